"""How much a forward pass has to compute: what rates and shares of the machine's peak are counted in."""

from __future__ import annotations

import math

from ..nets import ScoreNet


def taps_inside(inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> int:
    """Over all outputs of one dimension, the taps that read a pixel and not the zeros around the map."""
    starts = [o * stride - padding for o in range(outputs)]
    return sum(min(inputs, start + kernel) - max(0, start) for start in starts)


def macs_inside(net: ScoreNet) -> int:
    """Multiply-accumulates of one sample's forward pass, without those whose factor is the padding's zero.

    `ScoreNet.macs` counts them all, as the papers do; a small map has many, on 2×2 pixels five taps in nine.
    """
    total = 0
    for layer, size in net.placed():
        top = tuple(layer.map_size(s) for s in size)
        taps = [taps_inside(i, o, layer.kernel, layer.stride, layer.padding) for i, o in zip(size, top, strict=True)]
        total += layer.weight.shape[0] * layer.weight.shape[1] * math.prod(taps)
    return total + (net.head.weight.numel() if net.head is not None else 0)
