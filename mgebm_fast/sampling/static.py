"""Chains and cascades at fixed addresses: what a CUDA graph captures, as plain code between buffers of its own."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..gradient.resident import ResidentPlan
from ..ops import counters
from ..ops.conv_chain.resident import MAX_NETS
from ..ops.edge_step import NO_BAD_STEP
from ..ops.state import dense_copy
from ..ops.update import Update
from .chain import Chain


class Static(Protocol):
    """What a graph captures: buffers, and the code that runs between them."""

    healthy: Tensor  # 0-dim bool, whether the last run was

    def refresh(self) -> None: ...
    def load(self, *arguments: Any) -> None: ...
    def run_once(self) -> None: ...
    def results(self) -> list[Tensor]: ...


class StaticChain:
    """A chain of `steps` steps on tensors like x, between fixed addresses. It refers to the energy weakly."""

    def __init__(self, chain: Chain, x: Tensor, steps: int) -> None:
        self.steps = steps
        with torch.inference_mode(False), torch.no_grad():
            self.x = dense_copy(x)  # the start, then the state
            self._counters = torch.zeros(3, dtype=torch.int64, device=x.device)
            ids = chain.place.sample_tensor
            self._ids = self._counters[1] if ids is None or ids.dim() == 0 else ids.clone()
            self._mask = None if chain.mask is None else chain.mask.clone()
            self.healthy = torch.ones((), dtype=torch.bool, device=x.device)
            self._numbers = chain.numbers.in_memory(x.device)
        place = dataclasses.replace(
            chain.place, seed=0, seed_tensor=self._counters[0], first_sample=0, sample_tensor=self._ids, step=0,
            step_tensor=self._counters[2],
        )  # fmt: skip
        self.plan, self._energy = chain.plan, weakref.ref(chain.energy)
        self._chain = dataclasses.replace(chain, energy=_gone, mask=self._mask, place=place, numbers=self._numbers)

    def refresh(self) -> None:
        """The energy's present weights, at the addresses of the old ones."""
        self.plan.refresh()

    def load(self, x: Tensor | None, mask: Tensor | None, place: counters.Counters, numbers: Update) -> None:
        """The start, the mask, the counters and the numbers of the next run. None of x and mask: they are written from
        elsewhere."""
        if x is not None:
            self.x.copy_(x)
        if mask is not None and self._mask is not None:
            self._mask.copy_(mask)
        sources = (
            (self._counters[0], place.seed, place.seed_tensor),
            (self._ids, place.first_sample, place.sample_tensor),
            (self._counters[2], place.step, place.step_tensor),
        )
        for buffer, number, tensor in sources:
            buffer.fill_(number) if tensor is None else buffer.copy_(tensor)
        self._numbers.load(numbers)

    def enter(self, x: Tensor, mask: Tensor | None) -> None:
        """The start and the mask, as part of what is captured."""
        self.x.copy_(x)
        if mask is not None and self._mask is not None:
            self._mask.copy_(mask)

    @property
    def numbers(self) -> int:
        """How many of them `read_from` takes."""
        assert self._numbers.table is not None
        return self._numbers.table.numel()

    def read_from(self, seed: Tensor, step: Tensor, numbers: Tensor) -> None:
        """Read the seed and the first step (int64, 0-dim), and the numbers of the steps (float32, as they lie in
        `Update.table`), where the caller writes them, in place of buffers of its own."""
        assert self._numbers.table is not None
        self._numbers = dataclasses.replace(self._numbers, table=numbers.view(self._numbers.table.shape))
        place = dataclasses.replace(self._chain.place, seed_tensor=seed, step_tensor=step)
        self._chain = dataclasses.replace(self._chain, place=place, numbers=self._numbers)

    def read_ids_from(self, ids: Tensor) -> None:
        """Read the sample ids, (N,) int64, where the caller writes them."""
        self._ids = ids
        self._chain = dataclasses.replace(self._chain, place=dataclasses.replace(self._chain.place, sample_tensor=ids))

    def run_once(self) -> None:
        energy = self._energy()
        chain = dataclasses.replace(self._chain, energy=_gone if energy is None else energy)
        if chain.bad_step is not None:
            chain.bad_step.fill_(NO_BAD_STEP)
        chain.advance_(self.x, 0, self.steps)
        self.healthy.copy_(chain.healthy(self.x))

    @property
    def is_resident(self) -> bool:
        """Whether one launch makes all steps, and may make those of other such chains too."""
        chain = self._chain
        return isinstance(self.plan, ResidentPlan) and chain.backend in self.plan.backends and chain.mask is None

    @staticmethod
    def run_together(chains: Sequence[StaticChain], start: Tensor) -> None:
        """Resident chains of a cascade in one launch, coarse to fine from `start`, which is of a smaller size."""
        first, *finer = [plan for one in chains if isinstance(plan := one.plan, ResidentPlan)]
        for plan in (first, *finer):
            plan.bad_step.fill_(NO_BAD_STEP)
        first.share_launch_(
            finer, start, [one.x for one in chains], [one._chain.place_at(0) for one in chains],
            [one.steps for one in chains], [one._numbers.steps(0, one.steps) for one in chains],
        )  # fmt: skip
        for one in chains:
            one.healthy.copy_(one._chain.healthy(one.x))

    def results(self) -> list[Tensor]:
        return [self.x.clone()]


