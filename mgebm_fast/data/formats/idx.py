"""Files of MNIST's own format (idx), plain or gzip: `train-images-idx3-ubyte.gz` and its like, alone or in a folder."""

from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..arrays import array_collection
from ..collection import Collection
from ..foreign import MAX_FILE_BYTES, check_regular, reading

_IMAGES = re.compile(r"(.*)-images[-.]idx3-ubyte(\.gz)?")


def images_of(files: Iterable[Path]) -> list[Path]:
    """The files of images among others, the training part first; a plain one before the same in gzip."""
    by_name = {match[1]: file for file in sorted(files, reverse=True) if (match := _IMAGES.fullmatch(file.name))}
    return [by_name[key] for key in sorted(by_name, key=lambda key: ("train" not in key, key))]


def collection(path: Path, files: list[Path], size: int, channels: int) -> Collection:
    """Files of images, with the labels that lie beside them; all but training is held out where there are several."""
    images = [_array(file, 3) for file in files]
    labels = []
    for file in files:
        beside = (file.with_name(re.sub("images([-.])idx3", r"labels\1idx1", file.name).removesuffix(".gz") + end)
                  for end in ("", ".gz"))  # fmt: skip
        labels += [_array(found, 1) for found in beside if found.is_file()][:1]
    training = np.repeat(["train" in file.name for file in files], [len(part) for part in images])
    made = array_collection(
        np.concatenate(images), path.name, size, channels,
        labels=np.concatenate(labels) if len(labels) == len(files) else None,
        held_out=~training if 0 < training.sum() < len(training) else None,
    )  # fmt: skip
    stems = [_IMAGES.sub(r"\1", file.name) for file in files]
    names = [f"{stem}/{i}" for stem, part in zip(stems, images, strict=True) for i in range(len(part))]
    return replace(made, names=names)


def _array(path: Path, dimensions: int) -> np.ndarray:
    """uint8 of so many dimensions. The file: 0, 0, 8 (uint8), how many dimensions, each in 4 bytes, and the values."""
    with reading(path, "an idx file"):
        check_regular(path, MAX_FILE_BYTES)
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES)
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
        if magic != 0x800 + dimensions:
            raise ValueError(f"it must hold uint8 of {dimensions} dimensions, got the head {magic:#010x}")
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        if values.size != np.prod(shape, dtype=object):
            raise ValueError(f"it must hold {' × '.join(map(str, shape))} values, got {values.size}")
        return values.reshape(shape)
