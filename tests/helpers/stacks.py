"""Small stacks of convolutions for the native engine, and where their chains draw noise."""

from __future__ import annotations

import dataclasses

import torch

from mgebm_fast.ops import counters


@dataclasses.dataclass
class Norm:
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float = 1e-5


@dataclasses.dataclass
class Stage:
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    norm: Norm | None
    activation: str
    slope: float
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    shortcut: int | None = None


def make(size, channels, layers, *, norm=False, activation="leaky_relu", slope=0.2, dilation=1, seed=0):
    """(stages, head) for layers of (channels, kernel, stride, padding)."""
    generator = torch.Generator().manual_seed(seed)
    stages, inputs, rank = [], channels, len(size)
    for outputs, kernel, stride, padding in layers:
        fan = inputs * kernel**rank
        weight = torch.randn((outputs, inputs) + (kernel,) * rank, generator=generator) / fan**0.5
        bias = None if norm else 0.1 * torch.randn(outputs, generator=generator)
        out = tuple((s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in size)
        scale = Norm(0.5 + torch.rand(outputs, generator=generator), 0.1 * torch.randn(outputs, generator=generator))
        each = (stride,) * rank, (padding,) * rank, (dilation,) * rank
        stages.append(Stage(weight, bias, *each, scale if norm else None, activation, slope, tuple(size), out))
        inputs, size = outputs, out
    return stages, torch.randn((inputs, *size), generator=generator)


def images(samples, channels, size, seed=1):
    return torch.rand((samples, channels, *size), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def net(norm=False, size=(8, 8), channels=3):
    return make(size, channels, [(24, 5, 2, 2), (40, 3, 1, 1), (16, 3, 1, 1)], norm=norm)


def place(**base):
    base = {"seed": 7, "first_sample": 0, "step": 0, "stream": 3} | base
    return counters.check("test", 20, 192, torch.device("cpu"), **base)
