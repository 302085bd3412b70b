"""MultiGrid: energy nets of growing sizes, whose chains go from coarse to fine and start at stored colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .. import noise
from ..sampling import graphs
from ..sampling.cascade import GridCallback, cascade
from ..sampling.langevin import Langevin
from . import storage
from .energies import AnyEnergyModel, EnergyModel
from .model import Group, _family


class MultiGrid(EnergyModel):
    """The multi-grid energy-based model (Gao et al., CVPR 2018): one net for each size but the first.

    The chain at sizes[i] starts at the replicated result of the one at sizes[i − 1], the first at a 1×1 image.
    Arguments and state as `EnergyModel`'s.
    """

    kind = storage.FORMAT  # the name of the class in model files

    def cascade(
        self,
        start: Tensor,  # (N, C, 1, 1) float32
        *,
        seed: int | Tensor | None = None,
        first_sample: int | Tensor = 0,
        first_step: int | Sequence[int] = 0,
        purpose: noise.Purpose | int = noise.Purpose.SAMPLING,
        langevin: Langevin | Sequence[Langevin] | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        callback: GridCallback | None = None,
        precision: str = "auto",
        backend: str = "auto",
        graph: graphs.Graph = None,
    ) -> list[Tensor]:
        """The samples at every size, sizes[0] (the start) first; all of `start` as one batch.

        Args:
            start: 1×1 images, in the units of `value_range`.
            seed: None: a fresh one for each call, as in `langevin_sample`.
            first_step: the step counter that the chains begin at, one for all grids or one a net.
            purpose: what the noise is for; a grid's stream is (purpose, index in sizes).
            langevin: dynamics in place of the model's own.
            mask, known: at the finest size, broadcastable to (N, C, S, S). Pixels of `known` where the mask is False
                are held; at coarser sizes a cell is held, at the mean of its block's known pixels, where it has any.
            callback: callback(grid, step, x) after each step, grid the index in sizes, x the live state.
            graph: as in `langevin_sample`; one CUDA graph holds the chains of all grids.

        Raises DivergenceError naming the grid and the step.
        """
        if not isinstance(start, Tensor) or start.dim() != 4 or start.shape[1:] != (self.channels, 1, 1):
            got = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
            raise ValueError(f"cascade: start must have shape (N, {self.channels}, 1, 1), got {got}")
        dynamics = self.langevin if langevin is None else self._per_net(langevin)
        return cascade(
            list(self.nets), self.sizes, dynamics, start, seed=seed, first_sample=first_sample, first_step=first_step,
            purpose=purpose, mask=mask, known=known, callback=callback, precision=precision, backend=backend,
            graph=graph,
        )  # fmt: skip

    def _sample_group(self, group: Group) -> list[Tensor]:
        return self.cascade(
            self.draw_colours(group.n, seed=group.seed, first_sample=group.first_sample), seed=group.seed,
            first_sample=group.first_sample, langevin=self.chains(group.length), mask=group.mask, known=group.known,
            callback=group.callback, **group.engine,
        )  # fmt: skip

    @classmethod
    def from_config(cls: type[AnyEnergyModel], config: Mapping[str, Any]) -> AnyEnergyModel:
        return cls(config["sizes"], **cls._arguments(config))

    @classmethod
    def _loadable(cls) -> list[type[Any]]:
        """Models of one net as well: this is the class that most programs load by."""
        every: Any = EnergyModel  # abstract, which mypy does not pass on
        return [*_family(cls), *(found for found in _family(every) if not issubclass(found, cls))]
