"""One chain: everything is checked and resolved once, then a step is one gradient and one update in place."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import ops
from ..errors import BackendError, DivergenceError
from ..gradient import GradientPlan, frozen_parameters, plan
from ..gradient.cuda import note_bad_steps_
from ..gradient.plan import Energy
from ..ops import counters
from ..ops.edge_step import NO_BAD_STEP
from ..ops.langevin_step import check_grad, launch
from ..ops.state import check_mask, dense_copy, why_not_plain
from ..ops.update import Update
from . import arguments, graphs, memory
from .static import StaticChain

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
    graph: graphs.Slot | str = ""  # where a graph of it is, or why there is none

    def place_at(self, k: int) -> counters.Counters:
        """The noise counters of the chain's k-th step."""
        return self.place.steps(k, k + 1)[0]

    def advance_(self, x: Tensor, start: int, stop: int) -> None:
        """Steps start … stop − 1 of the chain, on x in place."""
        if self.backend in self.plan.backends:
            self.plan.advance_(x, self.place_at(start), stop - start, self.numbers, self.mask)
            return
        # The ∞-norm of each gradient keeps inf and NaN; a clamp on x would hide them.
        peaks = None if self.bad_step is None else x.new_empty(stop - start)
        places = self.place.steps(start, stop)
        with frozen_parameters(self.energy):
            for k, place in enumerate(places):
                gradient = check_grad(self.plan.gradient(x), x, self.where)
                if peaks is not None:
                    torch.linalg.vector_norm(gradient, float("inf"), out=peaks[k])
                launch(x, gradient, self.mask, self.numbers, place, self.backend)
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

    def settle(self, x: Tensor, origin: Tensor, start: int, stop: int) -> Chain:
        """The chain to go on with from x, reached from `origin` by steps start … stop − 1; one host sync where x is
        healthy.

        Where 16 bits overflowed, the steps are repeated in float32, with a warning, and the chain to go on with is a
        float32 one. A state that is not finite raises DivergenceError; the steps are then replayed to find the first
        bad one, so that a healthy chain pays for one host sync at its end.
        """
        if bool(self.healthy(x)):
            return self
        if not bool(torch.isfinite(origin).all()):
            raise ValueError(f"{self.where}: x must be finite, got NaN or infinite values")
        if self.bad_step is not None and int(self.bad_step) != NO_BAD_STEP:
            warnings.warn(
                f"{self.where}: the {self.plan.precision} gradient overflowed at step {int(self.bad_step)}; the chain "
                "is run again in fp32",
                stacklevel=2,
            )
            again = self.in_fp32(x)
            x.copy_(origin)
            memory.advance_(again, x, origin, start, stop)
            return again.settle(x, origin, start, stop)
        replay = dense_copy(origin)
        bad = stop - 1
        for k in range(start, stop):
            memory.advance_(self, replay, replay.clone(), k, k + 1)
            if not bool(torch.isfinite(replay).all()):
                bad = k
                break
        raise DivergenceError(
            f"{self.where}: the chain became non-finite at step {self.step_number(bad)}; a smaller step size, "
            "grad_clamp or clamp keeps a chain in bounds"
        )

    def in_fp32(self, x: Tensor) -> Chain:
        """The same chain with a float32 gradient."""
        return dataclasses.replace(self, precision="fp32").planned(x)

    def planned(self, x: Tensor) -> Chain:
        """The same chain with a new plan for tensors like x, that has the energy's present weights."""
        made = plan(self.energy, x, self.precision, self.where)
        return dataclasses.replace(self, plan=made, bad_step=bad_step_cell(made, x.device), graph="")

    def refreshed(self, x: Tensor) -> Chain:
        """This chain with the energy's present weights, which a callback may have changed; planned again where the net
        itself is another one."""
        try:
            self.plan.refresh()
        except BackendError:
            return self.planned(x)
        return self

    def run(self, x: Tensor, steps: int, callback: Callback | None = None) -> Tensor:
        """The state `steps` steps after x, a new tensor."""
        if callback is None and isinstance(self.graph, graphs.Slot):
            results = self.graph.run(lambda: StaticChain(self, x, steps), x, self.mask, self.place)
            if results is not None:
                return results[0]
        state = dense_copy(x)
        if self.bad_step is not None:
            self.bad_step.fill_(NO_BAD_STEP)
        if callback is None:
            memory.advance_(self, state, x, 0, steps)
            self.settle(state, x, 0, steps)
            return state
        chain = self
        with frozen_parameters(self.energy):
            for k in range(steps):
                before = state.clone()
                memory.advance_(chain, state, before, k, k + 1)
                # Check for 16-bit overflow before calling back: a step cannot be un-reported.
                if chain.bad_step is not None and int(chain.bad_step) != NO_BAD_STEP:
                    chain = chain.settle(state, before, k, k + 1)
                callback(self.step_number(k), state)
                if k + 1 < steps:
                    chain = chain.refreshed(state)
        chain.settle(state, x, 0, steps)
        return state

    def snapshots(self, x: Tensor, steps: int, every: int) -> Iterator[tuple[int, Tensor]]:
        """(step, copy of the state) after every `every` steps and after the last; two states are alive at a time."""
        state = dense_copy(x)
        for start in range(0, steps, every):
            stop = min(start + every, steps)
            # The caller may have changed the weights since, and a plan may hold what it made of them.
            chain = self.planned(state)
            origin = state.clone()
            memory.advance_(chain, state, origin, start, stop)
            chain.settle(state, origin, start, stop)
            yield self.step_number(stop - 1), state.clone()


