"""Which sources a compiled module belongs to: a hash of csrc/, compiled into it and compared when it is loaded.

Read by setup.py too, so without torch and without the package.
"""

from __future__ import annotations

import hashlib
import shlex
import struct
from pathlib import Path

RECORD = "_csrc.sha256"  # in an installed package, which has no csrc/ beside it
_ENDINGS = {".h", ".cuh", ".cpp", ".cu"}


def of_sources(csrc: Path) -> str:
    """The hash of the names and contents of the sources below `csrc`."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in _ENDINGS):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def source_root(package: Path) -> Path | None:
    """The checkout that `package` (the folder of mgebm_fast) stands in; None for an installed copy."""
    root = package.parent
    return root if (root / "csrc/op_table.h").is_file() and (root / "setup.py").is_file() else None


def why_stale(package: Path, built: str) -> str:
    """Why a compiled module made from sources of hash `built` is not `package`'s own; empty where it is."""
    root, record = source_root(package), package / RECORD
    if root is not None:
        wanted, reason = of_sources(root / "csrc"), f"it was compiled from other sources than {root / 'csrc'}"
    elif record.is_file():
        wanted = record.read_text().strip()
        reason = f"it was compiled for another version than the Python files in {package}"
    else:
        wanted, reason = "", f"{package} was copied, without {RECORD}, which says what it was compiled from"
    return "" if built == wanted else f"{reason}. Reinstall: {how_to_install(package)}"


def why_cut(path: Path) -> str:
    """Why an ELF module ends early: to load such a file is a bus error. Empty where it is whole, or of another kind."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":  # the loader refuses what is shorter or no ELF
            return ""
        table, entry, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<2H", head, 54)
        file.seek(table)
        segments = file.read(entry * count)
    ends = [sum(struct.unpack_from("<Q16xQ", segments, at + 8)) for at in range(0, len(segments) - 39, max(entry, 40))]
    whole = max([table + entry * count, *ends])
    return f"{path} is cut short: {size} of {whole} bytes" if size < whole else ""


def how_to_install(package: Path) -> str:
    """What to run where `package` has no compiled module that it can use."""
    root = source_root(package)
    if root is None:
        return "pip install --force-reinstall --no-deps mgebm_fast (or the path of its sources or wheel)"
    return f"pip install -e {shlex.quote(str(root))}"
