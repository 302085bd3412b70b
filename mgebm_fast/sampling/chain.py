"""One chain, checked and resolved: a step is one gradient and one update in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import BackendError
from ..gradient import GradientPlan, frozen_parameters, plan
from ..gradient.cuda import note_bad_steps_
from ..gradient.plan import Energy
from ..ops import counters
from ..ops.edge_step import NO_BAD_STEP
from ..ops.langevin_step import check_grad, launcher
from ..ops.update import Update

Callback = Callable[[int, Tensor], Any]
Ids: TypeAlias = "int | Tensor | Sequence[int]"  # the id of a batch's first sample, or N ids


@dataclasses.dataclass(frozen=True)
class Chain:
    """What a chain needs beside its state. The state is the caller's: `advance_` writes it in place."""

    energy: Energy
    numbers: Update
    plan: GradientPlan
    precision: str
    mask: Tensor | None
    place: counters.Counters
    backend: str
    where: str
    # Of a plan that may overflow: the first step whose gradient did, else NO_BAD_STEP; 0-dim int64 on the device.
    bad_step: Tensor | None = None
    together: int = 1  # steps that are made between two looks at the state
    compile: bool | str = False

    def place_at(self, k: int) -> counters.Counters:
        """The noise counters of the chain's k-th step."""
        return self.place.steps(k, k + 1)[0]

    def advance_(self, x: Tensor, start: int, stop: int) -> None:
        """Steps start … stop − 1 of the chain, on x in place."""
        numbers = self.numbers.steps(start, stop)
        if self.backend in self.plan.backends and self.plan.takes(numbers):
            self.plan.advance_(x, self.place_at(start), stop - start, numbers, self.mask)
            return
        # The ∞-norm of each gradient keeps inf and NaN; a clamp on x would hide them.
        peaks = None if self.bad_step is None else x.new_empty(stop - start)
        places, launch = self.place.steps(start, stop), launcher(x, self.mask, self.backend)
        with frozen_parameters(self.energy):
            gradient_of, where = self.plan.gradient, self.where
            for k, place in enumerate(places):
                gradient = check_grad(gradient_of(x), x, where)
                if peaks is not None:
                    torch.linalg.vector_norm(gradient, float("inf"), out=peaks[k])
                launch(gradient, numbers.steps(k, k + 1), place)
        if peaks is not None and self.bad_step is not None:
            note_bad_steps_(self.bad_step, peaks, places)

    def step_number(self, k: int) -> int:
        """The noise counter of the k-th step, as callbacks and trajectories name it."""
        base = self.place.step if self.place.step_tensor is None else int(self.place.step_tensor)
        return base + k

    def healthy(self, x: Tensor) -> Tensor:
        """Whether x and every gradient on the way to it are finite, 0-dim bool on x's device."""
        fine = torch.isfinite(x).all()
        return fine if self.bad_step is None else fine & (self.bad_step == NO_BAD_STEP)

    def in_fp32(self, x: Tensor) -> Chain:
        """The same chain with a float32 gradient."""
        return dataclasses.replace(self, precision="fp32").planned(x)

    def planned(self, x: Tensor) -> Chain:
        """The same chain with a new plan for tensors like x, that has the energy's present weights."""
        made = plan(self.energy, x, self.precision, self.where, steps=self.together, compile=self.compile)
        return dataclasses.replace(self, plan=made, bad_step=bad_step_cell(made, x.device))

    def refreshed(self, x: Tensor) -> Chain:
        """This chain with the energy's present weights, which a callback may have changed; planned again where the net
        itself is another one."""
        try:
            self.plan.refresh()
        except BackendError:
            return self.planned(x)
        return self


def bad_step_cell(plan: GradientPlan, device: torch.device) -> Tensor | None:
    """Where a plan's overflow is noted: the plan's own cell, a new one for any float16 plan, None for the others."""
    if plan.bad_step is None and plan.precision == "fp16":
        return torch.full((), NO_BAD_STEP, device=device)
    return plan.bad_step
