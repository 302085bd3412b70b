"""∇E and whole chains of a small stack on a GPU, by the resident chain: one launch, which reads and writes only x."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import backend as backends
from ..ops.conv_chain import resident
from ..ops.counters import Counters
from ..ops.edge_step import NO_BAD_STEP
from ..ops.state import check_mask
from ..ops.update import Update
from .base import GradientPlan, PlanReport
from .stack import Stack, example_input, layout_of, reread


def why_not(stack: Stack, x: Tensor, precision: str) -> str:
    """Why the resident chain cannot run `stack` on tensors like x; an empty string when it can."""
    if os.environ.get("MGEBM_RESIDENT") == "0":
        return "MGEBM_RESIDENT=0"
    if precision != "fp16":
        return f"its weights and maps are fp16, not {precision}"
    if missing := backends.unavailable("conv_chain", "native", x.device):
        return missing
    return resident.why_not(stack.stages, resident.limits_of(x.device))


class ResidentPlan(GradientPlan):
    """∇E and Langevin steps of one energy with the weights that it had at the last `refresh`, in float16.

    There is no host sync, so that a CUDA graph can capture a call. `bad_step` records the first step that overflowed.
    """

    backends = ("native",)
    precision = "fp16"
    bad_step: Tensor

    def __init__(self, stack: Stack, energy: Any, x: Tensor) -> None:
        self._energy = energy
        with torch.inference_mode(False), torch.no_grad():
            self.bad_step = torch.full((), NO_BAD_STEP, device=x.device)
            self._idle = torch.full((), NO_BAD_STEP, device=x.device)
            self._example = example_input(stack)
            self._layouts = [layout_of(stage) for stage in stack.stages]
            samples = resident.best_samples(stack.stages, x.shape[0], resident.limits_of(x.device))
            self._chain = resident.ResidentChain(stack.stages, samples=samples, device=x.device)
            self._chain.load(stack.stages, stack.head)

    def gradient(self, x: Tensor) -> Tensor:  # (N, C, *size) float32 -> the same, contiguous
        """∇E(x), float32; what overflowed in float16 is inf or NaN."""
        resident.check(self._chain, x)
        x = x.detach().contiguous()
        out = torch.empty_like(x)
        resident.launch_gradient(self._chain, x, out, self._idle)
        return out

    def advance_(self, x: Tensor, place: Counters, steps: int, numbers: Update, mask: Tensor | None) -> None:
        """`steps` Langevin steps on x in place, in one launch."""
        resident.check(self._chain, x)
        if mask is not None:
            mask = check_mask(mask, x, "conv_chain").expand(x.shape).contiguous()
        if x.shape[0] and steps:
            net = self._chain.arguments(x, x, steps=steps, numbers=numbers, place=place, mask=mask)
            resident.launch([self._chain], [net], x, self.bad_step)

    def share_launch_(
        self, finer: Sequence[ResidentPlan], start: Tensor, states: Sequence[Tensor], places: Sequence[Counters],
        steps: Sequence[int], numbers: Sequence[Update],
    ) -> None:  # fmt: skip
        """Chains of a cascade in one launch, this plan's and those of `finer`, coarse to fine: the first from `start`,
        each other one from the replicated result of the one before, into `states`. This plan's `bad_step` is of all."""
        chains, nets, before = [plan._chain for plan in (self, *finer)], [], start.detach().contiguous()
        for chain, x, place, count, own in zip(chains, states, places, steps, numbers, strict=True):
            resident.check(chain, x)
            nets.append(chain.arguments(before, x, steps=count, numbers=own, place=place))
            before = x
        resident.launch(chains, nets, before, self.bad_step)

    def refresh(self) -> None:
        stack = reread(self._energy, self._example, self._layouts, blocks=True)
        self._chain.load(stack.stages, stack.head)

    def explain(self) -> PlanReport:
        layout = self._chain.layout
        how = f"{layout.samples} samples a block, {layout.shared_bytes / 1024:.0f} KiB of shared memory"
        return PlanReport("resident", "fp16", f"{how}; sums, x and the step in fp32", "all steps in one launch")
