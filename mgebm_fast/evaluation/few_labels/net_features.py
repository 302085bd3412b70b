"""Feature maps of a model's own energy nets, for a classifier to read. (`features.py` is the space of FID and KID.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...models import Model
from ...nets import ScoreNet

MAP = 4  # larger maps are averaged to this many cells a side
_BATCH = 256


def energy_nets(model: nn.Module) -> list[ScoreNet]:
    """The model's energy nets, coarse to fine; ValueError where it has none whose layers can be read."""
    nets = list(getattr(model, "nets", ()))
    if not nets or not all(isinstance(net, ScoreNet) for net in nets):
        got = type(nets[0]).__name__ if nets else f"a {type(model).__name__}, which has no energy"
        raise ValueError(
            f"energy_features: model must have energy nets of the classes EnergyNet and ResidualNet, got {got}"
        )
    if getattr(model, "classes", ()):
        raise ValueError("energy_features: model must be learnt without labels, got a class-conditional one")
    if any(net.ndim != 2 for net in nets):
        raise ValueError(f"energy_features: model must be of images, got one of {nets[0].ndim}-dimensional data")
    return nets


def energy_features(
    model: Model,
    images: Any,  # (N, C, S, S) uint8, array or tensor
) -> list[Tensor]:  # one (N, D) float32 a net, coarse to fine, on the CPU
    """What each net of a model computes below its head: its top map, flattened in (channel, row, column) order.

        φ_i(x) = h_L(… h_1(down_i(x))),    f_i(x) = w · φ_i(x) + b

    down_i is the block mean to the net's size, as in training; h is convolution, norm and activation. A top map of more
    than 4×4 cells is averaged to 4×4. A net with batch statistics is read under its running ones (`freeze_norm`), so
    that an image's features do not depend on its batch. Nothing of the model changes.

    ValueError for a model with no such net (a generator alone), one of videos or sounds, or images of another shape
    or dtype. Source: the learned feature maps of all grids as a classifier's input, Gao et al. (CVPR 2018).
    """
    nets = [net.freeze_norm() if net.norm == "batch" else net for net in energy_nets(model)]
    shape = (model.channels, model.sizes[-1], model.sizes[-1])
    if tuple(images.shape[1:]) != shape or str(images.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(
            f"energy_features: images must be uint8 (N, {', '.join(map(str, shape))}), "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    return read_maps(nets, scaled_down(model, images))


def scaled_down(model: Model, images: Any) -> list[Tensor]:
    """uint8 (N, C, S, S) -> (N, C, s, s) float32 in the model's units for each of its nets, on the model's device."""
    device = next(model.parameters()).device
    chunks = []
    for i in range(0, len(images), _BATCH):
        chunk = images[i : i + _BATCH]
        chunk = chunk if isinstance(chunk, Tensor) else torch.from_numpy(np.array(chunk, order="C"))
        chunks.append(ops.pyramid(model.from_uint8(chunk.to(device)), model.sizes[1:]))
    if not chunks:
        return [torch.empty(0, model.channels, s, s, device=device) for s in model.sizes[1:]]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


@torch.no_grad()
def read_maps(nets: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[Tensor]:
    """`top_map` of every net on its own input, in batches, on the CPU."""
    out = []
    for net, x in zip(nets, inputs, strict=True):
        parts = [top_map(net, x[i : i + _BATCH]).cpu() for i in range(0, len(x), _BATCH)]
        out.append(torch.cat(parts) if parts else top_map(net, x).cpu())
    return out


def top_map(net: Any, x: Tensor) -> Tensor:  # (N, C, s, s) -> (N, D)
    """The net's top map, at most 4×4 cells, flattened. Differentiable."""
    for layer in net.layers:
        x = layer(x)
    if max(x.shape[2:]) > MAP:
        x = F.adaptive_avg_pool2d(x, (min(MAP, x.shape[2]), min(MAP, x.shape[3])))
    return x.flatten(1)
