"""The baselines: the Langevin loops and the training step that one writes in plain PyTorch.

A loop takes (energy, x, dynamics) and returns x after `dynamics.steps` steps; `energy` is what `plain_net` builds. The
loops draw their noise with `torch.randn_like` and know nothing of this package's ops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from ..learning import TrainConfig, build_model
from ..learning.config.keys import pick
from ..nets import EnergyNet
from ..ops.update import Update
from ..sampling import Langevin

Loop = Callable[[nn.Module, Tensor, Langevin], Tensor]


def plain_net(net: EnergyNet) -> nn.Sequential:
    """The same energy, (N, C, S, S) -> (N,), with the same weights, as a stack of PyTorch's own layers."""
    activations: dict[str, Callable[[], nn.Module]] = {
        "leaky_relu": lambda: nn.LeakyReLU(net.negative_slope), "relu": nn.ReLU, "silu": nn.SiLU, "elu": nn.ELU,
        "none": nn.Identity,
    }  # fmt: skip
    layers: list[nn.Module] = []
    for layer in net.convolutions:
        outputs, inputs = layer.weight.shape[:2]
        conv = nn.Conv2d(inputs, outputs, layer.kernel, layer.stride, layer.padding, bias=layer.bias is not None)
        conv.weight.data.copy_(layer.effective_weight())
        if layer.bias is not None and conv.bias is not None:
            conv.bias.data.copy_(layer.bias)
        layers.append(conv)
        if layer.norm is not None:
            norm = nn.BatchNorm2d(outputs, track_running_stats=False)
            norm.weight.data.copy_(layer.norm.weight)
            norm.bias.data.copy_(layer.norm.bias)
            layers.append(norm)
        layers.append(activations[net.activation]())
    if net.head is None or net.head.bias is None:
        raise ValueError("plain_net: net must have a linear head, got head='sum'")
    head = nn.Linear(net.head.weight.shape[1], 1)
    head.weight.data.copy_(-net.head.effective_weight())
    head.bias.data.copy_(-net.head.bias)
    return nn.Sequential(*layers, nn.Flatten(), head, nn.Flatten(0)).to(net.head.weight.device)


def langevin_update(x: Tensor, gradient: Tensor, numbers: Update) -> Tensor:
    """One step as a line of torch: x ← clamp(x − drift·(clip(∇E, ±c) + (x − m)/σ²) + noise_std·ε)."""
    if numbers.grad_clamp < math.inf:
        gradient = gradient.clamp(-numbers.grad_clamp, numbers.grad_clamp)
    if numbers.inverse_variance:
        gradient = gradient + (x - numbers.reference_mean) * numbers.inverse_variance
    x = x - numbers.drift * gradient
    if numbers.noise_std:
        x = x + numbers.noise_std * torch.randn_like(x)
    return x.clamp(numbers.low, numbers.high) if numbers.low > -math.inf else x


def numbers_of(dynamics: Langevin) -> list[Update]:
    """The numbers of each of the K steps."""
    found = dynamics.by_step()
    return found if len(found) == dynamics.steps else found * dynamics.steps


def seed_loop(energy: nn.Module, x: Tensor, dynamics: Langevin) -> Tensor:
    """`backward()` with live weights and `retain_graph=True`: every step computes unused weight gradients."""
    for numbers in numbers_of(dynamics):
        x = x.detach().requires_grad_()
        energy(x).sum().backward(retain_graph=True)
        assert x.grad is not None
        x = langevin_update(x.detach(), x.grad, numbers)
    energy.zero_grad()
    return x


def plain_loop(energy: nn.Module, x: Tensor, dynamics: Langevin) -> Tensor:
    """`autograd.grad` with frozen weights, in x's own precision: the loop written with care."""
    energy.requires_grad_(False)
    for numbers in numbers_of(dynamics):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
        x = langevin_update(x.detach(), gradient, numbers)
    energy.requires_grad_(True)
    return x


def bf16_cast_loop(energy: nn.Module, x: Tensor, dynamics: Langevin) -> Tensor:
    """`plain_loop` with the net and its input cast to bfloat16; the state and the update stay float32."""
    low = copy.deepcopy(energy).to(torch.bfloat16).requires_grad_(False)
    for numbers in numbers_of(dynamics):
        leaf = x.to(torch.bfloat16).requires_grad_()
        (gradient,) = torch.autograd.grad(low(leaf).float().sum(), leaf)
        x = langevin_update(x, gradient.float(), numbers)
    return x


