"""Rules of normalisations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ....ops.graph_chain import layers
from ...builder import Unreadable
from ..values import ChannelsLast, GraphBuilder, Value
from .channels_last import norm_of_pixels
from .registry import MAX_ROWS, constant, rule, value


def _affine_of(weight: Any, bias: Any, mean: Any, variance: Any, eps: float) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(variance.detach() + eps)
    scale = scale if weight is None else scale * weight.detach()
    shift = -mean.detach() * scale
    return scale, shift if bias is None else shift + bias.detach()


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_batch_norm_no_update",
      "_batch_norm_with_update", "cudnn_batch_norm", "_native_batch_norm_legit_functional")  # fmt: skip
def _batch_norm(b: GraphBuilder, out: Tensor, x: Any, weight: Any, bias: Any, *rest: Any) -> Value:
    x, weight, bias = value(b, x), constant(b, weight), constant(b, bias)
    numbers = [r for r in rest if not isinstance(r, (Tensor, type(None), bool))]
    eps = numbers[-1]
    training = next((r for r in rest if isinstance(r, bool)), False)
    if x.merged and training:  # an instance norm: every channel of every sample by itself
        channels = x.held.channels
        weight, bias = (None if t is None else t.detach()[:channels] for t in (weight, bias))
        normed = b.add(layers.GroupNorm, [x], x.held, x.shape, channels, eps, weight, bias)
        return dataclasses.replace(normed, merged=True)
    if training or rest[0] is None:
        raise Unreadable(f"{b.name} takes the statistics of the batch")
    if x.merged:
        raise Unreadable(f"{b.name} is an instance norm by running statistics")
    scale, shift = _affine_of(weight, bias, rest[0], rest[1], eps)
    if x.flattened:
        raise Unreadable(f"{b.name} normalises every pixel of a flattened map by itself")
    view = (-1, *[1] * (len(x.shape) - 1))
    return b.affine(x, scale.reshape(view), shift.reshape(view))


@rule("native_group_norm")
def _group_norm(b: GraphBuilder, out: Tensor, x: Any, weight: Any, bias: Any, *sizes: Any) -> Value:
    x, weight, bias = b.as_map(value(b, x)), constant(b, weight), constant(b, bias)
    _, c, pixels, groups, eps = sizes
    if x.held.channels != c or x.held.pixels != pixels:
        raise Unreadable(f"{b.name} does not fit a tensor of shape {x.shape}")
    parts = (None if t is None else t.detach() for t in (weight, bias))
    return b.add(layers.GroupNorm, [x], x.held, x.shape, groups, eps, *parts)


@rule("native_layer_norm")
def _layer_norm(
    b: GraphBuilder, out: Tensor, x: Any, shape: Any, weight: Any, bias: Any, eps: float
) -> Value | ChannelsLast:
    x, weight, bias = value(b, x), constant(b, weight), constant(b, bias)
    held, rows = x.map_shape if x.is_map else (x.held.channels,), x.shape[: len(x.shape) - len(shape)]
    # Of each row by itself: those of a map are its channels, those of features lie one after the other.
    if rows and (x.flattened or x.is_map and len(rows) > 1 or math.prod(x.shape) ** 2 > MAX_ROWS):
        if len(shape) > 1 or not eps > 0:
            raise Unreadable(f"{b.name} normalises {tuple(shape)} of a tensor of shape {x.shape}")
        return norm_of_pixels(b, out, b.channels_last(x), shape, weight, bias, eps)
    parts = (None if t is None else t.detach().expand(x.shape).reshape(held).contiguous() for t in (weight, bias))
    return b.add(layers.GroupNorm, [x], x.held, x.shape, math.prod(rows), eps, *parts)
