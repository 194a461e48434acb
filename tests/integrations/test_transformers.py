"""The Hugging Face Trainer with ``compute_loss_func=`` is the plain loop, for a small text classifier."""

import pytest
import torch
from same import assert_same
from torch import nn

from torch_molere import MetaReweighter

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")

STEPS = 18


class Texts(torch.utils.data.Dataset):
    """48 token sequences of one length with padding; the label is whether token 5 occurs."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 20, (48, 10), generator=generator)
        self.lengths = torch.randint(4, 11, (48,), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, row):
        mask = torch.arange(10) < self.lengths[row]
        ids = torch.where(mask, self.ids[row], 0)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": int((ids == 5).any())}


def classifier():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=10,
        num_labels=2,
        hidden_dropout_prob=0.1,
    )
    return transformers.BertForSequenceClassification(config)


def reweighting(model, optimizer):
    return MetaReweighter(model, optimizer, warmup_steps=3, every=2, val_fraction=0.2)


class Keep(transformers.TrainerCallback):
    """Writes and reads the reweighter's state beside the Trainer's own checkpoints."""

    def __init__(self, reweighter, resume_from=None):
        self.reweighter = reweighter
        self.resume_from = resume_from

    def on_save(self, args, state, control, **_):
        torch.save(self.reweighter.state_dict(), f"{args.output_dir}/checkpoint-{state.global_step}/reweighter.pt")

    def on_train_begin(self, args, state, control, **_):
        if self.resume_from is not None:
            self.reweighter.load_state_dict(torch.load(f"{self.resume_from}/reweighter.pt", weights_only=True))


def trainer(tmp_path, accumulate=1, resume_from=None, seen=None, **options):
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reweighter = reweighting(model, optimizer)

    def compute_loss(outputs, labels, num_items_in_batch=None):
        if seen is not None and torch.is_grad_enabled():
            seen[-1]["labels"] = labels
        return reweighter.loss(outputs, labels) / accumulate

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=3,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **({"save_strategy": "no"} | options),
    )
    return (
        transformers.Trainer(
            model,
            arguments,
            train_dataset=Texts(),
            eval_dataset=Texts(),
            optimizers=(optimizer, None),
            compute_loss_func=compute_loss,
            callbacks=[Keep(reweighter, resume_from)],
        ),
        reweighter,
    )


def plain(seen, accumulate, precision):
    """The same batches, each from the same random state, in a loop of one's own."""
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reweighter = reweighting(model, optimizer)
    for number, batch in enumerate(seen):
        torch.set_rng_state(batch["random state"])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        outputs.logits = outputs.logits.float()
        (reweighter.loss(outputs, batch["labels"]) / accumulate).backward()
        if (number + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model, reweighter


@pytest.mark.parametrize(("accumulate", "precision"), [(1, False), (2, False), (1, True)])
def test_train_is_the_plain_loop(tmp_path, accumulate, precision):
    seen = []
    trained, reweighter = trainer(tmp_path, accumulate, seen=seen, bf16=precision)

    def see(model, positional, named):
        if torch.is_grad_enabled() and model.training and reweighter._observing:
            seen.append({**named, "random state": torch.get_rng_state()})

    trained.model.register_forward_pre_hook(see, with_kwargs=True)
    trained.train()
    assert len(seen) == STEPS
    model, same = plain(seen, accumulate, precision)
    assert_same(trained.model.state_dict(), model.state_dict())
    assert_same(reweighter.weighting.state_dict(), same.weighting.state_dict())
    assert_same(reweighter.splitter.state_dict(), same.splitter.state_dict())
    assert reweighter.steps == STEPS // accumulate
    assert reweighter.engine == same.engine == "finite"
    mean = trained.evaluate()["eval_loss"]  # without gradients: the plain mean, and no step
    with torch.no_grad():
        texts = [Texts()[row] for row in range(48)]
        inputs = {name: torch.stack([text[name] for text in texts]) for name in ("input_ids", "attention_mask")}
        logits = trained.model.eval()(**inputs).logits
    exact = nn.functional.cross_entropy(logits.float(), torch.tensor([text["labels"] for text in texts])) / accumulate
    assert mean == pytest.approx(float(exact), rel=1e-2 if precision else 1e-5)
    assert reweighter.steps == STEPS // accumulate


def test_resuming_is_never_having_stopped(tmp_path):
    whole, reweighter = trainer(tmp_path, save_strategy="steps", save_steps=12)
    whole.train()
    again, resumed = trainer(tmp_path, resume_from=f"{tmp_path}/checkpoint-12")
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-12")
    assert_same(again.model.state_dict(), whole.model.state_dict())
    assert_same(resumed.state_dict(), reweighter.state_dict())
    assert resumed.steps == STEPS
