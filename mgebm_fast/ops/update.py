"""The numbers of the Langevin update, and what every op that makes such steps checks before it does."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..checks import is_int, is_number, number
from ..errors import InputError, Refused
from . import counters, varying
from .state import addresses, check_mask
from .varying import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """The numbers of the update, checked once: x ← clamp(x − drift·(clip(g, ±c) + (x − m)/σ²) + noise_std·ε).

    Where one of the first three varies, or the mean does, these fields are NaN and the tensors beside them hold.
    """

    drift: float
    noise_std: float
    inverse_variance: float  # 1/σ², 0 without a reference
    reference_mean: float
    grad_clamp: float  # c, infinity without one
    low: float
    high: float
    table: Tensor | None = None  # (K or 1, N or 1, 3) float32: drift, noise_std, inverse_variance by step and sample
    means: Tensor | None = None  # (N or 1, *x.shape[1:]) float32

    @property
    def by_sample(self) -> bool:
        """Whether samples differ in a number, or elements in their mean."""
        return self.means is not None or (self.table is not None and self.table.shape[1] > 1)

    @property
    def form(self) -> tuple[Any, ...]:
        """What a captured chain is for: the shapes of what it reads from memory (`in_memory`), the other numbers."""
        table = (1, 1) if self.table is None else tuple(self.table.shape[:2])
        mean = self.reference_mean if self.means is None else tuple(self.means.shape)
        return table, mean, self.grad_clamp, self.low, self.high

    def steps(self, start: int, stop: int) -> Update:
        """Those of the chain's steps start … stop − 1."""
        if self.table is None or self.table.shape[0] == 1:
            return self
        return dataclasses.replace(self, table=self.table[start:stop])

    def part(self, rows: slice) -> Update:
        """Those of some samples of the batch."""
        table, means = self.table, self.means
        if table is not None and table.shape[1] > 1:
            table = table[:, rows].contiguous()
        if means is not None and means.shape[0] > 1:
            means = means[rows]
        return dataclasses.replace(self, table=table, means=means)

    def in_memory(self, device: torch.device) -> Update:
        """A copy with the first three numbers in a table on `device`, which a captured chain reads."""
        first = torch.tensor([[self.arguments[:3]]], dtype=torch.float32, device=device)
        table = first if self.table is None else self.table.clone()
        means = None if self.means is None else self.means.clone()
        return dataclasses.replace(
            self, drift=math.nan, noise_std=math.nan, inverse_variance=math.nan, table=table, means=means
        )

    def load(self, other: Update) -> None:
        """Take the first three numbers, and the means, of another of this form; in place."""
        if self.means is not None and other.means is not None and other is not self:
            self.means.copy_(other.means)
        if self.table is None or other is self:
            return
        if other.table is not None:
            self.table.copy_(other.table)
        else:
            for entry, value in zip(self.table.unbind(-1), other.arguments):
                entry.fill_(value)

    @property
    def native_arguments(self) -> tuple[Any, ...]:
        """The fields of `LangevinStepNumbers`."""
        table, means = self.table, self.means
        if table is None and means is None:
            return (self.arguments, 0, 0, 0, 0, 0)
        at, mean = addresses("update", table, means, dispatched=True)
        by_step, by_sample = (0, 0)
        if table is not None:
            steps, samples, entries = table.shape
            by_step, by_sample = samples * entries * (steps > 1), entries * (samples > 1)
        by_mean = 0 if means is None or means.shape[0] == 1 else means[0].numel()
        return (self.arguments, at, by_step, by_sample, mean, by_mean)

    def columns(self, x: Tensor) -> tuple[Any, Any, Any, Any]:
        """drift, noise_std, 1/σ² and m of one step, float64 tensors that broadcast to x where they vary."""
        mean = self.reference_mean if self.means is None else self.means.double()
        if self.table is None:
            return self.drift, self.noise_std, self.inverse_variance, mean
        first = self.table[0].double().unbind(1)
        drift, noise_std, inverse_variance = (value.reshape(-1, *(1,) * (x.dim() - 1)) for value in first)
        return drift, noise_std, inverse_variance, mean

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

    @property
    def triton_tensors(self) -> dict[str, Tensor | None]:
        """What varies, as keyword arguments of those Triton launchers that take it."""
        return {"table": self.table, "means": self.means}


