"""An exported sampler: one readable Python file, made of the functions of `plain` that a model needs."""

from __future__ import annotations

import inspect
import pprint
from collections.abc import Mapping
from typing import Any

from . import plain

_IMPORTS = """\
from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
"""


def script(model: Mapping[str, Any], name: str) -> str:
    """The source of a sampler of `model` (`describe.plain_model`); its weights are in `name`.safetensors beside it."""
    start = f"start_{model['start']}"
    kinds = {"stages" in net for net in model["nets"]}
    layers: dict[bool, list[Any]] = {True: [plain.Residual, plain.residual_layers], False: [plain.stacked_layers]}
    parts: list[Any] = [plain.Energy, *(part for kind in kinds for part in layers[kind])]
    if len(kinds) > 1:
        parts.append(plain.layers_of)
    parts += [plain.Energies, *([plain.Generator] if "generator" in model else []), getattr(plain, start)]
    parts += [plain.langevin, plain.enlarged, plain.cascade, plain.load]
    sources = [inspect.getsource(part) for part in parts]
    if len(kinds) == 1:
        sources.insert(parts.index(plain.Energies), f"layers_of = {layers[kinds.pop()][-1].__name__}\n")
    sources.append(f"start = {start}\n")
    sources += [inspect.getsource(part) for part in (plain.sample, plain.save, plain.main)]
    shape = ", ".join(map(str, model["shape"]))
    low, high = model["value_range"]
    head = f'''"""Samples and energies of a {model["kind"]} model in plain PyTorch, by `mgebm export --to sampler`.

    python {name}.py --num 16 --seed 0 --out samples.{"png" if len(model["shape"]) == 3 else "npy"}

Energies of images x, float32 (N, {shape}) from {low:g} to {high:g}, low where they are likely:

    from {name} import MODEL, load
    energies, _ = load(MODEL, "{name}.safetensors")
    energies(x)  # (N, {len(model["nets"])}), a column a size, coarse to fine

Needs torch and safetensors, and Pillow for pictures. The law of the samples is the model's; their noise is torch's,
so that a seed gives other samples than in `mgebm sample`.
"""
'''
    described = f"MODEL = {pprint.pformat(dict(model), width=110, sort_dicts=False, compact=True)}\n"
    ending = 'if __name__ == "__main__":\n    main()\n'
    return "\n\n".join([f"{head}\n{_IMPORTS}\n{described}", *sources, ending])
