"""Checkpoints: folders of safetensors and JSON that are written atomically, and that know when they are damaged.

A run's folder is input like any other: what is read here follows no link, opens regular files only, and reads no more
than the length that was written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import files
from ...checks import is_int, is_number
from ...errors import CheckpointError, DivergenceError
from ...models.storage import MOST_JSON, STATE_FILE, check_regular, fault_of

STATE = STATE_FILE
BEST = "best"  # beside the numbered ones: the state of the lowest measure, which pruning leaves alone
FORMAT = "mgebm_fast.checkpoint"
VERSION = 2  # 1 had no checksum of state.json itself
# Bounds on |entry| of what optimisers keep: gradients and their means, and the means of their squares.
LARGEST_MOMENT, LARGEST_SQUARE = 1e16, 1e32
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the limit of this process (ulimit -f)",
}
_NAME = re.compile(r"step_(\d+)")
_SET_ASIDE = re.compile(r"step_(\d+)(\.\w+)?")


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def step_of(folder: Path) -> int:
    """The number in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step_"))


def is_set_aside(folder: Path) -> bool:
    """Whether a checkpoint was undone or is damaged, by the name that `set_aside` gave it."""
    return bool(_SET_ASIDE.fullmatch(folder.name)) and not _NAME.fullmatch(folder.name)


def write(folder: Path, fill: Callable[[Path], None], state: Mapping[str, Any]) -> Path:
    """Make the checkpoint `folder`: `fill(path)` writes its files beside the target, which is then renamed into place.

    `state` is stored with the length and CRC-32 of every file, and of itself, so that damage is seen when it is read.
    Files and folders are synchronised to the disk before the rename. On any failure what was at `folder` is still
    there.
    """
    files.make_folder(folder.parent)
    with files.folder_beside(folder) as temporary:
        fill(temporary)
        written = {path.name: files.fingerprint(path) for path in sorted(temporary.iterdir())}
        record = {"format": FORMAT, "version": VERSION, **state, "files": written}
        record["crc32"] = checksum(record)
        (temporary / STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        files.synchronise(temporary, inside=True)
        if os.path.lexists(folder):  # damaged, or written again at the same step: a rename cannot replace a full folder
            old = temporary.with_name(temporary.name + ".old")
            files.remove(old)
            os.rename(folder, old)
            try:
                os.rename(temporary, folder)
            except BaseException:
                os.rename(old, folder)
                raise
            files.remove(old)
        else:
            os.rename(temporary, folder)
        files.synchronise(folder.parent)
    return folder


def checksum(record: Mapping[str, Any]) -> str:
    """CRC-32 of a record as JSON, 8 hex digits: the same for the record and for what is read from its file."""
    return f"{zlib.crc32(json.dumps(record, sort_keys=True, separators=(',', ':')).encode()):08x}"


def read(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files are all there and undamaged; CheckpointError names the file that is not."""
    path = folder / STATE
    if folder.is_symlink() and _NAME.fullmatch(folder.name):
        raise CheckpointError("must be a folder, got a symbolic link", folder)
    if not os.path.lexists(path):
        raise CheckpointError(f"not a checkpoint, it has no {STATE}", folder)
    with damage_named(path, "not a checkpoint's state"):
        state = json.loads(files.read_regular(path, MOST_JSON))
        known, version = state["format"] == FORMAT, state.get("version")
        if not known or version not in (1, VERSION):
            raise CheckpointError(f"written in format {state['format']} {version}, need {FORMAT} {VERSION}", path)
        if version != 1 and state.pop("crc32", None) != checksum(state):
            raise CheckpointError("damaged or changed, its checksum is not that of what was written", path)
        listed_files, mark, measure = dict(state["files"]), state.get("metrics"), state.get("measure")
        numbers = is_int(state["iteration"], 0) and (mark is None or is_int(mark["bytes"], 0))
        if not numbers or not isinstance(state.get("rollback", {}), dict) or not is_number(measure or 0):
            raise CheckpointError("iteration, metrics, rollback or measure is not what a run writes", path)
    for name, expected in listed_files.items():
        file = folder / name
        if name != Path(name).name or name in (".", ".."):
            raise CheckpointError(f"files must be names of this folder, got {name!r}", path)
        if not os.path.lexists(file):
            raise CheckpointError("missing from the checkpoint", file)
        with damage_named(file, "unreadable"):
            actual = files.fingerprint(check_regular(file), expected["bytes"])
        if actual["bytes"] != expected["bytes"]:
            raise CheckpointError(f"truncated, {actual['bytes']} bytes where {expected['bytes']} were written", file)
        if actual != expected:
            raise CheckpointError("damaged, its checksum is not that of what was written", file)
    named = _SET_ASIDE.fullmatch(folder.name)
    step = state.get("iteration")
    if named and step != int(named[1]):
        raise CheckpointError(f"must be of update {int(named[1])}, as its folder's name says, got {step!r}", path)
    return state


@contextlib.contextmanager
def damage_named(path: Path, what: str, keep: type[Exception] = CheckpointError) -> Iterator[None]:
    """Inside, whatever a damaged or hostile file makes its reader raise becomes a CheckpointError that names it; errors
    of the class `keep` stay what they are."""
    try:
        yield
    except (CheckpointError, MemoryError, keep):
        raise
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path) from error
    except Exception as error:
        raise CheckpointError(f"truncated or {what} ({type(error).__name__}: {error})", path) from error


def listed(root: Path) -> list[Path]:
    """The checkpoint folders in `root`, oldest first. Temporary and set-aside folders have other names; links are not
    followed."""
    if not files.is_folder(root):
        return []
    folders = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and files.is_folder(path)]
    return sorted(folders, key=step_of)


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
        files.remove(folder)


def clean(root: Path) -> None:
    """Remove what interrupted writes left behind; a replaced folder whose successor never came is put back."""
    if not files.is_folder(root):
        return
    for path in list(root.iterdir()):
        if path.name.startswith((".step_", f".{BEST}.")) and path.name.endswith(".tmp.old"):
            target = root / path.name[1:].partition(".")[0]
            if not target.exists():
                os.rename(path, target)
                continue
        if path.name.startswith((".step_", f".{BEST}.")) and ".tmp" in path.name:
            files.remove(path)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint that is not to count as one any more, and yet not to be lost; `why` ends its new name."""
    target = folder.with_name(f"{folder.name}.{why}")
    files.remove(target)
    os.rename(folder, target)
    return target


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A plain safetensors file. DivergenceError where an entry is not finite, or beyond the bounds above."""
    from safetensors.torch import save

    if fault := fault_of(tensors, LARGEST_MOMENT, LARGEST_SQUARE):
        raise DivergenceError(f"training: {fault}")
    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    with damage_named(path, "no safetensors file at all"):
        tensors = load(check_regular(path).read_bytes())
    if fault := fault_of(tensors, LARGEST_MOMENT, LARGEST_SQUARE):
        raise CheckpointError(fault, path)
    return tensors


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that no second process trains into it; the lock goes with the process."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
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
    """Inside, an OSError that means "no space", or a larger file than the process may write, says so, with `advice()`
    on how to go on. It stays an OSError."""
    try:
        yield
    except OSError as error:
        if (what := _FULL.get(error.errno or 0)) is None:
            raise
        file = f" ({error.filename})" if error.filename else ""
        full = OSError(f"{what}{file}: {advice()}")
        full.errno = error.errno
        raise full from error
