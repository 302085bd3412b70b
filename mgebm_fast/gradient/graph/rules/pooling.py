"""Rules of the ops that pool, resize and pad maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....ops.graph_chain import layers
from ....ops.graph_chain.layers import Map
from ...builder import Unreadable
from ..values import GraphBuilder, Value
from .registry import rule, shape_of, value


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
        # As a list at once: of a single number torch would be asked by an op, which the tape would keep.
        axes.append(tuple(tuple((at, w) for at, w in enumerate(taps) if w != 0) for taps in matrix.T.tolist()))
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
    x = b.as_map(value(b, x))
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
