"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_bytes(path: str | os.PathLike[str], data: bytes | memoryview, *, durable: bool = True) -> Path:
    """Write a file beside its target and rename it over the target; `durable`: once it is on the disk itself."""
    path = Path(path)
    # beside the target, since a rename is atomic within one file system only
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk names no file, and nobody asked for the temporary one
            error.filename, error.filename2 = str(path), None
        raise
    return path
