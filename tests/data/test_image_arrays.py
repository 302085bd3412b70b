"""Arrays, tensors and numpy files: layouts, ranges and labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mgebm_fast.data import load
from mgebm_fast.errors import DataError


@pytest.fixture
def colour(rng) -> np.ndarray:
    return rng.integers(0, 256, (20, 8, 8, 3), np.uint8)


def load_all(source, size=8, channels=3, **options):
    return load(source, size=size, channels=channels, split="all", **options)


def test_layouts(colour):
    planes = colour.transpose(0, 3, 1, 2)
    for source in (colour, planes, torch.from_numpy(colour), torch.from_numpy(planes.copy())):
        np.testing.assert_array_equal(load_all(source).images, planes)
    grey = colour[..., 0]
    for source in (grey, grey[..., None], grey[:, None]):
        np.testing.assert_array_equal(load_all(source, channels=1).images[:, 0], grey)
        assert (load_all(source).images == grey[:, None]).all()


def test_both_layouts_possible(rng):
    twice = rng.integers(0, 256, (5, 3, 8, 3), np.uint8)
    with pytest.raises(DataError, match="channels-first or -last"):
        load_all(twice)
    assert load_all(torch.from_numpy(twice)).images.shape == (5, 3, 8, 8)


@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 8, 4), (5, 2, 8, 8), (0, 8, 8), (5, 8, 8, 8, 3), (5, 0, 8, 3)])
def test_wrong_shapes(shape):
    with pytest.raises(DataError, match="load: ndarray must"):
        load_all(np.zeros(shape, np.uint8))


def test_wrong_channels(colour):
    with pytest.raises(DataError, match="has 3 channels, which cannot become channels=2"):
        load_all(colour, channels=2)


def test_other_channel_counts_are_kept(rng):
    bands = rng.integers(0, 256, (6, 5, 8, 8), np.uint8)
    np.testing.assert_array_equal(load_all(bands, channels=5).images, bands)
    means = bands.reshape(6, 5, 4, 2, 4, 2).astype(float).mean(axis=(3, 5))
    np.testing.assert_array_equal(load_all(bands, size=4, channels=5).images, np.floor(means + 0.5))


def test_numbers_of_every_kind(colour):
    planes = colour.transpose(0, 3, 1, 2)
    for dtype in (np.int16, np.uint16, np.int64, np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(load_all(colour.astype(dtype)).images, planes)
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(load_all((colour / 255).astype(dtype)).images, planes)
    np.testing.assert_array_equal(load_all(torch.from_numpy(colour).bfloat16() * 0 + 1).images, 255)
    np.testing.assert_array_equal(load_all(colour > 100).images, np.where(planes > 100, 255, 0))


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 1.01), (0, 16), (0, 63.9), (0, 255.5), (-0.001, 200)])
def test_floats_of_an_unclear_range_are_refused(low, high):
    array = np.linspace(low, high, 2 * 8 * 8).reshape(2, 8, 8)
    with pytest.raises(DataError, match="float pixels of ndarray must be in"):
        load_all(array, channels=1)


def test_integers_out_of_range_are_refused():
    for value in (-1, 256):
        with pytest.raises(DataError, match="integer pixels of ndarray must be in 0 … 255"):
            load_all(np.full((2, 8, 8), value, np.int32), channels=1)
    with pytest.raises(DataError, match="dtype complex128"):
        load_all(np.zeros((2, 8, 8), complex), channels=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_are_counted_and_located(bad, colour, monkeypatch):
    monkeypatch.setattr("mgebm_fast.data.arrays.CHUNK_BYTES", 3 * 8 * 8 * 3 * 4)  # found in the second chunk of several
    array = (colour / 255).astype(np.float32)
    array[4, 2, 7, 1] = array[11, 0, 0, 0] = array[4, 3, 0, 0] = bad
    with pytest.raises(DataError, match=r"must be finite, got 3 that are not, the first at index \(4, 2, 7, 1\)"):
        load_all(array)
    with pytest.raises(DataError, match="must be finite"):  # in the part that the split leaves out, too
        load(array, size=8, channels=3, split="held_out")


def test_resize_of_arrays_is_that_of_files(colour, write_folder, encode):
    folder = write_folder({f"{i}.png": encode(image) for i, image in enumerate(colour)})
    for size, channels in ((4, 3), (5, 3), (12, 1), (2, 1)):
        files, array = (load_all(source, size=size, channels=channels).images for source in (folder, colour))
        np.testing.assert_array_equal(files, array)


def test_npy(colour, tmp_path):
    np.save(tmp_path / "x.npy", colour)
    data = load_all(tmp_path / "x.npy")
    np.testing.assert_array_equal(data.images, colour.transpose(0, 3, 1, 2))
    assert data.labels is None and data.name == "x.npy"
    with pytest.raises(DataError, match="classes=.* cannot be chosen from x.npy: it has no labels"):
        load_all(tmp_path / "x.npy", classes=["cat"])


@pytest.mark.parametrize("image_key", ["images", "x", "arr_0", "anything"])
def test_npz_images(image_key, colour, tmp_path):
    np.savez(tmp_path / "x.npz", **{image_key: colour})
    assert len(load_all(tmp_path / "x.npz")) == 20


def test_npz_labels(colour, tmp_path):
    labels = np.arange(20) % 3
    np.savez(tmp_path / "a.npz", x=colour, y=labels)
    data = load_all(tmp_path / "a.npz", classes=[2, 0])
    assert data.class_names == ("2", "0")
    np.testing.assert_array_equal(data.labels, np.where(labels[labels != 1] == 2, 0, 1))
    np.testing.assert_array_equal(data.images, colour[labels != 1].transpose(0, 3, 1, 2))
    np.savez_compressed(tmp_path / "b.npz", images=colour, labels=labels, class_names=["red", "green", "blue"])
    assert load_all(tmp_path / "b.npz").class_names == ("red", "green", "blue")
    np.savez(tmp_path / "c.npz", images=colour, labels=np.array(["dog", "cat"] * 10))
    assert load_all(tmp_path / "c.npz", classes="dog").class_names == ("dog",)


def test_numpy_files_that_are_refused(colour, tmp_path):
    path = tmp_path / "x.npy"
    for content, reason in ((b"", "not an .npy file"), (b"nonsense", "not an .npy file")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            load_all(path)
    np.save(path, colour)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="x.npy cannot be read"):
        load_all(path)
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match="pickle.*never loaded"):
        load_all(path)
    path = tmp_path / "x.npz"
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="not an .npz file"):
        load_all(path)
    np.savez(path, images=np.array([{"a": 1}], object))
    with pytest.raises(DataError, match="images of .*pickle.*never loaded"):
        load_all(path)
    np.savez(path, first=colour, second=colour)
    with pytest.raises(DataError, match="images or x or arr_0, got first, second"):
        load_all(path)
    np.savez(path, images=colour, labels=np.arange(19))
    with pytest.raises(DataError, match=r"labels of x.npz must be \(20,\).*got \(19,\)"):
        load_all(path)


def test_images_with_labels(colour):
    for labels in (np.arange(20) % 2, torch.arange(20) % 2, [0, 1] * 10):
        data = load_all((torch.from_numpy(colour), labels))
        assert data.class_names == ("0", "1")
        np.testing.assert_array_equal(data.labels, [0, 1] * 10)


def test_batch_colours_and_subset(colour, monkeypatch):
    monkeypatch.setattr("mgebm_fast.data.image_data.CHUNK_BYTES", 1000)  # several chunks
    data = load_all((colour, np.arange(20) % 4))
    assert (len(data), data.size, data.channels) == (20, 8, 3)
    planes = torch.from_numpy(colour.transpose(0, 3, 1, 2).copy())
    for index in (torch.tensor([3, 0, 3]), np.array([3, 0, 3]), [3, 0, 3]):
        batch = data.batch(index)
        assert batch.dtype == torch.uint8 and batch.is_contiguous() and torch.equal(batch, planes[[3, 0, 3]])
    batch = data.batch(slice(2, 5))
    batch.zero_()  # a copy: the data stay
    assert torch.equal(data.batch(slice(None)), planes)
    assert data.batch([]).shape == (0, 3, 8, 8)
    with pytest.raises(IndexError):
        data.batch([20])
    with pytest.raises(TypeError, match="indices must be"):
        data.batch([0.5])
    colours = data.colours()
    assert colours.dtype == torch.float32
    torch.testing.assert_close(colours, planes.double().mean(dim=(2, 3)).float(), rtol=1e-7, atol=0)
    part = data.subset([5, 1])
    assert part.labels.tolist() == [1, 1] and torch.equal(part.batch([0, 1]), planes[[5, 1]])
    assert part.class_names == data.class_names
