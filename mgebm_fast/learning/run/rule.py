"""The interface between a learning method and the loop that runs it."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import noise
from .distributed import Ranks
from .divergence.factors import Factors


class UpdateRule(abc.ABC):
    """A learning method: how the initial state is updated by a batch, what it looks like, and how it is stored."""

    noisy: Sequence[str] = ()  # the nets, as metrics name them, whose observed images have noise
    slowed_alone: Sequence[str] = ()  # those that can have factors of their own
    stiffness_bounds: Mapping[str, float] = {}  # of those whose noise follows their stiffness
    divisible = False  # whether a batch may be learnt from in parts, which is what several ranks do
    knows_images = False  # by their place in the order of the feed, so that no other can stand in for one
    # The loop sets these.
    ranks = Ranks()
    attempt = 0  # how often the run went back after it diverged
    factors: Mapping[str, Factors] = {"": Factors()}  # of nets by their names in metrics; "": of all others
    _made: Sequence[tuple[int, dict[str, float]]] = ()

    @abc.abstractmethod
    def update(self, batch: Tensor, iteration: int, *, detail: bool = False) -> dict[str, float]:
        """One parameter update from observed images (N, C, S, S), uint8 or float in the model's units.

        `batch` is the share of this rank. `iteration` counts from 0; all randomness is a function of it and the seed.
        `detail` asks for measurements that cost something. Raises DivergenceError, with nothing applied, where a
        number is not finite.
        """

    def factors_of(self, net: str = "") -> Factors:
        return self.factors.get(net, self.factors[""])

    def launch(self, batch: Tensor, iteration: int, *, detail: bool = False) -> None:
        """`update`, whose metrics `collect` gives; where a GPU makes it on its own, they are not waited for."""
        self._made = [*self._made, (iteration, self.update(batch, iteration, detail=detail))]

    def collect(self, launched: int, *, wait: bool) -> tuple[list[tuple[int, dict[str, float]]], int]:
        """(iteration, metrics) of updates launched since the last call, of `launched` in the life of the run; and how
        many were made.

        Without `wait`, those alone whose metrics are here. Where one of them could not be applied, neither were those
        after it: fewer were made than launched, and the first of the others says why when it is launched again.
        """
        made, self._made = list(self._made), ()
        return made, launched

    def forget(self) -> None:
        """Drop what was launched and not collected: the state becomes another one."""
        self._made = ()

    def cost(self, updates: int) -> float:
        """What the first `updates` updates cost together, in a unit of its own: of how much time is left."""
        return float(updates)

    def to_come(self, iteration: int) -> str:
        """What an update after `iteration` changes for good, for the user; empty where nothing does."""
        return ""

    def how(self) -> str:
        """How updates are launched, and why not otherwise."""
        return "without a CUDA graph, because this method has none"

    def check(self) -> None:
        """DivergenceError unless all that `write` stores is finite and of a sane size (`models.storage`).

        Called before a state is stored or kept, since an update checks what goes into it and not what comes of it.
        """
        return

    @abc.abstractmethod
    def headline(self, metrics: Mapping[str, float]) -> str:
        """A few words on how training stands, from what `update` returned."""

    @abc.abstractmethod
    def panels(self, observed: Tensor) -> tuple[list[tuple[str, Tensor]], int]:
        """Titled uint8 images of the model, always from the same noise, beside `observed`; and how many to a row."""

    def samples(self, count: int) -> Tensor | None:
        """Samples in the model's units, at most `count`, always from the same noise; None where that costs too much."""
        return None

    @abc.abstractmethod
    def write(self, folder: Path, iteration: int) -> None:
        """The files of a checkpoint after `iteration` updates: all that later updates depend on."""

    @abc.abstractmethod
    def read(self, folder: Path) -> None:
        """Restore what `write` stored, bit for bit."""

    def before_stored(self, iteration: int) -> None:
        """Make what the model's tensors do not hold, noise and layers in use, as it is after `iteration` updates.

        Called before the model is stored, and after a checkpoint was read.
        """
        return

    @abc.abstractmethod
    def snapshot(self) -> Any:
        """What `write` would store, as copies in memory: what a run without a folder goes back to."""

    @abc.abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Restore what `snapshot` gave, bit for bit; it can be restored again."""

    def purpose(self, of: noise.Purpose) -> int:
        """What training draws of this kind are for in the present attempt: no other attempt has their counters."""
        return noise.retried(of, self.attempt)

    @abc.abstractmethod
    def write_model(self, path: Path, iteration: int) -> None:
        """The model to sample from, as one file."""
