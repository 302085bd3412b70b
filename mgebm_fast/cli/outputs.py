"""What `--out` may be: a file of a known ending, or a folder, in a place that can be written; and samples there."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import clean

if TYPE_CHECKING:
    import numpy as np

# Endings of file formats that are not written here: a path with one is an error, not the name of a folder.
_OTHER_FILES = set(".jpg .jpeg .gif .webp .bmp .tif .tiff .npz .zip .pt .mp4 .avi .wav".split())
IMAGE_FILES = (".png", ".npy")
MIN_CELL = 40  # pixels of the longer side of an image in a picture: 8 × 8 digits are enlarged, 64 × 64 photos are not
_OURS = re.compile(r"sample_\d+\.png")


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


def _write_png(out: Path, images: dict[int, np.ndarray], numbers: Sequence[int], points: int | None) -> None:
    from ..pictures import image_grid, labelled_panel, save_png

    if len(images) > 1:
        save_png(out, labelled_panel([(f"{size} × {size}", batch) for size, batch in images.items()]))
        return
    ((size, batch),) = images.items()
    save_png(out, image_grid(batch, columns=points, scale=max(1, -(-MIN_CELL // size))))


def _write_npy(out: Path, images: dict[int, np.ndarray], numbers: Sequence[int], points: int | None) -> None:
    from ..files import write_npy

    (batch,) = images.values()
    write_npy(out, batch)


def _write_folder(out: Path, images: dict[int, np.ndarray], numbers: Sequence[int], points: int | None) -> None:
    """One PNG a sample, named by its number, made in a folder beside `out` and renamed; others there are kept."""
    from ..files import folder_beside, synchronise
    from ..pictures import save_png

    out = out.resolve()  # a link to a folder stays one
    with folder_beside(out) as temporary:
        for size, batch in images.items():
            folder = temporary / f"size_{size:03d}" if len(images) > 1 else temporary
            folder.mkdir(exist_ok=True)
            digits = max(5, len(str(max(numbers))))
            for i, picture in zip(numbers, batch, strict=True):
                pixels = picture[:3] if len(picture) >= 3 else picture[:1]
                save_png(folder / f"sample_{i:0{digits}d}.png", pixels.transpose(1, 2, 0), durable=False)
        synchronise(temporary, inside=True)
        if out.is_dir() and any(out.iterdir()):
            _replace_samples(temporary, out)
        else:
            os.replace(temporary, out)
        synchronise(out.parent)


def _replace_samples(new: Path, out: Path) -> None:
    """Replace files with the names that this command gives; other files in the folder are kept."""
    for old in [*out.glob("sample_*.png"), *out.glob("size_*/sample_*.png")]:
        if _OURS.fullmatch(old.name):
            old.unlink()
    for path in sorted(new.rglob("*.png")):
        target = out / path.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)


SAMPLE_WRITERS = {".png": _write_png, ".npy": _write_npy, "folder": _write_folder}
