"""`load`: any source of images -> `ImageData`."""

from __future__ import annotations

import operator
import os
import tarfile
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, suggest
from . import store
from .arrays import array_collection, open_npy, open_npz
from .builtin import BUILT_IN, BUILT_IN_PREFIX, check_not_both, is_builtin, open_builtin
from .collection import SPLITS, Batch, Collection, choose
from .datasets import dataset_collection, torchvision_collection
from .files import open_folder, open_tar, open_zip
from .foreign import check_regular, expand, reason
from .formats import idx
from .image_data import ImageData
from .sound import is_sound
from .video import is_video

_TAR_ENDINGS = (".tar", ".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")


def load(
    source: Any,
    *,
    size: int,
    channels: int,
    classes: Sequence[str | int] | str | None = None,
    split: str = "train",
    strict: bool = False,
    cache: bool | None = None,
    root: str | os.PathLike[str] = "data",
    download: bool = False,
    most: int | None = None,
    seed: int = 0,
    like: dict[str, Any] | None = None,
) -> ImageData:
    """Read images as uint8 (N, channels, size, size), by one policy for all sources (`mgebm_fast.data.policy`).

    Args:
        source: a built-in name (`digits`, `lfw`, `texture:brick|grass|gravel`, `photos`, also as `builtin:NAME`; a name
            that is also a file or folder here is refused); a folder, zip or tar archive of images (labels:
            the folder an image lies in, where every image lies in one); an `.npy` or `.npz` file; CIFAR as its authors
            give it (`cifar-10-python.tar.gz`);
            `torchvision:NAME` or `torchvision:NAME:ROOT`; a tensor or array, or (images, labels) of them; a torch
            Dataset or a sequence of images.
        channels: 1 or 3; arrays with another number of channels keep theirs.
        classes: names (or one name) of the classes to keep. They are chosen before anything is decoded, and labels
            are renumbered in this order.
        split: `train`, `held_out` or `all`. Digits, textures, photos, CIFAR and torchvision have their own parts; so
            have folders and archives with folders named as parts: train (training) beside val, valid, validation, test
            or testing, of which all but the first are held out. Any other source holds out 10 % of each class, at least
            one image, at most 5,000 in all, chosen by a fixed permutation. The split of a class is the same whether or
            not other classes are asked for.
        strict: raise for the first image that cannot be used, where otherwise all such are listed in `skipped` and
            counted in a warning.
        cache: None keeps what took more than 16 MiB of files to decode, or makes more than 256 MiB of pixels, in
            $MGEBM_CACHE (default ~/.cache/mgebm_fast), mapped from there; True keeps any file source; False keeps
            everything in memory.
        root, download: where torchvision's sets lie, and whether they may be fetched.
        like: the `fingerprint()` of a training part that was loaded before. Images are divided as they were then, by
            their names, and those that have been added since are left out; a set too large for its names to be kept
            (`data.fingerprint.MOST`) is divided as it would be without.
        most, seed: read only so many images of the split, those that a permutation by the seed puts first, in its
            order.

    Raises:
        DataError (a ValueError): a source that does not exist, is empty or damaged as a whole; an unknown class;
            pixels of an unknown range or not finite; `strict` and a bad image.
        OSError: the cache cannot be written, and was asked for or is to hold more than 256 MiB of pixels.
    """
    size, channels = _whole("size", size), _whole("channels", channels)
    most = None if most is None else _whole("most", most)
    _check_split(split)
    collection = _open(source, size, channels, root, download)
    chosen = choose(collection, split, classes, like)
    if most is not None:
        chosen = chosen.take(np.random.default_rng(seed).permutation(len(chosen.index))[:most])
    index = chosen.index
    if strict and collection.skipped:
        path, why = collection.skipped[0]
        raise DataError(f"{path} of {collection.name} cannot be used: {why}")
    decoded = _decode(collection, index, size, channels, strict, cache)
    skipped = (*collection.skipped, *((path, why) for path, why in decoded.skipped))
    # The held-out split may be empty; evaluation then has no real images to compare with.
    if not len(decoded.images) and split != "held_out":
        path, why = skipped[0]
        raise DataError(f"no readable image among {len(index)} of {collection.name}; the first, {path}: {why}")
    if collection.passed_over:
        warnings.warn(
            f"{collection.name}: passed over files that are no images: {collection.passed_over}", stacklevel=2
        )
    if skipped:
        total = len(index) + len(collection.skipped)
        path, why = skipped[0]
        warnings.warn(
            f"{collection.name}: skipped {len(skipped)} of {total} images; the first, {path}: {why}", stacklevel=2
        )
    if decoded.dropped:
        chosen = chosen.take(np.delete(np.arange(len(index)), decoded.dropped))
    return ImageData(
        decoded.images, chosen.labels, chosen.class_names, collection.name, skipped, chosen.names, chosen.held_out
    )


