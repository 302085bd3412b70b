"""edge_step_: the first layer's data gradient and the Langevin update in one kernel; ∇E never goes to memory."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from . import counters
from .backend import choose, past_dispatcher, register
from .bias_act import DTYPES
from .langevin_step import langevin_step_reference
from .state import check_state, mask_strides, strides
from .update import Update, prepare

OP = "edge_step_"
register("edge_step", triton=True)
# The value of a bad-step cell as long as every gradient was finite.
NO_BAD_STEP = 2**63 - 1
MAX_COLUMNS = 64  # stride² · channels padded to a power of two: one tile of the kernel


@dataclasses.dataclass(frozen=True)
class EdgeWeights:
    """The first convolution, and the same weights in the order of the kernel. Made by `edge_weights`.

    With stride s, output pixel (h, w) = (s i + p, s j + q) of the data gradient and upstream pixel (i + d, j + e) meet
    at the kernel position (p + pad − s d, q + pad − s e): all s² phases of a block are columns of one product,

        ∇[i, j, (p, q, c)] = Σ_{d, e, k} upstream[i + d, j + e, k] · packed[(d, e, k), (p, q, c)]
    """

    weight: Tensor  # (K, C, kh, kw), in the upstream gradient's dtype
    packed: Tensor  # (TH * TW * K, columns), the same dtype, contiguous
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    first: tuple[int, int]  # smallest (d, e)
    taps: tuple[int, int]  # (TH, TW): how many d and e there are
    places: Tensor  # (TH * TW * K, columns) int64 into weight, its number of entries where there is none

    def update_(self, weight: Tensor) -> None:
        """Take new values (K, C, kh, kw), float32 or as `weight`, in place: a captured graph then replays with them."""
        if tuple(weight.shape) != tuple(self.weight.shape):
            raise ValueError(
                f"edge_weights: weight must be {tuple(self.weight.shape)}, as before, got {tuple(weight.shape)}"
            )
        with torch.no_grad():
            self.weight.copy_(weight)
            values = torch.nn.functional.pad(self.weight.reshape(-1), (0, 1))
            torch.index_select(values, 0, self.places.reshape(-1), out=self.packed.view(-1))


def edge_weights(
    weight: Tensor,  # (K, C, kh, kw)
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    dtype: torch.dtype | None = None,
) -> EdgeWeights:
    """The first layer's weights prepared for `edge_step_`, in `dtype` (None: weight's): that of the upstream gradient.

    Raises ValueError for what the kernel cannot hold: not two spatial dimensions, a stride above 2, or
    stride² · C (C padded to a power of two) above 64.
    """
    where = "edge_weights"
    if not isinstance(weight, Tensor) or weight.dim() != 4:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{where}: weight must be (K, C, kh, kw), got {got}")
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(f"{where}: dtype must be float32, float16 or bfloat16, got {dtype}")
    s, pad, dil = (_pair(v, n, where) for v, n in ((stride, "stride"), (padding, "padding"), (dilation, "dilation")))
    if not all(v in (1, 2) for v in s):
        raise ValueError(f"{where}: stride must be 1 or 2, got {stride}")
    if min(pad) < 0 or min(dil) < 1:
        raise ValueError(f"{where}: padding must be >= 0 and dilation >= 1, got {padding} and {dilation}")
    wide = columns(weight.shape[1], s)
    if wide > MAX_COLUMNS:
        raise ValueError(f"{where}: stride² · channels must be at most {MAX_COLUMNS}, got {wide}")
    first, taps, places = places_on(tuple(weight.shape), s, pad, dil, weight.device)
    made = EdgeWeights(
        weight=torch.empty(weight.shape, dtype=dtype, device=weight.device),
        packed=torch.empty(places.shape, dtype=dtype, device=weight.device),
        stride=s,
        padding=pad,
        dilation=dil,
        first=first,
        taps=taps,
        places=places,
    )
    made.update_(weight)
    return made


def columns(channels: int, stride: tuple[int, int]) -> int:
    """Columns of the packed weights: a block's phases times the channels padded to a power of two, at least 16."""
    return max(16, stride[0] * stride[1] * (1 << (channels - 1).bit_length()))