# A number of the update, or what varies in its place: `varying` says how.
Number: TypeAlias = float | Sequence[float] | Tensor | Schedule


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
    step_size: Number | None = None,
    noise_scale: Number = 1.0,
    drift: Number | None = None,
    noise_std: Number | None = None,
    reference_std: Number | None = None,
    reference_mean: float | Tensor = 0.0,
    grad_clamp: float | None = None,
    clamp: tuple[float, float] | None = None,
    x: Tensor | None = None,
    steps: int | None = None,
    where: str = "langevin_step_",
) -> Update:
    """The checked numbers of a Langevin step; as in `langevin_step_`; numpy's and 0-dim tensors too.

    x: what the chain of `steps` steps is made on; without it no number may vary (`varying`), since shapes depend on it.
    steps: None: one, of an op that makes no more.
    """
    numbers = (step_size, noise_scale, drift, noise_std, reference_std, reference_mean, grad_clamp, clamp)
    if not torch.compiler.is_compiling():  # a trace passes caches by
        try:
            return _cached(where, tuple(map(type, clamp)) if type(clamp) is tuple else None, *numbers)
        except TypeError:  # what cannot be hashed, or is no number of Python's
            pass
    *given, bounds = numbers
    if isinstance(bounds, (list, tuple, Tensor, np.ndarray)):
        bounds = tuple(map(number, bounds))
    plain: list[Any] = [*map(number, given), bounds]
    if x is None or not any(map(varying.is_varying, plain[:-1])):
        return _update(where, *plain)
    return _varying(plain, x, steps, where)


def _update(
    where: str,
    step_size: float | None,
    noise_scale: float,
    drift: float | None,
    noise_std: float | None,
    reference_std: float | None,
    reference_mean: float,
    grad_clamp: float | None,
    clamp: tuple[float, float] | None,
) -> Update:
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


# A loop calls with the same numbers every step: they are checked once. Within a tuple, 1 and True are told apart by
# their types alone.
_cached = functools.lru_cache(maxsize=256, typed=True)(lambda where, types, *numbers: _update(where, *numbers))


def _varying(numbers: Sequence[Any], x: Tensor, steps: int | None, where: str) -> Update:
    """`_update` of numbers, in its order, of which one varies at least."""
    step_size, noise_scale, drift, noise_std, reference_std, reference_mean, grad_clamp, clamp = numbers
    given = {"step_size": step_size, "noise_scale": noise_scale, "drift": drift, "noise_std": noise_std}
    given["reference_std"] = reference_std
    for name, value in given.items():
        if steps is None and isinstance(value, Schedule):  # in a loop of such steps it would stay at its start
            raise Refused(name, "be a number in a single step, or a value a sample", value, where)
    steps = 1 if steps is None else steps
    found: dict[str, Any] = {
        name: varying.by_step_and_sample(value, name, steps, x, where, positive=name in ("step_size", "reference_std"))
        for name, value in given.items()
    }
    # The checks of numbers: which go together, and those that do not vary.
    tethered = isinstance(reference_mean, (Tensor, np.ndarray))
    plain: dict[str, Any] = {name: 1.0 if isinstance(value, Tensor) else value for name, value in found.items()}
    plain["reference_mean"] = 0.0 if tethered else reference_mean
    checked = _update(where, **plain, grad_clamp=grad_clamp, clamp=clamp)
    means = None
    if tethered:
        if reference_std is None:
            raise Refused("reference_mean", "be given with reference_std", "a tensor alone", where)
        means = varying.means_like(torch.as_tensor(reference_mean), x, where)
    if not any(isinstance(value, Tensor) for value in found.values()):
        return dataclasses.replace(checked, reference_mean=math.nan, means=means)
    if step_size is not None:
        found["drift"] = found["step_size"] ** 2 / 2
        found["noise_std"] = found["noise_scale"] * found["step_size"]
    sigma = found["reference_std"]
    columns = (found["drift"], found["noise_std"], 0.0 if sigma is None else 1.0 / sigma**2)
    wide = [torch.as_tensor(column, dtype=torch.float64, device=x.device) for column in columns]
    table = torch.stack(torch.broadcast_tensors(*map(torch.atleast_2d, wide)), -1)
    return dataclasses.replace(
        checked, drift=math.nan, noise_std=math.nan, inverse_variance=math.nan, table=table.float().contiguous(),
        means=means, reference_mean=math.nan if tethered else checked.reference_mean,
    )  # fmt: skip


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
    varies: bool = True,
    seed: int | Tensor,
    first_sample: int | Tensor,
    step: int | Tensor,
    stream: int,
    **numbers: Any,
) -> tuple[Update, Tensor | None, counters.Counters]:
    """The checked numbers, mask and counters of `steps` Langevin steps on x; None: of one, in an op that calls its
    counter `step`. `numbers` are those of `update`, which may vary or not; `mask` is as in `check_mask`."""
    checked = update(**numbers, x=x if varies else None, steps=steps, where=where)
    mask = None if mask is None else check_mask(mask, x, where)
    place = counters.check(
        where, x.shape[0], x.shape[1:].numel(), x.device, seed=seed, first_sample=first_sample, step=step,
        stream=stream, steps=steps,
    )  # fmt: skip
    return checked, mask, place
