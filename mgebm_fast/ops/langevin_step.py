"""langevin_step_: gradient, Gaussian reference, noise, clip, clamp and mask in one pass over x, in place."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .. import native
from . import counters
from .backend import choose, launch_place, past_dispatcher
from .noise import noise_reference

OP = "langevin_step_"
GRAD_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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


def coefficients(
    step_size: float | None, noise_scale: float, drift: float | None, noise_std: float | None, where: str = OP
) -> tuple[float, float]:
    """(drift, noise_std) from exactly one form.

    Coupled: drift = δ²/2 and noise_std = τδ, with δ = `step_size` and τ = `noise_scale`. Decoupled: both given.
    """
    if (step_size is None) == (drift is None):
        got = "both" if step_size is not None else "neither"
        raise ValueError(f"{where}: give step_size (coupled form) or drift and noise_std (decoupled form), got {got}")
    if step_size is not None:
        if noise_std is not None:
            raise ValueError(f"{where}: noise_std goes with drift; beside step_size give noise_scale, got {noise_std}")
        _check_number(step_size, "step_size", where, positive=True)
        _check_number(noise_scale, "noise_scale", where)
        return step_size**2 / 2, noise_scale * step_size
    if noise_std is None:
        raise ValueError(f"{where}: drift and noise_std go together, got drift={drift} and no noise_std")
    if noise_scale != 1.0:
        raise ValueError(f"{where}: noise_scale goes with step_size; beside drift give noise_std, got {noise_scale}")
    assert drift is not None
    _check_number(drift, "drift", where)
    _check_number(noise_std, "noise_std", where)
    return float(drift), float(noise_std)


def _check_number(value: float, name: str, where: str, *, positive: bool = False, signed: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} must be a number, got {type(value).__name__}")
    low_enough = signed or (value > 0 if positive else value >= 0)
    if not math.isfinite(value) or not low_enough:
        bound = "finite" if signed else "finite and > 0" if positive else "finite and >= 0"
        raise ValueError(f"{where}: {name} must be {bound}, got {value}")


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
    where: str = OP,
) -> Update:
    """The checked numbers of a Langevin step; arguments as in `langevin_step_`."""
    drift, noise_std = coefficients(step_size, noise_scale, drift, noise_std, where)
    _check_number(reference_mean, "reference_mean", where, signed=True)
    if reference_std is not None:
        _check_number(reference_std, "reference_std", where, positive=True)
        if reference_std < 1e-18:  # 1/σ² would not be a float32
            raise ValueError(f"{where}: reference_std must be at least 1e-18, got {reference_std}")
    if grad_clamp is not None:
        _check_number(grad_clamp, "grad_clamp", where, positive=True)
    low, high = -math.inf, math.inf
    if clamp is not None:
        if not isinstance(clamp, (tuple, list)) or len(clamp) != 2:
            raise ValueError(f"{where}: clamp must be a pair (low, high) or None, got {clamp!r}")
        low, high = float(clamp[0]), float(clamp[1])
        if not low < high:
            raise ValueError(f"{where}: clamp must be (low, high) with low < high, got ({low}, {high})")
    return Update(
        drift=drift,
        noise_std=noise_std,
        inverse_variance=0.0 if reference_std is None else 1.0 / reference_std**2,
        reference_mean=float(reference_mean),
        grad_clamp=math.inf if grad_clamp is None else float(grad_clamp),
        low=low,
        high=high,
    )


def dimensions(x: Tensor) -> tuple[int, int, int]:
    """(N, C, S): samples, channels, and the product of the spatial dimensions."""
    shape = tuple(x.shape)
    channels = shape[1] if len(shape) > 1 else 1
    return shape[0], channels, math.prod(shape[2:])


def strides(x: Tensor) -> tuple[int, int, int] | None:
    """(sample, channel, spatial) strides of a contiguous or channels-last tensor; None for any other layout."""
    _, channels, spatial = dimensions(x)
    if x.is_contiguous():
        return channels * spatial, spatial, 1
    if x.dim() > 2 and x.movedim(1, -1).is_contiguous():
        return channels * spatial, 1, channels
    return None


def check_state(x: Tensor, where: str = OP) -> None:
    """Raise unless x is a dense float32 tensor (N, …) that may be written in place."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: x must be a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32:
        raise TypeError(f"{where}: x must be float32 (the state and the update are float32 always), got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{where}: x must have shape (N, ...), got a 0-dim tensor")
    if strides(x) is None:
        raise ValueError(
            f"{where}: x must be contiguous or channels-last, since it is updated in place, got shape "
            f"{tuple(x.shape)} with strides {x.stride()}; call .contiguous() and keep the result"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{where}: x must not require grad, since it is updated in place; detach it first")


def check_mask(mask: Tensor, x: Tensor, where: str = OP) -> Tensor:
    """The mask as a contiguous bool tensor of x's rank, each dimension 1 or x's, the spatial ones all or none."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{where}: mask must be a bool tensor (True = updated), got {got}")
    if mask.device != x.device:
        raise ValueError(f"{where}: mask must be on {x.device}, as x is, got {mask.device}")
    shape = (1,) * (x.dim() - mask.dim()) + tuple(mask.shape)
    if len(shape) > x.dim() or any(m not in (1, n) for m, n in zip(shape, x.shape)):
        raise ValueError(f"{where}: mask must broadcast to x's shape {tuple(x.shape)}, got {tuple(mask.shape)}")
    mask = mask.reshape(shape)
    if any(size != 1 for size in shape[2:]):
        mask = mask.expand(*shape[:2], *x.shape[2:])
    return mask.contiguous()


def mask_strides(mask: Tensor, x: Tensor) -> tuple[int, int, int]:
    """(sample, channel, spatial) strides of a checked mask, 0 where it broadcasts."""
    samples, channels, spatial = dimensions(mask)
    return (
        channels * spatial if samples > 1 else 0,
        spatial if channels > 1 else 0,
        1 if spatial > 1 else 0,
    )


def check_grad(grad: Tensor, x: Tensor, where: str = OP) -> Tensor:
    """The gradient, dense; a layout that is neither contiguous nor channels-last is copied."""
    if not isinstance(grad, Tensor):
        raise TypeError(f"{where}: grad must be a tensor, got {type(grad).__name__}")
    if grad.shape != x.shape:
        raise ValueError(f"{where}: grad must have x's shape {tuple(x.shape)}, got {tuple(grad.shape)}")
    if grad.dtype not in GRAD_TYPES:
        raise TypeError(f"{where}: grad must be float32, float16 or bfloat16, got {grad.dtype}")
    if grad.device != x.device:
        raise ValueError(f"{where}: grad must be on {x.device}, as x is, got {grad.device}")
    return grad if strides(grad) is not None else grad.contiguous()


def langevin_step_(
    x: Tensor,  # (N, C, *spatial) float32, contiguous or channels-last
    grad: Tensor,  # the same shape, float32 | float16 | bfloat16
    *,
    step_size: float | None = None,
    noise_scale: float = 1.0,
    drift: float | None = None,
    noise_std: float | None = None,
    reference_std: float | None = None,
    reference_mean: float = 0.0,
    grad_clamp: float | None = None,
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    first_sample: int | Tensor = 0,
    step: int | Tensor = 0,
    stream: int = 0,
    backend: str = "auto",
) -> Tensor:
    """One Langevin step, in place:

        x ← clamp( x − drift·(clip(grad, ±grad_clamp) + (x − m)/σ²) + noise_std·ε ),   ε ~ N(0, I)

    The coupled (textbook) form takes `step_size` δ and `noise_scale` τ: drift = δ²/2, noise_std = τδ. The decoupled
    form takes `drift` and `noise_std`. Exactly one form at a time.

    Args:
        x: the state; every dimension after (N, C) is spatial. Values in the model's pixel units.
        grad: ∇E(x), energy per pixel unit, without the reference's part.
        reference_std, reference_mean: σ and m of the Gaussian reference N(m, σ²I); None: no reference.
        grad_clamp, clamp: bounds on the gradient's entries and on the result; None: none.
        mask: bool, broadcastable to x, True = updated; held pixels keep their bits and are not clamped.
        seed, first_sample, step, stream: the noise's place, as in `noise`; tensors must be on x's device.

    Returns:
        x itself.

    Raises:
        TypeError, ValueError: an argument is not as above. BackendError: a named backend is not available here.

    Source: the chain of Xie, Lu, Zhu and Wu (ICML 2016, §3) with the clips of later users.
    """
    check_state(x)
    numbers = update(
        step_size=step_size,
        noise_scale=noise_scale,
        drift=drift,
        noise_std=noise_std,
        reference_std=reference_std,
        reference_mean=reference_mean,
        grad_clamp=grad_clamp,
        clamp=clamp,
    )
    grad = check_grad(grad, x)
    if mask is not None:
        mask = check_mask(mask, x)
    samples, channels, spatial = dimensions(x)
    placed = counters.check(
        OP, samples, channels * spatial, x.device, seed=seed, first_sample=first_sample, step=step, stream=stream
    )
    backend = choose("langevin_step", backend, x.device)
    if past_dispatcher(x, grad):
        launch(x, grad, mask, numbers, placed, backend)
        torch.autograd.graph.increment_version(x)
    else:
        torch.ops.mgebm_fast.langevin_step_(x, grad, mask, *numbers.arguments, *placed.arguments, backend)
    return x


@torch.library.custom_op(
    "mgebm_fast::langevin_step_",
    mutates_args=("x",),
    schema="(Tensor(a0!) x, Tensor grad, Tensor? mask, float drift, float noise_std, float inverse_variance, "
    f"float reference_mean, float grad_clamp, float low, float high, {counters.SCHEMA}, str backend) -> ()",
)
def _langevin_step(x, grad, mask, *arguments):
    numbers, placed, backend = Update(*arguments[:7]), counters.Counters(*arguments[7:-1]), arguments[-1]
    launch(x, grad, mask, numbers, placed, backend)


@_langevin_step.register_fake
def _(x, grad, mask, *arguments):
    return None


def launch(
    x: Tensor, grad: Tensor, mask: Tensor | None, numbers: Update, placed: counters.Counters, backend: str
) -> None:
    """Run the step on checked arguments, past the dispatcher: what a chain calls K times after checking once."""
    if x.numel() == 0:
        return
    if backend == "reference":
        langevin_step_reference(x, grad, mask, numbers, placed)
    elif backend == "triton":
        from ..kernels.langevin_step import langevin_step_ as kernel

        kernel(
            x,
            grad,
            **numbers.triton_arguments,
            mask=mask,
            mask_strides=None if mask is None else mask_strides(mask, x),
            **placed.reference_arguments,
        )
    else:
        _launch_native(x, grad, mask, numbers, placed)


def _launch_native(x: Tensor, grad: Tensor, mask: Tensor | None, numbers: Update, placed: counters.Counters) -> None:
    on_cuda = x.device.type == "cuda"
    module = native.module()
    (module.langevin_step_cuda if on_cuda else module.langevin_step_cpu)(
        x.data_ptr(),
        grad.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        dimensions(x),
        strides(x),
        strides(grad),
        (0, 0, 0) if mask is None else mask_strides(mask, x),
        GRAD_TYPES[grad.dtype],
        numbers.arguments,
        placed.native_arguments,
        *launch_place(x),
    )


def langevin_step_reference(
    x: Tensor, grad: Tensor, mask: Tensor | None, numbers: Update, placed: counters.Counters
) -> None:
    """The formula in plain torch: float64 throughout, rounded to float32 once at the end."""
    samples, channels, spatial = dimensions(x)
    state, force = x.double(), grad.double()
    if not math.isinf(numbers.grad_clamp):
        force = force.clamp(-numbers.grad_clamp, numbers.grad_clamp)
    force = force + (state - numbers.reference_mean) * numbers.inverse_variance
    result = state - numbers.drift * force
    if numbers.noise_std:
        normal = noise_reference(samples, channels * spatial, placed, "normal", x.device)
        result = result + numbers.noise_std * normal.reshape(x.shape)
    if not (math.isinf(numbers.low) and math.isinf(numbers.high)):
        result = result.clamp(numbers.low, numbers.high)
    result = result.float()
    x.copy_(result if mask is None else torch.where(mask, result, x))
