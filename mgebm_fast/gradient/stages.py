"""What a reading of an energy gives: the stages of a stack of convolutions, and the gradient in its top map."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """y = weight · (z − mean) / √(var + eps) + bias, mean and biased variance of a channel over (N, *spatial)."""

    weight: Tensor  # (out,)
    bias: Tensor  # (out,)
    eps: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """One convolution with what follows it. Tensors are float32 and may share memory with the net's parameters."""

    name: str  # module path, for messages
    weight: Tensor  # (out, in, *kernel), as used: divided by its spectral norm, running statistics folded in
    bias: Tensor | None  # (out,); None where batch statistics, which subtract it, follow
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    norm: BatchNorm | None
    activation: str  # none | relu | leaky_relu | silu | elu
    slope: float  # of leaky_relu; 0 for relu, 1 for none
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    # Of a shortcut: the index of the stage whose z it reads. It adds to the z of the stage after it, and the stages
    # around it are one behind the other. Only the resident chain takes one.
    shortcut: int | None = None


@dataclasses.dataclass(frozen=True)
class Stack:
    """At least one stage, and the gradient of the energy in the top map."""

    ndim: int
    channels: int  # of x
    size: tuple[int, ...]  # of x
    stages: tuple[Stage, ...]
    head: Tensor  # (C_top, *top size) = dE/d(top map), the same for every sample

    @property
    def has_shortcuts(self) -> bool:
        return any(stage.shortcut is not None for stage in self.stages)


class Unreadable(Exception):
    """The reason why an energy is no stack."""
