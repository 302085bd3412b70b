"""Image sets that the package's dependencies ship: nothing is downloaded, the same images everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from ..errors import DataError, suggest
from .arrays import array_collection
from .collection import Collection
from .policy import block_mean

TEXTURES = ("brick", "grass", "gravel")
REDUCTIONS = (2, 4, 8)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
RECORDINGS = ("simulated:fire", "simulated:chimes")  # a video and a sound, for the methods that take those
BUILT_IN_PREFIX = "builtin:"  # marks a built-in set, whatever lies in the working folder
BUILT_IN = ("digits", "lfw", *(f"texture:{name}" for name in TEXTURES), "photos")


def open_builtin(name: str, size: int, channels: int) -> Collection:
    if name in _OPENERS:
        return _OPENERS[name](size, channels)
    if not name.startswith("texture:"):
        raise DataError(f"a built-in set must be one of {', '.join(BUILT_IN)}, got {name!r}{suggest(name, BUILT_IN)}")
    texture, _, factor = name.removeprefix("texture:").partition("/")
    if texture not in TEXTURES:
        near = suggest(texture, TEXTURES)
        raise DataError(f"texture must be one of {', '.join(TEXTURES)}, got {texture!r}{near}")
    if factor not in ("", *map(str, REDUCTIONS)) or name.endswith("/"):
        raise DataError(f"a texture must be reduced by one of {', '.join(map(str, REDUCTIONS))}, got {name!r}")
    return _texture(texture, size, channels, int(factor or 1))


def is_builtin(name: str) -> bool:
    """Whether a name is that of a set, or of a recording, that the package has; also with `builtin:` before it."""
    if name.startswith(BUILT_IN_PREFIX):
        return True
    return name in _OPENERS or name in RECORDINGS or name.startswith("texture:")


def explicit(name: str) -> str:
    """A name as it stands in a configuration, where a built-in one is never a path, for `load`."""
    return BUILT_IN_PREFIX + name if is_builtin(name) and not name.startswith(BUILT_IN_PREFIX) else name


def check_not_both(name: str) -> None:
    """DataError where a built-in name is also that of something in the working folder."""
    if not name.startswith(BUILT_IN_PREFIX) and os.path.lexists(name):
        raise DataError(
            f"{name!r} is a built-in set and also lies in this folder: {BUILT_IN_PREFIX}{name} means the set, "
            f"./{name} what lies here"
        )


def _digits(size: int, channels: int) -> Collection:
    """scikit-learn's 1,797 digits, 8 x 8, 0 … 16 -> 0 … 255; stratified split, 1,437 to train on and 360 held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    _, held = train_test_split(np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0)
    mask = np.zeros(len(images), bool)
    mask[held] = True
    return array_collection(images, "digits", size, channels, labels=digits.target, held_out=mask)


def _lfw(size: int, channels: int) -> Collection:
    """The faces of scikit-image's LFW crops: the first 100 of its 200, 25 x 25 grey."""
    from skimage import data

    return array_collection(data.lfw_subset()[:100].astype(np.float32), "lfw", size, channels)


def _texture(texture: str, size: int, channels: int, factor: int) -> Collection:
    """Overlapping crops of one 512 x 512 grey texture, reduced by `factor`.

    Held out: those of its lowest quarter, or of its lowest `size` rows where those are more.
    """
    from skimage import data

    image = block_mean(getattr(data, texture)()[None, ..., None], factor)[0]
    name = f"texture:{texture}" + (f"/{factor}" if factor > 1 else "")
    edge = image.shape[0] - max(image.shape[0] // 4, size)
    if edge < size:
        raise DataError(f"crops of {name} must be of size 1 … {image.shape[0] // 2}, got {size}")
    stride = max(4, size // 8)
    parts = [_crops(region, size, stride) for region in (image[:edge], image[edge:])]
    return _two_parts(parts, name, size, channels)


def _photos(size: int, channels: int) -> Collection:
    """Overlapping crops of four colour photographs at 1/1, 1/2 and 1/4 of their size.

    Held out: the crops of the right-hand quarter of each, or of its last `size` columns where those are more. A scale
    is used in a photograph where a crop fits both parts.
    """
    from skimage import data

    parts: list[list[np.ndarray]] = [[], []]
    for name in PHOTOGRAPHS:
        image = getattr(data, name)()
        edge = image.shape[1] - max(image.shape[1] // 4, size)
        regions = (image[:, :edge], image[:, edge:]) if edge > 0 else ()
        for factor in (1, 2, 4):
            if not regions or any(min(region.shape[:2]) < factor * size for region in regions):
                continue
            for part, region in zip(parts, regions, strict=True):
                height, width = (side // factor * factor for side in region.shape[:2])
                reduced = block_mean(region[None, :height, :width], factor)[0]
                part.append(_crops(reduced, size, max(4, size // 4)))
    if not parts[0]:
        raise DataError(f"crops of photos must fit beside a held-out part of their size, got size {size}")
    return _two_parts([np.concatenate(part) for part in parts], "photos", size, channels)


def _crops(image: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Every crop on a lattice of `stride`: (H, W, C) -> (n, size, size, C)."""
    windows = np.lib.stride_tricks.sliding_window_view(image, (size, size), axis=(0, 1))[::stride, ::stride]
    return np.ascontiguousarray(windows.transpose(0, 1, 3, 4, 2)).reshape(-1, size, size, image.shape[-1])


def _two_parts(parts: list[np.ndarray], name: str, size: int, channels: int) -> Collection:
    mask = np.repeat([False, True], [len(part) for part in parts])
    return array_collection(np.concatenate(parts), name, size, channels, held_out=mask)


_OPENERS: dict[str, Callable[[int, int], Collection]] = {"digits": _digits, "lfw": _lfw, "photos": _photos}
