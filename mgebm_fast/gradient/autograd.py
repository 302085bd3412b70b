"""∇E by autograd: right for every differentiable module or callable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class AutogradPlan:
    """One forward and one backward to x alone, in float32, as the energy itself computes them."""

    precision = "fp32"

    def __init__(self, energy: Callable[[Tensor], Tensor], where: str, reason: str) -> None:
        self._energy, self._where, self._reason = energy, where, reason
        self._ones: Tensor | None = None

    def gradient(self, x: Tensor) -> Tensor:  # (N, ...) -> (N, ...)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().requires_grad_()
            energies = self._energy(leaf)
            self._check(energies, leaf)
            ones = self._ones
            if ones is None or ones.shape != energies.shape or ones.dtype != energies.dtype:
                ones = self._ones = torch.ones_like(energies)
            (gradient,) = torch.autograd.grad(energies, leaf, ones, allow_unused=True)
        if gradient is None:
            raise ValueError(f"{self._where}: energy must depend on x, got a value whose graph does not reach x")
        return gradient

    def refresh(self) -> None:
        """Nothing to do: every call runs the energy as it is."""

    def explain(self) -> str:
        return f"autograd, fp32, because {self._reason}"

    def _check(self, energies: Tensor, x: Tensor) -> None:
        if not isinstance(energies, Tensor):
            raise TypeError(f"{self._where}: energy must return a tensor, got {type(energies).__name__}")
        if energies.shape != x.shape[:1]:
            samples = x.shape[0]
            got = tuple(energies.shape)
            hint = ""
            if got == ():
                hint = "; return one energy a sample, not their sum or mean"
            elif energies.numel() == samples:
                hint = "; flatten it"
            raise ValueError(
                f"{self._where}: energy must return shape ({samples},), one energy a sample, got {got}{hint}"
            )
        if not energies.is_floating_point():
            raise TypeError(f"{self._where}: energy must return floating-point values, got {energies.dtype}")
        if not energies.requires_grad:
            raise ValueError(
                f"{self._where}: energy must be differentiable in x, got a value without a graph "
                "(is there a detach, a no_grad or a round trip through numpy in it?)"
            )
