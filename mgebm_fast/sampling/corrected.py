"""Metropolis-corrected chains: the checks, the loop over steps, and the result that they share."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import noise, ops
from ..checks import is_number
from ..gradient import frozen_parameters, plan
from ..gradient.plan import Energy
from ..ops import counters
from ..ops.state import check_mask, dense_copy, why_not_plain
from ..ops.update import Update, update
from . import arguments
from .arguments import as_numbers_, check_callback, count
from .chain import Callback, Ids
from .coupling import coupling, randomness
from .explanation import Explanation, explained
from .metropolis import State, Target, decide, propose


@dataclasses.dataclass(frozen=True)
class MetropolisResult:
    """The end of a corrected chain, and what its steps did."""

    x: Tensor  # (N, ...) float32
    potential: Tensor  # (N,) float64, U(x) at the end
    accepted: Tensor  # (steps, N) bool
    log_ratio: Tensor  # (steps, N) float64, log of a step's acceptance probability; −inf where a path became non-finite

    @property
    def acceptance(self) -> Tensor:
        """Share of accepted steps of each sample, (N,) float64."""
        return self.accepted.double().mean(0)


class Corrected(abc.ABC):
    """What MALA and HMC share. A step draws p from (seed, sample id, step, MOMENTUM, `grid`) and the uniform number of
    its decision from (…, ACCEPTANCE, `grid`), so that a sample's chain does not depend on the batch it runs in."""

    steps: int
    step_size: float
    reference_std: float | None
    reference_mean: float
    temperature: float
    box: tuple[float, float] | None
    grad_clamp: float | None
    jitter: float

    @property
    @abc.abstractmethod
    def path(self) -> int:
        """Leapfrog steps of one proposal."""

    def __post_init__(self) -> None:
        where = type(self).__name__
        as_numbers_(self, "box")
        count(self.steps, "steps", where)
        count(self.path, "leapfrog_steps", where)
        for name in ("temperature", "jitter"):
            value, low, high = getattr(self, name), 0.0, 1.0 if name == "jitter" else math.inf
            if not is_number(value) or not (low <= value < high) or (name == "temperature" and value == 0):
                bounds = "in [0, 1)" if name == "jitter" else "finite and > 0"
                raise ValueError(f"{where}: {name} must be a number {bounds}, got {value!r}")
        self._numbers()
        if self.box is None:
            return
        if not isinstance(self.box, tuple) or len(self.box) != 2:
            raise ValueError(f"{where}: box must be a pair (low, high) or None, got {self.box!r}")
        low, high = self.box
        if not all(isinstance(bound, (int, float)) and math.isfinite(bound) for bound in self.box) or not low < high:
            raise ValueError(f"{where}: box must be finite (low, high) with low < high, got {self.box}")

    def _numbers(self) -> Update:
        """The step's numbers, checked where those of Langevin chains are."""
        return update(
            step_size=self.step_size, reference_std=self.reference_std, reference_mean=self.reference_mean,
            grad_clamp=self.grad_clamp, where=type(self).__name__,
        )  # fmt: skip

    def target(
        self, energy: Energy, x: Tensor, *, mask: Tensor | None = None, precision: str = "auto", coupled: bool = False
    ) -> Target:
        """The law that this chain samples, for tensors like x. `coupled`: the batch is one state."""
        where = type(self).__name__
        numbers = self._numbers()
        return Target(
            energy=energy,
            plan=plan(energy, x, precision, where),
            inverse_variance=numbers.inverse_variance,
            reference_mean=numbers.reference_mean,
            temperature=self.temperature,
            grad_clamp=numbers.grad_clamp,
            box=self.box,
            mask=None if mask is None else check_mask(mask, x, where),
            coupled=coupled,
            where=where,
        )

    def __call__(
        self,
        energy: Energy,
        x: Tensor,  # (N, ...) float32
        *,
        mask: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        first_sample: Ids = 0,
        first_step: int = 0,
        grid: int = 0,
        precision: str = "auto",
        callback: Callback | None = None,
    ) -> MetropolisResult:
        """The state after `steps` steps from x, and every step's acceptance.

        Args:
            energy: a module or any callable (N, ...) -> (N,), without the reference's part, each sample's value a
                function of that sample alone.
            x: the start; left untouched. Of finite energy and gradient, and inside the box where there is one.
            mask: bool, broadcastable to x, True = updated: the chain samples these given the held ones.
            seed, first_sample, first_step, grid: what the chain's randomness is a function of; 30 steps are 10 and
                then 20 with first_step=10. `first_sample` may be N ids. `grid` in [0, 65536) keeps chains apart.
                seed=None: a fresh one for each call, drawn from `generator` or torch's global CPU generator; leave it
                so in a training loop.
            precision: of the gradient. It costs acceptance, never exactness.
            callback: callback(step, x) after each step, with step = first_step + k; x is not written to afterwards.

        Raises:
            TypeError, ValueError: an argument is not as above, or the energy couples the samples of a batch.
        """
        check_callback(callback, type(self).__name__)
        potential = None
        accepted, ratios = [], []
        steps = self._run(
            energy, x, mask, grid, precision, seed=seed, generator=generator, first_sample=first_sample,
            first_step=first_step,
        )  # fmt: skip
        for k, (state, moved, log_ratio) in enumerate(steps):
            accepted.append(moved)
            ratios.append(log_ratio)
            potential, last = state.potential, state.x
            if callback is not None:
                callback(first_step + k, last)
        assert potential is not None
        return MetropolisResult(last, potential, torch.stack(accepted), torch.stack(ratios))

    def trajectory(
        self,
        energy: Energy,
        x: Tensor,
        *,
        every: int = 1,
        mask: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        first_sample: Ids = 0,
        first_step: int = 0,
        grid: int = 0,
        precision: str = "auto",
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields (step, state) after every `every` steps and after the last one; arguments as in the call."""
        every = count(every, "every", "trajectory")
        steps = self._run(
            energy, x, mask, grid, precision, seed=seed, generator=generator, first_sample=first_sample,
            first_step=first_step,
        )  # fmt: skip
        return (
            (first_step + k, state.x)
            for k, (state, _, _) in enumerate(steps)
            if (k + 1) % every == 0 or k == self.steps - 1
        )

    def explain(self, energy: Energy, x: Tensor, *, precision: str = "auto") -> Explanation:
        """What a chain on (energy, x) would run, and why. Raises what a run would raise of the energy."""
        self._check_energy(energy, x)
        target = self.target(energy, x, precision=precision)
        parts = [f"{self.steps} steps of {self.path} leapfrog of size {self.step_size:g}"]
        parts += [f"jittered by ±{self.jitter:.0%}"] if self.jitter else []
        parts += [f"temperature {self.temperature:g}"] if self.temperature != 1 else []
        if self.reference_std is not None:
            parts.append(f"reference N({self.reference_mean:g}, {self.reference_std:g}²)")
        parts += [f"mirrors at {self.box[0]:g} and {self.box[1]:g}"] if self.box else []
        return explained(energy, x, target.plan, f"{type(self).__name__}, {', '.join(parts)}")

    def _check_energy(self, energy: Energy, x: Tensor) -> None:
        where = type(self).__name__
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.dim() == 0:
            got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{where}: x must be a float32 tensor (N, ...), got {got}")
        if reason := why_not_plain(x.resolve_neg()):
            raise TypeError(f"{where}: x must be a plain tensor, got {reason}")
        if reason := coupling(energy, x):
            raise ValueError(
                f"{where}: energy must treat samples apart, but {reason}; freeze_norm() gives a net that does"
            )
        if reason := randomness(energy, x):
            raise ValueError(f"{where}: energy must be a function of x, but {reason}; .eval() turns that off")

    def _run(
        self,
        energy: Energy,
        x: Tensor,
        mask: Tensor | None,
        grid: int,
        precision: str,
        **counted: Any,
    ) -> Iterator[tuple[State, Tensor, Tensor]]:
        """(state, accepted, log_ratio) of every step. Not a generator function itself: wrong arguments raise here."""
        where = type(self).__name__
        self._check_energy(energy, x)
        place = arguments.place(device=x.device, where=where, **counted)
        first_step = place.pop("first_step")
        counters.check(
            where, x.shape[0], x.shape[1:].numel(), x.device, step=first_step,
            stream=noise.stream(noise.Purpose.MOMENTUM, grid), **place,
        )  # fmt: skip
        noise.check_counter(first_step, "first_step", where, last=self.steps - 1)
        target = self.target(energy, x, mask=mask, precision=precision)
        start = dense_copy(x)
        with frozen_parameters(energy):
            state = target.state(start)
        _check_start(state, target)
        return self._steps(target, state, place, first_step, grid)

    def _steps(
        self, target: Target, state: State, place: dict, first_step: int, grid: int
    ) -> Iterator[tuple[State, Tensor, Tensor]]:
        for step in range(first_step, first_step + self.steps):
            with frozen_parameters(target.energy):
                uniform = self.uniforms(state.x, step=step, grid=grid, **place)
                momentum = target.momentum(
                    state.x, step=step, stream=noise.stream(noise.Purpose.MOMENTUM, grid), **place
                )
                proposal = propose(target, state, momentum, self.step_sizes(uniform, state.x), self.path)
                state, accepted = decide(state, proposal, uniform[:, 0])
            yield state, accepted, proposal.log_ratio

    def uniforms(self, x: Tensor, *, step: int, grid: int = 0, **place) -> Tensor:
        """The two uniform numbers of each sample's step, (N, 2): its decision, and its jitter."""
        return ops.noise(
            (x.shape[0], 2), step=step, stream=noise.stream(noise.Purpose.ACCEPTANCE, grid), distribution="uniform",
            device=x.device, **place,
        )  # fmt: skip

    def step_sizes(self, uniform: Tensor, x: Tensor) -> float | Tensor:
        """The leapfrog step of each sample: δ, or δ·(1 + jitter·(2u − 1)), (N, 1, ...)."""
        if not self.jitter:
            return self.step_size
        sizes = self.step_size * (1.0 + self.jitter * (2.0 * uniform[:, 1] - 1.0))
        return sizes.reshape(-1, *[1] * (x.dim() - 1))


def _check_start(state: State, target: Target) -> None:
    fine = torch.isfinite(state.potential)
    smooth = torch.isfinite(state.force).flatten(1).all(1) if state.force.dim() > 1 else torch.isfinite(state.force)
    if not bool((fine & smooth).all()):
        sample = int((~(fine & smooth)).nonzero()[0])
        got = f"U = {float(state.potential[sample])}" if not bool(fine[sample]) else "a NaN or infinite gradient"
        raise ValueError(f"{target.where}: x must be of finite energy and gradient, got {got} at sample {sample}")
    if target.box is None:
        return
    low, high = target.box
    outside = (state.x < low) | (state.x > high)
    if target.mask is not None:
        outside &= target.mask
    if bool(outside.any()):
        worst = float(state.x[outside][0])
        raise ValueError(
            f"{target.where}: x must lie in the box [{low:g}, {high:g}] where it is updated, got {worst:g}"
        )
