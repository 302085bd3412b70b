"""pyramid: block means of one batch at every size, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..checks import is_int, number
from .backend import choose, launch_place, past_dispatcher, register
from .state import addresses, why_not_plain

OP = "pyramid"
register("pyramid", cpu=True, cuda=True)
# Sums of bytes are int32 in the kernels: above this many pixels a block the input goes through float32.
MAX_BYTE_BLOCK = 2**23
MAX_SPATIAL = 3


def pyramid(
    x: Tensor,  # (N, C, *spatial) uint8 or float32
    sizes: Sequence[int | Sequence[int]],
    *,
    backend: str = "auto",
) -> list[Tensor]:
    """Block means straight from x: the value at size s is the mean over blocks of (spatial / s) pixels.

    Sums are exact for bytes and in double for floats, so each mean is rounded once, and
    `pyramid(upsample(y, f), [y.size])` gives y back to 1 ulp.

    Args:
        x: one to three spatial dimensions; uint8 values stay on their 0–255 scale.
        sizes: for each result one size for all spatial dimensions, or one for each; each divides x's.

    Returns:
        float32 tensors (N, C, *size), in the order of `sizes`; differentiable in a float x (the adjoint of a block
        mean is replication divided by the block's pixel count).

    Source: Gao et al. (CVPR 2018), whose every grid is the block mean of the finest image.
    """
    _check_input(x)
    extents = [_extent(size, x) for size in sizes]
    if not extents:
        return []
    backend = choose("pyramid", backend, x.device)
    flat = [size for extent in extents for size in extent]
    if past_dispatcher(x) and not (x.requires_grad or why_not_plain(x)):
        return _means(x, flat, backend)
    return torch.ops.mgebm_fast.pyramid(x, flat, backend)


def _check_input(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{OP}: x must be a tensor, got {type(x).__name__}")
    if x.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"{OP}: x must be uint8 or float32, got {x.dtype}")
    if not 1 <= x.dim() - 2 <= MAX_SPATIAL:
        raise ValueError(
            f"{OP}: x must have shape (N, C, *spatial) with 1 to 3 spatial dimensions, got {tuple(x.shape)}"
        )


def _extent(size: int | Sequence[int], x: Tensor) -> tuple[int, ...]:
    spatial = tuple(x.shape[2:])
    extent = tuple(map(number, size)) if isinstance(size, (tuple, list)) else (number(size),) * len(spatial)
    if len(extent) != len(spatial) or not all(map(is_int, extent)):
        raise ValueError(f"{OP}: sizes must hold ints or tuples of {len(spatial)} ints, got {size!r}")
    if any(s < 1 or n % s for s, n in zip(extent, spatial)):
        raise ValueError(f"{OP}: sizes must divide x's spatial size {spatial}, got {size!r}")
    return extent


def chains(spatial: tuple[int, ...], extents: list[tuple[int, ...]]) -> list[list[int]]:
    """Indices of `extents` in as few chains as a greedy pass finds: fine to coarse, each dividing the one before."""
    order = sorted(range(len(extents)), key=lambda i: (-math.prod(extents[i]), i))
    ordered: list[list[int]] = []
    for index in order:
        for chain in ordered:
            if all(f % c == 0 for f, c in zip(extents[chain[-1]], extents[index])):
                chain.append(index)
                break
        else:
            ordered.append([index])
    return ordered


def three(extent: Sequence[int]) -> tuple[int, int, int]:
    """(depth, height, width) with leading ones."""
    depth, height, width = (1,) * (MAX_SPATIAL - len(extent)) + tuple(extent)
    return depth, height, width


def _extents(flat: Sequence[int], x: Tensor) -> list[tuple[int, ...]]:
    rank = x.dim() - 2
    return [tuple(flat[i : i + rank]) for i in range(0, len(flat), rank)]


@torch.library.custom_op(
    "mgebm_fast::pyramid", mutates_args=(), schema="(Tensor x, SymInt[] sizes, str backend) -> Tensor[]"
)
def _pyramid(x, sizes, backend):
    return _means(x, sizes, backend)


def _means(x: Tensor, sizes: Sequence[int], backend: str) -> list[Tensor]:
    extents = _extents(sizes, x)
    if backend == "reference" or x.numel() == 0:
        return [pyramid_reference(x, extent) for extent in extents]
    spatial = tuple(x.shape[2:])
    if x.dtype == torch.uint8 and math.prod(spatial) > MAX_BYTE_BLOCK:
        x = x.float()
    x = x.contiguous()
    outputs = [x.new_empty((*x.shape[:2], *extent), dtype=torch.float32) for extent in extents]
    on_cuda = x.device.type == "cuda"
    launch = native.module().pyramid_cuda if on_cuda else native.module().pyramid_cpu
    address, *filled = addresses(OP, x, *outputs, dispatched=True)
    for chain in chains(spatial, extents):
        launch(
            address,
            x.dtype == torch.uint8,
            x.shape[0] * x.shape[1],
            three(spatial),
            [(three(extents[i]), filled[i]) for i in chain],
            *launch_place(x),
        )
    return outputs


@_pyramid.register_fake
def _(x, sizes, backend):
    return [x.new_empty((*x.shape[:2], *extent), dtype=torch.float32) for extent in _extents(sizes, x)]


def _setup_context(ctx, inputs, output):
    x, sizes, backend = inputs
    ctx.extents, ctx.spatial, ctx.backend = _extents(sizes, x), tuple(x.shape[2:]), backend


def _backward(ctx, grads):
    total = None
    for grad, extent in zip(grads, ctx.extents):
        factor = [n // s for n, s in zip(ctx.spatial, extent)]
        part = torch.ops.mgebm_fast.upsample(grad.float() / math.prod(factor), factor, ctx.backend)
        total = part if total is None else total + part
    return total, None, None


_pyramid.register_autograd(_backward, setup_context=_setup_context)


def pyramid_reference(x: Tensor, extent: Sequence[int]) -> Tensor:
    """One size's block means in plain torch: a float64 mean, rounded once."""
    shape, means = list(x.shape[:2]), []
    for n, s in zip(x.shape[2:], extent):
        means.append(len(shape) + 1)
        shape += [s, n // s]
    return x.double().reshape(shape).mean(dim=means).float()
