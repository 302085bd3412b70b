"""The interface of a gradient plan: ∇E, the Langevin steps that some plans make themselves, and `explain()`."""

from __future__ import annotations

import abc
import dataclasses
import weakref
from typing import Any, NoReturn

from torch import Tensor, nn

from ..ops.counters import Counters
from ..ops.update import Update


@dataclasses.dataclass(frozen=True)
class PlanReport:
    """Which plan computes ∇E, how, and why no faster one does."""

    plan: str  # native | graph | resident | fused | dense | conv | compiled | autograd
    precision: str  # of the operands: fp32, bf16, fp16; under autograd what the energy itself computes in
    how: str = ""
    steps: str = ""  # how the plan makes Langevin steps itself; empty where it gives the gradient alone
    why_not_faster: tuple[str, ...] = ()

    def __str__(self) -> str:
        detail = f" ({self.how})" if self.how else ""
        steps = f", {self.steps}" if self.steps else ""
        reasons = "".join(f", because {why}" for why in self.why_not_faster)
        return f"{self.plan}, {self.precision}{detail}{steps}{reasons}"


class GradientPlan(abc.ABC):
    """∇E for one energy and one shape of x, with the weights that it had when the plan was made or last refreshed."""

    precision: str  # "fp32", "bf16" or "fp16"
    backends: tuple[str, ...] = ()  # backends of the update that `advance_` can make steps with
    bad_step: Tensor | None = None  # for plans that record it: the first step that overflowed; 0-dim int64, on device

    @property
    def _energy(self) -> Any:
        """The energy, to which a plan refers weakly where it is a module: who runs a plan holds its energy."""
        energy = self.__energy()
        if energy is None:
            raise ReferenceError("the energy of this plan was deleted")
        return energy

    @_energy.setter
    def _energy(self, energy: Any) -> None:
        self.__energy = weakref.ref(energy) if isinstance(energy, nn.Module) else lambda: energy

    @abc.abstractmethod
    def gradient(self, x: Tensor) -> Tensor:
        """∇E(x) of each sample, the shape of x; x is left untouched and needs no `requires_grad`."""

    def takes(self, numbers: Update) -> bool:
        """Whether `advance_` makes steps with these numbers, which may vary."""
        return True

    def advance_(self, x: Tensor, place: Counters, steps: int, numbers: Update, mask: Tensor | None) -> None:
        """`steps` Langevin steps on x in place, `place` with the counters of the first; for `backends` alone."""
        raise NotImplementedError

    @abc.abstractmethod
    def refresh(self) -> None:
        """Take the energy's present weights; BackendError where it is no longer the net that the plan was made for."""

    @abc.abstractmethod
    def explain(self) -> PlanReport:
        """The plan's name, its precision, and why it was chosen."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} points into memory of its own: it cannot be copied or stored")
