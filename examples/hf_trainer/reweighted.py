"""Text classification with the Hugging Face Trainer and a loss of one's own, as people write it for class weights:
dynamic padding, batches of texts of one length, accumulation, a warm-up of the rate, evaluation, resuming."""

import argparse

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch_molere import MetaReweighter, ValidationBuffer, with_indices

WORDS = ["[PAD]", "[UNK]", "a", "bad", "big", "cat", "dog", "fast", "good", "is", "it", "not", "old", "ran", "the"]


class Trainer(transformers.Trainer):
    loss_is_scaled_for_ga = False  # a mean: the Trainer divides it where gradients are accumulated

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, indices = inputs.pop("labels"), inputs.pop("index", None)
        outputs = model(**inputs)
        loss = self.criterion(outputs.logits, labels, indices)
        return (loss, outputs) if return_outputs else loss


def tokenizer():
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def texts(count, tokenize, seed=0):
    """Made texts of 4 to 12 words: the class is whether "not" comes up."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    drawn = [torch.randint(2, len(WORDS), (length,), generator=generator).tolist() for length in lengths]
    made = [" ".join(WORDS[number] for number in numbers) for numbers in drawn]
    return [{**tokenize(text), "labels": int("not" in text.split())} for text in made]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="runs/hf")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    transformers.set_seed(0)
    tokenize = tokenizer()
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    criterion = MetaReweighter(model, optimizer, loss_fn=criterion, validation=ValidationBuffer(padding=0)).criterion
    train = with_indices(texts(args.rows, tokenize))
    arguments = transformers.TrainingArguments(
        args.out,
        per_device_train_batch_size=16,
        num_train_epochs=args.epochs,
        gradient_accumulation_steps=2,
        train_sampling_strategy="group_by_length",
        warmup_steps=4,
        save_strategy="epoch",
        eval_strategy="epoch",
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=transformers.DataCollatorWithPadding(tokenize),
        train_dataset=train,
        eval_dataset=texts(64, tokenize, seed=1),
        optimizers=(optimizer, None),
    )
    trainer.criterion = criterion
    trainer.train(resume_from_checkpoint=args.resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
