"""The fixed split of sources that have none of their own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgebm_fast.data import load
from mgebm_fast.data.collection import held_out_mask


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 80), min_size=1, max_size=8))
def test_share_of_every_class(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    mask = held_out_mask(len(labels), labels)
    if max(counts) == 1:  # no class can be split, so all of them are one
        assert mask.sum() == (len(labels) > 1)
        return
    held = np.bincount(labels[mask], minlength=len(counts))
    expected = [0 if n == 1 else max(1, round(n / 10)) for n in counts]
    np.testing.assert_array_equal(held, expected)


def test_largest_part():
    assert held_out_mask(49_990, None).sum() == 4999
    assert held_out_mask(120_000, None).sum() == 5000
    assert held_out_mask(120_000, np.arange(120_000) % 10).sum() == 5000


def test_split_is_fixed():
    """These positions were drawn once: another permutation would mix what people trained on with what they hold out."""
    assert np.flatnonzero(held_out_mask(40, None)).tolist() == [12, 14, 21, 35]
    labels = np.arange(60) % 3
    assert np.flatnonzero(held_out_mask(60, labels)).tolist() == [2, 22, 36, 42, 43, 56]


def test_parts_are_disjoint_and_complete(rng):
    images = rng.integers(0, 256, (57, 8, 8, 3), np.uint8)
    labels = rng.integers(0, 3, 57)
    parts = {split: load((images, labels), size=8, channels=3, split=split) for split in ("train", "held_out", "all")}
    keys = {split: [image.tobytes() for image in part.images] for split, part in parts.items()}
    assert not set(keys["train"]) & set(keys["held_out"])
    assert sorted(keys["train"] + keys["held_out"]) == sorted(keys["all"])


def test_choosing_a_class_moves_no_image(rng):
    images = rng.integers(0, 256, (80, 8, 8), np.uint8)
    labels = rng.integers(0, 4, 80)
    for split in ("train", "held_out"):
        whole = load((images, labels), size=8, channels=1, split=split)
        one = load((images, labels), size=8, channels=1, split=split, classes=["2"])
        np.testing.assert_array_equal(one.images, whole.images[whole.labels == 2])


def test_unreadable_images_move_no_other(pictures, write_folder):
    folder = write_folder(pictures)
    before = load(folder, size=8, channels=3, split="held_out")
    train = load(folder, size=8, channels=3)
    (folder / "cat" / "cat0.png").write_bytes(b"")
    with pytest.warns(UserWarning):
        data = [load(folder, size=8, channels=3, split=split) for split in ("train", "held_out", "all")][:2]
    assert sum(len(part) for part in data) == len(train) + len(before) - 1
    held = {image.tobytes() for image in data[1].images}
    assert held <= {image.tobytes() for image in before.images}


def test_of_a_single_image_nothing_is_held_out():
    image = np.zeros((1, 8, 8), np.uint8)
    assert len(load(image, size=8, channels=1)) == 1
    assert load(image, size=8, channels=1, split="held_out").images.shape == (0, 1, 8, 8)
