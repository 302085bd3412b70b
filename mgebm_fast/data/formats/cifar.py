"""CIFAR-10 and CIFAR-100 as their authors give them: the Python archive (pickles) and the binary one.

A pickle can call any function. This reader calls none: the few names that those pickles hold stand for small classes
of this module, which only keep the bytes of an array, and any other name is refused.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays import array_collection
from ..collection import Collection
from ..foreign import reading

_SIDE = 32
_PIXELS = 3 * _SIDE**2
# training part, test part, names of the classes, and the bytes before a label in a binary record: the first of the two
# labels of CIFAR-100 is coarse
_SETS = (
    (r"data_batch_\d", r"test_batch", r"batches\.meta", 0),
    (r"data_batch_\d\.bin", r"test_batch\.bin", r"batches\.meta\.txt", 0),
    (r"train", r"test", r"meta", 1),
    (r"train\.bin", r"test\.bin", r"fine_label_names\.txt", 1),
)


class Batches(NamedTuple):
    train: list[str]
    test: list[str]
    classes: str
    coarse: int


def batches_of(paths: Iterable[str]) -> Batches | None:
    """The files of a CIFAR set among the paths of an archive or a folder; None where they are none."""
    files = {path.rsplit("/", 1)[-1]: path for path in sorted(paths) if path.count("/") <= 2}
    for *patterns, coarse in _SETS:
        train, test, classes = ([files[n] for n in files if re.fullmatch(p, n)] for p in patterns)  # type: ignore
        if train and test and classes:
            return Batches(train, test, classes[0], coarse)
    return None


def collection(path: Path, batches: Batches, read: Callable[[str], bytes], size: int, channels: int) -> Collection:
    """The set, its own test part held out; `read` gives what a file holds. An image is named as in its batch."""
    images, labels, names, held_out = [], [], [], []
    with reading(path, "CIFAR-10 or CIFAR-100"):
        for file in (*batches.train, *batches.test):
            name = file.rsplit("/", 1)[-1]
            pixels, marks, titles = (_binary if name.endswith(".bin") else _pickled)(read(file), batches.coarse)
            if pixels.ndim != 2 or pixels.shape[1] != _PIXELS or len(marks) != len(pixels):
                raise ValueError(f"{name} must hold (N, {_PIXELS}) bytes and N labels, got {pixels.shape}")
            images.append(pixels)
            labels += marks
            names += [f"{name}/{title}" for title in titles or range(len(pixels))]
            held_out += [file in batches.test] * len(pixels)
        content = read(batches.classes)
        classes = content.decode().split() if batches.classes.endswith(".txt") else _names_of_classes(content)
        if not all(isinstance(label, int) and 0 <= label < len(classes) for label in labels):
            raise ValueError(f"labels must be in 0 … {len(classes) - 1}, one for each class")
    pixels = np.concatenate(images).reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    made = array_collection(
        pixels, path.name, size, channels, labels=np.array(labels), class_names=classes, held_out=np.array(held_out)
    )
    return replace(made, names=names)


def _binary(content: bytes, coarse: int) -> tuple[np.ndarray, list[int], list[str]]:
    """Records of one label (two in CIFAR-100) and 3,072 bytes, planes of red, green and blue."""
    records = np.frombuffer(content, np.uint8).reshape(-1, coarse + 1 + _PIXELS)
    return records[:, coarse + 1 :], records[:, coarse].tolist(), []


def _pickled(content: bytes, coarse: int) -> tuple[np.ndarray, list[int], list[str]]:
    batch = _unpickled(content)
    titles = [_text(title) for title in batch.get("filenames", ())]
    pixels = batch["data"].array()
    return pixels, list(batch["fine_labels" if coarse else "labels"]), titles if len(titles) == len(pixels) else []


def _names_of_classes(content: bytes) -> list[str]:
    meta = _unpickled(content)
    return [_text(name) for name in meta.get("label_names") or meta["fine_label_names"]]


def _unpickled(content: bytes) -> dict[str, Any]:
    batch = _Plain(io.BytesIO(content), encoding="bytes").load()
    return {_text(key): value for key, value in batch.items()}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class _Type:
    """Stands for numpy's array type and for a dtype; a dtype's state is not needed, its name says enough."""

    def __init__(self, *arguments: Any) -> None:
        self.name = _text(arguments[0]) if arguments else ""

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Keeps the shape, dtype and bytes of a pickled array."""

    def __init__(self, *arguments: Any) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, by_columns, content = self.state
        if dtype.name not in ("u1", "uint8"):
            raise ValueError(f"pixels must be uint8, got {dtype.name}")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")


def _from_buffer(content: Any, dtype: _Type, shape: Any, order: str) -> _Array:  # of protocol 5
    made = _Array()
    made.state = (1, shape, dtype, order == "F", content)
    return made


def _encoded(text: str, encoding: Any) -> bytes:  # how protocol 2 of Python 3 writes bytes
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"text is encoded as {encoding!r}")
    return text.encode("latin1")


_NAMES: dict[str, Any] = {
    "_reconstruct": _Array, "_frombuffer": _from_buffer, "ndarray": _Type, "dtype": _Type, "encode": _encoded
}  # fmt: skip
_MODULES = re.compile(r"numpy|numpy\.(core|_core)\.(multiarray|numeric)|_codecs")


class _Plain(pickle._Unpickler):  # type: ignore
    """Admits the names above alone. The unpickler in C would take memory for sizes that a damaged file only states."""

    def find_class(self, module: str, name: str) -> Any:
        if not _MODULES.fullmatch(module) or name not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR archive holds; nothing was run")
        return _NAMES[name]
