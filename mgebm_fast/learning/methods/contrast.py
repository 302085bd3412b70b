"""What one net learns from observed and synthesised images: mean energies, and the gradient of their difference."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ... import native
from ...gradient.exact import float32_as
from ...gradient.kept import read
from ...gradient.stack import Stack
from ...models.energies import norm_of
from ...nets import EnergyNet
from ...nets.score_net import ScoreNet
from ...ops.conv_chain import has_bfloat, prefers_bfloat
from ...ops.conv_learn import conv_learn

Contrast = tuple[list[Tensor], Tensor, Tensor]  # a gradient a parameter, and the two mean energies, 0-dim


def contrast(
    net: nn.Module, parameters: list[nn.Parameter], observed: Tensor, synthesised: Tensor, energy_l2: float,
    precision: str = "fp32", on_gpu: str = "auto",
) -> Contrast:  # fmt: skip
    """The gradients of mean E(observed) − mean E(synthesised) + energy_l2 · mean(E(observed)² + E(synthesised)²), and
    the two means.

    With norm="batch" observed and synthesised images are normalised apart; running statistics and power iterations
    follow the observed ones. An `EnergyNet` on a CPU with AVX2 or more learns in the native engine, others by autograd.

    precision: of the run. "bf16" lets the engine round the operands of gradients to bfloat16 where the CPU multiplies
        it, "auto" where that is faster; all else is float32.
    on_gpu: "fp32": exact; "tf32": operands rounded to TF32; "bf16": convolutions behind the first and their maps in
        bfloat16, of float32 weights; "auto": "fp32" where `precision` is, else "tf32". Statistics of batches, heads,
        energies and gradients of weights are float32 in all.
    """
    stack = readable(net, observed, synthesised)
    if isinstance(stack, Stack):
        assert isinstance(net, EnergyNet)
        bfloat = in_bfloat(stack, precision)
        return _by_engine(net, stack, parameters, observed, synthesised, energy_l2, bfloat)
    if on_gpu == "auto":
        on_gpu = "fp32" if precision == "fp32" else "tf32"
    bfloat = on_gpu == "bf16" and observed.device.type == "cuda"
    with float32_as("ieee" if on_gpu == "fp32" else "tf32", observed.device):
        return _by_autograd(net, parameters, observed, synthesised, energy_l2, bfloat)


def _by_autograd(
    net: nn.Module, parameters: list[nn.Parameter], observed: Tensor, synthesised: Tensor, energy_l2: float,
    bfloat: bool,
) -> Contrast:  # fmt: skip
    on_observed, on_synthesised = _energies(net, observed, synthesised, _InBfloat if bfloat else contextlib.nullcontext)
    loss = on_observed.mean() - on_synthesised.mean()
    if energy_l2:
        loss = loss + energy_l2 * (on_observed.square().mean() + on_synthesised.square().mean())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return _filled(parameters, found), on_observed.detach().mean(), on_synthesised.detach().mean()


class _InBfloat(TorchFunctionMode):
    """One forward pass whose convolutions are bfloat16, and the maps between them, of weights that stay float32. The
    first takes its images as they are: of pixels to 255, bfloat16 loses up to half a unit. A head and the sums of maps
    are float32. torch.autocast would round the first and the energies too, and cannot take a spectral norm."""

    _first = True

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _CONVOLUTIONS and self._first:
            self._first = False
            return function(*args, **kwargs).bfloat16()
        if function in _CONVOLUTIONS:
            args, kwargs = tree_map_only(Tensor, Tensor.bfloat16, (args, kwargs))
        elif function in _SUMS and args[0].dtype == torch.bfloat16:
            args = (args[0].float(), *args[1:])
        return function(*args, **kwargs)


_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_SUMS = (functional.linear, Tensor.sum, Tensor.mean)


def readable(net: nn.Module, observed: Tensor, synthesised: Tensor) -> Stack | str:
    """The net as the native engine learns it; or why it learns by autograd."""
    if observed.device.type != "cpu":
        return "it is not on a CPU"
    if reason := native.why_not():
        return reason
    if native.isa() == "portable":
        return "without AVX2 torch is faster"
    if type(net) is not EnergyNet:
        return f"{type(net).__name__} is not an EnergyNet"
    return read(net, min(observed, synthesised, key=len))


def in_bfloat(stack: Stack, precision: str) -> bool:
    """Whether the engine learns from bfloat16 operands: a layer behind the first, of some channels, gains by it."""
    if precision == "auto":
        return prefers_bfloat() and any(min(stage.weight.shape[:2]) >= 16 for stage in stack.stages[1:])
    return precision == "bf16" and has_bfloat()


def _by_engine(
    net: EnergyNet, stack: Stack, parameters: list[nn.Parameter], observed: Tensor, synthesised: Tensor,
    energy_l2: float, bfloat: bool,
) -> Contrast:  # fmt: skip
    n, m = len(observed), len(synthesised)
    share = observed.new_full((n + m,), 1 / n)
    share[n:] = -1 / m
    # Where there is a spectral norm, a weight is a function of the parameter, and the first forward moves it.
    with net.observing() if net.spectral_norm else contextlib.nullcontext():
        weights = [layer.effective_weight() for layer in net.convolutions]
        head = None if net.head is None else net.head.effective_weight()
    stages = stack.stages
    if net.spectral_norm:
        stages = tuple(dataclasses.replace(s, weight=w.detach()) for s, w in zip(stages, weights, strict=True))
    bias = None if net.head is None else net.head.bias
    found = conv_learn(
        stages,
        stack.head if head is None else -head.detach().reshape(stack.head.shape),
        torch.cat([observed, synthesised]),
        share,
        energy_l2 * share.abs(),
        bias=0.0 if bias is None else -float(bias.detach()),
        split=n if net.norm == "batch" else None,
        bfloat=bfloat,
    )
    made: list[tuple[Tensor | None, Tensor | None]] = [
        (head, -found.head.reshape(1, -1)),
        (bias, -found.bias.reshape(1)),
    ]
    for layer, weight, stage, of_stage in zip(net.convolutions, weights, stages, found.stages, strict=True):
        made += [(weight, of_stage.weight), (layer.bias, of_stage.bias)]
        if layer.norm is not None and of_stage.norm is not None:
            made += [(layer.norm.weight, of_stage.norm.weight), (layer.norm.bias, of_stage.norm.bias)]
            layer.norm.follow(of_stage.norm.mean, of_stage.norm.variance, n * math.prod(stage.out_size))
    learnt = [(t, g) for t, g in made if t is not None and t.requires_grad]
    some: Sequence[Tensor | None]
    if all(t.is_leaf for t, _ in learnt):
        of = {id(t): g for t, g in learnt}
        some = [of.get(id(parameter)) for parameter in parameters]
    else:
        outputs, upstream = zip(*learnt, strict=True)
        some = torch.autograd.grad(outputs, parameters, upstream, allow_unused=True)
    return _filled(parameters, some), found.energies[:n].mean(), found.energies[n:].mean()


def _filled(parameters: list[nn.Parameter], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]


def _energies(
    net: nn.Module, observed: Tensor, synthesised: Tensor, inside: Callable[[], contextlib.AbstractContextManager[Any]]
) -> tuple[Tensor, Tensor]:
    """The energies of both batches, each forward pass in a context of its own from `inside`."""
    with net.observing() if isinstance(net, ScoreNet) else contextlib.nullcontext(), inside():
        if norm_of(net) != "batch":
            on_observed, on_synthesised = net(torch.cat([observed, synthesised])).split(
                [len(observed), len(synthesised)]
            )
            return on_observed, on_synthesised
        on_observed = net(observed)
    with inside():
        return on_observed, net(synthesised)
