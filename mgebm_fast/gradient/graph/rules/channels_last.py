"""Rules of tensors whose channels come last, as a permutation makes them before a dense layer or a layer norm of each
pixel: those of the map that they hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from ....ops.graph_chain import layers
from ....ops.graph_chain.layers import Map
from ...builder import Unreadable
from ..values import ChannelsLast, GraphBuilder, Value
from .registry import RULES, constant
from .shapes import _kept, _places, _reduced

Read = Callable[..., Any]  # (builder, result of the op, *its arguments) -> values; None: by the rule of other tensors
_READS: dict[str, Read] = {}
# Functions of each number, and what adds or multiplies numbers at one place.
_EACH = (
    "relu leaky_relu silu tanh sigmoid mish abs softplus hardtanh exp log sin cos sqrt erf atan square relu6 "
    "reciprocal log1p expm1 rsqrt hardsigmoid hardswish elu celu selu gelu log_sigmoid_forward clamp clamp_min "
    "clamp_max pow cosh sinh softshrink neg add sub rsub mul div lerp clone contiguous alias detach lift_fresh_copy "
    "positive _to_copy dropout"
).split()


_DENSE = frozenset(("addmm", "mm", "linear"))  # whose rules take tensors of either kind


def read(b: GraphBuilder, name: str, out: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The values that an op gives, by its rule."""
    if name not in _DENSE and any(isinstance(a, ChannelsLast) for a in tree_flatten((args, kwargs))[0]):
        if name in _READS and (found := _READS[name](b, out, *args, **kwargs)) is not None:
            return found
        args, kwargs = tree_map_only(ChannelsLast, lambda x: _in_order(b, x), (args, kwargs))
    return RULES[name](b, out, *args, **kwargs)


def _put(*names: str) -> Callable[[Read], Read]:
    def put(function: Read) -> Read:
        _READS.update(dict.fromkeys(names, function))
        return function

    return put


def _in_order(b: GraphBuilder, x: ChannelsLast) -> Value:
    """As a tensor whose elements are held in their order."""
    moved = b.moved(x.map, lambda basis: basis.movedim(1, -1), x.shape)
    if not x.joined:
        return moved
    if x.joined < len(x.map.held.size):
        raise Unreadable(f"{b.name} is done to a map of shape {x.shape}")
    return dataclasses.replace(b.features(moved), shape=(x.map.held.pixels, x.map.held.channels), rows=True)


def _first(tensor: Tensor) -> Tensor:
    """A tensor (N, *size, C) as (N, C, *size)."""
    return tensor.movedim(-1, 1)


def _like(out: Tensor) -> Tensor:
    """The shape of a result (N, *size, C) as the map's, which rules ask for; an op on the result itself would be taken
    for one of the energy's."""
    return torch.empty(out.shape[0], out.shape[-1], *out.shape[1:-1], device="meta")


def _each(name: str) -> Read:
    def apply(b: GraphBuilder, out: Tensor, *args: Any, **more: Any) -> Any:
        lasts = [a for a in args if isinstance(a, ChannelsLast)]
        x = lasts[0]
        alike = all(a.shape == x.shape and a.joined == x.joined for a in lasts)
        if not alike or any(isinstance(a, Value) for a in args) or tuple(out.shape) != x.tensor_shape(b.samples):
            return None
        if x.joined and any(isinstance(a, Tensor) and a.dim() > 1 for a in args):
            return None
        given = [a.map if isinstance(a, ChannelsLast) else _of_map(a, len(x.shape)) for a in args]
        return ChannelsLast(RULES[name](b, out if x.joined else _like(out), *given, **more), x.joined)

    return apply


def _of_map(constant_: Any, rank: int) -> Any:
    """A constant that broadcasts to (N, *size, C) as one that does to (N, C, *size)."""
    if not isinstance(constant_, Tensor) or constant_.dim() == 0:
        return constant_
    missing = rank - constant_.dim()
    if missing < 0:  # with a row a sample
        return _first(constant_)
    return constant_.reshape((1,) * missing + tuple(constant_.shape)).movedim(-1, 0)


for _name in _EACH:
    _put(_name)(_each(_name))


@_put("permute", "transpose")
def _reordered(b: GraphBuilder, out: Tensor, x: ChannelsLast, *dims: Any) -> Any:
    name = "permute" if len(dims) == 1 else "transpose"
    rank = len(x.shape) + 1
    back = not x.joined and _places(name, rank, dims) == [0, rank - 1, *range(1, rank - 1)]
    return x.map if back else None


@_put("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "flatten", "unflatten", "unsqueeze",
      "squeeze", "expand")  # fmt: skip
