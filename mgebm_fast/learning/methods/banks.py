"""Persistent chains: which slots of a bank an update goes on with, and which of them start again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ... import noise, ops
from ...gradient import GradientPlan
from ...sampling.static import StaticChain


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


Advance = Callable[[int, bool, Tensor], Tensor]  # (grid, whether its chains go on, their start) -> their end


class BankCascade:
    """The chains of an update of which some go on from a bank, at fixed addresses.

    Args:
        by_part: the chain of (grid, whether it goes on), coarse to fine.
        plans: of each net, for `gradient`.
        start: (N, C, 1, 1), where the coarsest new chains start.
        ids: the slots of the batch, which the caller writes before a run.
        walk: walk(start, ids, advance), the batches of all grids.
    """

    def __init__(
        self,
        by_part: Mapping[tuple[int, bool], StaticChain],
        plans: Sequence[GradientPlan],
        start: Tensor,
        ids: Tensor,
        walk: Callable[[Tensor, Tensor, Advance], list[Tensor]],
    ) -> None:
        self.chains, self._by_part = list(by_part.values()), by_part
        self._plans, self._start, self._ids, self._walk = plans, start.clone(), ids, walk
        self.images: list[Tensor] = []
        self._fresh: set[int] = set()  # nets whose plans have the weights of the last refresh
        self.healthy = torch.ones((), dtype=torch.bool, device=start.device)
        for (_, goes_on), chain in by_part.items():
            chain.read_ids_from(ids[-len(chain.x) :] if goes_on else ids[: len(chain.x)])

    def refresh(self) -> None:
        self._fresh.clear()
        for chain in self.chains:
            chain.refresh()

    def enter(self, start: Tensor) -> None:
        self._start.copy_(start)

    def run_once(self) -> None:
        def advance(grid: int, goes_on: bool, x: Tensor) -> Tensor:
            chain = self._by_part[grid, goes_on]
            chain.enter(x, None)
            chain.run_once()
            return chain.x

        self.images = self._walk(self._start, self._ids, advance)
        self.healthy.copy_(torch.stack([chain.healthy for chain in self.chains]).all())

    def gradient(self, net: int, x: Tensor) -> Tensor:
        """∇E(x) of a net, by its weights at the last `refresh`."""
        if net not in self._fresh:
            self._plans[net].refresh()
            self._fresh.add(net)
        return self._plans[net].gradient(x)
