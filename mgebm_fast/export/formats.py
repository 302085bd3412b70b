"""`export`: what leaves a run, each checked against the model before it is written."""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import keyword
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..errors import Refused
from ..models import EnergyModel, Frame, Model
from ..models.storage import fault_of
from . import plain
from .describe import plain_model, plain_tensors
from .script import script

FORMATS = {
    "state-dict": ".safetensors",
    "torchscript": ".pt",
    "onnx": ".onnx",
    "sampler": ".py",
    "pretrained": "",
}  # the ending of what is written; "" for a folder
INSTALL_ONNX = 'pip install "mgebm_fast[onnx]"'
_IMPORTED = {"PIL", "numpy", "safetensors", "torch"}  # by a sampler, beside the standard library
_CLOSE = 1e-4  # of the largest energy: plain convolutions and ours round differently


def export(model: Model, to: str, out: str | os.PathLike[str]) -> list[Path]:
    """Write a model for programs that do not have mgebm_fast; the files written.

    Args:
        to: what is written.
            "state-dict": X.safetensors, weights by the names of `nn.Sequential`s, whose code is in the file's metadata
            "torchscript", "onnx": X.pt, X.onnx, energies (N, sizes), coarse to fine, of x (N, C, *size) float32
            "sampler": X.py, energies and chains in one file, and X.safetensors beside it
            "pretrained": a folder as `model.save_pretrained` writes it
        out: the file, or the folder.

    Where batch statistics couple images, the first three hold the model under its running statistics (`freeze_norm`), a
    sampler keeps them, as its chains need. Weights are divided by their spectral norm.

    Raises ValueError: a model without energies, nets of one's own, a Frame with Hamiltonian chains as a sampler,
    another ending of `out`. ModuleNotFoundError: onnx is not installed.
    """
    if to not in FORMATS:
        raise Refused("to", f"be one of {', '.join(FORMATS)}", repr(to), "export")
    out = Path(out)
    if FORMATS[to] and out.suffix != FORMATS[to]:
        raise Refused("out", f"end in {FORMATS[to]} for {to}", str(out), "export")
    if to == "pretrained":
        return model.save_pretrained(out)
    if to == "onnx":
        _need_onnx()
    described = plain_model(model)
    assert isinstance(model, EnergyModel)
    if to == "sampler" and isinstance(model, Frame) and model.leapfrog_steps is not None:
        raise Refused("run", "have Langevin chains to be a sampler", "a Frame with Hamiltonian ones", "export")
    if model.coupled and to != "sampler":
        model = model.freeze_norm()
        described = plain_model(model)
    tensors = plain_tensors(model, start=to == "sampler")
    energies = _checked(model, described, tensors)
    contents = _WRITERS[to](energies, described, tensors, out)
    files.make_folder(out.parent)
    return [files.write_bytes(path, data) for path, data in contents.items()]


def _checked(model: EnergyModel, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> plain.Energies:
    """The plain energies with their weights, found equal to the model's on images of noise."""
    if fault := fault_of(tensors):
        raise ValueError(f"export: {fault}")
    energies = plain.Energies(dict(described)).requires_grad_(False).eval()
    energies.load_state_dict({name: t for name, t in tensors.items() if name.startswith("size_")})
    x = _example(described)
    expected = torch.stack(list(model.energies(x).values()), 1).cpu()
    _check_close(energies(x), expected)
    return energies


def _check_close(found: Tensor, expected: Tensor) -> None:
    apart, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not apart <= _CLOSE * (scale + 1):
        raise RuntimeError(f"export: energies must be the model's, got {apart:.3g} apart at a size of {scale:.3g}")


def _example(described: Mapping[str, Any]) -> Tensor:
    low, high = described["value_range"]
    draw = torch.Generator().manual_seed(0)
    return torch.rand(3, *described["shape"], generator=draw) * (high - low) + low


def how_to_load(energies: plain.Energies, described: Mapping[str, Any], path: str) -> str:
    """Python that rebuilds the net of every size from torch.nn alone, as `nets`: the energy at a size, of block means x
    there, is −nets[size](x).sum(1)."""
    lines = ["from safetensors.torch import load_file", "from torch import Tensor, nn", "", ""]
    if any(isinstance(module, plain.Residual) for module in energies.modules()):
        lines += [inspect.getsource(plain.Residual), ""]
    lines.append(f"weights = load_file({path!r})")
    lines.append("nets = {")
    for net, modules in zip(described["nets"], energies.values(), strict=True):
        lines.append(f"    {net['size'][-1]}: {_code(nn.Sequential(*modules.children()))},")
    lines += [
        "}",
        "for size, net in nets.items():",
        '    prefix = f"size_{size}."',
        "    net.load_state_dict({k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)})",
    ]
    return "\n".join(lines) + "\n"


def _code(module: nn.Module) -> str:
    """The Python that makes a module, or one like it."""
    if not isinstance(module, (nn.Sequential, plain.Residual)):
        return f"nn.{module!r}"
    name = "nn.Sequential" if isinstance(module, nn.Sequential) else "Residual"
    return f"{name}({', '.join(map(_code, module.children()))})"


def _state_dict(energies: plain.Energies, described: Any, tensors: Any, out: Path) -> dict[Path, bytes]:
    from safetensors.torch import save

    metadata = {"model": json.dumps(described), "how_to_load": how_to_load(energies, described, out.name)}
    return {out: save(dict(tensors), metadata)}


def _torchscript(energies: plain.Energies, described: Any, tensors: Any, out: Path) -> dict[Path, bytes]:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        traced = torch.jit.trace(energies, _example(described)[:2])
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        again = torch.jit.load(buffer)
        _check_close(again(_example(described)), energies(_example(described)))
    return {out: buffer.getvalue()}


def _need_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"export: onnx needs {' and '.join(missing)}: {INSTALL_ONNX}")


def _onnx(energies: plain.Energies, described: Any, tensors: Any, out: Path) -> dict[Path, bytes]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    x = _example(described)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                energies, (x,), dynamo=True, input_names=["x"], output_names=["energies"],
                dynamic_shapes={"x": {0: torch.export.Dim("images", min=1)}}, verbose=False,
            )  # fmt: skip
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
    assert program is not None
    proto = program.model_proto
    onnx.checker.check_model(proto)
    (found,) = ReferenceEvaluator(proto).run(None, {"x": x[:2].numpy()})
    _check_close(torch.from_numpy(found), energies(x[:2]))
    return {out: proto.SerializeToString()}


def _sampler(energies: plain.Energies, described: Any, tensors: Any, out: Path) -> dict[Path, bytes]:
    from safetensors.torch import save

    if not out.stem.isidentifier() or keyword.iskeyword(out.stem):
        raise Refused("out", "be named as a Python module, letters, digits and _", str(out), "export")
    if out.stem in sys.stdlib_module_names | _IMPORTED:
        raise Refused("out", f"have another name than a module, which it would hide: {out.stem}", str(out), "export")
    if empty := [name for name in ("colours", "bank") if name in tensors and not len(tensors[name])]:
        raise Refused("run", f"be trained, with {empty[0]} that chains start from", "a model that has none", "export")
    return {out.with_suffix(".safetensors"): save(dict(tensors)), out: script(described, out.stem).encode()}


_Writer = Callable[[plain.Energies, Any, Any, Path], "dict[Path, bytes]"]
_WRITERS: dict[str, _Writer] = {
    "state-dict": _state_dict, "torchscript": _torchscript, "onnx": _onnx, "sampler": _sampler
}  # fmt: skip
