"""The gate before every figure: a contender's gradient against the same net in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..sampling import Langevin
from .peers import BoundLoop

# Relative L2 over the batch, pixels 0–255, Xavier weights. fp32 leaves room for activations whose sign flips:
# 4.5e-3 was seen of the 64×64 net without statistics.
LIMITS = {"fp32": 1e-2, "tf32": 0.05, "fp16": 0.05, "bf16": 0.15}
# The same for weight gradients: every contender's learning step is float32, but the chains before it may not be.
LEARNING_LIMITS = {"fp32": 5e-3, "tf32": 0.05, "fp16": 0.05, "bf16": 0.05}
# One step without noise, reference and bounds moves x by drift·∇E; this drift is so large that x's rounding vanishes.
_DRIFT = 2.0**24
_PROBE = Langevin(steps=1, drift=_DRIFT, noise_std=0.0)


class WrongGradientError(RuntimeError):
    """A contender's gradient is further from float64 than its precision explains."""

    def __init__(self, what: str, error: float, precision: str, limit: float) -> None:
        super().__init__(f"{what} {error:.3g} away from float64, more than the {limit:g} that {precision} explains")
        self.error, self.precision = error, precision


def gradient64(plain: nn.Module, x: Tensor) -> Tensor:  # (N, ...) -> float64
    """∇E in float64, of a float64 module."""
    leaf = x.double().requires_grad_()
    return torch.autograd.grad(plain(leaf).sum(), leaf)[0]


def gradient_of(loop: BoundLoop, x: Tensor) -> Tensor:
    """∇E as the contender's own chain uses it, read off a step of its own."""
    return (x.double() - loop(x.clone(), _PROBE).double()) / _DRIFT


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖got − expected‖ / ‖expected‖ over all entries of all tensors."""
    off = sum(float((a.double() - b).square().sum()) for a, b in zip(got, expected, strict=True))
    size = sum(float(b.square().sum()) for b in expected)
    return math.sqrt(off / size) if size else math.inf


def check(error: float, precision: str, what: str = "gradient", limits: Mapping[str, float] = LIMITS) -> None:
    """Raise WrongGradientError unless `error` is what `precision` explains."""
    if not error <= limits[precision]:  # NaN is wrong too
        raise WrongGradientError(what, error, precision, limits[precision])
