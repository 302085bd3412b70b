"""conv_chain on a GPU, resident: all K steps in one launch, with weights, maps and state in shared memory.

csrc/ops/conv_chain/resident.h is the kernel. It takes nets without batch statistics whose float16 weights, and the maps
of one sample, fit into the shared memory of a block (`why_not`); several nets of one launch are a cascade.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ... import native
from ..backend import launch_place
from ..counters import Counters
from ..edge_step import NO_BAD_STEP
from ..update import Update
from .packed import IDLE, nowhere
from .resident_layout import WARPS, Layout, slope_of
from .windows import StageLike

MAX_NETS, MAX_STAGES = 4, 16  # kResidentNets, kResidentStages of resident_params.h
MAX_SAMPLES = 16
_HEAD_LOG2 = 1.0


def scaled_head(head: Tensor) -> tuple[Tensor, Tensor]:
    """(head times the power of two that brings its largest entry into [2, 4), one over that power), for float16.

    The largest entry is not read back: `refresh` may follow every update.
    """
    exponent = _HEAD_LOG2 - torch.floor(torch.log2(head.abs().amax().clamp_min(2.0**-100)))
    return head * torch.exp2(exponent), torch.exp2(-exponent)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a GPU gives one block, and how many blocks run at a time."""

    shared_bytes: int
    blocks: int


H100 = Limits(shared_bytes=232448, blocks=132)


@functools.cache
def limits_of(device: torch.device) -> Limits:
    """The limits of a CUDA device."""
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks a field
    return Limits(properties.shared_memory_per_block_optin, properties.multi_processor_count)


def why_not(stages: Sequence[StageLike], limits: Limits = H100) -> str:
    """Why a block cannot hold a chain of this net; an empty string when it can."""
    if len(stages) > MAX_STAGES:
        return f"it takes up to {MAX_STAGES} layers, with shortcuts, and the net has {len(stages)}"
    for index, stage in enumerate(stages):
        name = getattr(stage, "name", index)
        if stage.norm is not None:
            return f"a block sees its own samples alone, and layer {name} normalises by batch statistics"
        if stage.activation == "leaky_relu" and stage.slope < 0:
            return f"it reads slopes from signs, and layer {name} has slope {slope_of(stage):g}"
    needed = Layout(stages, samples=1).shared_bytes
    if needed > limits.shared_bytes:
        sizes = f"{needed / 1024:.0f} KiB of shared memory, of {limits.shared_bytes / 1024:.0f}"
        return f"weights and maps of one sample take {sizes}"
    return ""


def best_samples(stages: Sequence[StageLike], batch: int, limits: Limits = H100) -> int:
    """How many chains a block should hold, by a count of the tiles that its warps go through in turn."""
    best, least = 1, math.inf
    for samples in range(1, min(MAX_SAMPLES, max(batch, 1)) + 1):
        layout = Layout(stages, samples)
        if layout.shared_bytes > limits.shared_bytes:
            break
        waves = math.ceil(math.ceil(batch / samples) / limits.blocks)
        if waves * layout.cost < least:
            best, least = samples, waves * layout.cost
    return best


