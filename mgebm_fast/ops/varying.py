"""Numbers of the Langevin update that differ from step to step, or from sample to sample.

A number of a chain of K steps on N samples may be

    a float, the same for all
    a `Schedule`, of any K
    a list of K values, or a 1-D tensor or array of K: a schedule over the steps
    a 1-D tensor or array of N: a value a sample
    a 2-D tensor or array (K, N), either dimension may be 1: by step and sample

A 1-D tensor whose length is both K and N could mean either, and is refused.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import is_number, number, one_of
from ..errors import Refused
from .state import why_not_plain

LEAST = 1e-18  # of a positive number: 1/σ² of a smaller one would not be a float32


SHAPES = ("linear", "geometric", "cosine", "first")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end` over the steps of a chain, whatever their number K is.

    Its value at step k = 0 … K − 1, with t = k/(K − 1), and t = 0 where K = 1:

        linear     (1 − t)·start + t·end
        geometric  start^(1 − t) · end^t
        cosine     (1 − u)·start + u·end,  u = (1 − cos πt)/2: level at both ends
        first      start at k = 0, end at all others

    Args:
        start, end: finite and ≥ 0; of a geometric one > 0, or equal.
        shape: "linear", "geometric", "cosine" or "first".
    """

    start: float
    end: float
    shape: str = "linear"

    def __post_init__(self) -> None:
        one_of(self.shape, SHAPES, "shape", "Schedule")
        for name in ("start", "end"):
            value = number(getattr(self, name))
            if not is_number(value) or not 0 <= value < math.inf:
                raise Refused(name, "be a finite number >= 0", repr(value), "Schedule")
            object.__setattr__(self, name, float(value))
        if self.shape == "geometric" and self.start != self.end and not min(self.start, self.end):
            raise Refused("start and end", "be > 0 in a geometric one", f"{self.start:g} and {self.end:g}", "Schedule")

    def values(self, steps: int) -> list[float]:
        """Those of the steps of a chain of so many."""
        return [self._at(k / max(1, steps - 1)) for k in range(steps)]

    def _at(self, t: float) -> float:
        if self.shape == "geometric":
            return self.start ** (1 - t) * self.end**t
        if self.shape == "first":
            return self.end if t > 0 else self.start
        if self.shape == "cosine":
            t = (1 - math.cos(math.pi * t)) / 2
        return (1 - t) * self.start + t * self.end

    def __mul__(self, factor: float) -> Schedule:
        """The schedule of every value times `factor`."""
        return dataclasses.replace(self, start=self.start * factor, end=self.end * factor)


def is_varying(value: Any) -> bool:
    """Whether a number is given as several."""
    return isinstance(value, (list, tuple, Schedule)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0)


def listed(value: Any, steps: int) -> Any:
    """A `Schedule` as the list of its values over so many steps; any other value as it is."""
    return value.values(steps) if isinstance(value, Schedule) else value


def _check_tensor(value: Tensor, name: str, where: str) -> None:
    # A compiler's tensors are none yet: the kernel asks when it runs.
    if not torch.compiler.is_compiling() and (reason := why_not_plain(value.resolve_neg(), dispatched=True)):
        raise TypeError(f"{where}: {name} must be a plain tensor, got {reason}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{where}: {name} must hold real numbers, got {value.dtype}")


def values_of(value: Any, name: str, where: str, *, positive: bool = False) -> Tensor:
    """A varying number as float64, with the dimensions it was given; an error unless all are finite and ≥ 0.

    positive: ≥ 1e-18. Its device is the value's. Entries are not looked at where a CUDA graph is captured.
    """
    if isinstance(value, Schedule):
        value = [value.start, value.end]
    if isinstance(value, (list, tuple)):
        if not value or not all(map(is_number, value)):
            raise TypeError(f"{where}: {name} must be a number, or a list of numbers, one a step, got {value!r}")
        value = torch.tensor([float(v) for v in value], dtype=torch.float64)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiu":
            raise TypeError(f"{where}: {name} must hold real numbers, got an array of {value.dtype}")
        value = torch.from_numpy(value.astype(np.float64))
    else:
        _check_tensor(value, name, where)
    found = value.detach().to(torch.float64)
    if not found.numel():
        raise Refused(name, "hold a value", f"an empty one of shape {tuple(found.shape)}", where)
    captured = found.is_cuda and torch.cuda.is_current_stream_capturing()
    if not captured and not torch.compiler.is_compiling():
        low, high = (float(bound) for bound in found.aminmax())
        if not (math.isfinite(low) and math.isfinite(high) and low >= (LEAST if positive else 0)):
            bound = f"finite and at least {LEAST if positive else 0:g}"
            raise Refused(name, f"be {bound} in every entry", f"values from {low:g} to {high:g}", where)
    return found


def by_step_and_sample(
    value: Any, name: str, steps: int, x: Tensor, where: str, *, positive: bool = False
) -> Tensor | float:
    """A checked number as it is, or a varying one as float64 (K or 1, N or 1) on x's device."""
    if not is_varying(value):
        return value
    value = listed(value, steps)
    found, samples = values_of(value, name, where, positive=positive).to(x.device), x.shape[0]
    shape = tuple(found.shape)
    if isinstance(value, (list, tuple)):
        check_length(value, name, steps, where)
        return found[:, None]
    if found.dim() == 1:
        if steps == samples == len(found) and steps > 1:
            raise Refused(
                name,
                f"say which it is, as there are {steps} steps and as many samples: a list or shape ({steps}, 1) is a "
                f"schedule, shape (1, {steps}) is a value a sample",
                f"shape {shape}",
                where,
            )
        if len(found) in (steps, samples):
            return found[:, None] if len(found) == steps else found[None]
    elif found.dim() == 2 and shape[0] in (1, steps) and shape[1] in (1, samples):
        return found
    must = f"be a number, {steps} values (one a step), {samples} (one a sample) or of shape ({steps}, {samples})"
    raise Refused(name, must, f"shape {shape}", where)


def check_length(values: Any, name: str, steps: int, where: str) -> None:
    """Raise unless a list holds a value for each of so many steps."""
    if len(values) != steps:
        raise Refused(name, f"hold one value a step, {steps}, or be a Schedule", f"{len(values)}", where)


def means_like(mean: Tensor, x: Tensor, where: str) -> Tensor:
    """A reference mean that broadcasts to x as contiguous float32 (N or 1, *x.shape[1:]), on x's device."""
    _check_tensor(mean, "reference_mean", where)
    if mean.device != x.device:
        raise Refused("reference_mean", f"be on {x.device}, as x is", f"a tensor on {mean.device}", where)
    shape = (1,) * (x.dim() - mean.dim()) + tuple(mean.shape)
    if len(shape) > x.dim() or any(m not in (1, n) for m, n in zip(shape, x.shape)):
        raise Refused("reference_mean", f"broadcast to x's shape {tuple(x.shape)}", f"{tuple(mean.shape)}", where)
    captured = mean.is_cuda and torch.cuda.is_current_stream_capturing()
    if not captured and not torch.compiler.is_compiling() and not bool(torch.isfinite(mean).all()):
        raise Refused("reference_mean", "be finite", "NaN or infinite values", where)
    found = mean.detach().resolve_neg().float().reshape(shape)
    return found.expand(shape[0], *x.shape[1:]).contiguous()
