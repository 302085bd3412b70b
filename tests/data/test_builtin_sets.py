"""The image sets that come with the dependencies."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data as skimage_data
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mgebm_fast.data import load
from mgebm_fast.data.builtin import PHOTOGRAPHS
from mgebm_fast.errors import DataError


def test_digits():
    everything = load("digits", size=8, channels=1, split="all")
    digits = load_digits()
    assert everything.images.shape == (1797, 1, 8, 8)
    exact = digits.images * 255 / 16
    assert np.abs(everything.images[:, 0] - exact).max() <= 0.5
    assert set(np.unique(everything.images)) == {round(v * 255 / 16) for v in range(17)}
    np.testing.assert_array_equal(everything.labels, digits.target)
    assert everything.class_names == tuple("0123456789")


def test_split_of_digits():
    rows = np.arange(1797)
    train_rows, held_rows = train_test_split(rows, test_size=360, stratify=load_digits().target, random_state=0)
    everything, train, held_out = (
        load("digits", size=8, channels=1, split=split) for split in ("all", "train", "held_out")
    )
    assert len(train) == 1437 and len(held_out) == 360
    np.testing.assert_array_equal(train.images, everything.images[np.sort(train_rows)])
    np.testing.assert_array_equal(held_out.labels, everything.labels[np.sort(held_rows)])
    assert np.bincount(held_out.labels).min() >= 34
    threes = load("digits", size=8, channels=1, split="held_out", classes=[3])
    np.testing.assert_array_equal(threes.images, held_out.images[held_out.labels == 3])


def test_digits_at_other_sizes():
    eight = load("digits", size=8, channels=1)
    four = load("digits", size=4, channels=3)
    means = eight.images.reshape(-1, 4, 2, 4, 2).astype(float).mean(axis=(2, 4))
    np.testing.assert_array_equal(four.images[:, 0], np.floor(means + 0.5))
    assert (four.images == four.images[:, :1]).all()
    assert load("digits", size=16, channels=1, split="held_out").images.shape == (360, 1, 16, 16)


def test_lfw_is_the_faces():
    faces = load("lfw", size=25, channels=1, split="all")
    source = skimage_data.lfw_subset()[:100]
    np.testing.assert_array_equal(faces.images[:, 0], np.rint(source * 255))
    parts = [load("lfw", size=24, channels=1, split=split) for split in ("train", "held_out")]
    assert [part.images.shape for part in parts] == [(90, 1, 24, 24), (10, 1, 24, 24)]
    assert faces.labels is None


@pytest.mark.parametrize("texture", ["brick", "grass", "gravel"])
@pytest.mark.parametrize("size", [64, 130])
def test_textures(texture, size):
    image = getattr(skimage_data, texture)()
    edge = 512 - max(128, size)
    train, held_out, everything = (
        load(f"texture:{texture}", size=size, channels=1, split=split) for split in ("train", "held_out", "all")
    )
    assert len(train) > 100 and len(held_out) >= 20 and len(everything) == len(train) + len(held_out)
    np.testing.assert_array_equal(train.images[0, 0], image[:size, :size])
    np.testing.assert_array_equal(held_out.images[0, 0], image[edge : edge + size, :size])
    # disjoint regions: no training crop holds a row of the held-out part
    stride = max(4, size // 8)
    tops = range(0, edge - size + 1, stride)
    lefts = range(0, 512 - size + 1, stride)
    assert len(train) == len(tops) * len(lefts) and tops[-1] + size <= edge
    np.testing.assert_array_equal(train.images[-1, 0], image[tops[-1] :, lefts[-1] :][:size, :size])


def test_a_reduced_texture():
    train, held_out = (load("texture:brick/4", size=48, channels=1, split=split) for split in ("train", "held_out"))
    small = skimage_data.brick().reshape(128, 4, 128, 4).mean((1, 3))
    assert train.name == "texture:brick/4" and len(train) == 6 * 14
    assert np.abs(train.images[0, 0] - small[:48, :48]).max() <= 0.5
    assert np.abs(held_out.images[0, 0] - small[80:, :48]).max() <= 0.5
    for wrong in ("texture:brick/3", "texture:brick/"):
        with pytest.raises(DataError, match=f"a texture must be reduced by one of 2, 4, 8, got '{wrong}'"):
            load(wrong, size=16, channels=1)


def test_photos():
    train, held_out = (load("photos", size=64, channels=3, split=split) for split in ("train", "held_out"))
    assert train.images.shape[1:] == (3, 64, 64) and len(train) > 2000 and len(held_out) > 300
    astronaut = getattr(skimage_data, PHOTOGRAPHS[0])()
    np.testing.assert_array_equal(train.images[0], astronaut[:64, :64].transpose(2, 0, 1))
    np.testing.assert_array_equal(held_out.images[0], astronaut[:64, 384:448].transpose(2, 0, 1))
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in held_out.images)
    grey = load("photos", size=16, channels=1, split="held_out")
    assert grey.images.shape[1:] == (1, 16, 16) and len(grey) > len(held_out)


def test_a_set_is_the_same_each_time():
    first, second = (load("texture:grass", size=32, channels=3, split="held_out") for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)


def test_errors():
    with pytest.raises(DataError, match=r"brick, grass, gravel, got 'gras' \(did you mean 'grass'\?\)"):
        load("texture:gras", size=16, channels=1)
    with pytest.raises(DataError, match="size 1 … 256, got 257"):
        load("texture:brick", size=257, channels=1)
    with pytest.raises(DataError, match="got size 500"):
        load("photos", size=500, channels=3)
    with pytest.raises(DataError, match="channels must be 1"):
        load("digits", size=8, channels=2)
    with pytest.raises(DataError, match="photos: it has no labels"):
        load("photos", size=16, channels=3, classes=["chelsea"])
    with pytest.raises(DataError, match="0, 1, .*, got '10'"):
        load("digits", size=8, channels=1, classes=["10"])
