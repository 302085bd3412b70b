"""∇E by autograd, as it is or compiled by torch: right for every differentiable module or callable."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from ..errors import BackendError
from .base import GradientPlan, PlanReport
from .holding import frozen_parameters, on_meta
from .reach import modules_of

INDUCTOR = "inductor"  # what compile=True is

_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def ask(energy: Callable[[Tensor], Tensor], x: Tensor, where: str) -> Tensor:
    """energy(x); TypeError or ValueError where its weights have another dtype than x, lie on another device or are
    wrapper subclasses (torch's own error names only an op)."""
    try:
        return energy(x)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        weights = _weights(energy)
        _check_devices(weights, x, where)
        if wrapper := _wrapper(weights):
            raise TypeError(f"{where}: energy must have plain tensors for weights, but {wrapper} ({error})") from error
        types = _floats(weights)
        if not types or x.dtype in types:
            raise
        name = str(types[0]).removeprefix("torch.")
        raise TypeError(
            f"{where}: energy must take float32 x, got one with {name} weights ({error}); wrap it, as in "
            f"`lambda x: net(x.to(torch.{name})).float()`, or call net.float() and use torch.autocast"
        ) from error


def _check_devices(weights: list[tuple[str, Tensor]], x: Tensor, where: str) -> None:
    for name, w in weights:
        if w.device.type != x.device.type:
            what = "load values into it" if w.is_meta else f"energy.to({str(x.device)!r}) moves it"
            raise ValueError(
                f"{where}: energy must have its weights on {x.device}, as x is, got {name} on {w.device}; {what}"
            )


def _wrapper(weights: list[tuple[str, Tensor]]) -> str:
    """Which weight is a tensor subclass that wraps others; an empty string for none."""
    wrappers = (f"{n} is a {type(w).__name__}" for n, w in weights if _wraps(w))
    return next(wrappers, "")


def _wraps(tensor: Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _backward(energies: Tensor, leaf: Tensor, ones: Tensor) -> Tensor | None:
    """The gradient of Σ energies in leaf; None where they do not depend on it.

    By torch's engine where nothing listens to torch's functions: what `torch.autograd.grad` checks before it, that the
    ones are like the energies, costs a fifth of a small net's step.
    """
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    if engine is None or torch.compiler.is_compiling() or has_torch_function((energies, leaf)):
        return torch.autograd.grad(energies, leaf, ones, allow_unused=True)[0]
    found = engine.run_backward(
        (energies,), (ones,), False, False, (leaf,), allow_unreachable=True, accumulate_grad=False
    )
    return found[0]


def _weights(energy: Callable[[Tensor], Tensor]) -> list[tuple[str, Tensor]]:
    """The parameters and buffers that an energy reaches, with their names, below the class of a module it holds."""
    if isinstance(energy, torch.nn.Module) and (own := [*energy.named_parameters(), *energy.named_buffers()]):
        return own
    held = list(modules_of(energy))
    inner = {id(child) for module in held for child in module.children()}
    return [
        (f"{type(module).__name__}.{name}", w)
        for module in held
        if id(module) not in inner
        for name, w in (*module.named_parameters(), *module.named_buffers())
    ]


def _floats(weights: list[tuple[str, Tensor]]) -> list[torch.dtype]:
    """The floating-point types of the parameters among weights, the widest first."""
    found = {w.dtype for _, w in weights if w.dtype.is_floating_point and isinstance(w, torch.nn.Parameter)}
    return sorted(found, key=lambda dtype: (-torch.finfo(dtype).bits, str(dtype)))


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
        first = self._ones is None
        if first and on_meta(self._energy):
            _check_devices([(name, w) for name, w in _weights(self._energy) if w.is_meta], x, self._where)
        leaf = x.detach().requires_grad_()
        energies = self._ask(leaf)
        self._check(energies, leaf)
        ones = self._ones
        if ones is None or ones.shape != energies.shape or ones.dtype != energies.dtype:
            ones = self._ones = torch.ones_like(energies)
        gradient = _backward(energies, leaf, ones)
        if gradient is None:
            raise ValueError(f"{self._where}: energy must depend on x, got a value whose graph does not reach x")
        if first and _wraps(gradient) and type(gradient) is not type(leaf):
            cause = _wrapper(_weights(self._energy))
            why = f", but {cause}" if cause else f", since its gradient is a {type(gradient).__name__}"
            raise TypeError(f"{self._where}: energy must have plain tensors for weights{why}")
        return gradient

    def _ask(self, leaf: Tensor) -> Tensor:
        return ask(self._energy, leaf, self._where)

    def refresh(self) -> None:
        """Nothing to do: every call runs the energy as it is."""

    def explain(self) -> PlanReport:
        return PlanReport("autograd", self._computes_in(), why_not_faster=self._reasons)

    def _computes_in(self) -> str:
        if torch.is_autocast_enabled(self._device):
            return f"{_NAMES.get(torch.get_autocast_dtype(self._device), 'a type')} by autocast"
        types = _floats(_weights(self._energy))
        return " and ".join(_NAMES.get(dtype, str(dtype)) for dtype in types) or "fp32"

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
        if energies.device != x.device:
            raise ValueError(f"{self._where}: energy must return values on {x.device}, as x, got {energies.device}")
        if not energies.requires_grad:
            raise ValueError(
                f"{self._where}: energy must be differentiable in x, got a value without a graph "
                "(is there a detach, a no_grad or a round trip through numpy in it?)"
            )


# Largest ‖difference‖ / ‖gradient‖ of a compiled gradient that is trusted, against the energy's own code in float32.
_COMPILED_BOUNDS = {"fp32": 0.01, "bf16": 0.15, "fp16": 0.05}
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# energy -> what of its compiled gradients was compared
_compared: MutableMapping[Any, set[Hashable]] = weakref.WeakKeyDictionary()


class CompiledPlan(AutogradPlan):
    """`AutogradPlan` with the energy's code and its backward pass compiled by torch.compile; in 16 bits by autocast.

    Code that torch compiled once serves later plans: torch keeps it, and guards it by what it depends on.
    """

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor],
        x: Tensor,
        where: str,
        precision: str,
        compiler: str,
        reasons: tuple[str, ...] = (),
    ) -> None:
        super().__init__(energy, where, reasons, x.device.type)
        self.precision, self.compiler = precision, compiler
        self._compiled: Any = None  # holds the energy, and goes where a chain is captured and needs it no more
        self._compare(x)

    def gradient(self, x: Tensor) -> Tensor:  # (N, ...) -> (N, ...)
        with torch.inference_mode(False), torch.enable_grad(), self._autocast():
            return self._gradient(x)

    def _autocast(self) -> Any:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._device, _TYPES[self.precision])

    def _ask(self, leaf: Tensor) -> Tensor:
        if self._compiled is None:
            self._compiled = torch.compile(self._energy, backend=self.compiler)
        return ask(self._compiled, leaf, self._where)

    def refresh(self) -> None:
        self._compiled = None

    def explain(self) -> PlanReport:
        how = f"torch.compile, {self.compiler}{'' if self.precision == 'fp32' else ', torch.autocast'}"
        return PlanReport("compiled", self.precision, how, why_not_faster=self._reasons)

    def _compare(self, x: Tensor) -> None:
        """Compare the gradient at x with that of the energy's own code, the first time for an energy and a form of x.

        BackendError: the code cannot be compiled, or its gradient is another one.
        """
        key = (tuple(x.shape), x.device, self.precision, self.compiler)
        try:
            known = _compared.setdefault(self._energy, set())
        except TypeError:  # a callable without weak references
            known = set()
        if key in known or not x.numel():
            return
        plain = AutogradPlan(self._energy, self._where)
        with frozen_parameters(self._energy):
            own, again = plain.gradient(x), plain.gradient(x)  # its own errors come first
            try:
                got = self.gradient(x).float()
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                said = " ".join(str(error).split())[:300]
                raise BackendError(
                    f"{self._where}: compile={self.compiler!r} needs an energy that torch.compile takes, and for "
                    f"{INDUCTOR!r} a C++ compiler (the variable CXX names one): {type(error).__name__}: {said}"
                ) from error
        if not torch.equal(own.nan_to_num(), again.nan_to_num()):
            raise BackendError(
                f"{self._where}: compile={self.compiler!r} needs an energy that is the same at every call; this one is "
                "random, so that its compiled gradient cannot be compared with its own"
            )
        apart, size, bound = float((own - got).norm()), float(own.norm()), _COMPILED_BOUNDS[self.precision]
        if not apart <= bound * size + 1e-6 * float(x.norm()) and math.isfinite(size):
            raise BackendError(
                f"{self._where}: the compiled gradient must be the energy's own, got one that is "
                f"{apart / max(size, 1e-30):.2g} away from it, more than {bound}"
            )
        known.add(key)
