"""∇E of a stack of convolutions, and whole chains of it, in one call of the native CPU engine (ops.conv_chain)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import native
from ..ops.conv_chain import MAX_STAGES, ConvChain, has_bfloat, prefers_bfloat
from ..ops.counters import Counters
from ..ops.update import Update
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


class NativePlan:
    """∇E and Langevin steps of one energy with the weights that it had at the last `refresh`, packed."""

    def __init__(self, stack: Stack, energy: Any, precision: str) -> None:
        self._stack, self._energy, self.precision = stack, energy, precision
        self._pack()

    def _pack(self) -> None:
        self._chain = ConvChain(self._stack.stages, self._stack.head, bfloat=self.precision == "bf16")

    def gradient(self, x: Tensor) -> Tensor:  # (N, C, *size) float32 -> the same, contiguous
        """∇E(x), float32."""
        return self._chain.gradient(x)

    def advance_(self, x: Tensor, place: Counters, steps: int, numbers: Update, mask: Tensor | None) -> None:
        """`steps` Langevin steps on x in place, all in one native call."""
        self._chain.advance_(x, steps, numbers, place, mask)

    def refresh(self) -> None:
        """Take the energy's present weights."""
        self._stack = reread(self._energy, example_input(self._stack))
        self._pack()

    def explain(self) -> str:
        """The plan's name and precision, in one line."""
        operands = "fp32" if self.precision == "fp32" else "bf16 (state, first convolution and sums in fp32)"
        slower = "" if prefers_bfloat() else f", and bf16 is not faster by {native.isa()}"
        return f"native, {operands}, all steps in one call, {native.isa()}{slower}"
