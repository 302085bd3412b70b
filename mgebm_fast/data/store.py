"""Where decoded images are kept: in memory, or in a file that is mapped; and the cache that spares a second decoding.

A cache entry is a folder `<key>/` with `images.bin` (the pixels, N x C x S x S bytes) and `index.json`; it is written
under another name and renamed when whole. Any entry may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from ..files import synchronise_file
from .collection import Batch
from .foreign import expand
from .policy import POLICY_VERSION

LARGE_BYTES = 256 << 20  # more pixels than this are mapped from a file
SLOW_BYTES = 16 << 20  # more than this to decode, seconds of it, is cached


class CacheError(OSError):
    """Decoded images cannot be written where they are kept."""


class _SourceError(Exception):
    """Carries an OSError raised while reading the source, not while writing the cache."""

    def __init__(self, error: OSError) -> None:
        self.error = error


class Decoded(NamedTuple):
    images: np.ndarray  # (n, C, S, S) uint8
    dropped: list[int]  # positions, of those asked for, that could not be decoded
    skipped: list[tuple[str, str]]


def cache_folder() -> Path | None:
    """$MGEBM_CACHE, else mgebm_fast below $XDG_CACHE_HOME or ~/.cache; None where it is `off` or there is no home."""
    value = os.environ.get("MGEBM_CACHE", "")
    if value.lower() == "off":
        return None
    if value:
        return expand(value)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # the XDG specification says to ignore a relative one
        return Path(shared) / "mgebm_fast"
    try:
        return Path.home() / ".cache" / "mgebm_fast"
    except RuntimeError:  # neither $HOME nor an entry in the list of users
        return None


def cache_key(fingerprint: Iterable[str], size: int, channels: int) -> str:
    digest = hashlib.sha256(f"{POLICY_VERSION} {size} {channels}\n".encode())
    for line in fingerprint:
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()[:32]


def in_memory(batches: Iterable[Batch], count: int, channels: int, size: int, strict: bool) -> Decoded:
    """Decode into one array; trimmed where images were skipped."""
    images = np.empty((count, channels, size, size), np.uint8)
    filled, kept, skipped = 0, [], []
    for batch in batches:
        check_strict(batch.skipped, strict)
        images[filled : filled + len(batch.images)] = batch.images
        filled += len(batch.images)
        kept += batch.positions
        skipped += batch.skipped
    return Decoded(images[:filled], _others(kept, count), skipped)


def on_disk(
    batches: Iterable[Batch], count: int, channels: int, size: int, strict: bool, folder: Path, key: str | None
) -> Decoded:
    """Decode into a file below `folder` and map it. With a key it stays for the next time, else it has no name.

    CacheError, which names the folder, where it cannot be written (a full disk); nothing is left behind then.
    """
    work = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder))
        kept: list[int] = []
        skipped: list[tuple[str, str]] = []
        with (work / "images.bin").open("wb") as file:
            for batch in _reading(batches):
                check_strict(batch.skipped, strict)
                # written with write(), not through a map: a full disk is then an error and not a bus fault
                file.write(np.ascontiguousarray(batch.images).data)
                kept += batch.positions
                skipped += batch.skipped
            file.flush()
            synchronise_file(file.fileno(), work / "images.bin")
        dropped = _others(kept, count)
        shape = (len(kept), channels, size, size)
        index = {"shape": shape, "dropped": dropped, "skipped": skipped}
        (work / "index.json").write_text(json.dumps(index), encoding="utf-8")
        if key is None or not kept:
            return Decoded(_map(work / "images.bin", shape), dropped, skipped)
        target = folder / key
        try:
            work.rename(target)
        except OSError:  # another process was first, or a damaged entry is in the way
            if from_cache(folder, key) is None:
                shutil.rmtree(target, ignore_errors=True)
                work.rename(target)
        return Decoded(_map(target / "images.bin", shape), dropped, skipped)
    except _SourceError as failed:
        raise failed.error from None
    except OSError as error:
        need = count * channels * size * size / 2**20
        raise CacheError(
            error.errno,
            f"load: cannot write decoded images ({need:.0f} MiB) below {folder}: {error.strerror or error}; set "
            f"MGEBM_CACHE to a folder with room, or to off to keep them in memory",
        ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _reading(batches: Iterable[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except OSError as error:
        raise _SourceError(error) from error


def from_cache(folder: Path, key: str) -> Decoded | None:
    """An entry that is there and whole, else None."""
    try:
        index: dict[str, Any] = json.loads((folder / key / "index.json").read_text(encoding="utf-8"))
        shape, file = tuple(index["shape"]), folder / key / "images.bin"
        if file.stat().st_size != int(np.prod(shape, dtype=np.int64)):
            return None
        return Decoded(_map(file, shape), index["dropped"], [(path, why) for path, why in index["skipped"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not shape[0]:
        return np.empty(shape, np.uint8)
    # copy-on-write: torch.from_numpy warns about arrays that cannot be written to
    return np.memmap(file, np.uint8, mode="c", shape=shape)


def _others(kept: list[int], count: int) -> list[int]:
    mask = np.ones(count, bool)
    mask[kept] = False
    return np.flatnonzero(mask).tolist()


def check_strict(skipped: list[tuple[str, str]], strict: bool) -> None:
    """DataError that names the first image left out, where none may be."""
    if strict and skipped:
        path, why = skipped[0]
        raise DataError(f"{path} cannot be used: {why}")
