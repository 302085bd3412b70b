"""A layer's constants as the engine reads them: weights and vectors in whole strips, tables of taps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

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


class Vectors(NamedTuple):
    """Constants of an affine step: [depth], or [pixel][depth] where one holds a number an element; a row of such for
    each sample where one holds a row a sample."""

    scale: Tensor | None
    shift: Tensor | None
    per_element: bool
    row_floats: int  # of a sample's row; 0: the same for all samples

    def fields(self) -> dict[str, object]:
        """Those of a step."""
        return {
            "weights": self.scale, "bias": self.shift, "per_element": self.per_element, "row_floats": self.row_floats
        }  # fmt: skip


def affine_vectors(scale: Tensor | None, shift: Tensor | None, out: layers.Map) -> Vectors:
    """Both in one layout."""
    rows = [None if t is None else layers.as_rows(t.detach().float(), out) for t in (scale, shift)]
    samples = max(len(t) for t in (*rows, torch.empty(1)) if t is not None)
    pixels = max(t.shape[2] for t in (*rows, torch.empty(1, 1, 1)) if t is not None)
    depth = padded(out.channels)

    def laid_out(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        whole = tensor.expand(samples, -1, pixels).transpose(1, 2)
        return F.pad(whole, (0, depth - out.channels)).clone(memory_format=torch.contiguous_format)

    return Vectors(laid_out(rows[0]), laid_out(rows[1]), pixels > 1, pixels * depth if samples > 1 else 0)


def norm_vectors(layer: layers.GroupNorm) -> Vectors:
    weight, bias = layer.weight, layer.bias
    if weight is None and bias is None:
        return Vectors(None, None, False, 0)
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


def by_tap(weight: Tensor, table: windows.Windows) -> Tensor:  # (C, 1, *kernel) -> [row][depth]
    """The weights of a depthwise convolution, filled up to whole strips."""
    rows = weight.detach().float().flatten(1)[:, table.offsets].T
    return F.pad(rows, (0, -len(weight) % STRIP)).contiguous().clone()


def places_of(layer: layers.Rearrange, source: layers.Map) -> Tensor:  # -> (pixels · depth of out,) int32
    """Where each number of `out` as the engine holds it, [pixel][depth], stands in what is read; −1: nowhere."""
    channels, pixels = layer.out.channels, layer.out.pixels
    places = torch.tensor(layer.places).reshape(channels, pixels)
    at = places % source.pixels * padded(source.channels) + places // source.pixels
    return F.pad(at.T, (0, -channels % STRIP), value=-1).to(torch.int32).contiguous().reshape(-1)


def as_features(weight: Tensor) -> Tensor:  # (out, in, *kernel) -> (out, pixels · depth)
    """The weights of a dense layer on all pixels of a map, as [pixel][depth] holds them."""
    depth = padded(weight.shape[1])
    return F.pad(weight.detach().float().flatten(2).transpose(1, 2), (0, depth - weight.shape[1])).flatten(1)


def depth_of(inputs: int, bfloat: bool) -> int:
    """Channels of a row of packed weights."""
    return -(-inputs // BFLOAT_DEPTH) * BFLOAT_DEPTH if bfloat else inputs


def packed(
    source: Tensor, rows: Tensor, inputs: int, outputs: int, strides: tuple[int, int], bfloat: bool, rest: bool = False
) -> Scratch:
    """[strip][row][channel][16] of float32, or of bfloat16 with channels in pairs, filled up to whole tiles; `rest` as
    in `pack`."""
    depth = depth_of(inputs, bfloat)
    weights = source.detach().float().contiguous()
    return pack(weights, rows, inputs, outputs, strides, depth=depth, bfloat=bfloat, rest=rest)
