"""Datasets that say which row each item is, as people have them."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from torch_molere.data import with_indices

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(10) * 100


def tensors():
    return TensorDataset(X, Y)


class Counted(Dataset):
    """Fetches batches at once, and says so."""

    fetched = 0

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return X[index], Y[index]

    def __getitems__(self, indices):
        self.fetched += 1
        return [self[index] for index in indices]


class Words(Dataset):
    """Items as Hugging Face datasets have them."""

    features = ("input_ids", "label")

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"input_ids": X[index], "label": int(Y[index])}


class Endless(IterableDataset):
    def __iter__(self):
        yield X[0], Y[0]


class OneWay:
    def __getitem__(self, index):
        return X[index], Y[index]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("dataset", "rows"),
    [
        (tensors, range(10)),
        (Counted, range(10)),
        (lambda: [(x, y) for x, y in zip(X, Y, strict=True)], range(10)),
        (lambda: Subset(tensors(), [7, 2, 9]), [7, 2, 9]),
        (lambda: ConcatDataset([Subset(tensors(), [1, 3]), tensors()]), [1, 3, *range(10)]),
    ],
)
def test_a_shuffled_loader_says_which_rows_it_gives(dataset, rows, workers):
    if workers and dataset is not Counted:
        pytest.skip("one kind of dataset is enough to see that it goes to workers")
    indexed = with_indices(dataset())
    loader = DataLoader(indexed, batch_size=3, shuffle=True, num_workers=workers)
    met = []
    for inputs, targets, indices in loader:
        assert indices.dtype == torch.long
        original = torch.tensor([rows[index] for index in indices])
        assert torch.equal(inputs, X[original]) and torch.equal(targets, Y[original])
        met += indices.tolist()
    assert sorted(met) == list(range(len(rows))) == list(range(len(indexed)))


def test_a_subset_of_rows_that_have_their_indices_keeps_them():
    (_, _, indices), *_ = DataLoader(Subset(with_indices(tensors()), [7, 2, 9]), batch_size=3)
    assert indices.tolist() == [7, 2, 9]


def test_dicts_get_a_key():
    batch = next(iter(DataLoader(with_indices(Words()), batch_size=4)))
    assert torch.equal(batch["input_ids"], X[:4])
    assert batch["index"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="have a key 'index' already"):
        with_indices([{"index": 3}])[0]


def test_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()}).with_format("torch")
    indexed = with_indices(rows)
    assert indexed.column_names == ["x", "label"]
    for batch in DataLoader(indexed, batch_size=4, shuffle=True):
        assert torch.equal(batch["x"], X[batch["index"]]) and torch.equal(batch["label"], Y[batch["index"]])
    with pytest.raises(TypeError, match="got IterableDataset"):
        with_indices(rows.to_iterable_dataset())


def test_image_folder(tmp_path):
    folders, image = pytest.importorskip("torchvision.datasets"), pytest.importorskip("PIL.Image")
    for name, shades in (("cats", (10, 20)), ("dogs", (30,))):
        (tmp_path / name).mkdir()
        for shade in shades:
            image.new("L", (2, 2), shade).save(tmp_path / name / f"{shade}.png")
    indexed = with_indices(folders.ImageFolder(tmp_path))
    indexed.transform = lambda picture: picture.getpixel((0, 0))[0]  # goes to the folder itself
    assert list(indexed) == [(10, 0, 0), (20, 0, 1), (30, 1, 2)]
    assert indexed.classes == ["cats", "dogs"] and indexed.targets == [0, 0, 1]


def test_everything_else_is_the_dataset_s_own():
    dataset = Counted()
    indexed = with_indices(dataset)
    assert with_indices(indexed) is indexed
    assert indexed[torch.tensor(3)][2] == 3 and indexed[-1][2] == 9  # by its one index, however asked for
    indexed.__getitems__([1, 2])
    assert indexed.fetched == dataset.fetched == 1
    indexed.noted = True
    assert not hasattr(dataset, "noted") and indexed.noted
    for other in (copy.deepcopy(indexed), pickle.loads(pickle.dumps(indexed))):
        assert other[2][2] == 2 and other.fetched == 1
    with pytest.raises(AttributeError, match="lengths"):
        _ = indexed.lengths
    with pytest.raises(IndexError):
        indexed[10]
    with pytest.raises(TypeError):
        indexed["three"]
    assert repr(with_indices([1])) == "with_indices([1])"


@pytest.mark.parametrize("dataset", [Endless(), OneWay(), iter([(1, 2)]), None])
def test_what_has_no_rows_is_refused_with_the_remedy(dataset):
    with pytest.raises(TypeError, match=r"must be map-style, .* let it yield \(inputs, targets, index\) itself"):
        with_indices(dataset)


@pytest.mark.parametrize(
    ("item", "found"),
    [((1, 2, 3), "a tuple of 3"), ((1,), "a tuple of 1"), (torch.ones(2), "a Tensor"), ("ab", "a str")],
)
def test_other_items_are_refused(item, found):
    with pytest.raises(ValueError, match=f"must be \\(inputs, targets\\) or a dict, got {found}"):
        with_indices([item])[0]