def prepare(
    energy: Energy,
    x: Tensor,  # (N, ...) float32, any layout
    steps: int,
    numbers: Update,
    *,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    first_sample: Ids = 0,
    first_step: int | Tensor = 0,
    stream: int = 0,
    precision: str = "auto",
    backend: str = "auto",
    graph: bool | None = False,
    where: str = "langevin_sample",
) -> Chain:
    """Check every argument of a chain of `steps` steps on tensors like x, and resolve its gradient and backend.

    `graph`: None takes a CUDA graph where one is safe, True insists on one, False takes none.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: x must be a tensor, got {type(x).__name__}")
    if not torch.compiler.is_compiling() and (reason := why_not_plain(x.resolve_neg())):
        raise TypeError(f"{where}: x must be a plain tensor, got {reason}")
    if x.dtype != torch.float32:
        raise TypeError(f"{where}: x must be float32, got {x.dtype}; x.float() converts it")
    if x.dim() == 0:
        raise ValueError(f"{where}: x must have shape (N, ...), got a 0-dim tensor")
    counted = arguments.place(seed, generator, first_sample, first_step, x.device, where)
    place = place_of(x, steps, stream=stream, where=where, **counted)
    mask = None if mask is None else check_mask(mask, x, where)
    backend = ops.choose("langevin_step", backend, x.device)
    slot = graphs.slot_for(energy, x, mask, place, graph, steps, numbers, precision, backend)
    if isinstance(slot, graphs.Slot) and slot.refresh():
        made = slot.static.chain.plan
    else:
        made = plan(energy, x, precision, where)
        if isinstance(slot, graphs.Slot):
            slot = graphs.why_not_plan(made, graph) or slot
    graphs.insist(graph, slot, where)
    return Chain(
        energy=energy,
        numbers=numbers,
        plan=made,
        precision=precision,
        mask=mask,
        place=place,
        backend=backend,
        where=where,
        bad_step=bad_step_cell(made, x.device),
        graph=slot,
    )


def place_of(
    x: Tensor,
    steps: int,
    *,
    seed: int | Tensor,
    first_sample: int | Tensor,
    first_step: int | Tensor,
    stream: int,
    where: str,
) -> counters.Counters:
    """The checked counters of a chain of `steps` steps on tensors like x."""
    return counters.check(
        where, x.shape[0], x.shape[1:].numel(), x.device, seed=seed, first_sample=first_sample, step=first_step,
        stream=stream, steps=steps,
    )  # fmt: skip


def bad_step_cell(plan: GradientPlan, device: torch.device) -> Tensor | None:
    """Where a plan's overflow is noted: the plan's own cell, a new one for any float16 plan, None for the others."""
    if plan.bad_step is None and plan.precision == "fp16":
        return torch.full((), NO_BAD_STEP, device=device)
    return plan.bad_step
