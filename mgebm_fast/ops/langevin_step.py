"""langevin_step_: gradient, Gaussian reference, noise, clip, clamp and mask in one pass over x, in place."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import native
from ..noise import WORD
from . import counters
from .backend import choose, launch_place, past_dispatcher, register
from .noise import noise_reference
from .state import addresses, check_state, dimensions, mask_strides, strides, why_not_plain
from .update import Number, Update, prepare, update

OP = "langevin_step_"
register("langevin_step", cpu=True, cuda=True, triton=True)
GRAD_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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
    return grad if grad.is_contiguous() or strides(grad) is not None else grad.contiguous()


def langevin_step_(
    x: Tensor,  # (N, C, *spatial) float32, contiguous or channels-last
    grad: Tensor,  # the same shape, float32 | float16 | bfloat16
    *,
    step_size: Number | None = None,
    noise_scale: Number = 1.0,
    drift: Number | None = None,
    noise_std: Number | None = None,
    reference_std: Number | None = None,
    reference_mean: float | Tensor = 0.0,
    grad_clamp: float | None = None,
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
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
        reference_std, reference_mean: σ and m of the Gaussian reference N(m, σ²I); None: no reference. A tensor m that
            broadcasts to x is a mean for each element: a tether to given images.
        step_size, noise_scale, drift, noise_std, reference_std: a tensor (N,) or (1, N) is a value a sample.
        grad_clamp, clamp: bounds on the gradient's entries and on the result; None: none.
        mask: bool, broadcastable to x, True = updated; held pixels keep their bits and are not clamped.
        seed, first_sample, step, stream: the noise's place, as in `noise`; tensors must be on x's device. Without a
            seed each call draws one from torch's generator: steps in a loop never share their noise.

    Returns:
        x itself.

    Raises:
        TypeError, ValueError: an argument is not as above. BackendError: a named backend is not available here.

    Source: the chain of Xie, Lu, Zhu and Wu (ICML 2016, §3) with the clips of later users.
    """
    seed = counters.seed_or_fresh(seed, x, OP)
    if (
        backend == "auto"
        and mask is None
        and _is_plain(x, grad)
        and type(step) is type(seed) is type(first_sample) is int
    ):
        numbers = update(
            step_size=step_size, noise_scale=noise_scale, drift=drift, noise_std=noise_std,
            reference_std=reference_std, reference_mean=reference_mean, grad_clamp=grad_clamp, clamp=clamp, x=x,
        )  # fmt: skip
        if _launch_small(x, grad, numbers, seed, first_sample, step, stream):
            return x
    check_state(x, OP)
    grad = check_grad(grad, x)
    numbers, mask, placed = prepare(
        OP, x, mask, step_size=step_size, noise_scale=noise_scale, drift=drift, noise_std=noise_std,
        reference_std=reference_std, reference_mean=reference_mean, grad_clamp=grad_clamp, clamp=clamp, seed=seed,
        first_sample=first_sample, step=step, stream=stream,
    )  # fmt: skip
    backend = choose("langevin_step", backend, x.device)
    if past_dispatcher(x, grad):
        launcher(x, mask, backend)(grad, numbers, placed)
        torch.autograd.graph.increment_version(x)
    else:
        tensors = numbers.table, numbers.means
        torch.ops.mgebm_fast.langevin_step_(x, grad, mask, *numbers.arguments, *tensors, *placed.arguments, backend)
    return x


def _is_plain(x: Tensor, grad: Tensor) -> bool:
    """Whether a step on the CPU needs no further check of its tensors: the usual case, at a tenth of the cost."""
    return (
        past_dispatcher(x, grad)  # subclasses and tracing end here
        and x.dtype is grad.dtype is torch.float32
        and x.is_cpu
        and grad.is_cpu
        and x.is_contiguous()
        and grad.is_contiguous()
        and x.shape == grad.shape
        and x.dim() > 0
        and not (x.requires_grad or why_not_plain(x) or why_not_plain(grad))
    )


