"""Files that are written atomically, and read only if they are what they should be: regular, no link, not too long."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import stat
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 1 << 20
_OLD = 3600  # seconds after which a temporary file is left behind, whatever process has its number now
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.tmp(\.old)?")
# Errors of file systems without fsync. Any other, such as EIO, means that data may be lost.
_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_said: set[str] = set()


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview, *, durable: bool = True) -> Path:
    """Write a file atomically: beside its target, and renamed over it once it is on the disk.

    A symbolic link is followed, so that it stays one; OSError for a pipe or a device. `durable=False` leaves it to the
    caller to `synchronise` the file, as one of many in a folder.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.exists() and not target.is_file() and not target.is_dir():
        raise OSError(errno.EINVAL, "must be a regular file or new, got a pipe, a socket or a device", str(path))
    temporary = temporary_beside(target)
    temporary.unlink(missing_ok=True)
    try:
        with _open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                synchronise_file(file.fileno(), path)
        os.replace(temporary, target)
        if durable:
            synchronise(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(
            error, OSError
        ):  # an error for a full disk names no file; name the target, not the temporary file
            error.filename, error.filename2 = str(path), None
        raise
    return path


def write_npy(path: Path, array: Any) -> Path:
    """An array as an .npy file, by `write_bytes`; ValueError for one of objects."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return write_bytes(path, buffer.getbuffer())


def write_inside(path: Path, data: bytes) -> Path:
    """`write_bytes` into a folder that is not trusted: a link at `path` is replaced, not followed."""
    if path.is_symlink():
        remove(path)
    return write_bytes(path, data)


def temporary_beside(path: Path) -> Path:
    """A name beside `path` for what is renamed to it when whole: a rename is atomic within one file system only."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to fill and rename to it; what is left of it at the end is removed."""
    temporary = temporary_beside(path)
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        remove(temporary)


def clean(folder: Path, name: str | None = None) -> None:
    """Remove what interrupted writes left in `folder`, which the caller holds; or of the target `name` alone, but for
    what a live process may be writing."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            match = _TEMPORARY.fullmatch(path.name)
            if not match or name not in (None, match["name"]):
                continue
            if name is None or time.time() - path.lstat().st_mtime > _OLD or not _lives(int(match["process"])):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it, as far as possible; of a link the link alone."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each of them on the disk before what it will hold."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        synchronise(folder.parent)


def synchronise(path: Path, *, inside: bool = False) -> None:
    """fsync a file, or a folder's list of names; `inside`: all files and folders in it first."""
    if inside and path.is_dir():
        for entry in sorted(path.iterdir()):
            synchronise(entry, inside=True)
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        synchronise_file(handle, path)
    finally:
        os.close(handle)


def synchronise_file(handle: int, path: Path) -> None:
    """fsync. A file system that has none is reported once and tolerated; any other OSError is raised, with the path."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            error.filename = str(path)
            raise
        if "fsync" not in _said:
            _said.add("fsync")
            warnings.warn(
                f"this file system does not support fsync ({error.strerror}): after a loss of power files may be "
                "incomplete",
                stacklevel=3,
            )


@contextmanager
def open_regular(path: Path, *, most: int | None = None) -> Iterator[BinaryIO]:
    """A file of a folder that is not trusted, open for reading. OSError for a link, anything that is no regular file,
    and one of more than `most` bytes."""
    # A FIFO would wait for a writer.
    with _open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "must be a regular file", str(path))
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"must have at most {most:,} bytes, got {status.st_size:,}", str(path))
        yield file


def read_regular(path: Path, most: int) -> bytes:
    """The content of such a file; never more than `most` bytes are read."""
    with open_regular(path, most=most) as file:
        return file.read(most)


def fingerprint(path: Path, most: int | None = None) -> dict[str, Any]:
    """Length and CRC-32 of a file; of one that is longer than `most` bytes the length alone, unread."""
    crc = 0
    with open_regular(path) as file:
        length = left = os.fstat(file.fileno()).st_size
        if most is not None and length > most:
            return {"bytes": length, "crc32": ""}
        while left and (chunk := file.read(min(left, _CHUNK))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return {"bytes": length, "crc32": f"{crc:08x}"}


def is_regular(path: Path) -> bool:
    """Whether `path` itself, not what it links to, is a regular file."""
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def is_folder(path: Path) -> bool:
    """Whether `path` itself, not what it links to, is a folder."""
    with suppress(OSError):
        return stat.S_ISDIR(path.lstat().st_mode)
    return False


def _open(path: Path, flags: int, mode: str) -> Any:
    try:
        return os.fdopen(os.open(path, flags | os.O_CLOEXEC, 0o666), mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "must not be a symbolic link", str(path)) from None
        raise


def _lives(process: int) -> bool:
    if process == os.getpid():
        return False  # this process writes one file at a time: a file with its number was left by an earlier process
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True
