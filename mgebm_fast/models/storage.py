"""Model files: safetensors with the configuration as JSON in the metadata; nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..files import write_bytes

# One key: safetensors writes several in random order, and equal models should give equal files.
KEY = "mgebm_fast"
FORMAT = "MultiGrid"
VERSION = 1
EMA = "ema."
MODEL_FILE = "model.safetensors"


def write(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], config: Mapping[str, Any], kind: str = FORMAT
) -> None:
    """Write tensors and config of a model of the class named `kind` to `path`, whole or not at all."""
    from safetensors.torch import save

    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={KEY: json.dumps({"format": kind, "version": VERSION, "config": config})},
    )
    write_bytes(path, data)


def read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of a `MultiGrid`; tensors stay on the CPU. Raises CheckpointError with one clear reason."""
    return read_one_of(path, (FORMAT,))[1:]


def read_one_of(path: str | os.PathLike, kinds: Sequence[str]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(kind, config, tensors) of a model of one of `kinds`, named by the first where it is of none of them."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such model file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            described = _description((file.metadata() or {}).get(KEY, "{}"))
            kind = str(described.get("format", ""))
            if kind not in kinds:
                other = f" but a {kind}" if kind else ""
                raise CheckpointError(f"{path}: this safetensors file holds no {kinds[0]} model{other}")
            if described.get("version") != VERSION:
                raise CheckpointError(
                    f"{path}: written as version {described.get('version')} of the format, this program reads {VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated, or no safetensors file at all ({error})") from error
    config = described.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: the model's configuration is missing or unreadable")
    return kind, config, tensors


def _description(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    return found if isinstance(found, dict) else {}


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights to sample with: those under "ema." in place of the ones they average, the rest as stored."""
    plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(EMA)}
    plain.update({name.removeprefix(EMA): tensor for name, tensor in tensors.items() if name.startswith(EMA)})
    return plain


def find(path: str | os.PathLike) -> Path:
    """The model file that `path` means: itself, a folder's model.safetensors, or that of a run's newest checkpoint.

    Warns where a newer checkpoint has lost its model.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    checkpoints = path if path.name == "checkpoints" else path / "checkpoints"
    every = sorted((p for p in checkpoints.glob("step_*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
    found = [p for p in every if (p / MODEL_FILE).is_file()]
    if not found:
        raise CheckpointError(f"{path}: no model here: neither {MODEL_FILE} nor checkpoints/step_*/{MODEL_FILE}")
    if found[-1] != every[-1]:
        warnings.warn(f"{path}: {every[-1].name} holds no model; the model is that of {found[-1].name}", stacklevel=3)
    return found[-1] / MODEL_FILE
