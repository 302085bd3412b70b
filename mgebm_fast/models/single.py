"""SingleGrid: one energy net and its chain, by where the chain starts: the model of the baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import noise, ops
from ..sampling.cascade import GridCallback, known_means, of_grid, updated_cells
from ..sampling.langevin import Langevin
from .multigrid import MultiGrid

STARTS = ("colours", "noise", "bank")


class SingleGrid(MultiGrid):
    """A model of one net at one size. A sample's chain starts at

        "colours": the expanded 1×1 image of a draw from the stored colours, as the first grid of a `MultiGrid` does
        "noise":   uniform noise in `value_range`
        "bank":    a draw from the stored images `bank`, the persistent chains of training

    and takes `sample_steps` steps (None: those of `langevin`). `sizes` is (1, size). Other arguments as `MultiGrid`'s.
    """

    kind = "SingleGrid"
    bank: Tensor

    def __init__(
        self, size: int, *, start: str = "noise", sample_steps: int | None = None, channels: int = 3, **arguments: Any
    ) -> None:
        super().__init__((1, size), channels=channels, **arguments)
        if start not in STARTS:
            raise ValueError(f"SingleGrid: start must be one of {', '.join(STARTS)}, got {start!r}")
        if sample_steps is not None and (not isinstance(sample_steps, int) or sample_steps < 1):
            raise ValueError(f"SingleGrid: sample_steps must be a positive int or None, got {sample_steps!r}")
        self.start, self.sample_steps = start, sample_steps
        if start == "bank":
            self._of_any_length = ("colours", "bank")
            self.register_buffer("bank", torch.empty(0, channels, size, size))

    @property
    def sampling(self) -> tuple[Langevin, ...]:
        chain = self.langevin[0]
        return (chain if self.sample_steps is None else dataclasses.replace(chain, steps=self.sample_steps),)

    def noise_start(
        self,
        n: int,
        *,
        seed: int,
        step: int = 0,
        first_sample: int | Tensor = 0,
        purpose: noise.Purpose | int = noise.Purpose.SAMPLING_STATE,
    ) -> Tensor:
        """(n, C, S, S) uniform in `value_range`, a function of (seed, step, sample id, purpose) and the pixel."""
        size, device = self.sizes[-1], self.colours.device
        draw = ops.noise(
            (n, self.channels, size, size), seed=seed, step=step, first_sample=first_sample,
            stream=noise.stream(purpose, 1), distribution="uniform", device=device,
        )  # fmt: skip
        low, high = self.value_range
        return draw.mul_(high - low).add_(low)

    def _start(self, n: int, seed: int, first_sample: int) -> Tensor:
        """Where the chains of n samples start."""
        if self.start == "colours":
            return ops.upsample(self.draw_colours(n, seed=seed, first_sample=first_sample), self.sizes[-1])
        if self.start == "noise":
            return self.noise_start(n, seed=seed, first_sample=first_sample)
        if len(self.bank) == 0:
            raise ValueError("sample: the model must hold a bank of chains, got none: train it first")
        where = noise.stream(noise.Purpose.SAMPLING_BANK, 1)
        index = noise.integers(
            len(self.bank), n, seed=seed, step=0, first_sample=first_sample, stream=where, device=self.bank.device
        )
        return self.bank[index]

    def _sample_group(
        self,
        n: int,
        *,
        seed: int,
        first_sample: int,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        callback: GridCallback | None = None,
        **arguments: Any,
    ) -> list[Tensor]:
        """The samples at every size; where pixels are known, the start holds them, and a 1×1 start is their mean."""
        x = self._start(n, seed, first_sample)
        if mask is not None and known is not None:
            if self.start == "colours":
                x = torch.where(updated_cells(mask, 1), x, known_means(known, mask, [1])[0])
            x = torch.where(mask, x, known)
        callback_here = of_grid(callback, 1)
        return self._grids(
            self._run(x, mask=mask, seed=seed, first_sample=first_sample, callback=callback_here, **arguments)
        )

    def _grids(self, x: Tensor) -> list[Tensor]:
        """A sample at every size: its block means, and itself."""
        return [ops.pyramid(x, [1])[0], x]

    def config(self) -> dict[str, Any]:
        return {**super().config(), "start": self.start, "sample_steps": self.sample_steps}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SingleGrid:
        return cls(
            config["sizes"][-1], start=config["start"], sample_steps=config["sample_steps"], **cls._arguments(config)
        )
