"""torch Datasets, sequences of images, and torchvision by name."""

from __future__ import annotations

import gzip
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from mgebm_fast.data import load
from mgebm_fast.errors import DataError


class Made(Dataset):
    """Items of a chosen form over known pixels; counts how often each was asked for."""

    def __init__(self, pixels, item, **attributes):
        self.pixels, self.item, self.asked = pixels, item, []
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.item(self.pixels[i], i)


@pytest.fixture
def pixels(rng) -> np.ndarray:
    return rng.integers(0, 256, (20, 8, 8, 3), np.uint8)


def to_tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


FORMS = {
    "picture": lambda image, i: Image.fromarray(image),
    "array": lambda image, i: image,
    "planes": lambda image, i: image.transpose(2, 0, 1),
    "tensor": lambda image, i: to_tensor(image),
    "pair": lambda image, i: (Image.fromarray(image), i % 2),
    "tensor pair": lambda image, i: (to_tensor(image), torch.tensor(i % 2)),
    "text label": lambda image, i: [to_tensor(image), "odd" if i % 2 else "even"],
    "dict": lambda image, i: {"image": Image.fromarray(image), "label": i % 2, "id": i},
}


@pytest.mark.parametrize("form", FORMS)
def test_items_of_every_form(form, pixels):
    data = load(Made(pixels, FORMS[form]), size=8, channels=3, split="all")
    np.testing.assert_array_equal(data.images, pixels.transpose(0, 3, 1, 2))
    if form in ("picture", "array", "planes", "tensor"):
        assert data.labels is None
    else:
        np.testing.assert_array_equal(data.labels, np.arange(20) % 2)
        assert data.class_names == (("even", "odd") if form == "text label" else ("0", "1"))


def test_grey_items(pixels):
    grey = pixels[..., 0]
    for item in (lambda image, i: image, lambda image, i: torch.from_numpy(image)[None]):
        data = load(Made(grey, item), size=4, channels=1, split="all")
        np.testing.assert_array_equal(data.images, load(grey, size=4, channels=1, split="all").images)


def test_sequences_and_tensor_datasets(pixels):
    planes = pixels.transpose(0, 3, 1, 2)
    data = load([Image.fromarray(image) for image in pixels], size=8, channels=3, split="all")
    np.testing.assert_array_equal(data.images, planes)
    tensors = TensorDataset(torch.from_numpy(planes.copy()), torch.arange(20) % 4)
    data = load(tensors, size=8, channels=3, split="all", classes=["3"])
    np.testing.assert_array_equal(data.images, planes[3::4])


def test_stated_labels_spare_the_decoding_of_other_classes(pixels):
    targets = [i % 4 for i in range(20)]
    inner = Made(pixels, FORMS["pair"], targets=targets, classes=["a", "b", "c", "d"])
    halves = ConcatDataset([Subset(inner, range(10)), Subset(inner, range(10, 20))])
    for source in (inner, Subset(inner, list(range(20))), Subset(halves, range(20))):
        inner.asked.clear()
        data = load(source, size=8, channels=3, classes=["c"], split="all")
        assert data.class_names == ("c",) and inner.asked == list(range(2, 20, 4))
    few = load(Subset(inner, [1, 5, 9, 3]), size=8, channels=3, split="all")
    assert few.class_names == ("b", "d") and few.labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (lambda image, i: to_tensor(image) * 2 - 1, r"item 0 of Made must be in \[0, 1\]; got -"),
        (lambda image, i: to_tensor(image) * 255, r"must be in \[0, 1\]; got 0"),
        (lambda image, i: to_tensor(image) * float("nan"), "item 0 of Made must be finite, got 192"),
        (lambda image, i: "a.png", "item 0 of Made must be a picture.* got str"),
        (lambda image, i: image[None], r"got ndarray of shape \(1, 8, 8, 3\)"),
        (lambda image, i: np.zeros((8, 8, 5), np.uint8), "must have 1, 3 channels"),
        (lambda image, i: {"pixels": image}, "must have an image under one of"),
        (lambda image, i: (), "empty tuple"),
    ],
)
def test_items_that_are_refused(item, message, pixels):
    with pytest.raises(DataError, match=message):
        load(Made(pixels, item), size=8, channels=3)


def test_one_item_out_of_range_refuses_the_whole(pixels):
    """Items of a dataset that was normalised may lie in [0, 1] by chance: leaving the others out would be silent."""
    item = lambda image, i: to_tensor(image) * (2 if i == 13 else 1)  # noqa: E731
    with pytest.raises(DataError, match=r"^load: float pixels of item 13 of Made must be in \[0, 1\]"):
        load(Made(pixels, item), size=8, channels=3, split="all")


def test_broken_items_are_skipped(pixels):
    def item(image, i):
        if i in (0, 7):
            raise OSError(f"disk error {i}")
        return Image.fromarray(image), i % 2

    with pytest.warns(UserWarning, match="skipped 2 of 20 images; the first, item 0 of Made: disk error 0"):
        data = load(Made(pixels, item), size=8, channels=3, split="all")
    kept = [i for i in range(20) if i not in (0, 7)]
    assert data.labels.tolist() == [i % 2 for i in kept]
    np.testing.assert_array_equal(data.images, pixels[kept].transpose(0, 3, 1, 2))
    with pytest.raises(DataError, match="item 0 of Made cannot be used: disk error 0"):
        load(Made(pixels, item), size=8, channels=3, split="all", strict=True)


