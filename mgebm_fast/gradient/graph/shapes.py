"""Rules of the ops that sum, pool, resize, cut or reorder."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.graph_chain import layers
from ...ops.graph_chain.layers import Map
from ..stages import Unreadable
from .rules import constant, rule, shape_of, value
from .values import GraphBuilder, Value


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


@rule("linalg_vector_norm", "norm")
def _norm(b: GraphBuilder, out: Tensor, x: Any, order: Any = 2, dims: Any = None, *rest: Any, **more: Any) -> Value:
    if order not in (2, None):
        raise Unreadable(f"{b.name} of order {order}")
    return b.pointwise(_reduced(b, out, b.pointwise(value(b, x), "power", 2), dims, mean=False), "root")


@rule("logsumexp")
def _logsumexp(b: GraphBuilder, out: Tensor, x: Any, dims: Any, keepdim: bool = False) -> Value:
    x = value(b, x)
    places = _dims(dims, x)
    if places != list(range(len(x.shape))):
        raise Unreadable(f"{b.name} over {len(places)} dimensions of a tensor of shape {x.shape}")
    return b.add(layers.LogSumExp, [b.features(x)], Map(1, ()), shape_of(out))


# ---- pooling and resizing ----


def _spatial(b: GraphBuilder, x: Any, dims: int) -> Value:
    x = b.as_map(value(b, x))
    if x.flattened or len(x.held.size) != dims:
        raise Unreadable(f"{b.name} takes {dims} spatial dimensions of a tensor of shape {x.shape}")
    return x


def _numbers(value: Any, dims: int, default: Any = None) -> tuple[int, ...]:
    if value is None or (isinstance(value, (list, tuple)) and not value):
        value = default
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * dims if len(value) == 1 else value


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(
    b: GraphBuilder, out: Tensor, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, *more: Any
) -> Value:
    options: list[Any] = [*more, *[False, True, None][len(more) :]]
    ceil_mode, count_include_pad, divisor_override = options
    dims = out.dim() - 2
    x = _spatial(b, x, dims)
    kernel = _numbers(kernel, dims)
    stride, padding = _numbers(stride, dims, kernel), _numbers(padding, dims)
    if ceil_mode or divisor_override is not None:
        raise Unreadable(f"{b.name} has ceil_mode or divisor_override")
    axes = []
    for n, k, s, p, length in zip(x.held.size, kernel, stride, padding, out.shape[2:], strict=True):
        axis = []
        for o in range(length):
            taps = [at for at in range(o * s - p, o * s - p + k) if 0 <= at < n]
            weight = 1.0 / (k if count_include_pad else max(1, len(taps)))
            axis.append(tuple((at, weight) for at in taps))
        axes.append(tuple(axis))
    return b.gather(x, tuple(axes))


@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d")
def _adaptive_pool(b: GraphBuilder, out: Tensor, x: Any, size: Any) -> Value:
    x = _spatial(b, x, out.dim() - 2)
    axes = []
    for n, length in zip(x.held.size, out.shape[2:], strict=True):
        bounds = [(o * n // length, -(-(o + 1) * n // length)) for o in range(length)]
        axes.append(tuple(tuple((at, 1.0 / (stop - start)) for at in range(start, stop)) for start, stop in bounds))
    return b.gather(x, tuple(axes))


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "max_pool3d", "mkldnn_max_pool2d")
def _max_pool(
    b: GraphBuilder, out: Tensor, x: Any, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:  # fmt: skip
    dims, shape = out.dim() - 2, shape_of(out)
    x = _spatial(b, x, dims)
    kernel = _numbers(kernel, dims)
    stride, padding, dilation = _numbers(stride, dims, kernel), _numbers(padding, dims), _numbers(dilation, dims)
    if ceil_mode:
        raise Unreadable(f"{b.name} has ceil_mode")
    return b.add(layers.MaxPool, [x], Map(shape[0], shape[1:]), shape, kernel, stride, padding, dilation)


def _by_dimension(b: GraphBuilder, out: Tensor, x: Any, apply: Any) -> Value:
    """A resampling that works on each dimension alone: `apply(dim, basis)`, basis (n, 1, n) -> (n, 1, n')."""
    x = _spatial(b, x, out.dim() - 2)
    axes = []
    for dim, n in enumerate(x.held.size):
        matrix = apply(dim, torch.eye(n, dtype=torch.float32, device="cpu")[:, None])[:, 0]  # (input, output)
        axes.append(
            tuple(
                tuple((at, float(matrix[at, o])) for at in range(n) if matrix[at, o] != 0)
                for o in range(matrix.shape[1])
            )
        )
    return b.gather(x, tuple(axes))


def _resized(mode: str) -> Any:
    def apply(b: GraphBuilder, out: Tensor, x: Any, *rest: Any, **more: Any) -> Value:
        align = next((r for r in rest if isinstance(r, bool)), None) if mode == "linear" else None
        scales = [r for r in rest[1:] if isinstance(r, float)]
        size = x.held.size if isinstance(x, Value) else ()
        for scale, n, length in zip(scales, size, out.shape[2:], strict=False):
            if scale * n != length:
                raise Unreadable(f"{b.name} has a scale of {scale} that does not fit its sizes")
        return _by_dimension(
            b, out, x, lambda dim, basis: F.interpolate(basis, size=out.shape[2 + dim], mode=mode, align_corners=align)
        )

    return apply


for _dim in (1, 2, 3):
    rule(f"upsample_nearest{_dim}d")(_resized("nearest"))
    rule(f"_upsample_nearest_exact{_dim}d")(_resized("nearest-exact"))
for _name in ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"):
    rule(_name)(_resized("linear"))


@rule("constant_pad_nd")
def _constant_pad(b: GraphBuilder, out: Tensor, x: Any, pads: Any, fill: float = 0) -> Value:
    x = value(b, x)
    if fill != 0 or not x.is_map or x.flattened or len(pads) > 2 * len(x.held.size):
        raise Unreadable(f"{b.name} pads with {fill}, or other dimensions than a map's")
    pairs = [(0, 0)] * (len(x.held.size) - len(pads) // 2) + [
        (pads[i], pads[i + 1]) for i in range(len(pads) - 2, -1, -2)
    ]
    return _by_dimension(b, out, x, lambda dim, basis: F.pad(basis, pairs[dim]))


def _padded(mode: str) -> Any:
    def apply(b: GraphBuilder, out: Tensor, x: Any, pads: Any) -> Value:
        pairs = [(pads[i], pads[i + 1]) for i in range(len(pads) - 2, -1, -2)]
        return _by_dimension(b, out, x, lambda dim, basis: F.pad(basis, pairs[dim], mode=mode))

    return apply


for _dim in (1, 2, 3):
    rule(f"reflection_pad{_dim}d")(_padded("reflect"))
    rule(f"replication_pad{_dim}d")(_padded("replicate"))


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
    return b.viewed(x, shape_of(out))


@rule("expand")
def _expand(b: GraphBuilder, out: Tensor, x: Any, size: Any, *, implicit: bool = False) -> Value:
    return b.expanded(value(b, x), shape_of(out))


def _applied(name: str) -> Any:
    """An op that moves elements of a sample about, as its matrix."""
    call = getattr(torch, name)

    def apply(b: GraphBuilder, out: Tensor, x: Any, *rest: Any, **more: Any) -> Value:
        x = value(b, x)
        for r in (*rest, *more.values()):
            constant(b, r)
        return b.linear(x, lambda basis: call(basis, *rest, **more), shape_of(out))

    return apply


@rule("index_select")
def _index_select(b: GraphBuilder, out: Tensor, x: Any, dim: int, index: Any) -> Value:
    x, which = value(b, x), constant(b, index)
    place = dim % out.dim() - 1
    if place < 0:
        raise Unreadable(f"{b.name} takes some samples of the batch")
    if not x.is_map or x.flattened or place == 0:
        return b.linear(x, lambda basis: basis.index_select(place + 1, which), shape_of(out))
    taken = tuple(((at, 1.0),) for at in which.reshape(-1).tolist())
    return b.gather(x, tuple(taken if d == place - 1 else _identity(n) for d, n in enumerate(x.held.size)))


for _name in ("permute", "transpose", "flip", "roll", "cumsum", "diff", "tril", "triu"):
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
    return b.linear(x, lambda basis: basis[(slice(None),) * (place + 1) + (slice(start, end, step),)], shape)


@rule("select")
def _select(b: GraphBuilder, out: Tensor, x: Any, dim: int, index: int) -> Value:
    x = value(b, x)
    if dim % (len(x.shape) + 1) == 0:
        raise Unreadable(f"{b.name} takes one sample of the batch")
    return b.linear(x, lambda basis: basis.select(dim, index), shape_of(out))


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
    if any(part.flattened for part in parts) or len({part.held.size for part in parts}) > 1:
        parts = [b.features(part) for part in parts]
    channels = sum(part.held.channels for part in parts)
    return b.add(layers.Concat, parts, Map(channels, parts[0].held.size), shape)


@rule("stack")
def _stack(b: GraphBuilder, out: Tensor, parts: Any, dim: int = 0) -> Value:
    parts = [b.features(value(b, part)) for part in parts]
    place = dim % out.dim() - 1
    if place != 0 and not (place == len(out.shape) - 2 and all(math.prod(p.shape) == 1 for p in parts)):
        raise Unreadable(f"{b.name} stacks along dimension {dim}")
    return b.add(layers.Concat, parts, Map(sum(part.held.channels for part in parts), ()), shape_of(out))
