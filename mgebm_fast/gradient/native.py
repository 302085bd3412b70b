"""∇E of a stack of convolutions, and whole chains of it, in one call of the native CPU engine (ops.conv_chain)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..errors import DivergenceError
from ..ops.conv_chain import MAX_STAGES, has_bfloat, prefers_bfloat
from ..ops.counters import Counters
from ..ops.update import Update
from .base import GradientPlan, PlanReport
from .kept import packed
from .stack import Stack, example_input, reread


def why_not(stack: Stack, x: Tensor, precision: str) -> str:
    """Why the engine cannot run `stack` on tensors like x in this precision; an empty string when it can."""
    if x.device.type != "cpu":
        return f"it runs on CPU tensors, x is on {x.device.type}"
    if not native.available():
        return f"the compiled module did not load: {native.load_error}"
    if precision == "fp16":
        return "it has no fp16"
    if precision == "bf16" and not has_bfloat():
        return f"bf16 needs AVX512_BF16 or AMX, and {native.isa()} is in use"
    if len(stack.stages) > MAX_STAGES:
        return f"it takes up to {MAX_STAGES} layers, the net has {len(stack.stages)}"
    return ""


class NativePlan(GradientPlan):
    """∇E and Langevin steps of one energy with the weights that it had at the last `refresh`, packed.

    Raises DivergenceError where a weight is not finite: behind a ReLU, samples could stay finite and be wrong.
    """

    backends = ("native",)

    def __init__(self, stack: Stack, energy: Any, precision: str, where: str = "gradient") -> None:
        self._energy, self.precision, self._where = energy, precision, where
        self._example = example_input(stack)
        self._pack(stack)

    def _pack(self, stack: Stack) -> None:
        self._chain = packed(stack, self.precision == "bf16")
        if not self._chain.finite:
            raise DivergenceError(
                f"{self._where}: the energy's weights must be finite, got NaN or infinite values in {not_finite(stack)}"
            )

    def gradient(self, x: Tensor) -> Tensor:  # (N, C, *size) float32 -> the same, contiguous
        """∇E(x), float32."""
        return self._chain.gradient(x)

    def advance_(self, x: Tensor, place: Counters, steps: int, numbers: Update, mask: Tensor | None) -> None:
        """`steps` Langevin steps on x in place, all in one native call."""
        self._chain.advance_(x, steps, numbers, place, mask)

    def refresh(self) -> None:
        self._pack(reread(self._energy, self._example))

    def explain(self) -> PlanReport:
        how = native.isa() + ("" if self.precision == "fp32" else "; state, first convolution and sums in fp32")
        slower = () if prefers_bfloat() else (f"bf16 is not faster by {native.isa()}",)
        return PlanReport("native", self.precision, how, "all steps in one call", slower)


def not_finite(stack: Stack) -> str:
    """The first layer of a stack with a weight that is not finite; an empty string where all are."""
    for stage in stack.stages:
        norm = () if stage.norm is None else (stage.norm.weight, stage.norm.bias)
        for tensor in (stage.weight, stage.bias, *norm):
            if tensor is not None and not math.isfinite(torch.linalg.vector_norm(tensor, math.inf)):
                return f"layer {stage.name}"
    return "" if math.isfinite(torch.linalg.vector_norm(stack.head, math.inf)) else "the last layer"
