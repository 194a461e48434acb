"""A fixed validation set is cycled, in the loader's own order, without touching the global random stream."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from torch_molere.validation import FixedValidation

CPU = torch.device("cpu")


def draws(validation, count):
    return [validation.draw()[1].tolist() for _ in range(count)]


def test_a_list_is_cycled_in_order():
    validation = FixedValidation([(torch.ones(1, 2), torch.tensor([i])) for i in range(3)], CPU)
    assert draws(validation, 7) == [[0], [1], [2], [0], [1], [2], [0]]


def test_every_pass_of_a_shuffling_loader_is_whole_and_another_order():
    loader = DataLoader(TensorDataset(torch.randn(10, 2), torch.arange(10)), batch_size=5, shuffle=True)
    torch.manual_seed(0)
    random = torch.get_rng_state()
    found = draws(FixedValidation(loader, CPU, seed=1), 6)
    assert torch.equal(torch.get_rng_state(), random)
    passes = [found[i] + found[i + 1] for i in (0, 2, 4)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    torch.manual_seed(99)
    assert draws(FixedValidation(loader, CPU, seed=1), 6) == found
    assert draws(FixedValidation(loader, CPU, seed=2), 6) != found


def test_a_pass_is_taken_up_in_the_middle():
    class Noisy(TensorDataset):  # augmentation draws from the global stream
        def __getitem__(self, row):
            x, y = super().__getitem__(row)
            return x + torch.rand(()), y

    loader = DataLoader(Noisy(torch.zeros(10, 1), torch.arange(10)), batch_size=3, shuffle=True)
    whole, half = FixedValidation(loader, CPU), FixedValidation(loader, CPU)
    for _ in range(6):
        whole.draw()
        half.draw()
    resumed = FixedValidation(loader, CPU)
    resumed.load_state_dict(half.state_dict())
    for _ in range(6):
        ((a,), _), y = whole.draw()
        ((b,), _), z = resumed.draw()
        assert torch.equal(a, b)
        assert torch.equal(y, z)


def test_batches_with_indices_and_dicts():
    validation = FixedValidation([({"a": torch.ones(2)}, torch.zeros(2), torch.arange(2))], CPU)
    (positional, named), targets = validation.draw()
    assert positional == ()
    assert set(named) == {"a"}
    assert targets.shape == (2,)