def _gone(x: Tensor) -> Tensor:
    raise ReferenceError("the energy of a captured chain was deleted")


class StaticChains(Protocol):
    """The chains of a training update, as a graph of the whole update holds them: a `StaticCascade` is one."""

    healthy: Tensor  # 0-dim bool, whether all chains of the last run were

    @property
    def chains(self) -> Sequence[StaticChain]: ...
    @property
    def images(self) -> list[Tensor]: ...  # of the last run, one batch a net
    def refresh(self) -> None: ...
    def enter(self, start: Tensor) -> None: ...
    def run_once(self) -> None: ...
    def gradient(self, net: int, x: Tensor) -> Tensor: ...


class StaticCascade:
    """All chains of a cascade, coarse to fine, and what lies between them."""

    def __init__(
        self,
        chains: Sequence[StaticChain],
        start: Tensor,
        held: tuple[Tensor, Tensor] | None,
        walk: Callable[..., list[Tensor]],  # walk(start, held, advance, done=…): `cascade.walk` of the sizes
        *,
        replicates: bool,  # whether a chain starts at the coarser result's replicated pixels, as in a shared launch
    ) -> None:
        self.chains, self._walk = chains, walk
        alike = [chain.is_resident and held is None and replicates for chain in chains[:MAX_NETS]]
        self._together = (*alike, False).index(False)  # how many chains, from the coarsest on, share a launch
        with torch.inference_mode(False), torch.no_grad():
            self._start, self._first = start.detach().clone(), start.detach().clone()
            self._held = None if held is None else (held[0].clone(), held[1].clone())
            self.healthy = torch.ones((), dtype=torch.bool, device=start.device)

    def refresh(self) -> None:
        for chain in self.chains:
            chain.refresh()

    @property
    def images(self) -> list[Tensor]:
        """What each chain made in the last run."""
        return [chain.x for chain in self.chains]

    def gradient(self, net: int, x: Tensor) -> Tensor:
        """∇E(x) of a net, by its weights at the last `refresh`."""
        return self.chains[net].plan.gradient(x)

    def load(
        self,
        start: Tensor,
        held: tuple[Tensor, Tensor] | None,
        places: Sequence[counters.Counters],
        numbers: Sequence[Update],
    ) -> None:
        self._start.copy_(start)
        if held is not None and self._held is not None:
            self._held[0].copy_(held[0])
            self._held[1].copy_(held[1])
        for chain, place, own in zip(self.chains, places, numbers, strict=True):
            chain.load(None, None, place, own)

    def enter(self, start: Tensor) -> None:
        """The start of the coarsest chain, and held pixels that are its replicated values, as part of what is
        captured."""
        self._start.copy_(start)
        if self._held is not None:
            known, mask = self._held
            known.copy_(torch.where(mask, 0.0, start.expand_as(known)))

    def run_once(self) -> None:
        def advance(grid: int, x: Tensor, cells: Tensor | None) -> Tensor:
            chain = self.chains[grid - 1]
            chain.enter(x, cells)
            chain.run_once()
            return chain.x

        done: list[Tensor] = []
        if self._together > 1:
            StaticChain.run_together(self.chains[: self._together], self._start)
            done = [self._start, *self.images[: self._together]]
        self._first.copy_(self._walk(self._start, self._held, advance, done=done)[0])
        self.healthy.copy_(torch.stack([chain.healthy for chain in self.chains]).all())

    def results(self) -> list[Tensor]:
        return [self._first.clone(), *(x.clone() for x in self.images)]
