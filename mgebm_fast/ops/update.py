"""The numbers of the Langevin update, and what every op that makes such steps checks before it does."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from torch import Tensor

from ..checks import is_int, is_number
from ..errors import InputError, Refused
from . import counters
from .state import check_mask


@dataclasses.dataclass(frozen=True)
class Update:
    """The numbers of the update, checked once: x ← clamp(x − drift·(clip(g, ±c) + (x − m)/σ²) + noise_std·ε)."""

    drift: float
    noise_std: float
    inverse_variance: float  # 1/σ², 0 without a reference
    reference_mean: float
    grad_clamp: float  # c, infinity without one
    low: float
    high: float

    @property
    def arguments(self) -> tuple[float, ...]:
        # Spelt out: dataclasses.astuple copies deeply, at ten times the cost, and this runs once a step.
        return (
            self.drift,
            self.noise_std,
            self.inverse_variance,
            self.reference_mean,
            self.grad_clamp,
            self.low,
            self.high,
        )

    @property
    def triton_arguments(self) -> dict[str, float | None]:
        """Keyword arguments of the Triton launchers, to which a bound that is not asked for is None."""
        return {
            "drift": self.drift,
            "noise_std": self.noise_std,
            "inv_variance": self.inverse_variance,
            "reference_mean": self.reference_mean,
            "grad_clamp": None if math.isinf(self.grad_clamp) else self.grad_clamp,
            "clamp_lo": None if math.isinf(self.low) else self.low,
            "clamp_hi": None if math.isinf(self.high) else self.high,
        }


def number(value: Any) -> Any:
    """A real number as Python's: numpy's scalars and 0-dim tensors too (one on a GPU costs a host sync)."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    return value.item() if isinstance(value, np.generic) else value


def coefficients(
    step_size: float | None,
    noise_scale: float,
    drift: float | None,
    noise_std: float | None,
    where: str = "langevin_step_",
) -> tuple[float, float]:
    """(drift, noise_std) from exactly one form.

    Coupled: drift = δ²/2 and noise_std = τδ, with δ = `step_size` and τ = `noise_scale`. Decoupled: both given.
    """
    if (step_size is None) == (drift is None):
        got = "both" if step_size is not None else "neither"
        raise InputError(f"give step_size (coupled form) or drift and noise_std (decoupled form), got {got}", where)
    if step_size is not None:
        if noise_std is not None:
            raise InputError(f"noise_std goes with drift; beside step_size give noise_scale, got {noise_std}", where)
        _check_number(step_size, "step_size", where, positive=True)
        _check_number(noise_scale, "noise_scale", where)
        return step_size**2 / 2, noise_scale * step_size
    if noise_std is None:
        raise InputError(f"drift and noise_std go together, got drift={drift} and no noise_std", where)
    if noise_scale != 1.0:
        raise InputError(f"noise_scale goes with step_size; beside drift give noise_std, got {noise_scale}", where)
    assert drift is not None
    _check_number(drift, "drift", where)
    _check_number(noise_std, "noise_std", where)
    return float(drift), float(noise_std)


def _check_number(value: float, name: str, where: str, *, positive: bool = False, signed: bool = False) -> None:
    if not is_number(value):
        raise TypeError(f"{where}: {name} must be a number, got {type(value).__name__}")
    low_enough = signed or (value > 0 if positive else value >= 0)
    if not math.isfinite(value) or not low_enough:
        bound = "finite" if signed else "finite and > 0" if positive else "finite and >= 0"
        raise Refused(name, f"be {bound}", value, where)


def update(
    *,
    step_size: float | None = None,
    noise_scale: float = 1.0,
    drift: float | None = None,
    noise_std: float | None = None,
    reference_std: float | None = None,
    reference_mean: float = 0.0,
    grad_clamp: float | None = None,
    clamp: tuple[float, float] | None = None,
    where: str = "langevin_step_",
) -> Update:
    """The checked numbers of a Langevin step; as in `langevin_step_`; numpy's and 0-dim tensors too."""
    numbers = (step_size, noise_scale, drift, noise_std, reference_std, reference_mean, grad_clamp, clamp)
    try:
        return _update(*numbers, where)
    except TypeError:  # what cannot be hashed, or is no number of Python's
        *plain, bounds = numbers
        if isinstance(bounds, (list, tuple, Tensor, np.ndarray)):
            bounds = tuple(map(number, bounds))
        return _update(*map(number, plain), bounds, where)


@functools.lru_cache(maxsize=256, typed=True)
def _update(
    step_size: float | None,
    noise_scale: float,
    drift: float | None,
    noise_std: float | None,
    reference_std: float | None,
    reference_mean: float,
    grad_clamp: float | None,
    clamp: tuple[float, float] | None,
    where: str,
) -> Update:
    """Checked once: a loop calls with the same numbers every step."""
    drift, noise_std = coefficients(step_size, noise_scale, drift, noise_std, where)
    _check_number(reference_mean, "reference_mean", where, signed=True)
    if reference_std is not None:
        _check_number(reference_std, "reference_std", where, positive=True)
        if reference_std < 1e-18:  # 1/σ² would not be a float32
            raise Refused("reference_std", "be at least 1e-18", reference_std, where)
    if grad_clamp is not None:
        _check_number(grad_clamp, "grad_clamp", where, positive=True)
    low, high = -math.inf, math.inf
    if clamp is not None:
        if not isinstance(clamp, tuple) or len(clamp) != 2:
            raise Refused("clamp", "be a pair (low, high) or None", repr(clamp), where)
        if not all(map(is_number, clamp)):
            raise TypeError(f"{where}: clamp must be a pair of numbers (low, high), got {clamp!r}")
        low, high = float(clamp[0]), float(clamp[1])
        if not low < high:
            raise Refused("clamp", "be (low, high) with low < high", f"({low}, {high})", where)
    return Update(
        drift=drift,
        noise_std=noise_std,
        inverse_variance=0.0 if reference_std is None else 1.0 / reference_std**2,
        reference_mean=float(reference_mean),
        grad_clamp=math.inf if grad_clamp is None else float(grad_clamp),
        low=low,
        high=high,
    )


def check_steps(steps: int, where: str) -> None:
    """Raise unless `steps` is a number of steps; numpy's integers are too."""
    steps = number(steps)
    if not is_int(steps, 0):
        raise Refused("steps", "be an int >= 0", repr(steps), where)


def prepare(
    where: str,
    x: Tensor,  # (N, ...)
    mask: Tensor | None,
    *,
    steps: int | None = None,
    seed: int | Tensor,
    first_sample: int | Tensor,
    step: int | Tensor,
    stream: int,
    **numbers: Any,
) -> tuple[Update, Tensor | None, counters.Counters]:
    """The checked numbers, mask and counters of `steps` Langevin steps on x; None: of one, in an op that calls its
    counter `step`. `numbers` are those of `update`, `mask` is as in `check_mask`."""
    checked = update(**numbers, where=where)
    mask = None if mask is None else check_mask(mask, x, where)
    place = counters.check(
        where, x.shape[0], x.shape[1:].numel(), x.device, seed=seed, first_sample=first_sample, step=step,
        stream=stream, steps=steps,
    )  # fmt: skip
    return checked, mask, place