def _viewed(b: GraphBuilder, out: Tensor, x: ChannelsLast, *rest: Any) -> Any:
    shape, held = tuple(out.shape), x.map.held
    if shape == (b.samples, held.channels) and held.pixels == 1:
        return b.viewed(b.features(x.map), shape[1:])
    if shape[-1:] != (held.channels,) or math.prod(shape[:-1]) != b.samples * held.pixels:
        return None
    if shape[0] == b.samples and len(shape) > 2:
        return ChannelsLast(b.viewed(x.map, (held.channels, *shape[1:-1])))
    joined = (ChannelsLast(x.map, n) for n in range(1, len(held.size) + 1))
    return next((same for same in joined if same.tensor_shape(b.samples) == shape), None)


def dense_of_pixels(b: GraphBuilder, x: ChannelsLast, weight: Tensor, bias: Tensor | None) -> ChannelsLast:
    """A dense layer of each pixel: a convolution by a kernel of one."""
    held, ones = x.map.held, (1,) * len(x.map.held.size)
    kernel = weight.detach().reshape(*weight.shape, *ones)
    out, bias = Map(len(weight), held.size), None if bias is None else bias.detach()
    shape = (len(weight), *held.size)
    return ChannelsLast(
        b.add(layers.Convolution, [x.map], out, shape, kernel, bias, ones, (0,) * len(ones), ones), x.joined
    )


@_put("bmm")
def _bmm(b: GraphBuilder, out: Tensor, x: Any, y: Any) -> Any:
    if not isinstance(x, ChannelsLast) or not isinstance(y, Tensor) or (len(y) > 1 and y.stride(0) != 0):
        return None
    return dense_of_pixels(b, x, y[0].T, None)


@_put("native_layer_norm")
def _layer_norm(b: GraphBuilder, out: Tensor, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    if not isinstance(x, ChannelsLast) or x.joined or not eps > 0:
        return None
    return norm_of_pixels(b, out, x, shape, weight, bias, eps)


def norm_of_pixels(
    b: GraphBuilder, out: Tensor, x: ChannelsLast, shape: Any, weight: Any, bias: Any, eps: float
) -> ChannelsLast:
    """A layer norm of each pixel's channels, or of all of a sample."""
    weight, bias = (None if t is None else constant(b, t).detach() for t in (weight, bias))
    if tuple(shape) == x.shape:
        of_map = [None if t is None else t.movedim(-1, 0).contiguous() for t in (weight, bias)]
        return ChannelsLast(RULES["native_layer_norm"](b, _like(out), x.map, list(x.map.shape), *of_map, eps))
    if tuple(shape) != x.shape[-1:]:
        raise Unreadable(f"{b.name} normalises {tuple(shape)} of a tensor of shape {x.shape}")
    # (x − mean) / √(var + eps) over the channels of each pixel
    of_pixels = torch.empty(b.samples, 1, *x.map.held.size)
    centred = b.combined(layers.Add, x.map, _kept(b, of_pixels, x.map, 1), -1.0)
    variance = b.affine(_reduced(b, of_pixels, b.pointwise(centred, "power", 2), 1, mean=True), None, eps)
    normed = b.combined(layers.Multiply, centred, b.pointwise(b.pointwise(variance, "sqrt"), "power", -1))
    view = (-1, *[1] * len(x.map.held.size))
    scale, shift = (None if t is None else t.reshape(view) for t in (weight, bias))
    return ChannelsLast(normed if scale is None and shift is None else b.affine(normed, scale, shift))


@_put("sum", "mean")
def _sum(b: GraphBuilder, out: Tensor, x: ChannelsLast, dims: Any = None, keepdim: bool = False, **more: Any) -> Any:
    if x.joined or dims is None:
        return None
    rank = len(x.shape) + 1
    places = sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims))
    pixels, every = list(range(1, rank - 1)), list(range(1, rank))
    if keepdim or places not in (pixels, every):
        return None
    name = b.name.split(" ")[0]
    return RULES[name](b, out, x.map, list(range(2, rank)) if places == pixels else every, False, **more)


def _along(name: str, place: int, default: int = 0) -> Read:
    """Of an op along the channels, whose dimension is argument `place`, `default` where it is left out."""

    def apply(b: GraphBuilder, out: Any, x: Any, *rest: Any) -> Any:
        parts = x if isinstance(x, (list, tuple)) else [x]
        dims = 1 + max(len(p.shape) for p in parts if isinstance(p, ChannelsLast))
        dim = rest[place] if len(rest) > place else default
        alike = all(isinstance(p, Tensor) or isinstance(p, ChannelsLast) and not p.joined for p in parts)
        if not alike or dim % dims != dims - 1:
            return None
        each = [p.map if isinstance(p, ChannelsLast) else _first(p) for p in parts]
        maps = each if isinstance(x, (list, tuple)) else each[0]
        outs = [_like(o) for o in out] if isinstance(out, (list, tuple)) else _like(out)
        made = RULES[name](b, outs, maps, *rest[:place], 1, *rest[place + 1 :])
        return [ChannelsLast(m) for m in made] if isinstance(made, list) else ChannelsLast(made)

    return apply


for _name, _place in (("slice", 0), ("split", 1), ("split_with_sizes", 1), ("cat", 0)):
    _put(_name)(_along(_name, _place))
_put("glu")(_along("glu", 0, -1))
