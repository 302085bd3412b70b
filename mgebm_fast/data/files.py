"""Folders, zip archives and tar archives of images: listed first, read in memory, decoded in threads."""

from __future__ import annotations

import os
import re
import stat
import tarfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .collection import Batch, Collection
from .policy import EXTENSIONS, decode

MAX_FILE_BYTES = 256 << 20  # an image file larger than this is refused unread
_CHUNK_IMAGES, _CHUNK_BYTES = 64, 4 << 20  # one task of a decoding thread
_MAX_THREADS = 8


@dataclass(frozen=True)
class Entry:
    """One image of a source, not read yet."""

    path: str  # relative to the folder or the archive, with "/"
    bytes: int
    stamp: int  # modification time in ns; 0 inside an archive, whose own time stands for all
    member: Any  # what the reader takes


@dataclass
class Listing:
    """The images of a source in a fixed order, and what was refused while listing."""

    entries: list[Entry] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


Reader = Callable[[list[Entry]], "Iterator[bytes | Exception]"]


def open_folder(path: Path, size: int, channels: int) -> Collection:
    """Images of a folder and all its sub-folders, in natural order of their paths (img2 before img10)."""
    listing = Listing()
    for file in _walk(path, set()):
        name = file.relative_to(path).as_posix()
        if not _is_image(name):
            continue
        try:
            status = file.stat()
        except OSError as error:
            listing.skipped.append((name, error.strerror or str(error)))
            continue
        if not stat.S_ISREG(status.st_mode):
            listing.skipped.append((name, "not a regular file"))
            continue
        listing.entries.append(Entry(name, status.st_size, status.st_mtime_ns, file))
    listing.entries.sort(key=lambda entry: natural(entry.path))

    def read(entries: list[Entry]) -> Iterator[bytes | Exception]:
        for entry in entries:
            try:
                yield entry.member.read_bytes()
            except OSError as error:
                yield error

    return _collection(path, listing, read, size, channels, "folder")


def open_zip(path: Path, size: int, channels: int) -> Collection:
    """Images of a zip archive, in natural order of their paths. Members are read in memory, never extracted."""
    listing = Listing()
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"load: {path} cannot be read as a zip archive: {error}") from error
    for info in members:
        name = _safe_name(info.filename, listing)
        if name is not None and _is_image(name):
            listing.entries.append(Entry(name, info.file_size, 0, info))
    listing.entries.sort(key=lambda entry: natural(entry.path))

    def read(entries: list[Entry]) -> Iterator[bytes | Exception]:
        with zipfile.ZipFile(path) as archive:
            for entry in entries:
                try:
                    yield archive.read(entry.member)
                except Exception as error:  # zlib, lzma, zipfile and missing passwords all raise their own
                    yield error

    return _collection(path, listing, read, size, channels, "zip archive")


def open_tar(path: Path, size: int, channels: int) -> Collection:
    """Images of a tar archive, plain or compressed, in the order of the archive: one pass forward reads it."""
    listing = Listing()
    try:
        with tarfile.open(path) as archive:
            members = archive.getmembers()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(f"load: {path} cannot be read as a tar archive: {error}") from error
    except Exception as error:  # lzma and zlib have errors of their own
        raise DataError(f"load: {path} cannot be decompressed: {error}") from error
    for info in members:
        if info.isdir():
            continue
        name = _safe_name(info.name, listing)
        if name is None or not _is_image(name):
            continue
        if info.isreg():
            listing.entries.append(Entry(name, info.size, 0, info))
        else:
            listing.skipped.append((name, "a link or a device, not a file"))

    def read(entries: list[Entry]) -> Iterator[bytes | Exception]:
        with tarfile.open(path) as archive:
            for entry in entries:
                try:
                    file = archive.extractfile(entry.member)
                    data = file.read() if file is not None else b""
                    yield data if len(data) == entry.bytes else OSError("the archive ends inside this file")
                except Exception as error:  # as in zip archives: each compressor raises its own
                    yield error

    return _collection(path, listing, read, size, channels, "tar archive")


