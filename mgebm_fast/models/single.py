"""OneNet: one energy net and its chain. SingleGrid: the model of the baselines, by where the chain starts."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import checks, noise, ops
from ..sampling.cascade import known_means, of_grid, updated_cells
from ..sampling.langevin import Langevin
from .energies import EnergyModel
from .model import Group

AnyOneNet = TypeVar("AnyOneNet", bound="OneNet")

STARTS = ("colours", "noise", "bank")
_TRAINING_GRID = 2  # first noise-stream index of training's corrected chains (2 + attempt); those of samples use 1


class OneNet(EnergyModel):
    """A model of one net at one size. A class of them says where the chain of a sample starts (`_start`).

    Args:
        size: of the images, one side. `sizes` is (1, size).
        sample_steps: of a sample's chain; None: those of `langevin`.
        Other arguments as `EnergyModel`'s.
    """

    _OWN: tuple[str, ...] = ()  # arguments besides `EnergyModel`'s that a file holds
    bank: Tensor

    def __init__(self, size: int, *, sample_steps: int | None = None, channels: int = 3, **arguments: Any) -> None:
        super().__init__((1, size), channels=channels, **arguments)
        self.sample_steps = checks.positive_int(sample_steps, "sample_steps", self.kind, none=True)

    @abc.abstractmethod
    def _start(self, group: Group) -> Tensor:
        """Where the chains of a group start; known pixels are put there by the caller."""

    def run(self, x: Tensor, chain: Langevin, *, attempt: int | None = None, **arguments: Any) -> Tensor:
        """Where `chain` on the model's energy comes to from x.

        Args:
            attempt: of the training run that the chain is of, `noise.retried`; None: it makes samples.
            arguments: seed, first_sample, first_step, mask, callback, precision, backend, graph as in
                `langevin_sample`; the last two do not concern a corrected chain.
        """
        (energy,), law = self.active_nets, self.law(chain)
        if not isinstance(law, Langevin):
            arguments = {name: value for name, value in arguments.items() if name not in ("backend", "graph")}
            return law(energy, x, grid=1 if attempt is None else _TRAINING_GRID + attempt, **arguments).x
        purpose = noise.Purpose.SAMPLING if attempt is None else noise.retried(noise.Purpose.TRAINING_CHAIN, attempt)
        where = f"{'sample' if attempt is None else 'training'}: grid 1 (size {self.sizes[-1]})"
        return law(energy, x, stream=noise.stream(purpose, 1), where=where, **arguments)

    def _sample_group(self, group: Group) -> list[Tensor]:
        x = self._start(group)
        if group.mask is not None and group.known is not None:
            x = torch.where(group.mask, x, group.known)
        return self.grids(
            self.run(
                x, self.chains(group.length)[0], seed=group.seed, first_sample=group.first_sample, mask=group.mask,
                callback=of_grid(group.callback, 1), **group.engine,
            )
        )  # fmt: skip

    def zeros(self, n: int) -> Tensor:  # (n, C, S, S)
        """Images whose every pixel is the mean m of the reference: the zero images of papers, which subtract it."""
        mean = self.langevin[0].reference_mean
        return torch.full(
            (n, *self.sample_shape(self.sizes[-1])), mean, dtype=torch.float32, device=self.colours.device
        )

    @classmethod
    def from_config(cls: type[AnyOneNet], config: Mapping[str, Any]) -> AnyOneNet:
        own = {name: config[name] for name in cls._OWN}
        return cls(config["sizes"][-1], **own, **cls._arguments(config))


class SingleGrid(OneNet):
    """One net at one size. A sample's chain starts at

        "colours": the expanded 1×1 image of a draw from the stored colours, as the first grid of a `MultiGrid` does
        "noise":   uniform noise in `value_range`
        "bank":    a draw from the stored images `bank`, the persistent chains of training

    Other arguments as `OneNet`'s.
    """

    kind = "SingleGrid"
    _OWN = ("start", "sample_steps")

    def __init__(self, size: int, *, start: str = "noise", **arguments: Any) -> None:
        super().__init__(size, **arguments)
        checks.one_of(start, STARTS, "start", "SingleGrid")
        self.start = start
        if start == "bank":
            self._register_rows("bank", *self.sample_shape(size))

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
        draw = ops.noise(
            (n, *self.sample_shape(self.sizes[-1])), seed=seed, step=step, first_sample=first_sample,
            stream=noise.stream(purpose, 1), distribution="uniform", device=self.colours.device,
        )  # fmt: skip
        low, high = self.value_range
        return draw.mul_(high - low).add_(low)

    def _start(self, group: Group) -> Tensor:
        n, place = group.n, {"seed": group.seed, "first_sample": group.first_sample}
        if self.start == "noise":
            return self.noise_start(n, **place)
        if self.start == "colours":
            x = ops.upsample(self.draw_colours(n, **place), self.sizes[-1])
            if group.mask is not None and group.known is not None:  # the start of an image is what is known of its mean
                x = torch.where(updated_cells(group.mask, 1), x, known_means(group.known, group.mask, [1])[0])
            return x
        if len(self.bank) == 0:
            raise ValueError("sample: the model must hold a bank of chains, got none: train it first")
        stream = noise.stream(noise.Purpose.SAMPLING_BANK, 1)
        return self.bank[noise.integers(len(self.bank), n, step=0, stream=stream, device=self.bank.device, **place)]

    def config(self) -> dict[str, Any]:
        return {**super().config(), "start": self.start, "sample_steps": self.sample_steps}
