"""Damaged files of every format: each is read, skipped or refused in one sentence; nothing else may come out.

The mutations are seeded: they flip bits, overwrite, cut, repeat and drop parts of a small valid file.
"""

from __future__ import annotations

import gzip
import io
import struct
import warnings
import wave

import numpy as np
import pytest
from helpers.archives import cifar_bytes, tar_bytes, zip_bytes
from helpers.cases import thorough

from mgebm_fast.data import load
from mgebm_fast.data.foreign import reason
from mgebm_fast.data.sound import load_sound
from mgebm_fast.data.video import load_video
from mgebm_fast.errors import DataError
from mgebm_fast.models.occlusions import read_mask

MUTATIONS = thorough(150, 500)  # a format


def numpy_bytes(array, save=np.save):
    file = io.BytesIO()
    save(file, array)
    return file.getvalue()


def wav_bytes():
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(np.arange(1, 101, dtype="<i2").tobytes())
    return file.getvalue()


@pytest.fixture
def samples(encode):
    """Format -> (file name, content, reader)."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 8, 8, 3), np.uint8)
    picture = {name: encode(pixels[0], name) for name in ("PNG", "JPEG", "GIF")}
    files = {f"{c}/{i}é.png": picture["PNG"] for c in ("cat", "dog") for i in range(1)}
    mask = rng.integers(0, 2, (8, 8)).astype(bool)
    idx = struct.pack(">4B3I", 0, 0, 8, 3, 2, 8, 8) + bytes(range(100, 228))

    def images(path):
        return load(path, size=8, channels=3, split="all")

    def folder(path):  # a single picture, in a folder
        return images(path.parent)

    def masked(path):
        return read_mask(path, 8)

    return {
        "npy": ("a.npy", numpy_bytes(pixels), images),
        "npz": ("a.npz", numpy_bytes(pixels, np.savez_compressed), images),
        "png": ("a.png", picture["PNG"], folder),
        "jpg": ("a.jpg", picture["JPEG"], folder),
        "gif": ("a.gif", picture["GIF"], folder),
        "zip": ("a.zip", zip_bytes(files), images),
        "tar": ("a.tar", tar_bytes(files), images),
        "tgz": ("a.tar.gz", tar_bytes(files, "w:gz"), images),
        "cifar": ("a.tar", tar_bytes(cifar_bytes()), images),
        "wav": ("a.wav", wav_bytes(), lambda path: load_sound(path, 10)),
        "npy sound": ("a.npy", numpy_bytes(np.arange(100.0)), lambda path: load_sound(path, 10)),
        "gif video": ("a.gif", encode(pixels[0], "GIF"), lambda path: load_video(path, (1, 8, 8), 3)),
        "npy video": ("a.npy", numpy_bytes(pixels), lambda path: load_video(path, (2, 8, 8), 3)),
        "npy mask": ("a.npy", numpy_bytes(mask), masked),
        "png mask": ("a.png", encode(mask.astype(np.uint8) * 255), masked),
        "idx": ("train-images-idx3-ubyte", idx, images),
        "idx.gz": ("train-images-idx3-ubyte.gz", gzip.compress(idx), images),
    }


def mutate(content, rng):
    out = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        if not out:
            break
        # headers decide more than pixels: half of the damage is near the beginning
        place = int(rng.integers(min(len(out), 160) if rng.integers(2) else len(out)))
        length = int(rng.integers(1, 9))
        kind = rng.integers(6)
        if kind == 0:
            out[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[place : place + length] = rng.bytes(length)
        elif kind == 2:
            del out[place : place + length]
        elif kind == 3:
            out[place:place] = out[place : place + length]
        elif kind == 4:
            out[place : place + length] = bytes([255 * int(rng.integers(2))]) * length
        else:
            del out[max(place, 1) :]
    return bytes(out)


@pytest.mark.parametrize(
    "name",
    "npy|npz|png|jpg|gif|zip|tar|tgz|cifar|wav|npy sound|gif video|npy video|npy mask|png mask|idx|idx.gz".split("|"),
)
def test_damage_is_one_sentence(name, samples, tmp_path):
    file, content, read = samples[name]
    path = tmp_path / "data" / file
    path.parent.mkdir()
    path.write_bytes(content)
    read(path)  # whole, it is read
    rng = np.random.default_rng(sum(name.encode()))
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of images that were skipped
        for _ in range(MUTATIONS):
            path.write_bytes(mutate(content, rng))
            try:
                read(path)
            except DataError as error:
                refused += 1
                words = str(error)
                assert "\n" not in words and len(words) < 1000 and (str(path.parent) in words or file in words)
    assert refused > MUTATIONS // 20


def test_a_reader_that_quotes_the_file_is_cut_short():
    assert len(reason(ValueError("quoted " * 1000))) < 250
