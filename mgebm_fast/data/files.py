"""Folders, zip archives and tar archives of images: listed first, read in memory, decoded in threads."""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .collection import Batch, Collection
from .foreign import MAX_FILE_BYTES, bounded_bytes, reading, reason
from .formats import cifar, idx, layout, tar
from .policy import EXTENSIONS, decode

_CHUNK_IMAGES, _CHUNK_BYTES = 64, 4 << 20  # one task of a decoding thread
_MAX_THREADS = 8


@dataclass(frozen=True)
class Entry:
    """One image of a source, not read yet."""

    path: str  # relative to the folder or the archive, with "/"
    bytes: int
    stamp: int  # modification time in ns; 0 inside an archive, whose own time is used
    member: Any  # what the reader opens: a path, or a member of an archive


@dataclass
class Listing:
    """The images of a source in a fixed order, what was refused while listing, and what is no image, by its ending."""

    entries: list[Entry] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    endings: Counter[str] = field(default_factory=Counter)

    def add(self, path: str, size: int, stamp: int, member: Any) -> None:
        if layout.is_hidden(path):
            return
        if layout.is_image(path):
            self.entries.append(Entry(path, size, stamp, member))
        else:
            layout.count_ending(path, self.endings)

    def sort(self) -> None:
        self.entries.sort(key=lambda entry: layout.natural(entry.path))


Reader = Callable[[list[Entry]], "Iterator[bytes | Exception]"]


def open_folder(path: Path, size: int, channels: int) -> Collection:
    """Images of a folder and all its sub-folders, in natural order of their paths (img2 before img10)."""
    listing = Listing()
    for file in _walk(path, set()):
        name = layout.plain(file.relative_to(path).as_posix())
        try:
            status = file.stat()
        except OSError as error:
            if layout.is_image(name):
                listing.skipped.append((name, error.strerror or str(error)))
            continue
        if stat.S_ISREG(status.st_mode):
            listing.add(name, status.st_size, status.st_mtime_ns, file)
        elif layout.is_image(name):
            listing.skipped.append((name, "not a regular file"))
    listing.sort()
    others = [] if listing.entries else sorted(path.iterdir())
    if images := idx.images_of(others):
        return idx.collection(path, images, size, channels)
    batches = cifar.batches_of(file.name for file in others)
    if batches is not None:
        return cifar.collection(path, batches, lambda name: bounded_bytes(path / name), size, channels)

    def read(entries: list[Entry]) -> Iterator[bytes | Exception]:
        for entry in entries:
            try:
                yield bounded_bytes(entry.member)
            except (OSError, DataError) as error:
                yield error

    return _collection(path, listing, read, size, channels, "folder")


def open_zip(path: Path, size: int, channels: int) -> Collection:
    """Images of a zip archive, in natural order of their paths. Members are read in memory, never extracted."""
    listing = Listing()
    with reading(path, "a zip archive"), _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
    for info in members:
        _list_member(listing, info.filename, info.file_size, info)
    listing.sort()

    def read(entries: list[Entry]) -> Iterator[bytes | Exception]:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            for entry in entries:
                try:
                    yield archive.read(entry.member)
                except Exception as error:  # zlib, lzma, zipfile and missing passwords all raise their own
                    yield error

    return _collection(path, listing, read, size, channels, "zip archive")


def open_tar(path: Path, size: int, channels: int) -> Collection:
    """Images of a tar archive, plain or compressed, in the order of the archive: one pass forward reads it.

    An archive of CIFAR-10 or CIFAR-100 as their authors give it is read as that set.
    """
    listing = Listing()
    members, damage = tar.members(path)
    for info, target in tar.resolve_links(members):
        if target.isreg():
            _list_member(listing, info.name, target.size, target)
        elif layout.is_image(info.name):
            listing.skipped.append((info.name[:200], "a link or a device, not a file"))
    files = {info.name: info for info in members if info.isreg() and info.size <= MAX_FILE_BYTES}
    batches = None if listing.entries else cifar.batches_of(files)
    if batches is not None:
        with tar.opened(path) as archive:
            return cifar.collection(path, batches, lambda name: tar.contents(archive, files[name]), size, channels)
    if damage:
        listing.skipped.append((path.name, damage))

    def read(entries: list[Entry]) -> Iterator[bytes | Exception]:
        place, held = None, b""
        with tar.opened(path) as archive:
            for entry in entries:
                try:
                    if entry.member is not place:  # hard links of one file stand side by side
                        place, held = entry.member, tar.contents(archive, entry.member)
                    yield held if len(held) == entry.bytes else OSError("the archive ends inside this file")
                except Exception as error:  # as in zip archives: each compressor raises its own
                    yield error

    return _collection(path, listing, read, size, channels, "tar archive")


class _BoundedFile:
    """A file that gives at most MAX_FILE_BYTES at once: an archive's directory states sizes of its own."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._bytes = os.fstat(self._file.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        left = self._bytes - self._file.tell()
        asked = left if size is None or size < 0 else min(size, left)
        if asked > MAX_FILE_BYTES:
            raise ValueError(f"a part of {asked} bytes, more than the {MAX_FILE_BYTES} allowed")
        return self._file.read(max(asked, 0))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> _BoundedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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


def _list_member(listing: Listing, name: str, size: int, member: Any) -> None:
    why = layout.refused(name)
    if why is None:
        listing.add(layout.inside(name), size, 0, member)
    else:
        listing.skipped.append((name[:200], why))


def _collection(path: Path, listing: Listing, read: Reader, size: int, channels: int, kind: str) -> Collection:
    entries, skipped = listing.entries, tuple(listing.skipped)
    passed_over = layout.described(listing.endings)
    if not entries:
        reasons = f"; found {passed_over}" if passed_over else ""
        reasons += f"; {len(skipped)} refused, the first {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"no images in the {kind} {path} (looked for {' '.join(EXTENSIONS)}){reasons}")
    told = layout.read_layout([entry.path for entry in entries], str(path))
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
        labels=told.labels,
        class_names=told.class_names,
        names=[entry.path for entry in entries],
        held_out=told.held_out,
        skipped=skipped,
        passed_over=passed_over,
        why_unlabelled=told.why_unlabelled,
        source_bytes=lambda index: sum(entries[i].bytes for i in index),
        fingerprint=fingerprint,
    )


def _decode(entries: list[Entry], read: Reader, size: int, channels: int) -> Iterator[Batch]:
    """Read in this thread, decode in a few others, yield in order; a bounded number of chunks is in flight."""
    affinity = getattr(os, "sched_getaffinity", None)
    threads = min(_MAX_THREADS, len(affinity(0)) if affinity else os.cpu_count() or 1)
    pending: deque[tuple[int, Future[Batch]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="mgebm-decode")
    try:
        for chunk in _chunks(entries, read):
            held = sum(len(data) for _, _, data in chunk if isinstance(data, bytes))
            pending.append((held, pool.submit(_decode_chunk, chunk, size, channels)))
            while len(pending) > 2 * threads or (len(pending) > 1 and sum(n for n, _ in pending) > MAX_FILE_BYTES):
                yield pending.popleft()[1].result()
        while pending:
            yield pending.popleft()[1].result()
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
