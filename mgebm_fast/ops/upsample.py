"""upsample: pixel replication by an integer factor, batched."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .. import native
from ..checks import is_int, number
from .backend import choose, launch_place, past_dispatcher, register
from .pyramid import MAX_SPATIAL, three
from .state import addresses, why_not_plain

OP = "upsample"
register("upsample", cpu=True, cuda=True)


def upsample(
    x: Tensor,  # (N, C, *spatial) float32
    factor: int | Sequence[int],
    *,
    backend: str = "auto",
) -> Tensor:
    """Replication: out[..., i, j] = x[..., i // f, j // f].

    Args:
        x: float32 with one to three spatial dimensions.
        factor: one positive integer for all spatial dimensions, or one for each.

    Returns:
        float32 (N, C, *(spatial · factor)), contiguous; differentiable (the adjoint is the block sum).

    Source: the up-scaling of Gao et al. (CVPR 2018) between grids.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{OP}: x must be a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32:
        raise TypeError(f"{OP}: x must be float32, got {x.dtype}")
    rank = x.dim() - 2
    if not 1 <= rank <= MAX_SPATIAL:
        raise ValueError(
            f"{OP}: x must have shape (N, C, *spatial) with 1 to 3 spatial dimensions, got {tuple(x.shape)}"
        )
    factors = list(map(number, factor)) if isinstance(factor, (tuple, list)) else [number(factor)] * rank
    if len(factors) != rank or not all(is_int(f, 1) for f in factors):
        raise ValueError(f"{OP}: factor must be a positive int or {rank} of them, got {factor!r}")
    backend = choose("upsample", backend, x.device)
    if past_dispatcher(x) and not (x.requires_grad or why_not_plain(x)):
        return _replicated(x, factors, backend)
    return torch.ops.mgebm_fast.upsample(x, factors, backend)


def _output_shape(x: Tensor, factors: Sequence[int]) -> list[int]:
    return [*x.shape[:2], *(n * f for n, f in zip(x.shape[2:], factors))]


@torch.library.custom_op(
    "mgebm_fast::upsample", mutates_args=(), schema="(Tensor x, SymInt[] factor, str backend) -> Tensor"
)
def _upsample(x, factor, backend):
    return _replicated(x, factor, backend)


def _replicated(x: Tensor, factor: Sequence[int], backend: str) -> Tensor:
    if backend == "reference":
        return upsample_reference(x, factor)
    x = x.contiguous()
    out = x.new_empty(_output_shape(x, factor))
    on_cuda = x.device.type == "cuda"
    (native.module().upsample_cuda if on_cuda else native.module().upsample_cpu)(
        *addresses(OP, x, out, dispatched=True),
        x.shape[0] * x.shape[1],
        three(x.shape[2:]),
        three(factor),
        *launch_place(x),
    )
    return out


@_upsample.register_fake
def _(x, factor, backend):
    return x.new_empty(_output_shape(x, factor))


def _setup_context(ctx, inputs, output):
    x, factor, backend = inputs
    ctx.spatial, ctx.count, ctx.backend = list(x.shape[2:]), prod(factor), backend


def _backward(ctx, grad):
    (means,) = torch.ops.mgebm_fast.pyramid(grad.float(), ctx.spatial, ctx.backend)
    return means * ctx.count, None, None


_upsample.register_autograd(_backward, setup_context=_setup_context)


def upsample_reference(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Replication in plain torch."""
    out = x
    for dim, f in enumerate(factor, start=2):
        out = out.repeat_interleave(f, dim=dim)
    return out.contiguous().clone() if out is x else out.contiguous()
