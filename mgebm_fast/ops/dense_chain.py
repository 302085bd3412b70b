"""dense_chain_: all K Langevin steps of a small grid in one call; on a map of 4×4 convolutions are dense matrices."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from . import counters
from .backend import BackendError, choose, past_dispatcher, register
from .bias_act import activate, slope_at
from .dense_net import DenseNet, DenseNorm
from .edge_step import check_bad_step, note_bad_step_
from .langevin_step import langevin_step_reference
from .state import check_state
from .update import Update, check_steps, prepare

OP = "dense_chain_"
register("dense_chain", triton=True)
MAX_SPLIT = 32
TILE = 16  # samples


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
    """K Langevin steps of a small net in place, the state held in fp32 throughout:

        for k in 0 … K − 1:   x ← `langevin_step_`(x, ∇E(x), …) at step first_step + k

    Products are of the net's dtype (the first layer takes x as a sum of two such numbers), sums, statistics and update
    float32. With batch statistics E is the sum over the batch, and its gradient goes through them.

    Args:
        steps: K >= 0.
        scale: the head is multiplied by it and ∇E divided: a power of two that keeps a 16-bit backward pass in range.
        step_size … mask, seed … stream: as in `langevin_step_`; first_step a number or a 0-dim int64 tensor.
        bad_step: as in `edge_step_`.
        split: programs that share a tile of 16 samples (Triton on a GPU), each with its part of every layer's columns;
            the result is the same bit for bit. With a split, or with batch statistics and more than one tile, all
            programs must fit the GPU at once, or the launch is refused.

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
            x, bad_step, list(net.weights), list(net.biases), *_norms_as_lists(net), net.head, list(net.sizes),
            ",".join(net.activations), list(net.slopes), steps, float(scale), mask, *numbers.arguments,
            *placed.arguments, split, backend,
        )  # fmt: skip
    return x


def _norms_as_lists(net: DenseNet) -> tuple[list[Tensor | None], list[int], list[float]]:
    """(gains, sites, eps) a layer: None, 0 and 0 where there are no statistics."""
    norms = net.norms
    return (
        [None if norm is None else norm.gain for norm in norms],
        [0 if norm is None else norm.sites for norm in norms],
        [0.0 if norm is None else norm.eps for norm in norms],
    )


@torch.library.custom_op(
    "mgebm_fast::dense_chain_",
    mutates_args=("x", "bad_step"),
    schema="(Tensor(a0!) x, Tensor(a1!)? bad_step, Tensor[] weights, Tensor[] biases, Tensor?[] gains, int[] sites, "
    "float[] eps, Tensor head, int[] sizes, str activations, float[] slopes, int steps, float scale, Tensor? mask, "
    "float drift, float noise_std, float inverse_variance, float reference_mean, float grad_clamp, float low, "
    f"float high, {counters.SCHEMA}, int split, str backend) -> ()",
)
def _dense_chain(
    x, bad_step, weights, biases, gains, sites, eps, head, sizes, activations, slopes, steps, scale, mask, *arguments
):
    norms = tuple(None if one[0] is None else DenseNorm(*one) for one in zip(gains, sites, eps))
    net = DenseNet(
        tuple(sizes), tuple(weights), tuple(biases), head, tuple(activations.split(",")), tuple(slopes), norms
    )
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
        if x.device.type != "cuda" and (split > 1 or (net.coupled and len(x) > TILE)):
            raise BackendError(
                f"{OP}: on CPU tensors Triton's programs run one after another, and cannot wait for each other: split "
                f"must be 1, and x with batch statistics of at most {TILE} samples, got {split} and {len(x)} samples"
            )
        from ..kernels.dense_chain import dense_chain_ as kernel

        arguments = placed.reference_arguments
        gains, sites, eps = _norms_as_lists(net)
        try:
            kernel(
                x,
                net.weights,
                net.biases,
                net.head,
                gains=gains,
                sites=sites,
                eps=eps,
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
        except RuntimeError as error:
            if "cooperative" not in str(error):  # CUDA's words: too many blocks in cooperative launch
                raise
            raise BackendError(
                f"{OP}: its programs wait for each other, and do not fit the GPU at once: {-(-len(x) // TILE)} tiles "
                f"of {TILE} samples with split = {split}; fewer samples a call, or a smaller split, do"
            ) from error
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
    normals: list[tuple[Tensor, Tensor, int] | None] = []
    for index, (weight, bias, norm) in enumerate(zip(net.weights, net.biases, net.norms)):
        rows, columns = net.sizes[index + 1], net.sizes[index]
        v, bias = h @ weight[:rows, :columns].double().T, bias[:rows].double()
        if norm is None:
            normals.append(None)
        else:
            channels = v.reshape(len(v), -1, norm.sites)
            mean, variance = channels.mean((0, 2), keepdim=True), channels.var((0, 2), correction=0, keepdim=True)
            rate = (variance + norm.eps).rsqrt()
            normal = ((channels - mean) * rate).reshape(v.shape)
            gain = norm.gain[:rows].double()
            normals.append((normal, gain * rate.expand(1, -1, norm.sites).reshape(-1), norm.sites))
            v = gain * normal
        v = v + bias
        slopes.append(slope_at(v, net.activations[index], net.slopes[index]))
        h = activate(v, net.activations[index], net.slopes[index])
    g = net.head[: net.sizes[-1]].double().expand(len(h), -1)
    for index in range(len(net.weights) - 1, -1, -1):
        g = g * slopes[index]
        if (made := normals[index]) is not None:
            normal, factor, sites = made
            g = factor * (g - _channel_mean(g, sites) - normal * _channel_mean(g * normal, sites))
        g = g @ net.weights[index][: net.sizes[index + 1], : net.sizes[index]].double()
    return g.reshape(x.shape)


def _channel_mean(values: Tensor, sites: int) -> Tensor:  # (N, D) -> (D,): of a channel, over samples too
    means = values.reshape(len(values), -1, sites).mean((0, 2))
    return means.repeat_interleave(sites)
