"""The windows of a bfloat16 product over its input with zeros around it, so that all outputs have the same taps.

The engine rounds an input once, into such a map; `place` says what stands where. A data gradient's outputs still form
a class for each place within a stride, which read different taps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..conv_chain import windows
from .layers import Size


class Framed(NamedTuple):
    """`windows` of the map with its frame; `place`, int32: the input pixel at each of that map's, −1 around it."""

    windows: windows.Windows
    place: Tensor

    @property
    def nbytes(self) -> int:
        return self.windows.nbytes + self.place.nbytes


@windows.remembered
def framed_forward(inputs: Size, outputs: Size, kernel: Size, stride: Size, padding: Size, dilation: Size) -> Framed:
    """A convolution: `padding` before each dimension, and what the last output reads after it."""
    axes = list(zip(inputs, outputs, kernel, stride, padding, dilation, strict=True))
    after = tuple(max(0, (o - 1) * s - p + (k - 1) * d - (i - 1)) for i, o, k, s, p, d in axes)
    size = tuple(p + i + a for p, i, a in zip(padding, inputs, after, strict=True))
    table = windows.forward_windows(size, outputs, kernel, stride, (0,) * len(size), dilation)
    return Framed(table, _place(inputs, padding, after))


@windows.remembered
def framed_backward(inputs: Size, outputs: Size, kernel: Size, stride: Size, padding: Size, dilation: Size) -> Framed:
    """Its data gradient, which reads the map of outputs: outputs o with o·stride − padding + t·dilation in the map of
    inputs for some tap t, though the convolution has none there."""
    axes = list(zip(inputs, outputs, kernel, stride, padding, dilation, strict=True))
    before = tuple(max(0, ((k - 1) * d - p) // s) for _, _, k, s, p, d in axes)
    after = tuple(max(0, (i - 1 + p) // s - (o - 1)) for i, o, _, s, p, _ in axes)
    size = tuple(b + o + a for b, o, a in zip(before, outputs, after, strict=True))
    shifted = tuple(p + b * s for b, s, p in zip(before, stride, padding, strict=True))
    table = windows.backward_windows(inputs, size, kernel, stride, shifted, dilation)
    return Framed(table, _place(outputs, before, after))


def _place(size: Size, before: Size, after: Size) -> Tensor:
    pixels = np.arange(np.prod(size, dtype=np.int64), dtype=np.int32).reshape(size)
    place = np.pad(pixels, list(zip(before, after, strict=True)), constant_values=-1) if size else pixels
    return torch.from_numpy(np.ascontiguousarray(place).reshape(-1))