class CompiledLoop:
    """The whole step as one function under `torch.compile`, channels-last; on a GPU max-autotune, and all K steps in
    one CUDA graph, as this package's own chains are: compile's graph a step would copy the state out at every one.

    Compiled once an architecture: weights are copied in before each chain, and the numbers of the step are tensors, so
    that neither training nor a chain with other numbers compiles again.
    """

    compiled: ClassVar[dict[tuple[str, torch.dtype, torch.device], tuple[nn.Module, Callable[..., Tensor]]]] = {}

    # graph, state, numbers and result of a chain: by what was compiled, the shape and the number of steps
    graphs: ClassVar[dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]]] = {}

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @classmethod
    def forget(cls) -> None:
        """Drop what was compiled, and free the memory of its graphs."""
        cls.graphs.clear()
        if cls.compiled:
            cls.compiled.clear()
            torch._dynamo.reset()

    def __call__(self, energy: nn.Module, x: Tensor, dynamics: Langevin) -> Tensor:
        key = str(energy), self.dtype, x.device
        if key not in self.compiled:
            self.compiled[key] = self._compile(energy, x.device)
        net, step = self.compiled[key]
        with torch.no_grad():
            torch._foreach_copy_(list(net.parameters()), list(energy.parameters()))
            numbers = torch.tensor([
                [n.drift, n.noise_std, n.inverse_variance, n.reference_mean, n.grad_clamp, n.low, n.high]
                for n in numbers_of(dynamics)
            ]).to(x.device)  # fmt: skip
            x = x.contiguous(memory_format=torch.channels_last)
            if x.device.type == "cuda":
                return self._replayed(key, step, x, numbers)
            for row in numbers:
                x = step(x, row)
        return x

    def _replayed(self, key: Any, step: Callable[..., Tensor], x: Tensor, numbers: Tensor) -> Tensor:
        """The chain from its CUDA graph, captured at its first call."""
        key = *key, tuple(x.shape), len(numbers)
        if key not in self.graphs:
            state, values = x.clone(), numbers.clone()
            side = torch.cuda.Stream(x.device)
            side.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles, tunes and warms libraries up, which is not allowed during a capture
                    step(state, values[0])
            torch.cuda.current_stream(x.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                result = state
                for row in values:
                    result = step(result, row)
            self.graphs[key] = graph, state, values, result
        graph, state, values, result = self.graphs[key]
        state.copy_(x)
        values.copy_(numbers)
        graph.replay()
        return result.clone()

    def _compile(self, energy: nn.Module, device: torch.device) -> tuple[nn.Module, Callable[..., Tensor]]:
        # Past its limit torch.compile runs eagerly without an error: a figure would then not be what it says.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        net = copy.deepcopy(energy).to(self.dtype).requires_grad_(False)
        for parameter in net.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

        def total(y: Tensor) -> Tensor:
            return net(y.to(self.dtype)).float().sum()

        def step(x: Tensor, numbers: Tensor) -> Tensor:
            drift, noise_std, inverse_variance, mean, clip, low, high = numbers.unbind()
            gradient = torch.func.grad(total)(x).clamp(-clip, clip) + (x - mean) * inverse_variance
            return (x - drift * gradient + noise_std * torch.randn_like(x)).clamp(low, high)

        mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
        return net, torch.compile(step, mode=mode, dynamic=False)


class PlainTrainer:
    """Multi-grid training in plain PyTorch, one net and one optimiser a size: what one writes without this package.

    It reads of a `TrainConfig` what the presets `digits` and `multigrid-released` use: the dynamics, data noise with
    its clamp, energy_l2, noise_anneal, Adam with a constant or cosine rate, and averaged weights.
    """

    def __init__(
        self, config: TrainConfig, loop: Loop = plain_loop, *, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.config, self.loop, self.device, self.dtype = config, loop, torch.device(device), dtype
        model = build_model(config)
        self.nets = [plain_net(net).to(device, dtype) for net in model.nets if isinstance(net, EnergyNet)]
        self.upsampling = getattr(model, "upsampling", "nearest")
        options = config.optimiser
        if options.name not in ("adam", "sgd") or options.schedule not in ("constant", "cosine"):
            raise ValueError("PlainTrainer: config.optimiser must be adam or sgd, constant or cosine")
        adam, rates = options.name == "adam", [pick(options.lr, grid) for grid in range(len(self.nets))]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Adam(net.parameters(), lr=rate, betas=options.betas)
            if adam
            else torch.optim.SGD(net.parameters(), lr=rate, momentum=options.momentum)
            for net, rate in zip(self.nets, rates, strict=True)
        ]
        self.rates = [
            torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps - first)
            if options.schedule == "cosine"
            else torch.optim.lr_scheduler.ConstantLR(optimiser, 1.0)
            for optimiser, first in zip(self.optimisers, config.first_updates(), strict=True)
        ]
        self.averages = copy.deepcopy(self.nets) if config.stabilise.ema else []
        self.iteration = 0

    def step(self, images: Tensor) -> None:  # (N, C, S, S) uint8
        """One update of every net from one batch."""
        config, stabilise = self.config, self.config.stabilise
        low, high = config.value_range
        images = images.to(self.device, self.dtype) * ((high - low) / 255) + low
        factors = config.noise_factors(self.iteration)
        x = adaptive_avg_pool2d(images, config.sizes[0])
        learning = [net for net, first in zip(self.nets, config.first_updates()) if first <= self.iteration]
        for grid, (net, size) in enumerate(zip(learning, config.sizes[1:])):
            observed = adaptive_avg_pool2d(images, size)
            if noise := pick(stabilise.data_noise, grid) * factors[grid]:
                observed = observed + noise * torch.randn_like(observed)
                if stabilise.data_noise_clamp:
                    observed = observed.clamp(low, high)
            x = self._start(x, size)
            x = self.loop(net, x, config.dynamics(factors)[grid]).detach()
            real, chain = net(observed), net(x)
            loss = real.mean() - chain.mean()
            if stabilise.energy_l2:
                loss = loss + stabilise.energy_l2 * (real.square().mean() + chain.square().mean())
            self.optimisers[grid].zero_grad()
            loss.backward()
            self.optimisers[grid].step()
            self.rates[grid].step()
        self._average()
        self.iteration += 1

    def _start(self, coarse: Tensor, size: int) -> Tensor:
        """Where a grid's chain starts: the coarser result, replicated or interpolated, with its block means."""
        if self.upsampling == "nearest":
            return interpolate(coarse, size=(size, size), mode="nearest")
        smooth = interpolate(coarse, size=(size, size), mode="bilinear")
        lacking = coarse - adaptive_avg_pool2d(smooth, coarse.shape[-1])
        return smooth + interpolate(lacking, size=(size, size), mode="nearest")

    @torch.no_grad()
    def _average(self) -> None:
        for average, net in zip(self.averages, self.nets, strict=False):
            for mean, value in zip(average.parameters(), net.parameters(), strict=True):
                mean.lerp_(value, 1 - self.config.stabilise.ema)
