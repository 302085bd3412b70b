"""∇E by autograd: right for every differentiable module or callable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import GradientPlan, PlanReport
from .reach import modules_of

_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def ask(energy: Callable[[Tensor], Tensor], x: Tensor, where: str) -> Tensor:
    """energy(x); TypeError where its weights have another dtype than x (torch's own error names only a layer)."""
    try:
        return energy(x)
    except RuntimeError as error:
        types = _weight_types(energy)
        if isinstance(error, torch.OutOfMemoryError) or not types or x.dtype in types:
            raise
        name = str(types[0]).removeprefix("torch.")
        raise TypeError(
            f"{where}: energy must take float32 x, got one with {name} weights ({error}); wrap it, as in "
            f"`lambda x: net(x.to(torch.{name})).float()`, or call net.float() and use torch.autocast"
        ) from error


def _weight_types(energy: Callable[[Tensor], Tensor]) -> list[torch.dtype]:
    """The floating-point types of the weights that an energy reaches."""
    weights = {p.dtype for module in modules_of(energy) for p in module._parameters.values() if p is not None}
    return [dtype for dtype in _NAMES if dtype in weights]


class AutogradPlan(GradientPlan):
    """One forward and one backward pass, to x alone, as the energy itself computes them: in float32, unless the energy
    casts or its caller has torch.autocast on."""

    precision = "fp32"

    def __init__(
        self, energy: Callable[[Tensor], Tensor], where: str, reasons: tuple[str, ...] = (), device: str = "cpu"
    ) -> None:
        self._energy, self._where, self._reasons, self._device = energy, where, reasons, device
        self._ones: Tensor | None = None

    def gradient(self, x: Tensor) -> Tensor:  # (N, ...) -> (N, ...)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return self._gradient(x)
        with torch.inference_mode(False), torch.enable_grad():
            return self._gradient(x)

    def _gradient(self, x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        energies = ask(self._energy, leaf, self._where)
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

    def explain(self) -> PlanReport:
        return PlanReport("autograd", self._computes_in(), why_not_faster=self._reasons)

    def _computes_in(self) -> str:
        if torch.is_autocast_enabled(self._device):
            return f"{_NAMES.get(torch.get_autocast_dtype(self._device), 'a type')} by autocast"
        return " and ".join(_NAMES[dtype] for dtype in _weight_types(self._energy)) or "fp32"

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
