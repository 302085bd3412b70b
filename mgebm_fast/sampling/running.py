"""Running a chain: every argument is checked once; a graph or plain steps; overflow and divergence are dealt with."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from ..errors import DivergenceError
from ..gradient import frozen_parameters, plan
from ..gradient.plan import Energy
from ..ops import counters
from ..ops.edge_step import NO_BAD_STEP
from ..ops.state import check_mask, dense_copy, why_not_plain
from ..ops.update import Update
from . import arguments, graphs, memory
from .chain import Callback, Chain, Ids, bad_step_cell
from .static import StaticChain


def settle(chain: Chain, x: Tensor, origin: Tensor, start: int, stop: int) -> Chain:
    """The chain to go on with from x, reached from `origin` by steps start … stop − 1; one host sync where x is
    healthy.

    Where 16 bits overflowed, the steps are repeated in float32, with a warning, and the chain to go on with is a
    float32 one. A state that is not finite raises DivergenceError; the steps are then replayed to find the first
    bad one, so that a healthy chain pays for one host sync at its end.
    """
    # A finite sum has finite terms, at a tenth of the cost of asking each: enough where nothing else can overflow.
    if (chain.bad_step is None and math.isfinite(x.sum())) or bool(chain.healthy(x)):
        return chain
    if not bool(torch.isfinite(origin).all()):
        raise ValueError(f"{chain.where}: x must be finite, got NaN or infinite values")
    if chain.bad_step is not None and int(chain.bad_step) != NO_BAD_STEP:
        warnings.warn(
            f"{chain.where}: the {chain.plan.precision} gradient overflowed at step {int(chain.bad_step)}; the chain "
            "is run again in fp32",
            stacklevel=2,
        )
        again = chain.in_fp32(x)
        x.copy_(origin)
        memory.advance_(again, x, origin, start, stop)
        return settle(again, x, origin, start, stop)
    replay = dense_copy(origin)
    bad = stop - 1
    for k in range(start, stop):
        memory.advance_(chain, replay, replay.clone(), k, k + 1)
        if not bool(torch.isfinite(replay).all()):
            bad = k
            break
    raise DivergenceError(
        f"{chain.where}: the chain became non-finite at step {chain.step_number(bad)}; a smaller step size, "
        "grad_clamp or clamp keeps a chain in bounds"
    )


class Dynamics(Protocol):
    """What describes a chain: its numbers for tensors like x."""

    def update(self, x: Tensor, where: str) -> Update: ...


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A chain to run, and whether a graph holds it."""

    chain: Chain
    graph: graphs.Slot | str  # the slot of its graph, or why there is none
    session: graphs.Session

    def run(self, x: Tensor, steps: int, callback: Callback | None = None) -> Tensor:
        """The state `steps` steps after x, a new tensor."""
        chain = self.chain
        if callback is None and isinstance(self.graph, graphs.Slot):
            build = functools.partial(StaticChain, chain, x, steps)
            results = self.graph.run(self.session, build, x, chain.mask, chain.place, chain.numbers)
            if results is not None:
                return results[0]
        state = dense_copy(x)
        if chain.bad_step is not None:
            chain.bad_step.fill_(NO_BAD_STEP)
        if callback is None:
            memory.advance_(chain, state, x, 0, steps)
            settle(chain, state, x, 0, steps)
            return state
        with frozen_parameters(chain.energy):
            for k in range(steps):
                before = state.clone()
                memory.advance_(chain, state, before, k, k + 1)
                # Check for 16-bit overflow before calling back: a step cannot be un-reported.
                if chain.bad_step is not None and int(chain.bad_step) != NO_BAD_STEP:
                    chain = settle(chain, state, before, k, k + 1)
                callback(chain.step_number(k), state)
                if k + 1 < steps:
                    chain = chain.refreshed(state)
        settle(chain, state, x, 0, steps)
        return state

    def snapshots(self, x: Tensor, steps: int, every: int) -> Iterator[tuple[int, Tensor]]:
        """(step, copy of the state) after every `every` steps and after the last; two states are alive at a time."""
        state = dense_copy(x)
        for start in range(0, steps, every):
            stop = min(start + every, steps)
            # The caller may have changed the weights since, and a plan may hold what it made of them.
            chain = self.chain.planned(state)
            origin = state.clone()
            memory.advance_(chain, state, origin, start, stop)
            settle(chain, state, origin, start, stop)
            yield chain.step_number(stop - 1), state.clone()


def prepare(
    energy: Energy,
    x: Tensor,  # (N, ...) float32, any layout
    steps: int,
    dynamics: Dynamics,
    *,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    first_sample: Ids = 0,
    first_step: int | Tensor = 0,
    stream: int = 0,
    precision: str = "auto",
    backend: str = "auto",
    graph: graphs.Graph = False,
    together: int | None = None,
    compile: bool | str = False,
    where: str = "langevin_sample",
) -> Prepared:
    """Check every argument of a chain of `steps` steps on tensors like x, and resolve its gradient and backend.

    `graph`: None takes a CUDA graph where one is safe, True insists on one, False takes none; or a `Session`.
    `together`: how many steps are made between two looks at the state; None: all.
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
    numbers = dynamics.update(x, where)
    place = place_of(x, steps, stream=stream, where=where, **counted)
    mask = None if mask is None else check_mask(mask, x, where)
    if mask is not None and not torch.compiler.is_compiling() and (reason := why_not_plain(mask)):
        raise TypeError(f"{where}: mask must be a plain tensor, got {reason}")
    backend = ops.choose("langevin_step", backend, x.device, where)
    session = graphs.session_of(graph, where=where)
    together = steps if together is None else min(together, steps)
    slot = graphs.slot_for(energy, x, mask, place, session, steps, numbers.form, precision, backend, compile)
    if isinstance(slot, graphs.Slot) and slot.refresh():
        made = slot.static.plan
    else:
        made = plan(energy, x, precision, where, steps=together, compile=compile)
        if isinstance(slot, graphs.Slot):
            slot = graphs.why_not_plan(made, session) or slot
    graphs.insist(session, slot, where)
    cell = bad_step_cell(made, x.device)
    chain = Chain(energy, numbers, made, precision, mask, place, backend, where, cell, together, compile)
    return Prepared(chain, slot, session)


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
