"""What `--out` may be, for the commands that write samples: a file of a known ending, or a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# Names of files, not of folders: who gives one wants a format that is not written here.
_OTHER_FILES = set(".jpg .jpeg .gif .webp .bmp .tif .tiff .npz .zip .pt .mp4 .avi .wav".split())
IMAGE_FILES = (".png", ".npy")


def check_out(out: Path, overwrite: bool, grids: bool, files: Sequence[str] = IMAGE_FILES) -> str:
    """The kind of output that a path means, before any work is done; ValueError where it cannot be written."""
    kind = out.suffix.lower() if out.suffix.lower() in files else "folder"
    wanted = f"must end in {', '.join(files[:-1])} or {files[-1]}, or be a folder"
    above = next(path for path in out.absolute().parents if path.exists())
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
        if any(out.iterdir()) and not overwrite:
            raise ValueError(
                f"--out: must be a new or empty folder, got {out}, which is not (--overwrite replaces its samples)"
            )
    return kind
