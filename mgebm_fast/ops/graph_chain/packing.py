"""A layer's constants as the engine reads them: weights and vectors in whole strips, tables of taps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv_chain import windows
from ..conv_chain.packed import STRIP, pack
from ..conv_chain.scratch import Scratch
from . import layers

BFLOAT_DEPTH = 32  # channels of a bfloat16 tile


def padded(channels: int) -> int:
    return -(-channels // STRIP) * STRIP


def vector(tensor: Tensor | None) -> Tensor | None:  # (C,) -> filled up to whole strips, a copy
    if tensor is None:
        return None
    return F.pad(tensor.detach().float(), (0, -tensor.shape[0] % STRIP)).contiguous().clone()


Vectors = tuple[Tensor | None, Tensor | None, bool]  # scale, shift, and whether they hold a number an element


def affine_vectors(scale: Tensor | None, shift: Tensor | None, out: layers.Map) -> Vectors:
    """Both as vectors, or both as [pixel][depth] where one of them is a map."""
    per_element = any(t is not None and t.dim() > 1 for t in (scale, shift)) and out.pixels > 1

    def laid_out(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not per_element:
            return vector(None if tensor is None else tensor.reshape(-1))
        whole = tensor if tensor.dim() > 1 else tensor.reshape(-1, *[1] * len(out.size))
        pixels = whole.detach().float().expand(out.channels, *out.size).reshape(out.channels, -1).T
        return F.pad(pixels, (0, -out.channels % STRIP)).contiguous().clone()

    return laid_out(scale), laid_out(shift), per_element


def norm_vectors(layer: layers.GroupNorm) -> Vectors:
    weight, bias = layer.weight, layer.bias
    if weight is None and bias is None:
        return None, None, False
    like = weight if weight is not None else bias
    assert like is not None
    return affine_vectors(
        torch.ones_like(like) if weight is None else weight, torch.zeros_like(like) if bias is None else bias, layer.out
    )


def gather_tables(axes: Sequence[layers.Axis], size: layers.Size) -> tuple[windows.Windows, Tensor]:
    """Windows whose rows are products of weights, and those products."""
    found = [windows.axis_of([[(weight, at) for at, weight in taps] for taps in axis]) for axis in axes]
    table = windows.product(found, size, tuple(len(axis) for axis in axes))
    return table, torch.tensor([math.prod(row) for row in table.rows] or [0.0], dtype=torch.float32)


def transposed(axis: layers.Axis, length: int) -> layers.Axis:
    found: list[dict[int, float]] = [{} for _ in range(length)]
    for output, taps in enumerate(axis):
        for at, weight in taps:
            found[at][output] = found[at].get(output, 0.0) + weight
    return tuple(tuple(sorted(taps.items())) for taps in found)


def tap_numbers(table: windows.Windows, kernel: layers.Size) -> Tensor:
    return torch.tensor([windows.ravel(row, kernel) for row in table.rows], dtype=torch.float32)


def packed(
    source: Tensor, rows: list[int], inputs: int, outputs: int, strides: tuple[int, int], bfloat: bool
) -> Scratch:
    """[strip][row][channel][16] of float32, or of bfloat16 with channels in pairs, filled up to whole tiles."""
    depth = -(-inputs // BFLOAT_DEPTH) * BFLOAT_DEPTH if bfloat else inputs
    return pack(source.detach().float().contiguous(), rows, inputs, outputs, strides, depth=depth, bfloat=bfloat)
