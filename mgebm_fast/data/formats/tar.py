"""Tar archives of images: members listed within bounds, hard links resolved, a missing end reported."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..foreign import reading
from .layout import inside

_EXTENSION_TYPES = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
_MAX_EXTENSION_BYTES = 1 << 20  # extended headers (long names, pax records) are read whole

# The exception that `TarFile.next` raises for a bad header anywhere in an archive; public, but missing in stubs.
_HeaderError = tarfile.SubsequentHeaderError  # type: ignore[attr-defined]


class _Member(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:
            raise _HeaderError(f"a member of {info.size} bytes")
        if info.type in _EXTENSION_TYPES and info.size > _MAX_EXTENSION_BYTES:
            raise _HeaderError(f"an extended header of {info.size} bytes")
        return info


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tarfile.TarFile]:
    with tarfile.open(path, tarinfo=_Member) as archive:
        yield archive


def contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """All bytes of a file of the archive; none of what is no file."""
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


def members(path: Path) -> tuple[list[tarfile.TarInfo], str]:
    """All members in the order of the archive, and what is wrong with its end ("" where nothing is).

    DataError where it cannot be read, or has a header that would be read without end or in more memory than it says.
    """
    infos: list[tarfile.TarInfo] = []
    with reading(path, "a tar archive"), opened(path) as archive:
        before = -1
        while (info := archive.next()) is not None:
            if archive.offset <= before:
                raise tarfile.ReadError(f"the size of {info.name[:200]} leads back in the archive")
            before = archive.offset
            infos.append(info)
            archive.members.clear()  # type: ignore[attr-defined]  # it keeps a list of its own
        file: Any = archive.fileobj
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
    whole = len(end) == tarfile.BLOCKSIZE and not any(end)
    return infos, "" if whole else f"no mark of the end after {len(infos)} members: cut short or damaged"


def resolve_links(found: list[tarfile.TarInfo]) -> list[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    """(member, file that holds its data) of all but folders, by the place of the data: one pass forward reads them.

    A hard link stands right after the file it names; one that names none is its own.
    """
    files: dict[str, tarfile.TarInfo] = {}
    pairs = []
    for info in found:
        target = files.get(inside(info.linkname), info) if info.islnk() else info
        if target.isreg():
            files[inside(info.name)] = target
        if not info.isdir():
            pairs.append((info, target))
    return sorted(pairs, key=lambda pair: pair[1].offset_data)
