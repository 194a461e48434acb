"""The Hugging Face Trainer with its loss replaced is the plain loop, bit for bit, for a small text classifier."""

import pytest
import torch
from same import assert_same
from torch import nn

from torch_molere import MetaReweighter, ValidationBuffer, with_indices
from torch_molere.loggers import trainer_callback

transformers = pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

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
    return MetaReweighter(model, optimizer, validation=ValidationBuffer(fraction=0.2), warmup_steps=3, every=2)


class Reweighted(transformers.Trainer):
    """A Trainer whose loss is the reweighter's; its batches say which rows they are of."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, indices = inputs.pop("labels"), inputs.pop("index", None)
        outputs = model(**inputs)
        loss = self.reweighter.loss(outputs, labels, indices)
        return (loss, outputs) if return_outputs else loss


def trainer(tmp_path, accumulate=1, resume_from=None, short=False, **options):
    """``short``: by ``compute_loss_func``, without indices."""
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reweighter = reweighting(model, optimizer)

    def compute_loss(outputs, labels, num_items_in_batch=None):
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
        remove_unused_columns=short,
        seed=3,
        **({"save_strategy": "no"} | options),
    )
    made = (transformers.Trainer if short else Reweighted)(
        model,
        arguments,
        train_dataset=Texts() if short else with_indices(Texts()),
        eval_dataset=Texts(),
        optimizers=(optimizer, None),
        compute_loss_func=compute_loss if short else None,
        callbacks=[trainer_callback(reweighter, resume_from=resume_from)],
    )
    made.reweighter = reweighter
    return made, reweighter


def plain(seen, accumulate, precision):
    """The same batches, each from the same random state, in a loop of one's own."""
    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reweighter = reweighting(model, optimizer)
    for number, (inputs, labels, indices, random) in enumerate(seen):
        torch.set_rng_state(random)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            loss = reweighter.loss(model(**inputs), labels, indices)
        (loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model, reweighter


@pytest.mark.parametrize(
    ("accumulate", "precision", "short"), [(1, False, False), (2, False, False), (2, False, True), (1, True, False)]
)
def test_train_is_the_plain_loop(tmp_path, accumulate, precision, short, monkeypatch):
    trained, reweighter = trainer(tmp_path, accumulate, short=short, bf16=precision)
    seen, loss = [], reweighter.loss
    states = []
    trained.model.register_forward_pre_hook(
        lambda model, _, inputs: states.append((inputs, torch.get_rng_state())), with_kwargs=True
    )

    def see(outputs, labels, indices=None):
        inputs, random = states[-1]
        if torch.is_grad_enabled():
            seen.append((dict(inputs), labels, indices, random))
        return loss(outputs, labels, indices)

    monkeypatch.setattr(reweighter, "loss", see)
    trained.train()
    assert len(seen) == STEPS
    model, same = plain(seen, accumulate, precision)
    assert_same(trained.model.state_dict(), model.state_dict())
    assert_same(reweighter.state_dict(), same.state_dict())
    assert reweighter.steps == STEPS // accumulate
    assert reweighter.meta_updates > 0
    assert len(reweighter.history) == (0 if short else 48)
    assert reweighter.engine == same.engine in ("finite", "forward")

    mean = trained.evaluate()["eval_loss"]  # without gradients: the plain mean, and no step
    with torch.no_grad():
        texts = [Texts()[row] for row in range(48)]
        inputs = {name: torch.stack([text[name] for text in texts]) for name in ("input_ids", "attention_mask")}
        logits = trained.model.eval()(**inputs).logits
    exact = nn.functional.cross_entropy(logits.float(), torch.tensor([text["labels"] for text in texts]))
    assert mean * (accumulate if short else 1) == pytest.approx(float(exact), rel=1e-2 if precision else 1e-5)
    assert reweighter.steps == STEPS // accumulate


@pytest.mark.parametrize("moved", [False, True])
def test_resuming_is_never_having_stopped(tmp_path, moved):
    """From the Trainer's own checkpoint, in its folder or in another."""
    whole, reweighter = trainer(tmp_path, save_strategy="steps", save_steps=12)
    whole.train()
    place = tmp_path / "checkpoint-12"
    if moved:
        place = place.rename(tmp_path / "kept")
        with pytest.raises(FileNotFoundError, match=r"resume_from=\.\.\."):
            trainer(tmp_path)[0].train(resume_from_checkpoint=str(place))
    again, resumed = trainer(tmp_path, resume_from=place if moved else None)
    again.train(resume_from_checkpoint=str(place))
    assert_same(again.model.state_dict(), whole.model.state_dict())
    assert_same(resumed.state_dict(), reweighter.state_dict())
    assert resumed.steps == STEPS


def test_what_a_tokenizer_and_its_collator_return():
    """A ``BatchEncoding`` as inputs is a dict as inputs; unequal lengths are refused with the remedy, which works."""
    found = []
    for kind in (dict, transformers.BatchEncoding):
        model = classifier()
        reweighter = reweighting(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        for rows in torch.arange(48).split(8):
            texts = [Texts()[row] for row in rows.tolist()]
            inputs = kind(
                {name: torch.stack([text[name] for text in texts]) for name in ("input_ids", "attention_mask")}
            )
            labels = torch.tensor([text["labels"] for text in texts])
            reweighter.step((inputs, labels, rows))
        found.append((model.state_dict(), reweighter.state_dict()))
    assert_same(found[0][0], found[1][0])
    assert_same(found[0][1]["weighting"], found[1][1]["weighting"])
    assert len(reweighter.validation) > 2
    with pytest.raises(ValueError, match="pad"):
        reweighter.step((kind({name: inputs[name][:, :9] for name in inputs}), labels, rows))
    assert reweighter.steps == 6

    buffer = ValidationBuffer(padding={"input_ids": 0, "attention_mask": 0})
    reweighter = MetaReweighter(model, reweighter.optimizers[0], validation=buffer, warmup_steps=1, every=1)
    for length in (9, 8, 10, 7):
        reweighter.step((kind({name: inputs[name][:, :length] for name in inputs}), labels, rows))
    assert reweighter.meta_updates == 3
