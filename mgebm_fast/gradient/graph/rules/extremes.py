"""Rules of greatest and least values: over pixels by pools, over features as y + relu(x − y).

Where several are the greatest, torch's gradient goes to one of them by max and min, and is shared by the other ops.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ....ops.graph_chain import layers
from ....ops.graph_chain.layers import Map
from ...builder import Unreadable
from ..values import GraphBuilder, Value
from .elementwise import _add, _sub
from .pooling import _numbers, _spatial
from .registry import rule, shape_of, value
from .shapes import _dims

_MOST = 64  # features whose greatest is taken


@rule("maximum", "minimum")
def _maximum(b: GraphBuilder, out: Tensor, x: Any, y: Any) -> Value:
    apart, half = _sub(b, out, x, y), -0.5 if b.name.startswith("minimum") else 0.5
    middle = _add(b, out, y, apart, alpha=0.5)  # |x − y| has no slope at 0: of equal ones each has half of the gradient
    return _add(b, out, middle, b.pointwise(apart, "abs"), alpha=half)


@rule("amax", "amin", "max", "min")
def _extreme(b: GraphBuilder, out: Any, x: Any, dims: Any = None, keepdim: bool = False) -> Value:
    if dims is None:
        raise Unreadable(f"{b.name} is over the batch")
    x, shape = value(b, x), shape_of(out if isinstance(out, Tensor) else out[0])
    places, least = _dims(dims, x), b.name.split()[0].endswith("min")
    shares = b.name.startswith("am")
    if shares and (not x.is_map or 0 in places and x.held.channels > 1):
        raise Unreadable(f"{b.name} shares its gradient among equal features (max and min are read)")
    x = b.affine(x, -1.0) if least else x
    if x.is_map and x.flattened and places == list(range(len(x.shape))):  # all of its elements
        x = Value(x.index, x.held, x.map_shape)
        places = list(range(len(x.shape)))
    elif 0 not in places:
        x = b.as_map(x)
    if x.is_map and not x.flattened:
        kernel = tuple(n if dim + 1 in places else 1 for dim, n in enumerate(x.held.size))
        x = _shared(b, x, kernel) if shares else _pooled(b, x, kernel)
        if places[0] == 0 and x.held.pixels == 1:
            x, places = b.viewed(b.features(x), (x.held.channels,)), [0]
    if 0 in places:
        x = _of_features(b, x, places)
    x = b.viewed(x, shape)  # which refuses what was not reduced
    return b.affine(x, -1.0) if least else x


def _pooled(b: GraphBuilder, x: Value, kernel: tuple[int, ...]) -> Value:
    """The greatest of windows side by side."""
    held = Map(x.held.channels, tuple(n // k for n, k in zip(x.held.size, kernel, strict=True)))
    none, ones = (0,) * len(kernel), (1,) * len(kernel)
    return b.add(layers.MaxPool, [x], held, (held.channels, *held.size), kernel, kernel, none, ones)


def _shared(b: GraphBuilder, x: Value, kernel: tuple[int, ...]) -> Value:
    """The same as the mean of those that are the greatest, which shares the gradient among them."""
    sizes = [*zip(x.held.size, kernel, strict=True)]
    spread = tuple(tuple(((at // k, 1.0),) for at in range(n)) for n, k in sizes)
    windows = tuple(tuple(tuple((at + i, 1.0) for i in range(k)) for at in range(0, n, k)) for n, k in sizes)
    below = b.combined(layers.Add, x, b.gather(_pooled(b, x, kernel), spread), -1.0)
    greatest = b.pointwise(below, "step", 0.0, True)
    count = b.gather(greatest, windows)
    total = b.gather(b.combined(layers.Multiply, x, greatest), windows)
    return b.combined(layers.Multiply, total, b.pointwise(count, "power", -1))


def _of_features(b: GraphBuilder, x: Value, places: list[int]) -> Value:
    """The greatest of features over their first dimensions, by halves."""
    count = math.prod(x.shape[: len(places)])
    x = b.features(x) if x.flattened else x
    if x.is_map or places != list(range(len(places))) or count > _MOST:
        raise Unreadable(f"{b.name} is over channels of a tensor of shape {x.shape}")
    each = x.held.channels // count

    def part(x: Value, first: int, many: int) -> Value:
        return b.add(layers.Slice, [x], Map(many * each, ()), (many * each,), first * each)

    while count > 1:
        half = count // 2
        first, second = part(x, 0, half), part(x, half, half)
        above = b.pointwise(b.combined(layers.Add, first, second, -1.0), "leaky_relu", 0.0)
        greater = b.combined(layers.Add, second, above, 1.0)
        if count % 2:
            held = Map((half + 1) * each, ())
            greater = b.add(layers.Concat, [greater, part(x, 2 * half, 1)], held, (held.channels,))
        x, count = greater, count - half
    return x


@rule("adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_max_pool(b: GraphBuilder, out: Any, x: Any, size: Any) -> Value:
    dims = out[0].dim() - 2
    x, size = _spatial(b, x, dims), _numbers(size, dims)
    if any(n % length for n, length in zip(x.held.size, size, strict=True)):
        raise Unreadable(f"{b.name} has windows of several lengths")
    return _pooled(b, x, tuple(n // length for n, length in zip(x.held.size, size, strict=True)))