def _pair(value: int | Sequence[int], name: str, where: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{where}: {name} must be an int or two, got {value!r}")
    return pair


@functools.lru_cache(maxsize=64)
def places_on(
    shape: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    device: torch.device,
) -> tuple[tuple[int, int], tuple[int, int], Tensor]:  # fmt: skip
    """`_places` on a device, copied there once: a chain that makes a new plan must not wait for the host."""
    with torch.inference_mode(False):
        first, taps, places = _places(shape, stride, padding, dilation)
        return first, taps, places.to(device)


def _places(
    shape: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int], Tensor]:
    """(first, taps, places) of `EdgeWeights`."""
    out_channels, channels, *kernel = shape
    met: list[list[dict[int, int]]] = []  # by axis and phase: {d: kernel index}
    for axis in range(2):
        s, pad, dil = stride[axis], padding[axis], dilation[axis]
        # Phase p and upstream offset d meet at k = (p + pad − s d) / dil.
        met.append([{(p + pad - dil * k) // s: k for k in range(kernel[axis]) if (p + pad - dil * k) % s == 0}
                    for p in range(s)])  # fmt: skip
    offsets = [sorted({d for phase in axis for d in phase}) for axis in met]
    first = (offsets[0][0], offsets[1][0])
    taps = (offsets[0][-1] - first[0] + 1, offsets[1][-1] - first[1] + 1)
    padded = 1 << (channels - 1).bit_length()
    places = torch.full((*taps, out_channels, columns(channels, stride)), math.prod(shape))
    index = torch.arange(math.prod(shape)).reshape(shape)
    for p, rows in enumerate(met[0]):
        for q, across in enumerate(met[1]):
            start = (p * stride[1] + q) * padded
            for d, kh in rows.items():
                for e, kw in across.items():
                    places[d - first[0], e - first[1], :, start : start + channels] = index[:, :, kh, kw]
    return first, taps, places.reshape(-1, places.shape[-1])


def edge_step_(
    x: Tensor,  # (N, C, H, W) float32, contiguous or channels-last
    upstream: Tensor,  # (N, K, OH, OW) float32 | float16 | bfloat16, contiguous or channels-last
    weights: EdgeWeights,  # in upstream's dtype
    *,
    unscale: float | Tensor = 1.0,
    step_size: float | None = None,
    noise_scale: float = 1.0,
    drift: float | None = None,
    noise_std: float | None = None,
    reference_std: float | None = None,
    reference_mean: float = 0.0,
    grad_clamp: float | None = None,
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    bad_step: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int | Tensor = 0,
    step: int | Tensor = 0,
    stream: int = 0,
    backend: str = "auto",
) -> Tensor:
    """One Langevin step from the gradient at the first layer's output, in place:

        ∇E = unscale · conv_transpose(upstream, weight);   x ← `langevin_step_`(x, ∇E, …)

    Products are of upstream's dtype, sums and the update float32; ∇E is not rounded in between.

    Args:
        upstream: dE/dz of the first convolution's output, times 1/unscale. Channels-last is the fast layout.
        unscale: what ∇E is multiplied by, a number or a 0-dim float32 tensor on x's device.
        step_size … mask, seed … stream: as in `langevin_step_`.
        bad_step: one int64 on x's device, `NO_BAD_STEP` at first; the smallest step at which an entry of ∇E was not
            finite. The caller reads it once a chain.

    Returns: x itself.
    Raises: TypeError, ValueError, BackendError.
    """
    seed = counters.seed_or_fresh(seed, x, OP)
    check_state(x, OP)
    check_upstream(x, upstream, weights)
    scale_tensor = unscale if isinstance(unscale, Tensor) else None
    if scale_tensor is not None:
        if scale_tensor.dim() or scale_tensor.dtype != torch.float32 or scale_tensor.device != x.device:
            got = f"{scale_tensor.dtype} {tuple(scale_tensor.shape)} on {scale_tensor.device}"
            raise ValueError(f"{OP}: unscale must be a number or a 0-dim float32 tensor on {x.device}, got {got}")
    elif not math.isfinite(unscale):
        raise ValueError(f"{OP}: unscale must be finite, got {unscale}")
    check_bad_step(bad_step, x, OP)
    numbers, mask, placed = prepare(
        OP, x, mask, varies=False, step_size=step_size, noise_scale=noise_scale, drift=drift,
        noise_std=noise_std,
        reference_std=reference_std, reference_mean=reference_mean, grad_clamp=grad_clamp, clamp=clamp, seed=seed,
        first_sample=first_sample, step=step, stream=stream,
    )  # fmt: skip
    backend = choose("edge_step", backend, x.device)
    scale = 1.0 if scale_tensor is not None else float(unscale)
    if past_dispatcher(x, upstream):
        launch(x, upstream, weights, scale_tensor, scale, mask, bad_step, numbers, placed, backend)
        torch.autograd.graph.increment_version(x)
    else:
        torch.ops.mgebm_fast.edge_step_(
            x, bad_step, upstream, weights.weight, weights.packed, weights.places, weights.stride, weights.padding,
            weights.dilation, weights.first, weights.taps, scale_tensor, scale, mask, *numbers.arguments,
            *placed.arguments, backend,
        )  # fmt: skip
    return x


def check_upstream(x: Tensor, upstream: Tensor, weights: EdgeWeights) -> None:
    """Raise unless `upstream` is the gradient of what the convolution makes of x."""
    if x.dim() != 4:
        raise ValueError(f"{OP}: x must be (N, C, H, W), got shape {tuple(x.shape)}")
    out_channels, channels, *kernel = weights.weight.shape
    if x.shape[1] != channels:
        raise ValueError(f"{OP}: x must have the {channels} channels of the weights, got {x.shape[1]}")
    sizes = [
        (n + 2 * pad - dil * (k - 1) - 1) // s + 1
        for n, k, s, pad, dil in zip(x.shape[2:], kernel, weights.stride, weights.padding, weights.dilation)
    ]
    wanted = (x.shape[0], out_channels, *sizes)
    if not isinstance(upstream, Tensor) or tuple(upstream.shape) != wanted:
        got = tuple(upstream.shape) if isinstance(upstream, Tensor) else type(upstream).__name__
        raise ValueError(f"{OP}: upstream must be {wanted}, the convolution's output for x, got {got}")
    if upstream.dtype != weights.weight.dtype:
        raise TypeError(f"{OP}: upstream must be {weights.weight.dtype}, as the weights are, got {upstream.dtype}")
    if upstream.device != x.device or weights.packed.device != x.device:
        raise ValueError(f"{OP}: upstream and weights must be on {x.device}, as x is, got {upstream.device}")
    if strides(upstream) is None:
        raise ValueError(f"{OP}: upstream must be contiguous or channels-last, got strides {upstream.stride()}")


def check_bad_step(bad_step: Tensor | None, x: Tensor, where: str) -> None:
    if bad_step is None:
        return
    if not isinstance(bad_step, Tensor) or bad_step.dtype != torch.int64 or bad_step.numel() != 1:
        got = f"{bad_step.dtype} {tuple(bad_step.shape)}" if isinstance(bad_step, Tensor) else repr(bad_step)
        raise ValueError(f"{where}: bad_step must hold one int64, got {got}")
    if bad_step.device != x.device:
        raise ValueError(f"{where}: bad_step must be on {x.device}, as x is, got {bad_step.device}")


@torch.library.custom_op(
    "mgebm_fast::edge_step_",
    mutates_args=("x", "bad_step"),
    schema="(Tensor(a0!) x, Tensor(a1!)? bad_step, Tensor upstream, Tensor weight, Tensor packed, Tensor places, "
    "int[] stride, int[] padding, int[] dilation, int[] first, int[] taps, Tensor? unscale_tensor, float unscale, "
    "Tensor? mask, float drift, float noise_std, float inverse_variance, float reference_mean, float grad_clamp, "
    f"float low, float high, {counters.SCHEMA}, str backend) -> ()",
)
def _edge_step(x, bad_step, upstream, weight, packed, places, *arguments):
    pairs = (tuple(pair) for pair in arguments[:5])
    scale_tensor, scale, mask = arguments[5:8]
    weights = EdgeWeights(weight, packed, *pairs, places)
    numbers, placed = Update(*arguments[8:15]), counters.Counters(*arguments[15:-1])
    launch(x, upstream, weights, scale_tensor, scale, mask, bad_step, numbers, placed, arguments[-1])


@_edge_step.register_fake
def _(x, bad_step, upstream, *arguments):
    return None


def launch(
    x: Tensor,
    upstream: Tensor,
    weights: EdgeWeights,
    unscale_tensor: Tensor | None,  # stands before `unscale`
    unscale: float,
    mask: Tensor | None,  # from `check_mask`
    bad_step: Tensor | None,
    numbers: Update,
    placed: counters.Counters,
    backend: str,
) -> None:
    """Run the step on checked arguments, past the dispatcher: what a chain calls K times after checking once."""
    if x.numel() == 0:
        return
    if backend == "triton":
        from ..kernels.edge_step import edge_step_ as kernel

        kernel(
            x,
            upstream,
            weights.packed,
            stride=weights.stride,
            first=weights.first,
            taps=weights.taps,
            unscale=unscale if unscale_tensor is None else unscale_tensor,
            **numbers.triton_arguments,
            table=numbers.table,
            mask=mask,
            mask_strides=None if mask is None else mask_strides(mask, x),
            bad_step=bad_step,
            **placed.reference_arguments,
        )
    else:
        scale = unscale if unscale_tensor is None else unscale_tensor.double()
        edge_step_reference(x, upstream, weights, scale, mask, bad_step, numbers, placed)


def edge_step_reference(
    x: Tensor,
    upstream: Tensor,
    weights: EdgeWeights,
    unscale: float | Tensor,
    mask: Tensor | None,
    bad_step: Tensor | None,
    numbers: Update,
    placed: counters.Counters,
) -> None:
    """The formula in plain torch: float64 throughout, rounded to float32 once at the end."""
    grad = conv2d_input(
        list(x.shape), weights.weight.double(), upstream.double(), weights.stride, weights.padding, weights.dilation
    )
    grad = grad * unscale
    if bad_step is not None:
        note_bad_step_(bad_step, grad, placed.step if placed.step_tensor is None else placed.step_tensor)
    langevin_step_reference(x, grad, mask, numbers, placed)


def note_bad_step_(bad_step: Tensor, grad: Tensor, step: int | Tensor) -> None:
    """bad_step ← min(bad_step, step) where an entry of grad is not finite; no synchronisation."""
    finite = torch.isfinite(grad).all()
    bad_step.copy_(torch.where(finite, bad_step, bad_step.clamp(max=step)))
