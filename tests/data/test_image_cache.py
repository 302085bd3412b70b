"""Where decoded images are kept: memory, a mapped file, the cache."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from mgebm_fast.data import files as files_module
from mgebm_fast.data import load, store
from mgebm_fast.errors import DataError


@pytest.fixture
def folder(pictures, write_folder):
    return write_folder(pictures)


@pytest.fixture
def decodings(monkeypatch) -> list[int]:
    """One entry for each file that is decoded."""
    seen, decode = [], files_module.decode
    monkeypatch.setattr(files_module, "decode", lambda *a: seen.append(1) or decode(*a))
    return seen


def entries(cache_folder) -> list[str]:
    return sorted(p.name for p in cache_folder.iterdir()) if cache_folder.exists() else []


def test_small_sources_are_not_cached(folder, cache_folder):
    data = load(folder, size=8, channels=3)
    assert not isinstance(data.images, np.memmap) and not entries(cache_folder)


def test_second_load_comes_from_the_cache(folder, cache_folder, decodings):
    plain = load(folder, size=4, channels=3, cache=False)
    first, second = (load(folder, size=4, channels=3, cache=True) for _ in range(2))
    assert len(decodings) == 2 * len(plain) and len(entries(cache_folder)) == 1
    for data in (first, second):
        assert isinstance(data.images, np.memmap)
        np.testing.assert_array_equal(data.images, plain.images)
        np.testing.assert_array_equal(data.labels, plain.labels)
        assert data.class_names == plain.class_names
        assert data.batch([3, 1]).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("limit", ["files", "pixels"])
def test_large_sources_are_cached_unasked(limit, folder, cache_folder, monkeypatch, decodings):
    data = load(folder, size=8, channels=3, cache=False)
    pixels, files = data.images.nbytes, sum(p.stat().st_size for p in folder.rglob("*.png"))
    size = 1 if limit == "files" else 64
    assert files > 22 * 3 * 1 and files < 22 * 3 * 64 * 64 and pixels
    monkeypatch.setattr(store, *("SLOW_BYTES", files // 2) if limit == "files" else ("LARGE_BYTES", files))
    for _ in range(2):
        assert isinstance(load(folder, size=size, channels=3).images, np.memmap)
    assert len(decodings) == 2 * len(data) and len(entries(cache_folder)) == 1
    load(folder, size=size, channels=3, cache=False)
    assert len(decodings) == 3 * len(data)


def test_what_the_cache_is_keyed_by(folder, cache_folder, decodings):
    load(folder, size=4, channels=3, cache=True)
    count = len(decodings)
    variants = ({"size": 8}, {"channels": 1}, {"split": "held_out"}, {"classes": ["dog"]})
    for n, variant in enumerate(variants, 2):
        load(folder, **{"size": 4, "channels": 3, "cache": True, **variant})
        assert len(entries(cache_folder)) == n and len(decodings) > count
        count = len(decodings)
    changed = folder / "cat" / "cat1.png"
    os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 1_000_000))
    load(folder, size=4, channels=3, cache=True, split="all")
    load(folder, size=4, channels=3, cache=True)
    assert len(decodings) > count


def test_skipped_images_are_remembered(folder, decodings):
    (folder / "cat" / "cat3.png").write_bytes(b"")
    loaded = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="skipped 1 of 24"):
            loaded.append(load(folder, size=8, channels=3, split="all", cache=True))
    first, second = loaded
    assert len(decodings) == 24 and first.skipped == second.skipped == (("cat/cat3.png", "empty file"),)
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(second.images[:, 0, 0, 0], 100 * second.labels)
    with pytest.raises(DataError, match="cat/cat3.png"):
        load(folder, size=8, channels=3, split="all", cache=True, strict=True)


@pytest.mark.parametrize("damage", ["cut", "grown", "no index", "bad index"])
def test_damaged_entries_are_made_again(damage, folder, cache_folder, decodings):
    plain = load(folder, size=8, channels=3, cache=True).images.copy()
    (entry,) = cache_folder.iterdir()
    if damage == "cut":
        (entry / "images.bin").write_bytes(b"123")
    elif damage == "grown":
        with (entry / "images.bin").open("ab") as file:
            file.write(b"123")
    elif damage == "no index":
        (entry / "index.json").unlink()
    else:
        (entry / "index.json").write_text('{"shape": [')
    np.testing.assert_array_equal(load(folder, size=8, channels=3, cache=True).images, plain)
    assert len(decodings) == 2 * len(plain) and len(entries(cache_folder)) == 1
    load(folder, size=8, channels=3, cache=True)
    assert len(decodings) == 2 * len(plain)


def test_a_failed_write_leaves_nothing(folder, cache_folder, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write decoded images .*No space left.*MGEBM_CACHE"):
        load(folder, size=8, channels=3, cache=True)
    assert not entries(cache_folder)
    (folder / "cat" / "cat0.png").write_bytes(b"")
    (folder / "dog" / "dog0.png").write_bytes(b"")
    with pytest.raises(DataError):
        load(folder, size=8, channels=3, cache=True, split="all", strict=True)
    assert not entries(cache_folder)


def test_cache_folder_that_cannot_be_made(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MGEBM_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="MGEBM_CACHE"):
        load(folder, size=8, channels=3, cache=True)
    monkeypatch.setattr(store, "SLOW_BYTES", 1)
    with pytest.warns(RuntimeWarning, match="set MGEBM_CACHE to a folder with room.*not cached"):  # nobody asked for it
        unasked = load(folder, size=8, channels=3)
    monkeypatch.setenv("MGEBM_CACHE", "off")
    asked = load(folder, size=8, channels=3, cache=True)
    for data in (unasked, asked):
        assert not isinstance(data.images, np.memmap) and len(data) == 22


def test_an_error_of_the_source_is_not_one_of_the_cache(folder, cache_folder, monkeypatch):
    calls = []

    def broken(*arguments):
        calls.append(1)
        raise OSError(errno.EIO, os.strerror(errno.EIO), "disk of the pictures")

    monkeypatch.setattr(store, "SLOW_BYTES", 1)
    monkeypatch.setattr(store, "_reading", lambda batches, whole=store._reading: whole(broken() for _ in batches))
    with pytest.raises(OSError, match="disk of the pictures") as caught:
        load(folder, size=8, channels=3)
    assert not isinstance(caught.value, store.CacheError) and len(calls) == 1 and not entries(cache_folder)


def test_large_arrays_are_mapped_and_only_files_are_kept(rng, tmp_path, cache_folder, monkeypatch):
    images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    monkeypatch.setattr(store, "LARGE_BYTES", 1000)
    data = load(images, size=8, channels=3, split="all")
    assert isinstance(data.images, np.memmap) and not entries(cache_folder)  # the file has no name any more
    np.testing.assert_array_equal(data.images, images.transpose(0, 3, 1, 2))
    np.save(tmp_path / "x.npy", images)
    kept = load(tmp_path / "x.npy", size=8, channels=3, split="all")
    assert isinstance(kept.images, np.memmap) and len(entries(cache_folder)) == 1
    np.testing.assert_array_equal(kept.images, data.images)
    held_out = load(tmp_path / "x.npy", size=8, channels=3, split="held_out")
    assert len(held_out) == 4