def _whole(name: str, value: Any) -> int:
    """An int of any kind, numpy's and 0-dimensional arrays and tensors too, of at least 1."""
    try:
        dimensions: Any = getattr(value, "ndim", 0)
        if isinstance(value, (bool, np.bool_)) or dimensions:
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"load: {name} must be an int, got {type(value).__name__}") from None
    if number < 1:
        raise DataError(f"{name} must be at least 1, got {number}")
    return number


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"split must be one of {', '.join(SPLITS)}, got {split!r}{suggest(str(split), SPLITS)}")


def _open(source: Any, size: int, channels: int, root: str | os.PathLike[str], download: bool) -> Collection:
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        _refuse_recordings(name)
        if isinstance(source, str) and is_builtin(name):
            check_not_both(name)
            name = name.removeprefix(BUILT_IN_PREFIX)
            _check_picture_channels(channels, name)
            return open_builtin(name, size, channels)
        if name.startswith("torchvision:"):
            return torchvision_collection(name, size, channels, root=Path(root), download=download)
        return _open_path(expand(name), name, size, channels)
    pair = isinstance(source, tuple) and len(source) == 2 and _is_array(source[0])
    if pair or _is_array(source):
        images, labels = source if pair else (source, None)
        return array_collection(images, type(images).__name__, size, channels, labels=labels)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, (dict, bytes)):
        return dataset_collection(source, size, channels)
    raise TypeError(
        "load: source must be a name, a path, an array, a tensor or a Dataset with a length and items, "
        f"got {type(source).__name__}"
    )


def _refuse_recordings(name: str) -> None:
    for kind, takes, found in (("video", "fire", is_video(name)), ("sound", "chimes", is_sound(name))):
        if found and not Path(name).is_dir():
            raise DataError(
                f"data must be images here, got the {kind} {name}; the method spatial-temporal, of the preset "
                f"{takes}, learns from a {kind}"
            )


def _open_path(path: Path, name: str, size: int, channels: int) -> Collection:
    try:
        if not path.exists():
            raise DataError(_not_found(path, name))
        if not path.is_dir():
            check_regular(path)
        if path.suffix.lower() in (".npy", ".npz") and path.is_file():
            return (open_npy if path.suffix.lower() == ".npy" else open_npz)(path, size, channels)
        _check_picture_channels(channels, name)
        if path.is_dir():
            return open_folder(path, size, channels)
        if images := idx.images_of([path]):
            return idx.collection(path, images, size, channels)
        if zipfile.is_zipfile(path) or path.suffix.lower() == ".zip":
            return open_zip(path, size, channels)
        if path.name.lower().endswith(_TAR_ENDINGS) or tarfile.is_tarfile(path):
            return open_tar(path, size, channels)
    except OSError as error:
        raise DataError(f"{name[:500]!r} cannot be read: {reason(error)}") from error
    raise DataError(f"{path} must be a folder, a zip or tar archive of images, or an .npy or .npz file")


def _not_found(path: Path, name: str) -> str:
    near = suggest(name, BUILT_IN)
    if not near and path.parent.is_dir():
        near = suggest(path.name, os.listdir(path.parent))
    return f"{name!r} is not a file, a folder or a built-in set ({', '.join(BUILT_IN)}, torchvision:NAME){near}"


def _check_picture_channels(channels: int, name: str) -> None:
    if channels not in (1, 3):
        raise DataError(f"channels must be 1 (grey) or 3 (colour) for {name}, got {channels}")


def _is_array(source: Any) -> bool:
    return isinstance(source, np.ndarray) or (hasattr(source, "detach") and hasattr(source, "shape"))


def _decode(
    collection: Collection, index: np.ndarray, size: int, channels: int, strict: bool, cache: bool | None
) -> store.Decoded:
    """In memory, on disk, or out of the cache: by the sizes of what goes in and what comes out."""
    count, out_bytes = len(index), len(index) * channels * size * size
    folder = store.cache_folder()
    in_bytes = collection.source_bytes(index) if collection.source_bytes else 0
    large = out_bytes > store.LARGE_BYTES
    wanted = cache or (cache is None and (large or in_bytes > store.SLOW_BYTES))
    to_disk = wanted and (collection.fingerprint is not None or large)

    def batches() -> Iterator[Batch]:
        return _with_progress(collection.decode(index), count, collection.name)

    if folder is None or not to_disk:
        return store.in_memory(batches(), count, channels, size, strict)
    key = None
    if collection.fingerprint is not None:
        key = store.cache_key(collection.fingerprint(index), size, channels)
        cached = store.from_cache(folder, key)
        if cached is not None:
            store.check_strict(cached.skipped, strict)
            return cached
    try:
        return store.on_disk(batches(), count, channels, size, strict, folder, key)
    except store.CacheError as error:
        if cache or large:
            raise
        warnings.warn(f"{error}; not cached", RuntimeWarning, stacklevel=3)
        return store.in_memory(batches(), count, channels, size, strict)


def _with_progress(batches: Iterable[Batch], total: int, name: str) -> Iterator[Batch]:
    """A bar on a terminal once it has taken a second; nothing anywhere else."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from batches
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.monotonic()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total, visible=False)
        for batch in batches:
            done = len(batch.images) + len(batch.skipped)
            bar.update(task, advance=done, visible=time.monotonic() - start > 1)
            yield batch
