"""noise: counter-based draws, the same on every backend and device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .. import noise as philox
from ..checks import one_of
from . import counters
from .backend import choose, launch_place, past_dispatcher, register
from .state import addresses

DISTRIBUTIONS = ("normal", "uniform", "bits")
register("noise", cpu=True, cuda=True, triton=True)


def noise(
    shape: Sequence[int],  # (N, ...): the sample dimension first
    *,
    seed: int | Tensor,
    step: int | Tensor,
    first_sample: int | Tensor = 0,
    stream: int = 0,
    distribution: str = "normal",
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Draws that depend on (seed, sample id, step, stream, element) alone: see `mgebm_fast.noise` for the formula.

    Args:
        shape: (N, …); elements of a sample are numbered in logical (C, H, W) order.
        seed: an int in [0, 2**64) or a 0-dim int64 tensor on `device`.
        step: an int in [0, 2**32) or a 0-dim int64 tensor.
        first_sample: id of the first sample, or an int64 tensor: 0-dim (the same) or (N,) (an id for each).
        stream: `mgebm_fast.noise.stream(purpose, grid)`.
        distribution: "normal" N(0, 1), "uniform" (0, 1], or "bits" (the Philox words).
        backend: "auto", "reference", "native" or "triton".

    Returns:
        a contiguous tensor of `shape`: float32, or int64 in [0, 2**32) for "bits".

    Raises:
        ValueError: a counter does not fit 32 bits (they never wrap), or an argument is not one of those above.
        BackendError: a named backend is not available here.
    """
    shape = [int(size) for size in shape]
    if not shape or min(shape) < 0:
        raise ValueError(f"noise: shape must be (N, ...) with no negative size, got {tuple(shape)}")
    one_of(distribution, DISTRIBUTIONS, "distribution", "noise")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    backend = choose("noise", backend, device)
    placed = counters.check(
        "noise", shape[0], math.prod(shape[1:]), device, seed=seed, first_sample=first_sample, step=step, stream=stream
    )
    if past_dispatcher():
        return make(shape, distribution, placed, device, backend)
    return torch.ops.mgebm_fast.noise(shape, distribution, *placed.arguments, device, backend)


@torch.library.custom_op(
    "mgebm_fast::noise",
    mutates_args=(),
    schema=f"(SymInt[] shape, str distribution, {counters.SCHEMA}, Device device, str backend) -> Tensor",
)
def _noise(shape, distribution, *arguments):
    *arguments, device, backend = arguments
    return make(shape, distribution, counters.Counters(*arguments), device, backend)


def make(
    shape: Sequence[int], distribution: str, placed: counters.Counters, device: torch.device, backend: str
) -> Tensor:
    """The draws for checked arguments, past the dispatcher."""
    out = torch.empty(shape, dtype=_dtype(distribution), device=device)
    if out.numel() == 0:
        return out
    samples, elements = shape[0], math.prod(shape[1:])
    if backend == "reference":
        return noise_reference(samples, elements, placed, distribution, device).reshape(shape).contiguous()
    if backend == "triton":
        from ..kernels.noise import noise as kernel

        kernel(out, distribution=distribution, **placed.reference_arguments)
        return out
    launch = native.module().noise_cuda if device.type == "cuda" else native.module().noise_cpu
    code = DISTRIBUTIONS.index(distribution)
    [address] = addresses("noise", out, dispatched=True)
    launch(address, samples, elements, 0, code, placed.native_arguments, *launch_place(out))
    return out


@_noise.register_fake
def _(shape, distribution, *arguments):
    return torch.empty(shape, dtype=_dtype(distribution), device=arguments[-2])


def _dtype(distribution: str) -> torch.dtype:
    return torch.int64 if distribution == "bits" else torch.float32


def noise_reference(
    samples: int, elements: int, placed: counters.Counters, distribution: str, device: torch.device
) -> Tensor:
    """(samples, elements) draws in plain torch; normals are computed in float64 and rounded once."""
    word, valid = philox.words(samples, elements, device=device, **placed.reference_arguments)
    if distribution == "bits":
        return torch.where(valid, word, -1).flatten(1)[:, :elements]
    draw = philox.normal(word).float() if distribution == "normal" else philox.uniform(word)
    return torch.where(valid, draw, torch.nan).flatten(1)[:, :elements]
