"""Which sources a compiled module belongs to: a hash of csrc/, compiled into it and compared when it is loaded.

Read by setup.py too, so without torch and without the package.
"""

from __future__ import annotations

import hashlib
import shlex
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
    root = source_root(package)
    if root is not None:
        if built == of_sources(root / "csrc"):
            return ""
        return f"it was compiled from other sources than {root / 'csrc'}. Reinstall: {install_command(root)}"
    record = package / RECORD
    if not record.is_file() or built == record.read_text().strip():
        return ""
    return (
        f"it was compiled for another version than the Python files in {package}. Reinstall: "
        "pip install --force-reinstall --no-deps mgebm_fast (or the path of its sources or wheel)"
    )


def install_command(root: Path) -> str:
    return f"pip install -e {shlex.quote(str(root))}"
