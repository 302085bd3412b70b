"""What passes through an update: what its chains made, what is learnt from it, and a further optimiser's step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..config.sections import OptimiserConfig


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """What the chains of one part of a batch made.

    Args:
        images: one batch a net, float32.
        ids: the sample ids of the chains: of the first, the others following, or of each.
        latents: z of the images that the chains started from, of a method with a generator.
    """

    images: list[Tensor]
    ids: int | Tensor = 0
    latents: Tensor | None = None


@dataclasses.dataclass
class GridLearned:
    """What one net learns from one part of a batch: a gradient a parameter, and two mean energies, 0-dim."""

    gradients: list[Tensor]
    observed: Tensor
    synthesised: Tensor


@dataclasses.dataclass
class Learned:
    """What all nets learn from one part of a batch, or the mean over parts of it, which ranks take of flat lists."""

    grids: list[GridLearned]
    buffers: list[Tensor]  # those that follow the observed images, averaged over parts
    healthy: Tensor  # 0-dim, 1 where no chain became non-finite

    def flatten(self) -> list[Tensor]:
        """All tensors: gradients by grid, energies by grid, health, buffers."""
        gradients = [gradient for grid in self.grids for gradient in grid.gradients]
        energies = [energy for grid in self.grids for energy in (grid.observed, grid.synthesised)]
        return [*gradients, *energies, self.healthy, *self.buffers]

    @classmethod
    def unflatten(cls, tensors: Iterable[Tensor], gradients: Sequence[int]) -> Learned:
        """The inverse of `flatten` for so many gradients a grid."""
        rest = iter(tensors)
        by_grid = [list(itertools.islice(rest, count)) for count in gradients]
        grids = [GridLearned(found, next(rest), next(rest)) for found in by_grid]
        healthy = next(rest)
        return cls(grids, list(rest), healthy)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A step that an update makes besides those of the nets: of a generator that learns from the chains."""

    optimiser: torch.optim.Optimizer
    config: OptimiserConfig
    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    loss: Tensor  # 0-dim
