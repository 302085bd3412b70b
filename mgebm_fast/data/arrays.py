"""Arrays, tensors, `.npy` and `.npz` files: one rule for their layout and one for the range of their pixels."""

from __future__ import annotations

import contextlib
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .collection import Batch, Collection, number_labels
from .foreign import reading
from .image_data import CHUNK_BYTES
from .policy import fit, match_channels

MAX_NPZ_BYTES = 8 << 30  # of one array: those of an .npz are read whole
_DARK = 32  # images whose largest integer is below this have another scale: 0 and 1, 0 … 15, 0 … 16, 0 … 31
_IMAGE_KEYS = ("images", "x", "arr_0")
_LABEL_KEYS = ("labels", "y")
_NAME_KEYS = ("class_names", "classes")


def open_npy(path: Path, size: int, channels: int) -> Collection:
    """An `.npy` file, mapped and not read whole. Pickled objects are refused."""
    return _with_file(array_collection(read_npy(path, mmap_mode="r"), path.name, size, channels), path)


def read_npy(path: Path, what: str = "load", **options: Any) -> np.ndarray:
    """The array of an `.npy` file (options: of `numpy.load`); DataError for anything else, and for pickled objects."""
    with reading(path, "an array", what=what):
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise ValueError("it is not an .npy file: it does not begin as one does")
        with _no_pickles(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numpy, about headers of Python 2
            array = np.load(path, allow_pickle=False, **options)
        _check_kind(array)
        return array


def open_npz(path: Path, size: int, channels: int) -> Collection:
    """An `.npz` file: images under `images`, `x` or `arr_0` (or its only array), labels under `labels` or `y`."""
    with reading(path, "an .npz file"):
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is not an .npz file: it is damaged, or not one at all")
        with zipfile.ZipFile(path) as archive:
            large = next((info for info in archive.infolist() if info.file_size > MAX_NPZ_BYTES), None)
        if large is not None:
            raise ValueError(
                f"{large.filename[:200]} has {large.file_size} bytes, more than the {MAX_NPZ_BYTES} allowed: save it "
                "as .npy, which is mapped"
            )
        with np.load(path, allow_pickle=False) as members:
            keys = members.files
            image_key = next((key for key in _IMAGE_KEYS if key in keys), keys[0] if len(keys) == 1 else None)
            if image_key is None:
                held = ", ".join(keys)[:500] or "nothing"
                raise DataError(f"{path} must hold its images under {' or '.join(_IMAGE_KEYS)}, got {held}")
            images = _member(members, image_key, path)
            labels, stated = (
                next((_member(members, key, path) for key in choice if key in keys), None)
                for choice in (_LABEL_KEYS, _NAME_KEYS)
            )
    names = None if stated is None else [str(name) for name in stated.reshape(-1)]
    return _with_file(array_collection(images, path.name, size, channels, labels=labels, class_names=names), path)


def array_collection(
    array: Any,  # (N, H, W), (N, H, W, C) or (N, C, H, W); a tensor or anything numpy takes
    name: str,
    size: int,
    channels: int,
    *,
    labels: Sequence | np.ndarray | None = None,  # (N,)
    class_names: Sequence[str] | None = None,
    held_out: np.ndarray | None = None,
) -> Collection:
    """An array as a source. The range is judged on the whole array, before any split.

    uint8 and other integers: 0 … 255; refused where the largest is 1 … 31, which is another scale. bool: 0 and 255.
    float: [0, 1] where its largest value is at most 1, [0, 255]
    where it is 64 or more; anything between could be either and is refused. Non-finite pixels are refused, with their
    number and the index of the first.
    """
    array, is_tensor = as_array(array)
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(
            f"{name} must be (N, H, W), (N, H, W, C) or (N, C, H, W) with at least one image, got {array.shape}"
        )
    first = array.ndim == 4 and channels_first(array.shape[1:], channels, is_tensor, name)
    have = 1 if array.ndim == 3 else array.shape[1 if first else 3]
    if have != channels and (have, channels) not in ((1, 3), (3, 1)):
        raise DataError(f"{name} has {have} channels, which cannot become channels={channels}")
    scale = pixel_scale(array, name)
    numbered: np.ndarray | None = None
    names: tuple[str, ...] = ()
    if labels is not None:
        raw, _ = as_array(labels)
        if raw.shape != array.shape[:1]:
            raise DataError(f"labels of {name} must be ({array.shape[0]},), one an image, got {raw.shape}")
        numbered, names = number_labels(raw, class_names)

    def decode(index: np.ndarray) -> Iterator[Batch]:
        step = max(1, CHUNK_BYTES // array[0].nbytes)
        for i in range(0, len(index), step):
            part = index[i : i + step]
            pixels = to_uint8(np.asarray(array[part]), scale)
            pixels = pixels[..., None] if array.ndim == 3 else pixels.transpose(0, 2, 3, 1) if first else pixels
            yield Batch(fit(match_channels(pixels, channels), size), list(range(i, i + len(part))), [])

    return Collection(name, len(array), decode, labels=numbered, class_names=names, held_out=held_out)


def as_array(source: Any) -> tuple[np.ndarray, bool]:
    """A numpy view of a tensor (True) or anything else (False)."""
    if hasattr(source, "detach"):
        source = source.detach().cpu()
        # numpy has no bfloat16; float32 holds every 16-bit float exactly
        return (source.float() if source.is_floating_point() and source.element_size() == 2 else source).numpy(), True
    return (source if isinstance(source, np.ndarray) else np.asarray(source)), False


def channels_first(shape: tuple[int, ...], channels: int, is_tensor: bool, name: str) -> bool:
    """Whether one image of this shape is (C, H, W) and not (H, W, C); a tensor that fits both is (C, H, W)."""
    counts = (1, 3, channels)
    first, last = shape[0] in counts, shape[-1] in counts
    if first and last and not is_tensor:
        raise DataError(f"{name} could be channels-first or -last, each image being {shape}: pass a tensor")
    if not first and not last:
        wanted = ", ".join(str(c) for c in sorted({*counts}))
        raise DataError(f"{name} must have {wanted} channels, first or last, got {shape} for each image")
    return first


def pixel_scale(array: np.ndarray, name: str, unit_only: bool = False) -> float:
    """What brings the array to 0 … 255: 255 or 1; DataError where its range is not one of those that are taken."""
    if array.dtype == np.bool_:
        return 255.0
    if array.dtype.kind not in "iuf":
        raise DataError(f"pixels of {name} must be integers, floats or bools, got dtype {array.dtype}")
    if array.dtype == np.uint8:
        if not unit_only:
            check_scale(largest(array), name)
        return 1.0
    low, high, bad, first_bad = _range(array)
    if bad:
        index = f"at index {first_bad}"
        raise DataError(f"pixels of {name} must be finite, got {bad} that are not, the first {index}")
    if array.dtype.kind in "iu":
        if low < 0 or high > 255:
            raise DataError(
                f"integer pixels of {name} must be in 0 … 255, got {low:g} … {high:g}; divide 16-bit ones by 257"
            )
        if not unit_only:
            check_scale(int(high), name)
        return 1.0
    if low >= 0 and high <= 1:
        return 255.0
    if low >= 0 and 64 <= high <= 255 and not unit_only:
        return 1.0
    accepted = "[0, 1]" if unit_only else "[0, 1], or in [0, 255] with a maximum of 64 or more"
    raise DataError(f"float pixels of {name} must be in {accepted}; got {low:g} … {high:g}")


def largest(array: np.ndarray) -> int:
    """The largest of uint8 pixels, or the first found that settles their scale; a bounded part at a time."""
    high, step = 0, max(1, CHUNK_BYTES // array[0].nbytes)
    for i in range(0, len(array), step):
        high = max(high, int(array[i : i + step].max()))
        if high >= _DARK:
            break
    return high


def check_scale(high: int, name: str) -> None:
    """DataError where the largest of integer pixels says that they are no 0 … 255, but 0 and 1, or 0 … 15."""
    if 0 < high < _DARK:
        raise DataError(
            f"integer pixels of {name} must be in 0 … 255 with a maximum of {_DARK} or more, got at most {high}, "
            f"which looks like another scale: pass bools, or multiply by 255 / {high}"
        )


def to_uint8(pixels: np.ndarray, scale: float) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind == "f":
        return np.rint(pixels * scale).astype(np.uint8)
    return (pixels * np.uint8(scale)).astype(np.uint8)


def _range(array: np.ndarray) -> tuple[float, float, int, tuple[int, ...]]:
    """Smallest and largest value, number of non-finite ones and the index of the first; a bounded part at a time."""
    low, high, bad = np.inf, -np.inf, 0
    first_bad: tuple[int, ...] = ()
    step = max(1, CHUNK_BYTES // array[0].nbytes)
    for i in range(0, len(array), step):
        part = np.asarray(array[i : i + step])
        finite = np.isfinite(part)
        if not finite.all():
            if not bad:
                n, *rest = np.unravel_index(int(np.argmin(finite)), part.shape)
                first_bad = (i + int(n), *(int(r) for r in rest))
            bad += int(part.size - finite.sum())
            continue
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    return low, high, bad, first_bad


def _member(members: Any, key: str, path: Path) -> np.ndarray:
    with reading(f"{key} of {path}", "an array"), _no_pickles():
        array = members[key]
        _check_kind(array)
        return array


@contextlib.contextmanager
def _no_pickles() -> Iterator[None]:
    """Inside, numpy's refusal of pickled objects becomes an error that says what to store in their place."""
    try:
        yield
    except ValueError as error:
        if "pickle" in str(error) or "Python objects" in str(error):
            raise ValueError(
                "it holds Python objects (pickle), which are never loaded: save a plain array of numbers"
            ) from error
        raise


def _check_kind(array: Any) -> None:
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufUS":
        raise ValueError(f"it must hold numbers, got {getattr(array, 'dtype', type(array).__name__)}")


def _with_file(collection: Collection, path: Path) -> Collection:
    status = path.stat()

    def fingerprint(index: np.ndarray) -> Iterator[str]:
        yield f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        yield index.astype("<i8").tobytes().hex()

    # decoding an array costs next to nothing: only the size of the result makes it worth keeping
    return replace(collection, fingerprint=fingerprint, source_bytes=lambda index: 0)
