"""What `--out` may be: a file of a known ending, or a folder, in a place that can be written."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..files import clean

# Endings of file formats that are not written here: a path with one is an error, not the name of a folder.
_OTHER_FILES = set(".jpg .jpeg .gif .webp .bmp .tif .tiff .npz .zip .pt .mp4 .avi .wav".split())
IMAGE_FILES = (".png", ".npy")


def check_place(out: Path, option: str = "--out", *, folder: bool = False) -> None:
    """ValueError unless `out`, a file or with `folder` a folder of files, can be written; nothing is left behind."""
    if out.exists() and not out.is_file() and not out.is_dir():
        raise ValueError(f"{option}: must be a regular file or new, got {out}, a pipe, a socket or a device")
    target = Path(os.path.realpath(out)) if out.is_symlink() else out.absolute()  # a link stays one
    place = target if folder else target.parent
    missing = [path for path in (place, *place.parents) if not os.path.exists(path)]
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
        clean(target.parent, target.name)
    except OSError as error:
        # os.access is not enough: for root it reports /proc as writable
        above = next(path for path in (place, *place.parents) if os.path.exists(path))
        raise ValueError(
            f"{option}: must be where a file can be written, got {out}, but in {above} none can: {error.strerror}"
        ) from None
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()


def check_out(
    out: Path, overwrite: bool, grids: bool, files: Sequence[str] = IMAGE_FILES, *, what: str = "samples",
    ours: str | None = None, attempt: bool = True,
) -> str:  # fmt: skip
    """The kind of output that a path means, before any work is done; ValueError where it cannot be written.

    `ours`: a pattern of the names of `what`; a folder with nothing else is as good as an empty one. `attempt`: also
    `check_place`, which of several processes only one may do.
    """
    kind = out.suffix.lower() if out.suffix.lower() in files else "folder"
    endings = f"end in {', '.join(files[:-1])} or {files[-1]}, or " if files else ""
    wanted = f"must {endings}be a folder"
    above = next(path for path in out.absolute().parents if os.path.exists(path))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"--out: must be where a file can be written, got {out}, and {above} is not such a folder")
    if kind != "folder" and out.is_dir():
        raise ValueError(f"--out: must be a file to end in {kind}, got the folder {out}")
    if kind == ".npy" and grids:
        raise ValueError(f"--out: must be a .png or a folder to hold every grid (--grids), got {out}")
    if kind == "folder" and out.suffix.lower() in _OTHER_FILES:
        raise ValueError(f"--out: {wanted}, got {out}")
    if kind == "folder" and out.exists():
        if not out.is_dir():
            raise ValueError(f"--out: {wanted}, got the file {out}")
        held = [path.name for path in out.iterdir() if not (ours and re.fullmatch(ours, path.name) and path.is_file())]
        if held and not overwrite:
            earlier = f" or that of an earlier {what}" if ours else ""
            raise ValueError(
                f"--out: must be a new or empty folder{earlier}, got {out}, which holds {min(held)} (--overwrite "
                f"replaces its {what} alone)"
            )
    if attempt:
        check_place(out, folder=out.is_dir())
    return kind
