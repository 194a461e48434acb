"""Text classification with the Hugging Face Trainer and a loss of one's own, as people write it for class weights."""

import argparse

import torch
import transformers
from torch import nn
from torch_molere import MetaReweighter, with_indices


class Trainer(transformers.Trainer):
    loss_is_scaled_for_ga = False  # a mean: the Trainer divides it where gradients are accumulated

    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, indices = inputs.pop("labels"), inputs.pop("index", None)
        outputs = model(**inputs)
        loss = self.criterion(outputs.logits, labels, indices)
        return (loss, outputs) if return_outputs else loss


def texts(count, seed=0):
    """Made texts of word numbers: the class is whether word 5 comes up."""
    ids = torch.randint(3, 30, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": int((i == 5).any())} for i in ids]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="runs/hf")
    args = parser.parse_args(argv)
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train = with_indices(texts(args.rows))
    arguments = transformers.TrainingArguments(
        args.out,
        per_device_train_batch_size=16,
        num_train_epochs=args.epochs,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=texts(64, 1), optimizers=(optimizer, None))
    trainer.criterion = MetaReweighter(model, optimizer, loss_fn=Trainer.criterion).criterion
    trainer.train()
    print(trainer.evaluate())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
