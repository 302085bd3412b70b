"""Rules of products with weights: convolutions, dense layers, matrices."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ....ops.graph_chain import layers
from ....ops.graph_chain.layers import Map
from ...builder import Unreadable
from ..values import ChannelsLast, GraphBuilder, Value
from .channels_last import dense_of_pixels
from .registry import MAX_ROWS, constant, rule, shape_of, value
from .shapes import _reduced

FEW_CHANNELS = 4  # of outputs, for which a product with zeros takes less time than sixteen channels one by one
MAX_PRODUCTS = 4096  # single products of a matrix product that no dense layer makes


@rule("convolution")
def _convolution(b: GraphBuilder, out: Tensor, x: Any, weight: Any, bias: Any, *geometry: Any) -> Value:
    x, weight, bias = value(b, x), constant(b, weight), constant(b, bias)
    stride, padding, dilation, transposed, _, groups = geometry
    dims, x = weight.dim() - 2, b.as_map(x)
    if x.flattened or len(x.held.size) != dims:
        raise Unreadable(f"{b.name} takes {dims} spatial dimensions of a tensor of shape {x.shape}")
    shape = shape_of(out)
    kind: type[layers.Layer] = layers.Transposed if transposed else layers.Convolution
    geometry = tuple(tuple(v) * (dims if len(v) == 1 else 1) for v in (stride, padding, dilation))
    if groups == len(weight) == x.held.channels > FEW_CHANNELS and not transposed:
        kind = layers.Depthwise
    elif groups != 1:
        return _grouped(b, kind, x, shape, weight.detach(), bias, groups, geometry)
    return b.add(kind, [x], Map(shape[0], shape[1:]), shape, weight.detach(), bias, *geometry)


def _grouped(
    b: GraphBuilder, kind: Any, x: Value, shape: tuple[int, ...], weight: Tensor, bias: Any, groups: int, geometry: Any
) -> Value:
    """A convolution of several groups as convolutions of as many of them as make sixteen channels, the depth of the
    engine's tiles, with zeros between one group and another."""
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    inputs, outputs = (columns, rows) if kind is layers.Convolution else (rows, columns)
    together = next(m for m in range(1, groups + 1) if groups % m == 0 and (m * inputs >= 16 or m == groups))
    parts = []
    for first in range(0, groups, together):
        block = weight.new_zeros(together * rows, together * columns, *weight.shape[2:])
        for g in range(together):
            own = weight[(first + g) * rows : (first + g + 1) * rows]
            block[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = own
        part, shift = x, None if bias is None else bias.detach()[first * outputs : (first + together) * outputs]
        if together < groups:
            held = Map(together * inputs, x.held.size)
            part = b.add(layers.Slice, [x], held, (together * inputs, *x.held.size), first * inputs)
        out = (together * outputs, *shape[1:])
        parts.append(b.add(kind, [part], Map(out[0], out[1:]), out, block, shift, *geometry))
    return parts[0] if len(parts) == 1 else b.add(layers.Concat, parts, Map(shape[0], shape[1:]), shape)


@rule("addmm")
def _addmm(
    b: GraphBuilder, out: Tensor, bias: Any, x: Any, weight: Any, *, beta: float = 1, alpha: float = 1
) -> Value | ChannelsLast:
    if beta != 1 or alpha != 1:
        raise Unreadable(f"{b.name} has beta={beta} and alpha={alpha}")
    bias = constant(b, bias)
    if bias.dim() != 1 or bias.shape[0] != out.shape[1]:
        raise Unreadable(f"{b.name} has a bias of shape {tuple(bias.shape)}")
    return _dense(b, x, constant(b, weight).T, bias)


@rule("mm")
def _mm(b: GraphBuilder, out: Tensor, x: Any, weight: Any) -> Value | ChannelsLast:
    return _dense(b, x, constant(b, weight).T, None)


def _dense(b: GraphBuilder, x: Any, weight: Tensor, bias: Tensor | None) -> Value | ChannelsLast:
    """W x + b of the last dimension: of x as it is; or of each of its rows, by one matrix with W for each, or as pixels
    where that would be large."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if isinstance(x, ChannelsLast):
        return dense_of_pixels(b, x, weight, bias)
    x = value(b, x)
    shape = (*x.shape[:-1], len(weight))
    if len(shape) == 1:
        return b.dense(x, weight, bias, shape)
    if math.prod(x.shape) * math.prod(shape) > MAX_ROWS:
        return dense_of_pixels(b, b.channels_last(x), weight, bias)
    made = b.linear(x, lambda basis: basis @ weight.T, shape)
    return dataclasses.replace(made if bias is None else b.affine(made, None, bias), rows=x.rows)


@rule("linear")
def _linear(b: GraphBuilder, out: Tensor, x: Any, weight: Any, bias: Any = None) -> Value | ChannelsLast:
    return _dense(b, x, constant(b, weight), constant(b, bias))


@rule("mv")
def _mv(b: GraphBuilder, out: Tensor, x: Any, vector: Any) -> Value:
    return b.dense(value(b, x), constant(b, vector)[None], None, ())


@rule("bmm")
def _bmm(b: GraphBuilder, out: Tensor, x: Any, y: Any) -> Value | ChannelsLast:  # (N, P, D) (N, D, K)
    p, k = shape_of(out)
    d = x.shape[1] if isinstance(x, Value) else x.shape[2]
    if isinstance(x, Value) and not isinstance(y, Value) and len(rows := b.rows(y)) == 1:
        return _dense(b, x, rows[0].T, None)
    if isinstance(y, Value) and not isinstance(x, Value) and len(rows := b.rows(x)) == 1:
        if d * k * p * k <= MAX_ROWS:
            return b.linear(y, lambda basis: rows[0] @ basis, (p, k))
        kernel = rows[0].detach()[:, :, None]
        return b.add(layers.Convolution, [b.as_map(y)], Map(p, (k,)), (p, k), kernel, None, (1,), (0,), (1,))
    if p * k * d > MAX_PRODUCTS:
        raise Unreadable(f"{b.name} multiplies matrices of {p} by {d} by {k}, whose products are too many")
    factors = []
    for factor, view in ((x, lambda t: t[:, :, None]), (y, lambda t: t.transpose(1, 2)[:, None])):
        if isinstance(factor, Value):
            factors.append(b.moved(factor, lambda basis, v=view: v(basis).expand(-1, p, k, d), (p, k, d)))
        else:
            factors.append(view(factor).expand(-1, p, k, d))
    first, second = factors
    if isinstance(first, Value) and isinstance(second, Value):
        product = b.combined(layers.Multiply, first, second)
    else:
        product = b.affine(first, second) if isinstance(first, Value) else b.affine(second, first)
    return _reduced(b, out, product, 3, mean=False)


def _by_kernel(b: GraphBuilder, x: Value, kernel: tuple[int, ...], out: Tensor, geometry: Any) -> Value:
    """Every element of each window as a channel, in the order (channel, place in the window)."""
    channels = x.held.channels
    elements = channels * math.prod(kernel)
    weight = torch.eye(elements).reshape(elements, channels, *kernel)
    held = Map(elements, tuple(out.shape[2:]))
    return b.add(layers.Convolution, [x], held, (elements, *held.size), weight, None, *geometry)


@rule("pixel_unshuffle")
def _pixel_unshuffle(b: GraphBuilder, out: Tensor, x: Any, factor: int) -> Value:
    x = value(b, x)
    if not x.is_map or x.flattened or len(x.held.size) != 2:
        raise Unreadable(f"{b.name} takes a tensor of shape {x.shape}")
    return _by_kernel(b, x, (factor, factor), out, ((factor, factor), (0, 0), (1, 1)))


@rule("pixel_shuffle")
def _pixel_shuffle(b: GraphBuilder, out: Tensor, x: Any, factor: int) -> Value:
    x, shape = value(b, x), shape_of(out)
    if not x.is_map or x.flattened or len(x.held.size) != 2:
        raise Unreadable(f"{b.name} takes a tensor of shape {x.shape}")
    geometry = (factor, factor), (0, 0), (1, 1)
    weight = torch.eye(x.held.channels).reshape(x.held.channels, shape[0], factor, factor)
    return b.add(layers.Transposed, [x], Map(shape[0], shape[1:]), shape, weight, None, *geometry)


@rule("im2col")
def _im2col(b: GraphBuilder, out: Tensor, x: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Value:
    x = value(b, x)
    if not x.is_map or x.flattened or len(x.held.size) != 2:
        raise Unreadable(f"{b.name} takes a tensor of shape {x.shape}")
    sizes = zip(x.held.size, kernel, dilation, padding, stride, strict=True)
    size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, d, p, s in sizes)
    whole = out.reshape(*out.shape[:2], *size)
    geometry = tuple(map(tuple, (stride, padding, dilation)))
    return b.viewed(_by_kernel(b, x, tuple(kernel), whole, geometry), shape_of(out))