def _launch_small(
    x: Tensor, grad: Tensor, numbers: Update, seed: int, first_sample: int, step: int, stream: int
) -> bool:
    """The step on plain tensors with numbers as counters; False, with nothing done, where a check may refuse them."""
    samples = x.shape[0]
    elements = x.numel() // samples if samples else 0
    fits = 0 <= seed < 1 << 64 and 0 <= step <= WORD and first_sample >= 0 and first_sample + samples - 1 <= WORD
    if not (fits and elements and type(stream) is int and 0 <= stream <= WORD and elements // 4 <= WORD):
        return False
    if not native.available():
        return False
    strides = (elements, elements, 1)
    native.module().langevin_step_cpu(
        x.data_ptr(), grad.data_ptr(), 0, samples, 1, elements, strides, strides, (0, 0, 0), 0,
        numbers.native_arguments, (seed, first_sample, step, stream, 0, 0, 0, False), torch.get_num_threads(),
    )  # fmt: skip
    torch._C._increment_version((x,))
    return True


@torch.library.custom_op(
    "mgebm_fast::langevin_step_",
    mutates_args=("x",),
    schema="(Tensor(a0!) x, Tensor grad, Tensor? mask, float drift, float noise_std, float inverse_variance, "
    "float reference_mean, float grad_clamp, float low, float high, Tensor? table, Tensor? means, "
    f"{counters.SCHEMA}, str backend) -> ()",
)
def _langevin_step(x, grad, mask, *arguments):
    numbers, placed, backend = Update(*arguments[:9]), counters.Counters(*arguments[9:-1]), arguments[-1]
    launcher(x, mask, backend)(grad, numbers, placed)


@_langevin_step.register_fake
def _(x, grad, mask, *arguments):
    return None


def launcher(
    x: Tensor, mask: Tensor | None, backend: str
) -> Callable[[Tensor, Update, counters.Counters], None]:  # of the gradient, the step's numbers and its counters
    """The step on checked arguments, past the dispatcher: what a chain calls K times after checking once. What the
    state and the mask say is read here."""
    if x.numel() == 0:
        return lambda grad, numbers, placed: None
    if backend == "reference":
        return lambda grad, numbers, placed: langevin_step_reference(x, grad, mask, numbers, placed)
    steps = (0, 0, 0) if mask is None else mask_strides(mask, x)
    if backend == "triton":
        from ..kernels.langevin_step import langevin_step_ as kernel

        return lambda grad, numbers, placed: kernel(
            x, grad, **numbers.triton_arguments, **numbers.triton_tensors, mask=mask,
            mask_strides=None if mask is None else steps, **placed.reference_arguments,
        )  # fmt: skip
    module = native.module()
    run = module.langevin_step_cuda if x.is_cuda else module.langevin_step_cpu
    (at, mask_at), sizes, layout, place = (
        addresses(OP, x, mask, dispatched=True),
        dimensions(x),
        strides(x),
        launch_place(x),
    )

    # The state and the mask live for as long as what holds their addresses.
    def launch(
        grad: Tensor, numbers: Update, placed: counters.Counters, _held: tuple[Tensor | None, ...] = (x, mask)
    ) -> None:
        (grad_at,) = addresses(OP, grad, dispatched=True)
        run(
            at, grad_at, mask_at, *sizes, layout, strides(grad), steps, GRAD_TYPES[grad.dtype],
            numbers.native_arguments, placed.native_arguments, *place,
        )  # fmt: skip

    return launch


def langevin_step_reference(
    x: Tensor, grad: Tensor, mask: Tensor | None, numbers: Update, placed: counters.Counters
) -> None:
    """The formula in plain torch: float64 throughout, rounded to float32 once at the end."""
    samples, channels, spatial = dimensions(x)
    state, force = x.double(), grad.double()
    if not math.isinf(numbers.grad_clamp):
        force = force.clamp(-numbers.grad_clamp, numbers.grad_clamp)
    drift, noise_std, inverse_variance, mean = numbers.columns(x)
    force = force + (state - mean) * inverse_variance
    result = state - drift * force
    if isinstance(noise_std, Tensor) or noise_std:
        normal = noise_reference(samples, channels * spatial, placed, "normal", x.device)
        result = result + noise_std * normal.reshape(x.shape)
    if not (math.isinf(numbers.low) and math.isinf(numbers.high)):
        result = result.clamp(numbers.low, numbers.high)
    result = result.float()
    x.copy_(result if mask is None else torch.where(mask, result, x))
