"""Energies of single numbers as energies of features. The engine fills up the channels of a map to whole strips: one of
three channels takes the room, and the time, of sixteen. Features in a row need no more than there are."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops.graph_chain import layers
from ...ops.graph_chain.graph import Graph
from ...ops.graph_chain.layers import Map
from ...ops.graph_chain.packing import padded
from ...ops.graph_chain.steps import MAX_NORM_CHANNELS

MAX_SUMS = 1 << 18  # entries of the matrix of a sum over pixels
WASTE = 1.5  # how much more room maps take than their numbers, from which it pays


def as_features(graph: Graph) -> Graph:
    """The same energy of x as features: with all of its maps, where no layer asks which pixels are neighbours and they
    take much room; else x alone, where only layers read it that take all of its elements."""
    maps = [m for m in (graph.x, *(layer.out for layer in graph.layers)) if m.size]
    room = sum(m.pixels * padded(m.channels) for m in maps)
    if room > WASTE * sum(m.pixels * m.channels for m in maps):
        flat: list[layers.Layer] = []
        for layer in graph.layers:
            made = _flat(layer, [graph.value(v) for v in layer.inputs])
            if made is None:
                break
            flat.append(made)
        else:
            return Graph(_line(graph.x), tuple(flat))
    readers = [layer for layer in graph.layers if 0 in layer.inputs]
    if not all(isinstance(r, layers.Rearrange) or _covering(r, graph.x) for r in readers):
        return graph
    return Graph(_line(graph.x), tuple(_of_line(r) if 0 in r.inputs else r for r in graph.layers))


def _line(m: Map) -> Map:
    return Map(m.channels * m.pixels, ())


def _covering(layer: layers.Layer, source: Map) -> bool:
    return isinstance(layer, layers.Convolution) and layer.covers(source.size)


def _of_line(layer: layers.Layer) -> layers.Layer:
    """What takes all of a map's elements, of them as features."""
    if isinstance(layer, layers.Rearrange):
        same = layer.out.pixels == 1 and layer.places == tuple(range(layer.out.channels))
        return layers.Affine(layer.inputs, layer.out, layer.name, None, None) if same else layer
    assert isinstance(layer, layers.Convolution)
    return dataclasses.replace(layer, weight=layer.weight.flatten(1), stride=(), padding=(), dilation=())


def _elements(constant: Tensor | None, out: Map) -> Tensor | None:
    """A constant (C,), (C, *size), (N, C, *size) or (N, C, 1, …) as (C · pixels,), or a row a sample of such."""
    if constant is None:
        return None
    rows = layers.as_rows(constant, out)
    whole = rows.expand(-1, -1, out.pixels).reshape(len(rows), -1).contiguous()
    return whole if layers.is_of_samples(constant, out) else whole[0]


def _with_out(layer: Any, sources: list[Map]) -> layers.Layer:
    """Of a layer that does the same to each number, or knows places in (channel, pixel) order."""
    return dataclasses.replace(layer, out=_line(layer.out))


def _affine(layer: layers.Affine, sources: list[Map]) -> layers.Layer:
    scale, shift = (_elements(t, layer.out) for t in (layer.scale, layer.shift))
    return layers.Affine(layer.inputs, _line(layer.out), layer.name, scale, shift)


def _constant(layer: layers.Constant, sources: list[Map]) -> layers.Layer:
    rows = layers.as_rows(layer.value, layer.out).expand(-1, -1, layer.out.pixels)
    return layers.Constant(layer.inputs, _line(layer.out), layer.name, rows.reshape(len(rows), -1).contiguous())


def _slice(layer: layers.Slice, sources: list[Map]) -> layers.Layer:
    return layers.Slice(layer.inputs, _line(layer.out), layer.name, layer.start * layer.out.pixels)


def _norm(layer: layers.GroupNorm, sources: list[Map]) -> layers.Layer | None:
    out = _line(layer.out)
    if out.channels > MAX_NORM_CHANNELS:
        return None
    weight, bias = (_elements(t, layer.out) for t in (layer.weight, layer.bias))
    return layers.GroupNorm(layer.inputs, out, layer.name, layer.groups, layer.eps, weight, bias)


def _convolution(layer: layers.Convolution, sources: list[Map]) -> layers.Layer | None:
    if not sources[0].size:
        return layer
    if not _covering(layer, sources[0]) or layer.out.pixels > 1:
        return None
    return dataclasses.replace(_of_line(layer), out=_line(layer.out))


def _gather(layer: layers.Gather, sources: list[Map]) -> layers.Layer | None:
    """Pixels in other places, or a sum over all of them; other sums stay."""
    (source,) = sources
    if all(len(taps) == 1 and taps[0][1] == 1.0 for axis in layer.axes for taps in axis):
        grid = torch.arange(source.channels * source.pixels).reshape(source.channels, *source.size)
        for dim, axis in enumerate(layer.axes, 1):
            grid = grid.index_select(dim, torch.tensor([taps[0][0] for taps in axis]))
        return layers.Rearrange(layer.inputs, _line(layer.out), layer.name, tuple(grid.reshape(-1).tolist()))
    if layer.out.pixels > 1 or source.channels**2 * source.pixels > MAX_SUMS:
        return None
    axes = [[0.0] * n for n in source.size]
    for along, axis in zip(axes, layer.axes, strict=True):
        for at, weight in axis[0]:
            along[at] += weight
    weights = torch.tensor([math.prod(pixel) for pixel in itertools.product(*axes)], dtype=torch.float32)
    matrix = torch.kron(torch.eye(source.channels), weights[None])
    return layers.Convolution(layer.inputs, _line(layer.out), layer.name, matrix, None, (), (), ())


_FLAT: dict[type[layers.Layer], Callable[[Any, list[Map]], layers.Layer | None]] = {
    layers.Affine: _affine, layers.Constant: _constant, layers.Slice: _slice, layers.GroupNorm: _norm,
    layers.Convolution: _convolution, layers.Gather: _gather,
    **dict.fromkeys(
        (layers.Pointwise, layers.Add, layers.Multiply, layers.Rearrange, layers.Concat, layers.LogSumExp), _with_out
    ),
}  # fmt: skip


def _flat(layer: layers.Layer, sources: list[Map]) -> layers.Layer | None:
    """The same of maps as features; None where it needs to know pixels."""
    make = _FLAT.get(type(layer))
    return None if make is None else make(layer, sources)
