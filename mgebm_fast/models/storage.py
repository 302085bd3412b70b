"""Model files: safetensors with the configuration as JSON in the metadata; nothing is ever unpickled.

Beside a run's final model stands model.json with the length and CRC-32 of model.safetensors, and in a checkpoint
state.json has them: where either is there, a file that is not what was written is refused. Tensors that no trained
model has (`fault_of`) are neither written nor read.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..errors import CheckpointError, DivergenceError

# One key: safetensors writes several in random order, and equal models should give equal files.
KEY = "mgebm_fast"
FORMAT = "MultiGrid"
VERSION = 1
EMA = "ema."
MODEL_FILE = "model.safetensors"
CHECKSUM_FILE, STATE_FILE = "model.json", "state.json"
MOST_JSON = 4 << 20  # bytes
# The largest |entry| of a weight, a running mean or a stored chain, and of what is a square (running variances). A
# trained net has weights around 1; float32 ends at 3e38.
LARGEST, LARGEST_SQUARE = 1e8, 1e16


def write(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], config: Mapping[str, Any], kind: str = FORMAT
) -> None:
    """Write tensors and config of a model of the class named `kind` to `path`, atomically. DivergenceError where they
    are not sane."""
    from safetensors.torch import save

    if fault := fault_of(tensors):
        raise DivergenceError(f"save: {fault}")
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in _apart(tensors).items()},
        metadata={KEY: json.dumps({"format": kind, "version": VERSION, "config": config})},
    )
    files.write_bytes(path, data)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with copies of those that share memory with an earlier one (tied weights)."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def write_checked(path: Path, save: Callable[[Path], None]) -> None:
    """Have `save` write the model file `path`, and its length and checksum beside it.

    model.json lists those of the file before as well, until the next time: whenever the process is killed, the model
    that lies there is in the list.
    """
    temporary = files.temporary_beside(path)
    files.remove(temporary)
    try:
        save(temporary)
        known = [files.fingerprint(temporary)]
        if files.is_regular(path):
            known.append(files.fingerprint(path))
        record = {"format": "mgebm_fast.model", "version": VERSION, "files": known}
        files.write_bytes(path.with_name(CHECKSUM_FILE), (json.dumps(record) + "\n").encode())
        os.replace(temporary, path)
        files.synchronise(path.parent)
    finally:
        files.remove(temporary)


def fault_of(tensors: Mapping[str, Tensor], largest: float = LARGEST, square: float = LARGEST_SQUARE) -> str:
    """What is wrong with the first tensor that is not sane, or "": every entry must be finite and |entry| <= `largest`,
    or `square` for running variances and second moments."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        bound = square if name.endswith(("running_var", "exp_avg_sq")) else largest
        low, high = (float(value) for value in torch.aminmax(tensor.detach()))
        if not -bound <= low <= high <= bound:
            size = max(-low, high)
            what = f"entries up to {size:.3g}" if size < float("inf") else "NaN or infinite entries"
            return f"{name} must be finite and at most {bound:g} in size, got {what}"
    return ""


def read_one_of(path: str | os.PathLike, kinds: Sequence[str]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(kind, config, tensors) of a model of one of `kinds`, named by the first where it is of none of them."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError("there is no such model file", path)
    if not path.is_file():
        raise CheckpointError("must be a model file, got a folder, a pipe or a device", path)
    _check_written(path)
    described, tensors = _parts(path, kinds)
    config = described.get("config")
    if not isinstance(config, dict):
        raise CheckpointError("the model's configuration is missing or unreadable", path)
    if fault := fault_of(tensors):
        raise CheckpointError(fault, path)
    return described["format"], config, tensors


def _parts(path: Path, kinds: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the file says of itself, of a known kind and version, and its tensors."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            described = _description((file.metadata() or {}).get(KEY, "{}"))
            kind = described.get("format", "")
            if not isinstance(kind, str) or kind not in kinds:
                other = f" but a {kind}" if kind else ""
                raise CheckpointError(f"this safetensors file holds no {kinds[0]} model{other}", path)
            if described.get("version") != VERSION:
                raise CheckpointError(
                    f"{path}: written as version {described.get('version')} of the format, this program reads {VERSION}"
                )
            return described, {name: file.get_tensor(name) for name in file.keys()}
    except CheckpointError:
        raise
    except Exception as error:  # a reader may raise anything for a damaged file
        raise CheckpointError(f"truncated, or no safetensors file at all ({error})", path) from error


def _check_written(path: Path) -> None:
    """CheckpointError where model.json or state.json beside the file says that another one was written."""
    known: list[Any] = []
    for name in (CHECKSUM_FILE, STATE_FILE) if path.name == MODEL_FILE else ():
        if not os.path.lexists(beside := path.with_name(name)):
            continue
        try:
            record = json.loads(files.read_regular(beside, MOST_JSON))
            if str(record["format"]).startswith(KEY):  # else it is a file of another program
                known += record["files"] if name == CHECKSUM_FILE else [record["files"][MODEL_FILE]]
                if not known:
                    raise ValueError("it lists none")
        except Exception as error:
            raise CheckpointError(f"{beside}: damaged, cannot tell whether {MODEL_FILE} is whole ({error})") from None
    if not known:
        return
    try:
        sizes = [int(one["bytes"]) for one in known]
        actual = files.fingerprint(path.resolve(), max(sizes))
    except (OSError, TypeError, KeyError, ValueError, OverflowError) as error:
        raise CheckpointError(f"cannot be compared with its checksum: {error}", path) from None
    if actual in known:
        return
    if actual["bytes"] not in sizes:
        raise CheckpointError(f"truncated, {actual['bytes']} bytes where {sizes[0]} were written", path)
    raise CheckpointError("damaged, its checksum is not that of what was written", path)


def _description(text: str) -> dict[str, Any]:
    try:
        described = json.loads(text)
    except (ValueError, RecursionError):
        described = None
    return described if isinstance(described, dict) else {}


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights to sample with: those under "ema." in place of the ones they average, the rest as stored."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(EMA)}
    plain.update({name.removeprefix(EMA): tensor for name, tensor in tensors.items() if name.startswith(EMA)})
    return plain


def find(path: str | os.PathLike) -> Path:
    """The model file that `path` means: itself, a folder's model.safetensors, or that of a run's newest checkpoint.

    Warns where a newer checkpoint has lost its model. CheckpointError where there is none; nothing inside a folder is
    followed if it is a link, or opened if it is no regular file.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if os.path.lexists(path / MODEL_FILE):
        return check_regular(path / MODEL_FILE)
    checkpoints = path if path.name == "checkpoints" else path / "checkpoints"
    named = (path for path in checkpoints.glob("step_*") if re.fullmatch("step_[0-9]+", path.name))
    every = sorted(named, key=lambda path: int(path.name[5:]))
    whole = [p for p in every if files.is_folder(p) and files.is_regular(p / MODEL_FILE)]
    if not whole:
        raise CheckpointError(f"no model here: neither {MODEL_FILE} nor checkpoints/step_*/{MODEL_FILE}", path)
    if whole[-1] != every[-1]:
        warnings.warn(f"{path}: {every[-1].name} holds no model; the model is that of {whole[-1].name}", stacklevel=3)
    return whole[-1] / MODEL_FILE


def check_regular(path: Path) -> Path:
    """`path` itself; CheckpointError where it is a link, or no regular file."""
    if not files.is_regular(path):
        what = "a symbolic link" if path.is_symlink() else "a folder, a pipe or a device"
        raise CheckpointError(f"must be a regular file, got {what}", path)
    return path
