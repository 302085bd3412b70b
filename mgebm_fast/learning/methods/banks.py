"""Persistent chains: which slots of a bank an update goes on with, and which of them start again."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ... import noise, ops


@dataclasses.dataclass(frozen=True)
class Slots:
    """The slots of a bank of `size` chains that the batch of an update holds, a function of (seed, update, place).

    own (`shared` False): place i of update t has slot (t·B + i) mod size. With size a multiple of B, each batch of an
        epoch has B slots of its own, visited once an epoch (Tieleman, ICML 2008, with as many chains as images).
    shared: B different slots, drawn again each update (the replay buffer of Du and Mordatch, NeurIPS 2019).
    """

    size: int
    batch_size: int  # B, of the whole batch
    shared: bool
    restart: float
    seed: int

    @classmethod
    def of(cls, bank_size: int | None, batch_size: int, images: int, restart: float, seed: int) -> Slots:
        """`bank_size` None: own slots, as many as the batches of an epoch of `images` hold."""
        own = -(-images // batch_size) * batch_size
        return cls(own if bank_size is None else bank_size, batch_size, bank_size is not None, restart, seed)

    def at(self, iteration: int, first: int, n: int, attempt: int = 0) -> Tensor:  # (n,) int64
        """The slots of places first … first + n − 1 of the batch of update `iteration`; all of a batch differ.

        attempt: of the run, `noise.retried`.
        """
        if not self.shared:
            return (torch.arange(first, first + n) + iteration * self.batch_size) % self.size
        stream = noise.stream(noise.retried(noise.Purpose.BANK_DRAW, attempt), 1)
        return noise.permutation(self.size, seed=self.seed, step=iteration, stream=stream)[first : first + n]

    def restarted(self, iteration: int, slots: Tensor, attempt: int = 0) -> Tensor:  # (n,) bool
        """Which of the slots start again at update `iteration`, each with probability `restart` of its own."""
        stream = noise.stream(noise.retried(noise.Purpose.BANK_RESTART, attempt), 1)
        draw = ops.noise(
            (len(slots), 1), seed=self.seed, step=iteration, first_sample=slots, stream=stream, distribution="uniform",
            device=slots.device,
        )  # fmt: skip
        return draw[:, 0] <= self.restart