def natural(path: str) -> tuple:
    """Sort key by which img2 comes before img10, folder by folder."""
    parts = path.split("/")
    runs = (re.split(r"([0-9]+)", part) for part in parts)
    return [[(int(run) if i % 2 else run) for i, run in enumerate(part)] for part in runs], path


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Files below `folder`; links to folders are followed, each folder once, so a loop of links ends."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as found:
        items = sorted(found, key=lambda item: item.name)
    for item in items:
        if item.name.startswith("."):
            continue
        if item.is_dir():
            yield from _walk(Path(item.path), seen)
        else:
            yield Path(item.path)


def _is_image(name: str) -> bool:
    """By its extension; hidden files and the side files that macOS adds to archives are not images."""
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX"
    return not hidden and os.path.splitext(parts[-1])[1].lower() in EXTENSIONS


def _safe_name(member: str, listing: Listing) -> str | None:
    """The member's path inside the archive; None, and a listed skip, where it points outside."""
    name = member.replace("\\", "/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        listing.skipped.append((member, "a path outside the archive"))
        return None
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _collection(path: Path, listing: Listing, read: Reader, size: int, channels: int, kind: str) -> Collection:
    entries, skipped = listing.entries, tuple(listing.skipped)
    if not entries:
        refused = f"; {len(skipped)} refused, the first {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"load: no images in the {kind} {path} (looked for {' '.join(EXTENSIONS)}){refused}")
    parents = [entry.path.rsplit("/", 2)[-2] if "/" in entry.path else "" for entry in entries]
    labels: np.ndarray | None = None
    names: tuple[str, ...] = ()
    why = ""
    if all(parents):
        order = sorted(set(parents), key=natural)
        place = {name: i for i, name in enumerate(order)}
        labels, names = np.array([place[parent] for parent in parents], np.int64), tuple(order)
    else:
        loose = entries[parents.index("")].path
        why = f"classes are sub-folders, but {loose} lies directly in it"

    archive = None if path.is_dir() else path.stat()

    def fingerprint(index: np.ndarray) -> Iterator[str]:
        yield f"{path.resolve()}"
        if archive is not None:
            yield f"{archive.st_size} {archive.st_mtime_ns}"
        for i in index:
            yield f"{entries[i].path} {entries[i].bytes} {entries[i].stamp}"

    return Collection(
        name=path.name or str(path),
        count=len(entries),
        decode=lambda index: _decode([entries[i] for i in index], read, size, channels),
        labels=labels,
        class_names=names,
        names=[entry.path for entry in entries],
        skipped=skipped,
        why_unlabelled=why,
        source_bytes=lambda index: sum(entries[i].bytes for i in index),
        fingerprint=fingerprint,
    )


def _decode(entries: list[Entry], read: Reader, size: int, channels: int) -> Iterator[Batch]:
    """Read in this thread, decode in a few others, yield in order; a bounded number of chunks is in flight."""
    affinity = getattr(os, "sched_getaffinity", None)
    threads = min(_MAX_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)
    pending: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="mgebm-decode")
    try:
        for chunk in _chunks(entries, read):
            pending.append(pool.submit(_decode_chunk, chunk, size, channels))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_Chunk = list[tuple[int, str, "bytes | Exception"]]


def _chunks(entries: list[Entry], read: Reader) -> Iterator[_Chunk]:
    fits = [entry for entry in entries if entry.bytes <= MAX_FILE_BYTES]
    contents = read(fits)
    chunk: _Chunk = []
    held = 0
    for position, entry in enumerate(entries):
        if entry.bytes <= MAX_FILE_BYTES:
            data = next(contents)
        else:
            data = ValueError(f"{entry.bytes} bytes, more than the {MAX_FILE_BYTES} allowed for one image")
        chunk.append((position, entry.path, data))
        held += entry.bytes
        if len(chunk) >= _CHUNK_IMAGES or held >= _CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _decode_chunk(chunk: _Chunk, size: int, channels: int) -> Batch:
    images, positions, skipped = [], [], []
    for position, path, data in chunk:
        try:
            if isinstance(data, Exception):
                raise data
            images.append(decode(data, size, channels))
            positions.append(position)
        except Exception as error:  # a damaged file makes decoders raise anything; the reason is listed
            skipped.append((path, reason(error)))
    stacked = np.stack(images) if images else np.empty((0, channels, size, size), np.uint8)
    return Batch(stacked, positions, skipped)


def reason(error: Exception) -> str:
    """One line for a person."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    plain = isinstance(error, (OSError, ValueError)) and text
    return text if plain else f"{type(error).__name__}: {text}"
