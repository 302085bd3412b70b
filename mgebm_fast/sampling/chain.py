"""One chain: everything is checked and resolved once, then a step is one gradient and one update in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import noise, ops
from ..errors import DivergenceError
from ..gradient import GradientPlan, frozen_parameters, plan
from ..gradient.plan import Energy
from ..ops import counters
from ..ops.langevin_step import Update, check_grad, check_mask, launch, strides

Callback = Callable[[int, Tensor], Any]


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

    def place_at(self, k: int) -> counters.Counters:
        """The noise counters of the chain's k-th step."""
        if self.place.step_tensor is not None:
            return dataclasses.replace(self.place, step_tensor=self.place.step_tensor + k)
        return dataclasses.replace(self.place, step=self.place.step + k)

    def advance_(self, x: Tensor, start: int, stop: int, callback: Callback | None = None) -> None:
        """Steps start … stop − 1 of the chain, on x in place."""
        with frozen_parameters(self.energy):
            for k in range(start, stop):
                gradient = check_grad(self.plan.gradient(x), x, self.where)
                launch(x, gradient, self.mask, self.numbers, self.place_at(k), self.backend)
                if callback is not None:
                    callback(self.step_number(k), x)

    def step_number(self, k: int) -> int:
        """The noise counter of the k-th step, as callbacks and trajectories name it."""
        base = self.place.step if self.place.step_tensor is None else int(self.place.step_tensor)
        return base + k

    def check_finite(self, x: Tensor, origin: Tensor, start: int, stop: int) -> None:
        """Raise where x, reached from `origin` by steps start … stop − 1, is not finite; the steps are then replayed
        to find the first bad one, so that a healthy chain pays for one look at its end."""
        if _finite(x):
            return
        if not _finite(origin):
            raise ValueError(f"{self.where}: x must be finite, got NaN or infinite values")
        replay = dense_copy(origin)
        bad = stop - 1
        for k in range(start, stop):
            self.advance_(replay, k, k + 1)
            if not _finite(replay):
                bad = k
                break
        raise DivergenceError(
            f"{self.where}: the chain became non-finite at step {self.step_number(bad)}; a smaller step size, "
            "grad_clamp or clamp keeps a chain in bounds"
        )

    def run(self, x: Tensor, steps: int, callback: Callback | None = None) -> Tensor:
        """The state `steps` steps after x, a new tensor."""
        state = dense_copy(x)
        self.advance_(state, 0, steps, callback)
        self.check_finite(state, x, 0, steps)
        return state

    def snapshots(self, x: Tensor, steps: int, every: int) -> Iterator[tuple[int, Tensor]]:
        """(step, copy of the state) after every `every` steps and after the last; two states are alive at a time."""
        state = dense_copy(x)
        for start in range(0, steps, every):
            stop = min(start + every, steps)
            # The caller may have changed the weights since, and a plan may hold what it made of them.
            chain = dataclasses.replace(self, plan=plan(self.energy, state, self.precision, self.where))
            origin = state.clone()
            chain.advance_(state, start, stop)
            chain.check_finite(state, origin, start, stop)
            yield self.step_number(stop - 1), state.clone()


def prepare(
    energy: Energy,
    x: Tensor,  # (N, ...) float32, any layout
    steps: int,
    numbers: Update,
    *,
    mask: Tensor | None = None,
    seed: int | Tensor = 0,
    first_sample: int | Tensor = 0,
    first_step: int | Tensor = 0,
    stream: int = 0,
    precision: str = "auto",
    backend: str = "auto",
    where: str = "langevin_sample",
) -> Chain:
    """Check every argument of a chain of `steps` steps on tensors like x, and resolve its gradient and backend."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: x must be a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32:
        raise TypeError(f"{where}: x must be float32, got {x.dtype}; x.float() converts it")
    if x.dim() == 0:
        raise ValueError(f"{where}: x must have shape (N, ...), got a 0-dim tensor")
    samples, elements = x.shape[0], x.shape[1:].numel()
    place = counters.check(
        where, samples, elements, x.device, seed=seed, first_sample=first_sample, step=first_step, stream=stream
    )
    if place.step_tensor is None:
        noise.check_counter(place.step, "first_step", where, last=steps - 1)
    return Chain(
        energy=energy,
        numbers=numbers,
        plan=plan(energy, x, precision, where),
        precision=precision,
        mask=None if mask is None else check_mask(mask, x, where),
        place=place,
        backend=ops.choose("langevin_step", backend, x.device),
        where=where,
    )


def dense_copy(x: Tensor) -> Tensor:
    """A copy that may be updated in place: channels-last stays so, any other layout becomes contiguous."""
    with torch.inference_mode(False), torch.no_grad():
        layout = torch.contiguous_format if strides(x) is None else torch.preserve_format
        return x.detach().clone(memory_format=layout)


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
