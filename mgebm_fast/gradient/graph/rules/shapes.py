"""Rules of the ops that sum, cut or reorder."""

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
from .registry import constant, rule, shape_of, value

MOST_ROWS = 64  # of which each is reduced by layers of its own
MOST_SUMMED = 256  # features that are summed by a matrix


def _dims(dims: Any, x: Value) -> list[int]:
    """Dimensions as places in x's shape without the batch; all of them where there are none given."""
    rank = len(x.shape) + 1
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        raise Unreadable("a sum over the batch")
    dims = [dims] if isinstance(dims, int) else list(dims)
    places = sorted(d % rank for d in dims)
    if places[0] == 0:
        raise Unreadable("a sum over the batch")
    return [place - 1 for place in places]


def _reduced(b: GraphBuilder, out: Tensor, x: Value, dims: Any, *, mean: bool) -> Value:
    places, shape = _dims(dims, x), shape_of(out)
    every = list(range(len(x.shape)))
    if x.is_map and not x.flattened and set(places) >= set(every[1:]):
        weight = 1.0 / x.held.pixels if mean else 1.0
        axes: tuple[layers.Axis, ...] = tuple(
            (tuple((at, weight if dim == 0 else 1.0) for at in range(n)),) for dim, n in enumerate(x.held.size)
        )
        pooled = b.gather(x, axes, drops=True)
        if places == every[1:]:
            return b.viewed(pooled, shape)
        factor = 1.0 / x.held.channels if mean else 1.0
        return b.dense(pooled, torch.full((1, x.held.channels), factor, dtype=torch.float32), None, shape)
    if x.is_map and places == every:  # flattened: all of its elements
        whole = Value(x.index, x.held, x.map_shape)
        return b.viewed(_reduced(b, out, whole, tuple(range(1, len(x.map_shape) + 1)), mean=mean), shape)
    if x.flattened or math.prod(x.shape) > MOST_SUMMED:
        x = b.as_map(x)
    if x.is_map and places == [0] and not x.flattened:  # over channels
        weight = x.held.channels if mean else 1
        kernel = torch.full((1, x.held.channels, *[1] * len(x.held.size)), 1.0 / weight, dtype=torch.float32)
        ones = (1,) * len(x.held.size)
        held = Map(1, x.held.size)
        summed = b.add(layers.Convolution, [x], held, (1, *x.held.size), kernel, None, ones, (0,) * len(ones), ones)
        return b.viewed(summed, shape)
    if x.is_map and not x.flattened and 0 not in places:
        axes = tuple(
            (tuple((at, 1.0 / n if mean else 1.0) for at in range(n)),) if dim + 1 in places else _identity(n)
            for dim, n in enumerate(x.held.size)
        )
        return b.viewed(b.gather(x, axes), shape)
    reduce = torch.mean if mean else torch.sum
    return b.linear(x, lambda basis: reduce(basis, [p + 1 for p in places]), shape)


def _identity(n: int) -> layers.Axis:
    return tuple(((at, 1.0),) for at in range(n))


