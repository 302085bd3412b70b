"""The boundary around files from elsewhere: regular files of a bounded size, and any failure as one sentence."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError

MAX_FILE_BYTES = 256 << 20  # an image file, a mask, or one part of an archive that is read at once
MAX_RECORDING_BYTES = 2 << 30  # a sound file, and the samples or pixels that are made of a recording


def expand(path: str | os.PathLike[str]) -> Path:
    """The path with `~` replaced; DataError where this machine knows no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{os.fspath(path)!r} has no meaning here: {error}") from error


def check_regular(path: Path, most: int | None = None, *, what: str = "load") -> None:
    """DataError for a pipe, a device or a socket, which may never end, and for a file of more than `most` bytes."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a folder")
        raise DataError(f"{path} must be a regular file, got {kind}", what)
    if most is not None and status.st_size > most:
        raise DataError(f"{path} must have at most {most} bytes, got {status.st_size}", what)


def bounded_bytes(path: Path, most: int = MAX_FILE_BYTES, *, what: str = "load") -> bytes:
    """All of a regular file of at most `most` bytes, not more even if it grows meanwhile."""
    check_regular(path, most, what=what)
    with path.open("rb") as file:
        return file.read(most)


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], expected: str, *, what: str = "load") -> Iterator[None]:
    """Inside, any failure is a DataError: `<what>: <path> cannot be read as <expected>: <reason>`.

    Decoders raise whatever comes to mind on a damaged file (struct.error, OverflowError, MemoryError, …): a list of
    kinds would never be whole. A DataError passes as it is.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{os.fspath(path)} cannot be read as {expected}: {reason(error)}", what) from error


def reason(error: Exception) -> str:
    """One line for a person, of at most 200 characters of what the reader said: some quote the file."""
    text = getattr(error, "strerror", None) or " ".join(str(error)[:2000].split())
    text = text if len(text) <= 200 else f"{text[:200]} …"
    plain = isinstance(error, (OSError, ValueError)) and text
    return text if plain else f"{type(error).__name__}: {text}" if text else type(error).__name__
