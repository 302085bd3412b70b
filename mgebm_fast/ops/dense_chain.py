"""dense_chain_: all K Langevin steps of a small grid in one call; on a map of 4×4 convolutions are dense matrices."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import counters
from .backend import choose, past_dispatcher, register
from .bias_act import DTYPES, activate, check_activation, slope_at
from .edge_step import check_bad_step, note_bad_step_
from .langevin_step import langevin_step_reference
from .state import check_state
from .update import Update, check_steps, prepare

OP = "dense_chain_"
register("dense_chain", triton=True)
MAX_LAYERS = 4
MAX_SITES = 16  # pixels of x and of every map
MAX_ELEMENTS = 256  # of x: a program holds a tile of samples in registers
MAX_WIDTH = 4096
MAX_SPLIT = 32
PAD = 64  # widths are padded to multiples of this, with zeros


@dataclasses.dataclass(frozen=True)
class DenseNet:
    """An energy's layers as matrices, v_l = W_l h_{l−1} + b_l, h_l = a_l(v_l), and dE/dh at the top (`dense_net`,
    `dense_net_of`). Padded rows, columns and entries are zero."""

    sizes: tuple[int, ...]  # D_0 … D_L, as they are
    weights: tuple[Tensor, ...]  # (padded D_l, padded D_{l−1}), 16 or 32 bits: views of one flat tensor
    biases: tuple[Tensor, ...]  # (padded D_l,) float32: views of one
    head: Tensor  # (padded D_L,) float32
    activations: tuple[str, ...]
    slopes: tuple[float, ...]

    def update_(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], head: Tensor) -> None:
        """Take new values, unpadded, in place: a captured graph then replays with them."""
        with torch.no_grad():
            for mine, weight in zip(self.weights, weights, strict=True):
                mine[: weight.shape[0], : weight.shape[1]] = weight
            for mine, bias in zip(self.biases, biases, strict=True):
                if bias is not None:
                    mine[: bias.shape[0]] = bias
            self.head[: head.numel()] = head.reshape(-1)


def padded(size: int) -> int:
    return -(-size // PAD) * PAD


def dense_net(
    weights: Sequence[Tensor],  # (D_l, D_{l−1}) each, up to four
    biases: Sequence[Tensor | None],  # (D_l,)
    head: Tensor,  # D_L entries: dE/dh_L
    *,
    activations: Sequence[str],
    slopes: Sequence[float],
    dtype: torch.dtype | None = None,
) -> DenseNet:
    """The layers prepared for `dense_chain_`, in `dtype` (None: the weights').

    Raises ValueError for more than four layers, x of more than 256 elements, or a width above 4096.
    """
    where = "dense_net"
    layers = len(weights)
    if not 1 <= layers <= MAX_LAYERS or {len(biases), len(activations), len(slopes)} != {layers}:
        got = (layers, len(biases), len(activations), len(slopes))
        raise ValueError(
            f"{where}: weights, biases, activations and slopes must be of 1 to {MAX_LAYERS} layers, got {got}"
        )
    dtype = weights[0].dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(f"{where}: dtype must be float32, float16 or bfloat16, got {dtype}")
    sizes = (weights[0].shape[1], *(weight.shape[0] for weight in weights))
    for index, weight in enumerate(weights):
        if weight.dim() != 2 or tuple(weight.shape) != (sizes[index + 1], sizes[index]):
            wanted = (sizes[index + 1], sizes[index])
            raise ValueError(f"{where}: weights[{index}] must be {wanted}, got {tuple(weight.shape)}")
        bias = biases[index]
        if bias is not None and tuple(bias.shape) != (sizes[index + 1],):
            raise ValueError(f"{where}: biases[{index}] must be ({sizes[index + 1]},), got {tuple(bias.shape)}")
        check_activation(activations[index], slopes[index], where)
    if head.numel() != sizes[-1]:
        raise ValueError(f"{where}: head must hold {sizes[-1]} entries, got {head.numel()}")
    if sizes[0] > MAX_ELEMENTS or max(sizes) > MAX_WIDTH:
        raise ValueError(f"{where}: sizes must be at most {MAX_ELEMENTS} and then {MAX_WIDTH}, got {sizes}")
    wide = [padded(size) for size in sizes]
    device = weights[0].device
    flat = torch.zeros(sum(a * b for a, b in zip(wide, wide[1:])), dtype=dtype, device=device)
    flat_bias = torch.zeros(sum(wide[1:]), dtype=torch.float32, device=device)
    net = DenseNet(
        sizes=sizes,
        weights=tuple(
            part.view(b, a) for part, a, b in zip(flat.split([a * b for a, b in zip(wide, wide[1:])]), wide, wide[1:])
        ),
        biases=tuple(flat_bias.split(wide[1:])),
        head=torch.zeros(wide[-1], dtype=torch.float32, device=device),
        activations=tuple(activations),
        slopes=tuple(float(slope) for slope in slopes),
    )
    net.update_(weights, biases, head)
    return net


def dense_net_of(stack: Any, dtype: torch.dtype = torch.float16) -> DenseNet | str:
    """A `gradient.stack.Stack` as a `DenseNet`, or the reason why it cannot be one."""
    reason = why_not_dense(stack)
    if reason:
        return reason
    weights, biases = dense_matrices(stack)
    return dense_net(
        weights,
        biases,
        stack.head,
        activations=[stage.activation for stage in stack.stages],
        slopes=[stage.slope for stage in stack.stages],
        dtype=dtype,
    )


def why_not_dense(stack: Any) -> str:
    """Why `stack` is no small dense chain; an empty string when it is."""
    if not 1 <= len(stack.stages) <= MAX_LAYERS:
        return f"it has {len(stack.stages)} layers, and dense chains 1 to {MAX_LAYERS}"
    if stack.channels * math.prod(stack.size) > MAX_ELEMENTS:
        return f"x has {stack.channels * math.prod(stack.size)} elements, more than {MAX_ELEMENTS}"
    for stage in stack.stages:
        if stage.norm is not None:
            return f"{stage.name} has batch statistics"
        for size in (stage.in_size, stage.out_size):
            if math.prod(size) > MAX_SITES:
                return f"{stage.name} works on a map of {'×'.join(map(str, size))}, more than {MAX_SITES} pixels"
        if stage.weight.shape[0] * math.prod(stage.out_size) > MAX_WIDTH:
            return (
                f"{stage.name} gives {stage.weight.shape[0] * math.prod(stage.out_size)} values, more than {MAX_WIDTH}"
            )
    return ""


def dense_matrices(stack: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each stage's convolution as a matrix on flattened (C, *spatial) maps, and its bias once a pixel."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    with torch.no_grad():
        for stage in stack.stages:
            values = torch.nn.functional.pad(stage.weight.reshape(-1), (0, 1))
            weights.append(values[dense_places(stage)])
            biases.append(None if stage.bias is None else stage.bias.repeat_interleave(math.prod(stage.out_size)))
    return weights, biases


def dense_places(stage: Any) -> Tensor:
    """(outputs, inputs) int64: where a stage's matrix has its entries among its weights, flattened; the number of the
    weights where the entry is 0."""
    outputs, inputs, *kernel = stage.weight.shape
    strides = [math.prod(kernel[axis + 1 :]) for axis in range(len(kernel))]
    sites = [list(itertools.product(*map(range, size))) for size in (stage.out_size, stage.in_size)]

    def tap_of(out: tuple[int, ...], site: tuple[int, ...]) -> int:
        """An output at o meets an input at i through the tap k with o · stride − padding + dilation · k = i."""
        met = [divmod(i + p - o * s, d) for o, i, s, p, d in
               zip(out, site, stage.stride, stage.padding, stage.dilation)]  # fmt: skip
        fits = all(rest == 0 and 0 <= k < size for (k, rest), size in zip(met, kernel))
        return sum(k * stride for (k, _), stride in zip(met, strides)) if fits else -1

    tapped = torch.tensor([[tap_of(out, site) for site in sites[1]] for out in sites[0]], device="cpu")
    device = stage.weight.device
    tapped = (tapped.pin_memory() if device.type == "cuda" else tapped).to(device, non_blocking=True)[None, :, None, :]
    filters = torch.arange(outputs * inputs, device=device).reshape(outputs, 1, inputs, 1)
    places = torch.where(tapped < 0, stage.weight.numel(), filters * math.prod(kernel) + tapped)
    return places.reshape(outputs * len(sites[0]), -1)


def dense_chain_(
    x: Tensor,  # (N, ...) float32, contiguous, D_0 elements a sample
    net: DenseNet,
    *,
    steps: int,
    scale: float = 1.0,
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
    first_step: int | Tensor = 0,
    stream: int = 0,
    split: int = 1,
    backend: str = "auto",
) -> Tensor:
    """K Langevin steps of a small net without batch statistics, in place, the state held in fp32 throughout:

        for k in 0 … K − 1:   x ← `langevin_step_`(x, ∇E(x), …) at step first_step + k

    Products are of the net's dtype (the first layer takes x as a sum of two such numbers), sums and update float32.

    Args:
        steps: K >= 0.
        scale: the head is multiplied by it and ∇E divided: a power of two that keeps a 16-bit backward pass in range.
        step_size … mask, seed … stream: as in `langevin_step_`; first_step a number or a 0-dim int64 tensor.
        bad_step: as in `edge_step_`.
        split: programs that share a tile of 16 samples (Triton on a GPU), each with its part of every layer's columns;
            the result is the same bit for bit. All programs must fit the GPU at once, or the launch is refused.

    Returns: x itself.
    Raises: TypeError, ValueError, BackendError.
    """
    seed = counters.seed_or_fresh(seed, x, OP)
    check_state(x, OP)
    if not x.is_contiguous() or x[:1].numel() not in (net.sizes[0], 0):
        raise ValueError(
            f"{OP}: x must be contiguous with {net.sizes[0]} elements a sample, got shape {tuple(x.shape)} with "
            f"strides {x.stride()}"
        )
    if net.head.device != x.device:
        raise ValueError(f"{OP}: net must be on {x.device}, as x is, got one on {net.head.device}")
    check_steps(steps, OP)
    if not isinstance(split, int) or not 1 <= split <= MAX_SPLIT:
        raise ValueError(f"{OP}: split must be in [1, {MAX_SPLIT}], got {split!r}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{OP}: scale must be finite and > 0, got {scale}")
    check_bad_step(bad_step, x, OP)
    numbers, mask, placed = prepare(
        OP, x, mask, varies=False, steps=steps, step_size=step_size, noise_scale=noise_scale, drift=drift,
        noise_std=noise_std, reference_std=reference_std, reference_mean=reference_mean, grad_clamp=grad_clamp,
        clamp=clamp, seed=seed, first_sample=first_sample, step=first_step, stream=stream,
    )  # fmt: skip
    if mask is not None:
        mask = mask.expand(x.shape).contiguous()
    backend = choose("dense_chain", backend, x.device)
    if past_dispatcher(x):
        launch(x, net, steps, float(scale), mask, bad_step, numbers, placed, split, backend)
        torch.autograd.graph.increment_version(x)
    else:
        torch.ops.mgebm_fast.dense_chain_(
            x, bad_step, list(net.weights), list(net.biases), net.head, list(net.sizes), ",".join(net.activations),
            list(net.slopes), steps, float(scale), mask, *numbers.arguments, *placed.arguments, split, backend,
        )  # fmt: skip
    return x


@torch.library.custom_op(
    "mgebm_fast::dense_chain_",
    mutates_args=("x", "bad_step"),
    schema="(Tensor(a0!) x, Tensor(a1!)? bad_step, Tensor[] weights, Tensor[] biases, Tensor head, int[] sizes, "
    "str activations, float[] slopes, int steps, float scale, Tensor? mask, float drift, float noise_std, "
    "float inverse_variance, float reference_mean, float grad_clamp, float low, float high, "
    f"{counters.SCHEMA}, int split, str backend) -> ()",
)
def _dense_chain(x, bad_step, weights, biases, head, sizes, activations, slopes, steps, scale, mask, *arguments):
    net = DenseNet(tuple(sizes), tuple(weights), tuple(biases), head, tuple(activations.split(",")), tuple(slopes))
    numbers, placed = Update(*arguments[:7]), counters.Counters(*arguments[7:-2])
    launch(x, net, steps, scale, mask, bad_step, numbers, placed, *arguments[-2:])


@_dense_chain.register_fake
def _(x, bad_step, *arguments):
    return None


def launch(
    x: Tensor,
    net: DenseNet,
    steps: int,
    scale: float | Tensor,  # a tensor: 0-dim float32, read by the kernel
    mask: Tensor | None,  # bool, x's shape, contiguous
    bad_step: Tensor | None,
    numbers: Update,
    placed: counters.Counters,
    split: int,
    backend: str,
) -> None:
    """The steps on checked arguments, past the dispatcher."""
    if x.numel() == 0 or steps == 0:
        return
    if backend == "triton":
        from ..kernels.dense_chain import dense_chain_ as kernel

        arguments = placed.reference_arguments
        kernel(
            x,
            net.weights,
            net.biases,
            net.head,
            activations=net.activations,
            slopes=net.slopes,
            steps=steps,
            scale=scale,
            **numbers.triton_arguments,
            table=numbers.table,
            mask=mask,
            bad_step=bad_step,
            split=split,
            seed=arguments["seed"],
            first_sample=arguments["first_sample"],
            first_step=arguments["step"],
            stream=arguments["stream"],
        )
    else:
        dense_chain_reference(x, net, steps, mask, bad_step, numbers, placed)


def dense_chain_reference(
    x: Tensor,
    net: DenseNet,
    steps: int,
    mask: Tensor | None,
    bad_step: Tensor | None,
    numbers: Update,
    placed: counters.Counters,
) -> None:
    """The formula in plain torch: float64 gradients of the weights as they are, x rounded to float32 at each step."""
    for k in range(steps):
        grad = dense_gradient(x, net)
        tensor = None if placed.step_tensor is None else placed.step_tensor + k
        here = dataclasses.replace(placed, step=placed.step + k, step_tensor=tensor)
        if bad_step is not None:
            note_bad_step_(bad_step, grad, here.step if tensor is None else tensor)
        langevin_step_reference(x, grad, mask, numbers.steps(k, k + 1), here)


def dense_gradient(x: Tensor, net: DenseNet) -> Tensor:
    """∇E(x) in float64, the shape of x."""
    h = x.double().reshape(x.shape[0], -1)
    slopes = []
    for index, (weight, bias) in enumerate(zip(net.weights, net.biases)):
        rows, columns = net.sizes[index + 1], net.sizes[index]
        v = h @ weight[:rows, :columns].double().T + bias[:rows].double()
        slopes.append(slope_at(v, net.activations[index], net.slopes[index]))
        h = activate(v, net.activations[index], net.slopes[index])
    g = net.head[: net.sizes[-1]].double() * slopes[-1]
    for index in range(len(net.weights) - 1, -1, -1):
        g = g @ net.weights[index][: net.sizes[index + 1], : net.sizes[index]].double()
        if index:
            g = g * slopes[index - 1]
    return g.reshape(x.shape)