@rule("sum")
def _sum(b: GraphBuilder, out: Tensor, x: Any, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return _reduced(b, out, value(b, x), dims, mean=False)


@rule("mean")
def _mean(b: GraphBuilder, out: Tensor, x: Any, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return _reduced(b, out, value(b, x), dims, mean=True)


@rule("var", "std")
def _var(
    b: GraphBuilder, out: Tensor, x: Any, dims: Any = None, *rest: Any, correction: Any = 1, keepdim: bool = False
) -> Value:
    x = value(b, x)
    count = math.prod(x.shape[place] for place in _dims(dims, x)) - (1 if correction is None else correction)
    centred = b.combined(layers.Add, x, _kept(b, out, x, dims), -1.0)
    total = b.affine(_reduced(b, out, b.pointwise(centred, "power", 2), dims, mean=False), 1.0 / count)
    return b.pointwise(total, "sqrt") if b.name.startswith("std") else total


def _kept(b: GraphBuilder, out: Tensor, x: Value, dims: Any) -> Value:
    """The mean over dimensions, which stay as dimensions of length 1."""
    places = _dims(dims, x)
    shape = tuple(1 if place in places else n for place, n in enumerate(x.shape))
    return _reduced(b, torch.empty(b.samples, *shape), x, dims, mean=True)


@rule("glu")
def _glu(b: GraphBuilder, out: Tensor, x: Any, dim: int = -1) -> Value:
    half = out.shape[dim]
    first, second = (_slice(b, out, x, dim, start, start + half) for start in (0, half))
    return b.combined(layers.Multiply, first, b.pointwise(second, "sigmoid"))


@rule("linalg_vector_norm", "norm")
def _norm(b: GraphBuilder, out: Tensor, x: Any, order: Any = 2, dims: Any = None, *rest: Any, **more: Any) -> Value:
    if order not in (2, None):
        raise Unreadable(f"{b.name} of order {order}")
    return b.pointwise(_reduced(b, out, b.pointwise(value(b, x), "power", 2), dims, mean=False), "root")


@rule("logsumexp")
def _logsumexp(b: GraphBuilder, out: Tensor, x: Any, dims: Any, keepdim: bool = False) -> Value:
    return _log_of_sums(b, value(b, x), dims, shape_of(out))


def _log_of_sums(b: GraphBuilder, x: Value, dims: Any, shape: tuple[int, ...]) -> Value:
    """log Σ exp over the last dimensions."""
    places = _dims(dims, x)
    rows, length = (math.prod(part) for part in (x.shape[: places[0]], x.shape[places[0] :]))
    if places != list(range(places[0], len(x.shape))) or rows > MOST_ROWS:
        raise Unreadable(f"{b.name} over {len(places)} dimensions of a tensor of shape {x.shape}")
    x = b.features(x)
    if rows == 1:
        return b.add(layers.LogSumExp, [x], Map(1, ()), shape)
    parts = [b.add(layers.Slice, [x], Map(length, ()), (length,), row * length) for row in range(rows)]
    parts = [b.add(layers.LogSumExp, [part], Map(1, ()), ()) for part in parts]
    return b.add(layers.Concat, parts, Map(rows, ()), shape)


# ---- shapes ----


@rule(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "flatten", "unflatten", "_reshape_copy"
)
def _view(b: GraphBuilder, out: Tensor, x: Any, *rest: Any) -> Value:
    x = value(b, x)
    if x.merged:
        return b.viewed(Value(x.index, x.held, x.map_shape), shape_of(out))
    if out.shape[:1] == (1,) and b.samples > 1 and tuple(out.shape[1:]) == (b.samples * x.held.channels, *x.held.size):
        return Value(x.index, x.held, x.map_shape, merged=True)
    whole = dataclasses.replace(x, rows=False)
    if out.shape[0] != b.samples and tuple(out.shape) == (rows := dataclasses.replace(x, rows=True)).tensor_shape(
        b.samples
    ):
        return rows
    return b.viewed(whole, shape_of(out))


@rule("expand")
def _expand(b: GraphBuilder, out: Tensor, x: Any, size: Any, *, implicit: bool = False) -> Value:
    return b.expanded(value(b, x), shape_of(out))


def _applied(name: str) -> Any:
    """An op that moves elements of a sample about, or sums them."""
    call = getattr(torch, name)
    way = GraphBuilder.linear if name in ("cumsum", "diff", "tril", "triu") else GraphBuilder.moved

    def apply(b: GraphBuilder, out: Tensor, x: Any, *rest: Any, **more: Any) -> Value:
        x = value(b, x)
        for r in (*rest, *more.values()):
            constant(b, r)
        return way(b, x, lambda basis: call(basis, *rest, **more), shape_of(out))

    return apply


@rule("index_select")
def _index_select(b: GraphBuilder, out: Tensor, x: Any, dim: int, index: Any) -> Value:
    x, which = value(b, x), constant(b, index)
    place = dim % out.dim() - 1
    if place < 0:
        raise Unreadable(f"{b.name} takes some samples of the batch")
    if not x.is_map or x.flattened or place == 0:
        return b.moved(x, lambda basis: basis.index_select(place + 1, which), shape_of(out))
    taken = tuple(((int(at), 1.0),) for at in which.reshape(-1))  # by torch's ops, which a tape notes
    return b.gather(x, tuple(taken if d == place - 1 else _identity(n) for d, n in enumerate(x.held.size)))


def _places(name: str, rank: int, dims: tuple[Any, ...]) -> list[int]:
    """Where each dimension of a permuted tensor was."""
    if name == "transpose":
        first, second = (d % rank for d in dims)
        places = list(range(rank))
        places[first], places[second] = second, first
        return places
    return [d % rank for d in dims[0]]


def _reordered(name: str) -> Any:
    move = _applied(name)

    def apply(b: GraphBuilder, out: Tensor, x: Any, *dims: Any) -> Value | ChannelsLast:
        x, rank = value(b, x), out.dim()
        last = x.is_map and not x.flattened and not x.merged
        if last and rank > 2 and _places(name, rank, dims) == [0, *range(2, rank), 1]:
            return ChannelsLast(x)
        return move(b, out, x, *dims)

    return apply


for _name in ("permute", "transpose"):
    rule(_name)(_reordered(_name))
for _name in ("flip", "roll", "cumsum", "diff", "tril", "triu"):
    rule(_name)(_applied(_name))


@rule("slice")
def _slice(
    b: GraphBuilder, out: Tensor, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    x, shape = value(b, x), shape_of(out)
    place = dim % (len(x.shape) + 1) - 1
    if shape == x.shape and place != 0:
        return x
    if place < 0:
        if out.shape[0] == b.samples:
            return x
        raise Unreadable(f"{b.name} takes some samples of the batch")
    which = range(*slice(start, end, step).indices(x.shape[place]))
    if x.is_map and not x.flattened:
        if place == 0 and step == 1:
            return b.add(layers.Slice, [x], Map(len(which), x.held.size), shape, which.start)
        if place > 0:
            axes = tuple(
                tuple(((at, 1.0),) for at in which) if d == place - 1 else _identity(n)
                for d, n in enumerate(x.held.size)
            )
            return b.gather(x, axes)
    return b.moved(x, lambda basis: basis[(slice(None),) * (place + 1) + (slice(start, end, step),)], shape)


@rule("select")
def _select(b: GraphBuilder, out: Tensor, x: Any, dim: int, index: int) -> Value:
    x = value(b, x)
    if dim % (len(x.shape) + 1) == 0:
        raise Unreadable(f"{b.name} takes one sample of the batch")
    place = dim % (len(x.shape) + 1)
    one = (*x.shape[: place - 1], 1, *x.shape[place:])
    return b.viewed(b.moved(x, lambda basis: basis.select(place, index).unsqueeze(place), one), shape_of(out))


@rule("unbind")
def _unbind(b: GraphBuilder, out: Any, x: Any, dim: int = 0) -> list[Value]:
    return [_select(b, part, x, dim, i) for i, part in enumerate(out)]


@rule("split", "split_with_sizes", "chunk")
def _split(b: GraphBuilder, out: Any, x: Any, sizes: Any, dim: int = 0) -> list[Value]:
    start, parts = 0, []
    for part in out:
        length = part.shape[dim]
        parts.append(_slice(b, part, x, dim, start, start + length))
        start += length
    return parts


@rule("cat")
def _cat(b: GraphBuilder, out: Tensor, parts: Any, dim: int = 0) -> Value:
    shape, place = shape_of(out), dim % out.dim() - 1
    if place != 0:
        raise Unreadable(f"{b.name} joins dimension {dim}")
    like = next(part for part in parts if isinstance(part, Value))
    parts = [p if isinstance(p, Value) else b.constant(p, shape_of(p), like) for p in parts]
    if len({part.held.size for part in parts}) > 1:
        parts = [b.features(part) for part in parts]
    channels = sum(part.held.channels for part in parts)
    return b.add(layers.Concat, parts, Map(channels, parts[0].held.size), shape)


@rule("stack")
def _stack(b: GraphBuilder, out: Tensor, parts: Any, dim: int = 0) -> Value:
    parts = [value(b, part) for part in parts]
    place = dim % out.dim() - 1
    if place == 0 and len({part.held for part in parts}) == 1:  # maps one after the other
        held = Map(sum(part.held.channels for part in parts), parts[0].held.size)
        return b.add(layers.Concat, parts, held, shape_of(out))
    parts = [b.features(part) for part in parts]
    if place != 0 and not (place == len(out.shape) - 2 and all(math.prod(p.shape) == 1 for p in parts)):
        raise Unreadable(f"{b.name} stacks along dimension {dim}")
    return b.add(layers.Concat, parts, Map(sum(part.held.channels for part in parts), ()), shape_of(out))
