"""A fixed validation set is cycled in its own order, and no random stream of the loop is read or moved."""

import random

import numpy as np
import pytest
import torch
from same import assert_same
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torch_molere.validation import FixedValidation


def attached(batches, seed=0):
    validation = FixedValidation(batches)
    validation.attach(nn.Identity(), torch.device("cpu"), seed)
    return validation


def drawn(validation, count):
    found = []
    for _ in range(count):
        batch = validation.draw(8, 0)
        validation.commit([], batch, None)
        found.append(batch)
    return found


def targets(validation, count):
    return [batch.targets.tolist() for batch in drawn(validation, count)]


def streams():
    return torch.get_rng_state(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()


class Augmented(TensorDataset):
    """Draws from every global random stream."""

    def __getitem__(self, row):
        x, y = super().__getitem__(row)
        return x + torch.rand(()) + np.random.rand() + random.random(), y


def test_a_list_is_cycled_in_order():
    validation = attached([(torch.ones(1, 2), torch.tensor([i])) for i in range(3)])
    assert targets(validation, 7) == [[0], [1], [2], [0], [1], [2], [0]]


def test_every_pass_of_a_shuffling_loader_is_whole_and_of_another_order():
    loader = DataLoader(Augmented(torch.randn(10, 2), torch.arange(10)), batch_size=5, shuffle=True)
    before = streams()
    found = targets(attached(loader, 1), 6)
    assert_same(streams(), before)
    passes = [found[i] + found[i + 1] for i in (0, 2, 4)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert targets(attached(loader, 1), 6) == found
    assert targets(attached(loader, 2), 6) != found


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(3)])
def test_a_pass_is_taken_up_in_the_middle(workers, generator):
    data = Augmented(torch.zeros(10, 1), torch.arange(10))
    loader = DataLoader(data, batch_size=3, shuffle=True, num_workers=workers, generator=generator)
    whole, half = attached(loader), attached(loader)
    before = None if generator is None else generator.get_state()
    drawn(whole, 6), drawn(half, 6)
    half.draw(8, 0)  # not committed: it is drawn again
    resumed = attached(loader, seed=7)
    resumed.load_state_dict(half.state_dict())
    for a, b in zip(drawn(whole, 4), drawn(resumed, 4), strict=True):
        assert torch.equal(a.arguments[0][0], b.arguments[0][0])
        assert torch.equal(a.targets, b.targets)
    assert generator is None or torch.equal(generator.get_state(), before)


def test_a_batch_is_drawn_again_until_committed_and_never_edited():
    batches = [(torch.zeros(2, 1), torch.tensor([i, i])) for i in range(2)]
    validation = attached(batches)
    first = validation.draw(8, 0)
    state = validation.state_dict()
    first.arguments[0][0].add_(1)  # a model that edits its input in place
    again = validation.draw(8, 1)
    assert torch.equal(again.arguments[0][0], batches[0][0])
    assert torch.equal(batches[0][0], torch.zeros(2, 1))
    assert validation.state_dict() == state
    validation.commit([], None, None)  # a step without meta-update
    assert validation.draw(8, 2).targets.tolist() == [0, 0]
    validation.commit([], again, None)
    assert validation.draw(8, 3).targets.tolist() == [1, 1]


class Stream(IterableDataset):
    def __init__(self, length):
        self.length = length

    def __iter__(self):
        number = 0
        while self.length is None or number < self.length:
            yield torch.ones(2), torch.tensor(number)
            number += 1


def test_iterable_and_endless_data_sets():
    assert targets(attached(DataLoader(Stream(3), batch_size=2)), 5) == [[0, 1], [2], [0, 1], [2], [0, 1]]
    endless = attached(DataLoader(Stream(None), batch_size=2))
    assert targets(endless, 3) == [[0, 1], [2, 3], [4, 5]]
    resumed = attached(DataLoader(Stream(None), batch_size=2))
    resumed.load_state_dict(endless.state_dict())
    assert targets(resumed, 2) == targets(endless, 2) == [[6, 7], [8, 9]]


def test_indices_and_dictionaries():
    (batch,) = drawn(attached([({"a": torch.ones(2)}, torch.zeros(2), torch.arange(2))]), 1)
    positional, named = batch.arguments
    assert (positional, set(named), batch.slots) == ((), {"a"}, [])
    assert batch.targets.shape == (2,)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (3, TypeError, "must be an iterable of batches, got int"),
        (iter([1]), TypeError, "one-pass iterator list_iterator"),
        ([], ValueError, "is empty: it needs at least one batch"),
    ],
)
def test_what_is_no_validation_set_is_refused_at_once(batches, error, message):
    with pytest.raises(error, match=message):
        FixedValidation(batches)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (DataLoader(Stream(0)), "it yielded no batch"),
        ([torch.ones(2)], r"must yield \(inputs, targets\) or .* got Tensor"),
        ([(torch.ones(2),)], "got tuple of 1"),
    ],
)
def test_what_it_yields_is_checked(batches, message):
    with pytest.raises(ValueError, match=message):
        attached(batches).draw(8, 0)


def test_a_loader_that_fails_once_goes_on_where_it_was():
    class Failing(TensorDataset):
        failing = True

        def __getitem__(self, row):
            if row == 4 and self.failing:
                self.failing = False
                raise KeyboardInterrupt
            return super().__getitem__(row)

    validation = attached(DataLoader(Failing(torch.zeros(6, 1), torch.arange(6)), batch_size=2))
    assert targets(validation, 2) == [[0, 1], [2, 3]]
    with pytest.raises(KeyboardInterrupt):
        validation.draw(8, 0)
    assert targets(validation, 2) == [[4, 5], [0, 1]]


def test_one_reweighter_only_and_states_that_do_not_fit():
    validation = attached([(torch.ones(2), torch.ones(2))])
    with pytest.raises(ValueError, match="this FixedValidation is used by a reweighter already"):
        validation.attach(nn.Identity(), torch.device("cpu"), 0)
    state = validation.state_dict()
    for name in state:
        with pytest.raises(ValueError, match=f"the validation's {name} must be an integer"):
            validation.load_state_dict(state | {name: -1})
    assert validation.state_dict() == state
