"""Checkpoints: folders that appear whole or not at all, of safetensors and JSON, that know when they are damaged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError

# What a run's folder holds.
CONFIG, MODEL, CHECKPOINTS, SAMPLES = "config.toml", "model.safetensors", "checkpoints", "samples"

STATE = "state.json"
FORMAT = "mgebm_fast.checkpoint"
VERSION = 1
_NAME = re.compile(r"step_(\d+)")
_TEMPORARY = ".tmp"
_CHUNK = 1 << 20


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def step_of(folder: Path) -> int:
    """The number in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def write(folder: Path, fill: Callable[[Path], None], state: Mapping[str, Any]) -> Path:
    """Make the checkpoint `folder`: `fill(path)` writes its files beside the target, which is then renamed into place.

    `state` is stored with the length and CRC-32 of every file, so that damage is seen when it is read. Files and
    folders are synchronised to the disk before the rename. On any failure what was at `folder` is still there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}{_TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        fill(temporary)
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        record = {"format": FORMAT, "version": VERSION, **state, "files": files}
        (temporary / STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            _synchronise(path)
        _synchronise(temporary)
        if folder.exists():  # damaged, or written again at the same step: a rename cannot replace a full folder
            old = temporary.with_name(temporary.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
            try:
                os.rename(temporary, folder)
            except BaseException:
                os.rename(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, folder)
        _synchronise(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def read(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files are all there and undamaged; CheckpointError names the file that is not."""
    path = folder / STATE
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a checkpoint, it has no {STATE}")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files = state["files"].items()
        known = state["format"] == FORMAT
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: truncated or not a checkpoint's state") from None
    if not known or state.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: written in format {state['format']} {state.get('version')}, need {FORMAT} {VERSION}"
        )
    for name, expected in files:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing from the checkpoint")
        found = _fingerprint(file)
        if found["bytes"] != expected["bytes"]:
            raise CheckpointError(f"{file}: truncated, {found['bytes']} bytes where {expected['bytes']} were written")
        if found != expected:
            raise CheckpointError(f"{file}: damaged, its checksum is not that of what was written")
    return state


def listed(root: Path) -> list[Path]:
    """The checkpoint folders in `root`, oldest first. Temporary and set-aside folders have other names."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def newest_whole(root: Path) -> tuple[tuple[Path, dict[str, Any]] | None, list[tuple[Path, CheckpointError]]]:
    """The newest undamaged checkpoint of `root` with its state, and each newer one with what is wrong with it."""
    faults: list[tuple[Path, CheckpointError]] = []
    for folder in reversed(listed(root)):
        try:
            return (folder, read(folder)), faults
        except CheckpointError as error:
            faults.append((folder, error))
    return None, faults


def prune(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for folder in listed(root)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove what interrupted writes left behind; a replaced folder whose successor never came is put back."""
    if not root.is_dir():
        return
    for path in list(root.iterdir()):
        if path.name.startswith(".step_") and path.name.endswith(f"{_TEMPORARY}.old"):
            target = root / path.name[1:].partition(".")[0]
            if not target.exists():
                os.rename(path, target)
                continue
        if path.name.startswith(".step_") and _TEMPORARY in path.name:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint that is not to count as one any more, and yet not to be lost; `why` ends its new name."""
    target = folder.with_name(f"{folder.name}.{why}")
    shutil.rmtree(target, ignore_errors=True)
    os.rename(folder, target)
    return target


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A plain safetensors file."""
    from safetensors.torch import save

    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated, or no safetensors file at all ({error})") from error


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that no second process trains into it; the lock goes with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"out: another process is training into {folder}") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming_a_full_disk(advice: Callable[[], str]) -> Iterator[None]:
    """Inside, an OSError that means "no space" says so, with `advice()` on how to go on. It stays an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        where = f" ({error.filename})" if error.filename else ""
        full = OSError(f"{what}{where}: {advice()}")
        full.errno = error.errno
        raise full from error


def _fingerprint(path: Path) -> dict[str, Any]:
    crc, length = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc, length = zlib.crc32(chunk, crc), length + len(chunk)
    return {"bytes": length, "crc32": f"{crc:08x}"}


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
