"""Whether data are still those of before: what a fingerprint sees, and how an earlier division is kept."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from mgebm_fast.data import Clips, fingerprint, load
from mgebm_fast.data.fingerprint import difference
from mgebm_fast.errors import DataError


def read(folder, split="train", **options):
    return load(folder, size=8, channels=3, split=split, **options)


def kept(data):
    """Through a JSON file, as a run keeps it."""
    return json.loads(json.dumps(data.fingerprint()))


def test_images_carry_their_names(pictures, write_folder):
    folder = write_folder(pictures)
    data = read(folder, "all")
    assert set(data.names) == set(pictures) and data.names[2] == "cat/cat2.png"
    for i in (0, 5, 20):
        pixels = np.asarray(Image.open(folder / data.names[i]))
        assert np.array_equal(data.images[i].transpose(1, 2, 0), pixels)
    assert data.subset([3, 1]).names == ("cat/cat3.png", "cat/cat1.png")
    few = read(folder, "train", most=3, seed=1)
    assert len(few.names) == 3 and set(few.names) < set(read(folder).names)


def test_the_same_data_do_not_differ(pictures, write_folder, tmp_path):
    folder = write_folder(pictures)
    first = kept(read(folder))
    assert first["count"] == 22 and first["listed"] == 24 and len(first["held_out"]) == 2
    for cache in (False, True, True):  # the third reads what the second cached
        assert kept(read(folder, cache=cache)) == first
    folder.rename(tmp_path / "elsewhere")
    assert difference(first, kept(read(tmp_path / "elsewhere"))) == ""


def test_what_has_changed_is_said(pictures, write_folder, encode):
    folder = write_folder(pictures)
    before = kept(read(folder))
    assert "cat/cat0.png" in before["names"]
    (folder / "cat/cat0.png").write_bytes(encode(np.full((8, 8, 3), 99, np.uint8)))
    assert difference(before, kept(read(folder))) == "of 24 images 1 replaced (cat/cat0.png)"
    for i in range(4):
        write_folder({f"dog/new{i}.png": pictures["dog/dog1.png"]})
    (folder / "cat/cat3.png").unlink()
    said = difference(before, kept(read(folder)))
    assert re.fullmatch(
        r"of 24 images 4 added \((dog/new\d.png, ){3}…\), 1 removed \(cat/cat3.png\), 1 replaced \(cat/cat0.png\)", said
    )


def test_an_earlier_division_is_kept(pictures, write_folder):
    """Adding images redraws a class: a run that is measured then must not meet what it was trained on."""
    folder = write_folder(pictures)
    train, held_out = read(folder), read(folder, "held_out")
    for i in range(30):
        write_folder({f"cat/a{i}.png": pictures[f"dog/dog{i % 12}.png"]})
    assert set(read(folder, "held_out").names) & set(train.names)  # what a new division would do
    like = kept(train)
    assert read(folder, like=like).names == train.names
    assert read(folder, "held_out", like=like).names == held_out.names
    assert difference(like, kept(read(folder, like=like))) == ""
    with pytest.raises(DataError, match="none of them is named as one that was trained on"):
        read(write_folder({"x/1.png": pictures["cat/cat1.png"]}, "others"), like=like)


def test_arrays_by_place_and_content(rng):
    images = rng.integers(2, 256, (40, 8, 8), np.uint8)
    before = kept(load(images, size=8, channels=1))
    assert difference(before, kept(load(images.copy(), size=8, channels=1))) == ""
    images[3] += 1
    assert difference(before, kept(load(images, size=8, channels=1))) == "of 40 images 1 replaced (3)"
    assert difference(before, kept(load(images[:30], size=8, channels=1))).startswith("of 40 images 10 removed (30, 31")
    assert difference(before, kept(load(images, size=4, channels=1))) == "they are 1×4×4 each where they were 1×8×8"


def test_large_sets_keep_a_digest_alone(rng, monkeypatch):
    monkeypatch.setattr(fingerprint, "MOST", 39)
    images = rng.integers(2, 256, (40, 8, 8), np.uint8)
    before = kept(load(images, size=8, channels=1))
    assert len(json.dumps(before)) < 300
    assert difference(before, kept(load(images, size=8, channels=1))) == ""
    images[3] += 1
    assert difference(before, kept(load(images, size=8, channels=1))) == "names or pixels of some images differ"


def test_recordings():
    frames = np.random.default_rng(0).integers(0, 256, (3, 9, 4, 5), np.uint8)
    before = kept(Clips(frames, 4))
    assert difference(before, kept(Clips(frames.copy(), 4))) == ""
    frames[2, 8, 3, 4] ^= 1
    assert difference(before, kept(Clips(frames, 4))) == "the recording is another"
    assert "3×5×4×5 each" in difference(before, kept(Clips(frames, 5)))


def test_a_fingerprint_that_was_tampered_with_is_no_traceback(rng):
    now = load(rng.integers(2, 256, (20, 8, 8), np.uint8), size=8, channels=1).fingerprint()
    for key in ("kind", "shape", "names", "held_out", "content", "digest"):
        for value in (None, 7, "x", [1], {}):
            if key != "digest" or value:
                assert isinstance(difference({**now, "digest": "0", key: value}, now), str)


def test_what_is_printed_is_short(pictures, write_folder):
    assert repr(read(write_folder(pictures))) == "ImageData(images: 22 images 3 × 8 × 8, 2 classes)"
    assert len(repr(Clips(np.zeros((3, 9, 4, 5), np.uint8), 4))) < 100