def test_sources_that_are_no_dataset(pixels):
    with pytest.raises(DataError, match="list is empty"):
        load([], size=8, channels=3)
    with pytest.raises(TypeError, match="source must be"):
        load((image for image in pixels), size=8, channels=3)
    with pytest.raises(DataError, match="classes=.* its items have no labels"):
        load(Made(pixels, FORMS["array"]), size=8, channels=3, classes=["cat"])


def write_mnist(root, rng):
    """Two files a part, in MNIST's own format (idx): 40 training images, 10 for testing."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    made = {}
    for part, n in (("train", 40), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
            with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(head + array.tobytes())
        made[part] = images
    return made


@pytest.fixture
def torchvision():
    try:
        import torchvision
    except Exception as error:  # absent, or built for another torch, which raises RuntimeError
        pytest.skip(f"torchvision cannot be imported: {error}")
    return torchvision


def test_torchvision_by_name(tmp_path, rng, torchvision):
    made = write_mnist(tmp_path, rng)
    train = load(f"torchvision:MNIST:{tmp_path}", size=28, channels=1)
    held_out = load("torchvision:MNIST", size=28, channels=1, split="held_out", root=tmp_path)
    np.testing.assert_array_equal(train.images[:, 0], made["train"])
    np.testing.assert_array_equal(held_out.images[:, 0], made["t10k"])  # its own test part
    assert len(load(f"torchvision:MNIST:{tmp_path}", size=7, channels=1, split="all")) == 50
    assert train.class_names[3] == "3 - three" and train.labels.tolist() == [i % 10 for i in range(40)]


def test_torchvision_errors(tmp_path, torchvision):
    with pytest.raises(DataError, match=r"no set 'CIFAR' \(did you mean 'CIFAR10'\?\)"):
        load("torchvision:CIFAR", size=8, channels=3)
    with pytest.raises(DataError, match=r"CIFAR10 cannot be read below .*not found.*download=True"):
        load("torchvision:CIFAR10", size=8, channels=3, root=tmp_path)
    assert not list(tmp_path.iterdir())  # nothing was downloaded or begun
    with pytest.raises(DataError, match="EMNIST .*pass the Dataset itself"):
        load("torchvision:EMNIST", size=8, channels=1, root=tmp_path)


def test_torchvision_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match="needs torchvision"):
        load("torchvision:CIFAR10", size=8, channels=3)


@pytest.fixture
def stand_in(monkeypatch, pixels):
    """A module in torchvision's place, with the kinds of constructors that its sets have."""

    class Trained(Made):
        def __init__(self, root, train=True, transform=None, download=False):
            if root == "nowhere" and not download:
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            part = slice(0, 15) if train else slice(15, 20)
            super().__init__(pixels[part], FORMS["picture"], targets=[0] * len(pixels[part]))

    class Parted(Made):
        def __init__(self, root, split="train", transform=None):
            if split not in ("train", "val"):
                raise ValueError(f"Unknown value {split!r} for argument split")
            super().__init__(pixels[:15] if split == "train" else pixels[15:], FORMS["pair"])

    class Whole(Made):
        def __init__(self, size=20):
            super().__init__(pixels[:size], FORMS["pair"])

    class Demanding(Made):
        def __init__(self, root, split, kind):
            super().__init__(pixels, FORMS["pair"])

    module = types.ModuleType("torchvision.datasets")
    sets = {made.__name__: made for made in (Trained, Parted, Whole, Demanding)}
    module.__dict__.update(sets, __all__=tuple(sets))
    package = types.ModuleType("torchvision")
    package.datasets = module
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


@pytest.mark.parametrize(("name", "own"), [("Trained", True), ("Parted", True), ("Whole", False)])
def test_parts_of_a_named_set(name, own, pixels, stand_in):
    train, held_out = (load(f"torchvision:{name}", size=8, channels=3, split=s) for s in ("train", "held_out"))
    planes = pixels.transpose(0, 3, 1, 2)
    if own:
        np.testing.assert_array_equal(train.images, planes[:15])
        np.testing.assert_array_equal(held_out.images, planes[15:])
    else:
        assert (len(train), len(held_out)) == (18, 2)
    assert train.name == name


def test_named_sets_that_cannot_be_made(stand_in):
    with pytest.raises(DataError, match=r"Trained cannot be read below nowhere: .*download=True"):
        load("torchvision:Trained:nowhere", size=8, channels=3)
    assert len(load("torchvision:Trained:nowhere", size=8, channels=3, download=True)) == 15
    with pytest.raises(DataError, match="Demanding takes more than a root"):
        load("torchvision:Demanding", size=8, channels=3)
    with pytest.raises(DataError, match=r"no set 'Train' \(did you mean 'Trained'\?\)"):
        load("torchvision:Train", size=8, channels=3)
