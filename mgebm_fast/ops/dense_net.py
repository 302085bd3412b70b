"""A small grid's net as dense matrices: on a map of 4×4 a convolution is one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bias_act import DTYPES, check_activation

MAX_LAYERS = 4
MAX_SITES = 16  # pixels of x and of every map
NORM_SITES = (1, 2, 4, 8, 16)  # of maps with batch statistics: whole channels stand in a block of columns
MAX_ELEMENTS = 256  # of x: a program holds a tile of samples in registers
MAX_WIDTH = 4096
PAD = 64  # widths are padded to multiples of this, with zeros


@dataclasses.dataclass(frozen=True)
class DenseNorm:
    """Batch statistics of a layer: v = gain · (u − mean) / √(var + eps) + b of u = W h, mean and biased variance of a
    channel, which is `sites` outputs in a row, over all samples."""

    gain: Tensor  # (padded D_l,) float32: of each output its channel's
    sites: int
    eps: float

    def take(self, gain: Tensor) -> None:  # (C_l,)
        self.gain[: self.sites * len(gain)].view(len(gain), -1).copy_(gain[:, None])


@dataclasses.dataclass(frozen=True)
class DenseNet:
    """An energy's layers as matrices, v_l = W_l h_{l−1} + b_l or `DenseNorm`'s, h_l = a_l(v_l), and dE/dh at the top
    (`dense_net`, `dense_net_of`). Padded rows, columns and entries are zero."""

    sizes: tuple[int, ...]  # D_0 … D_L, as they are
    weights: tuple[Tensor, ...]  # (padded D_l, padded D_{l−1}), 16 or 32 bits: views of one flat tensor
    biases: tuple[Tensor, ...]  # (padded D_l,) float32: views of one
    head: Tensor  # (padded D_L,) float32
    activations: tuple[str, ...]
    slopes: tuple[float, ...]
    norms: tuple[DenseNorm | None, ...]

    @property
    def coupled(self) -> bool:
        """Whether samples depend on each other, through batch statistics."""
        return any(norm is not None for norm in self.norms)

    def update_(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        head: Tensor,
        gains: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Take new values, unpadded, in place: a captured graph then replays with them.

        Raises ValueError unless `gains` has one (C_l,) for each layer with batch statistics, and None for the others.
        """
        gains = [None] * len(self.norms) if gains is None else gains
        wanted = [norm and (size // norm.sites,) for norm, size in zip(self.norms, self.sizes[1:])]
        got = [None if gain is None else tuple(gain.shape) for gain in gains]
        if got != wanted:
            raise ValueError(f"update_: gains must be of shapes {wanted}, a layer each, got {got}")
        with torch.no_grad():
            for mine, weight in zip(self.weights, weights, strict=True):
                mine[: weight.shape[0], : weight.shape[1]] = weight
            for mine, bias in zip(self.biases, biases, strict=True):
                if bias is not None:
                    mine[: bias.shape[0]] = bias
            for norm, gain in zip(self.norms, gains, strict=True):
                if norm is not None and gain is not None:
                    norm.take(gain)
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
    norms: Sequence[tuple[Tensor, float] | None] | None = None,  # gain (C_l,) and eps; a channel is D_l / C_l in a row
    dtype: torch.dtype | None = None,
) -> DenseNet:
    """The layers prepared for `dense_chain_`, in `dtype` (None: the weights').

    Raises ValueError for more than four layers, x of more than 256 elements, a width above 4096, or a norm that does
    not fit its layer: a power of two of outputs, up to 16, for each channel, eps > 0.
    """
    where = "dense_net"
    layers = len(weights)
    norms = [None] * layers if norms is None else norms
    if not 1 <= layers <= MAX_LAYERS or {len(biases), len(activations), len(slopes), len(norms)} != {layers}:
        got = (layers, len(biases), len(activations), len(slopes), len(norms))
        raise ValueError(
            f"{where}: weights, biases, activations, slopes and norms must be of 1 to {MAX_LAYERS} layers, got {got}"
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
        _check_norm(norms[index], sizes[index + 1], f"{where}: norms[{index}]")
    if head.numel() != sizes[-1]:
        raise ValueError(f"{where}: head must hold {sizes[-1]} entries, got {head.numel()}")
    if sizes[0] > MAX_ELEMENTS or max(sizes) > MAX_WIDTH:
        raise ValueError(f"{where}: sizes must be at most {MAX_ELEMENTS} and then {MAX_WIDTH}, got {sizes}")
    wide = [padded(size) for size in sizes]
    device = weights[0].device
    flat = torch.zeros(sum(a * b for a, b in zip(wide, wide[1:])), dtype=dtype, device=device)
    flat_bias, flat_gain = torch.zeros(2, sum(wide[1:]), dtype=torch.float32, device=device)
    net = DenseNet(
        sizes=sizes,
        weights=tuple(
            part.view(b, a) for part, a, b in zip(flat.split([a * b for a, b in zip(wide, wide[1:])]), wide, wide[1:])
        ),
        biases=tuple(flat_bias.split(wide[1:])),
        head=torch.zeros(wide[-1], dtype=torch.float32, device=device),
        activations=tuple(activations),
        slopes=tuple(float(slope) for slope in slopes),
        norms=tuple(
            None if norm is None else DenseNorm(gain, size // len(norm[0]), float(norm[1]))
            for norm, gain, size in zip(norms, flat_gain.split(wide[1:]), sizes[1:])
        ),
    )
    net.update_(weights, biases, head, [norm and norm[0] for norm in norms])
    return net


def _check_norm(norm: tuple[Tensor, float] | None, outputs: int, where: str) -> None:
    if norm is None:
        return
    gain, eps = norm
    if gain.dim() != 1 or outputs not in [sites * len(gain) for sites in NORM_SITES]:
        raise ValueError(
            f"{where}: the gain must be (C,), and {outputs} outputs C times one of {NORM_SITES}, "
            f"got {tuple(gain.shape)}"
        )
    if not (math.isfinite(eps) and eps >= torch.finfo(torch.float32).tiny):
        raise ValueError(f"{where}: eps must be finite and > 0 in float32, got {eps}")


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
        norms=[stage.norm and (stage.norm.weight, stage.norm.eps) for stage in stack.stages],
        dtype=dtype,
    )


def bias_of(stage: Any) -> Tensor | None:
    """(C_out,): what is added last before the activation."""
    return stage.bias if stage.norm is None else stage.norm.bias


def why_not_dense(stack: Any) -> str:
    """Why `stack` is no small dense chain; an empty string when it is."""
    if not 1 <= len(stack.stages) <= MAX_LAYERS:
        return f"it has {len(stack.stages)} layers, and dense chains 1 to {MAX_LAYERS}"
    if stack.channels * math.prod(stack.size) > MAX_ELEMENTS:
        return f"x has {stack.channels * math.prod(stack.size)} elements, more than {MAX_ELEMENTS}"
    for stage in stack.stages:
        for size in (stage.in_size, stage.out_size):
            if math.prod(size) > MAX_SITES:
                return f"{stage.name} works on a map of {'×'.join(map(str, size))}, more than {MAX_SITES} pixels"
        if stage.norm is not None and math.prod(stage.out_size) not in NORM_SITES:
            where = f"batch statistics of {math.prod(stage.out_size)} pixels"
            return f"{stage.name} has {where}, and dense chains those of {', '.join(map(str, NORM_SITES))}"
        if stage.norm is not None and stage.norm.eps < torch.finfo(torch.float32).tiny:
            return f"{stage.name} has batch statistics with eps {stage.norm.eps}, and dense chains those with eps > 0"
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
            bias = bias_of(stage)
            biases.append(None if bias is None else bias.repeat_interleave(math.prod(stage.out_size)))
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