class ResidentChain:
    """A net laid out for `samples` chains a block, its weights as float16 in `memory`, on any device."""

    def __init__(self, stages: Sequence[StageLike], *, samples: int, device: torch.device | str = "cuda") -> None:
        self.layout = Layout(stages, samples)
        words = np.zeros(self.layout.memory_bytes // 4, np.int32)
        for at, values in self.layout.tables:
            words[at // 4 : at // 4 + len(values)] = values
        self.memory = torch.from_numpy(words).view(torch.uint8).to(device, copy=True)
        self._swizzles = [part.swizzle.to(device) for part in self.layout.parts]

    def _view(self, at: int, count: int, dtype: torch.dtype) -> Tensor:
        return self.memory[at : at + count * dtype.itemsize].view(dtype)

    @torch.no_grad()
    def load(self, stages: Sequence[StageLike], head: Tensor) -> None:
        """Take these weights; `head` is dE/d(top map), (C_top, *top size). Nothing synchronises."""
        head, unscale = scaled_head(head.detach())
        for index, (part, stage) in enumerate(zip(self.layout.parts, stages, strict=True)):
            weight = stage.weight.detach().flatten(2)
            if index == 0:  # x comes as the sum of two numbers, in twice the channels
                weight = torch.cat([weight, weight], 1)
            # -> (tap, output, input), padded to whole chunks
            padded = F.pad(
                weight.permute(2, 0, 1),
                (0, 8 * part.in_chunks - weight.shape[1], 0, 8 * part.out_chunks - weight.shape[0]),
            )
            into = self._view(part.weights, 8 * len(part.swizzle), torch.float16).view(-1, 8)
            into[self._swizzles[index]] = padded.to(torch.float16).reshape(-1, 8)
            if stage.bias is not None:
                self._view(part.bias, len(stage.bias), torch.float32).copy_(stage.bias.detach())
        channels = 8 * self.layout.parts[-1].out_chunks
        top = self._view(self.layout.head, head[0].numel() * channels, torch.float32).view(-1, channels)
        top[:, : head.shape[0]] = head.flatten(1).T
        self._view(self.layout.unscale, 1, torch.float32).copy_(unscale)

    def arguments(
        self,
        start: Tensor,
        out: Tensor,
        *,
        steps: int,
        numbers: Update,
        place: Counters,
        gradient: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The fields of `ResidentNet`: a chain from `start`, at this size or a smaller one, into `out`.

        Tensors are contiguous and on `memory`'s device; the caller keeps them alive.
        """
        factor = [n // m for n, m in zip(out.shape[2:], start.shape[2:], strict=True)]
        return (
            self.memory.data_ptr(), *self.layout.arguments, start.data_ptr(), (*[1] * (3 - len(factor)), *factor),
            out.data_ptr(), 0 if gradient is None else gradient.data_ptr(), 0 if mask is None else mask.data_ptr(),
            steps, numbers.native_arguments, place.native_arguments,
        )  # fmt: skip


def launch_arguments(
    chains: Sequence[ResidentChain], nets: Sequence[tuple[Any, ...]], batch: int, bad_step: Tensor, blocks: int
) -> tuple[Any, ...]:
    """The fields of `ResidentParams`: all chains of one launch, coarse to fine, on `blocks` blocks at most."""
    shared = max(chain.layout.shared_bytes for chain in chains)
    share = math.ceil(batch / blocks)
    return batch, share, bad_step.data_ptr(), shared, WARPS, math.ceil(batch / share), list(nets)


def launch(chains: Sequence[ResidentChain], nets: Sequence[tuple[Any, ...]], x: Tensor, bad_step: Tensor) -> None:
    """All chains on x's device and its current stream; `bad_step` is lowered to the first step that overflowed."""
    blocks = limits_of(x.device).blocks
    arguments = launch_arguments(chains, nets, x.shape[0], bad_step, blocks)
    native.module().conv_chain_cuda(*arguments, *launch_place(x))


def launch_gradient(chain: ResidentChain, x: Tensor, out: Tensor, bad_step: Tensor) -> None:
    """out ← ∇E(x); both contiguous."""
    if x.shape[0]:
        net = chain.arguments(x, out, steps=0, numbers=IDLE, place=nowhere(x.device), gradient=out)
        launch([chain], [net], x, bad_step)


def check(chain: ResidentChain, x: Tensor) -> None:
    """Raw addresses go to the kernel: only a contiguous float32 x of the net's shape, on its device, may pass."""
    shape = chain.layout.shape
    if x.dtype != torch.float32 or x.device != chain.memory.device:
        raise TypeError(f"conv_chain: x must be float32 on {chain.memory.device}, got {x.dtype} on {x.device}")
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"conv_chain: x must have shape (N, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
    if not x.is_contiguous():
        raise ValueError("conv_chain: x must be contiguous, got strides " + str(x.stride()))


def run(
    stages: Sequence[StageLike], head: Tensor, x: Tensor, *, steps: int, numbers: Update, place: Counters,
    mask: Tensor | None = None,
) -> None:  # fmt: skip
    """The steps in place, of a net laid out for this call alone. ValueError where a block cannot hold it."""
    limits = limits_of(x.device)
    if reason := why_not(stages, limits):
        raise ValueError(f"conv_chain: on a GPU the net must fit a block, but {reason}")
    chain = ResidentChain(stages, samples=best_samples(stages, x.shape[0], limits), device=x.device)
    chain.load(stages, head)
    if mask is not None:
        mask = mask.expand(x.shape).contiguous()
    if x.shape[0] and steps:
        net = chain.arguments(x, x, steps=steps, numbers=numbers, place=place, mask=mask)
        launch([chain], [net], x, torch.full((), NO_BAD_STEP, device=x.device))
