"""Metropolis-corrected chains: leapfrog proposals on the potential, each sample accepted or rejected by itself.

    target    π(x) ∝ exp(−U(x)/T),   U(x) = E(x) + ‖x − m‖²/2σ²,   nothing outside the box
    proposal  p ~ N(0, I);   (x′, p′) = leapfrog(x, p)
    accept    with probability min(1, exp(H(x, p) − H(x′, p′))),   H(x, p) = U(x)/T + ‖p‖²/2

Leapfrog is reversible and keeps volume whatever function of x stands for the force, so a clipped gradient or one of 16
bits costs acceptance and nothing else: E alone decides, in the energy's own precision, summed up in float64.

Source: Duane, Kennedy, Pendleton, Roweth (1987); Neal, "MCMC using Hamiltonian dynamics" (2011), §5.2 and §5.5.1.5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..gradient import GradientPlan
from ..gradient.autograd import ask
from ..gradient.plan import Energy

Force = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class State:
    """The state of a chain, with values that the next transition would otherwise compute again."""

    x: Tensor  # (N, ...)
    potential: Tensor  # (N,) float64, U(x)
    force: Tensor  # (N, ...), ∇U/T


@dataclasses.dataclass(frozen=True)
class Target:
    """exp(−U(x)/T) of one energy, and the force that proposals follow."""

    energy: Energy
    plan: GradientPlan
    inverse_variance: float = 0.0  # 1/σ², 0 without a reference
    reference_mean: float = 0.0
    temperature: float = 1.0
    grad_clamp: float = math.inf
    box: tuple[float, float] | None = None
    mask: Tensor | None = None  # bool, broadcastable to x; False = held
    coupled: bool = False  # samples share statistics: the batch is one state, accepted or rejected as a whole
    where: str = "MALA"

    def energies(self, x: Tensor) -> Tensor:
        """E(x), (N,) float64."""
        with torch.no_grad():
            energies = ask(self.energy, x, self.where)
        if not isinstance(energies, Tensor) or energies.shape != x.shape[:1]:
            got = tuple(energies.shape) if isinstance(energies, Tensor) else type(energies).__name__
            raise ValueError(f"{self.where}: energy must return shape ({x.shape[0]},), one energy a sample, got {got}")
        return energies.double()

    def potential(self, x: Tensor) -> Tensor:
        """U(x), (N,) float64."""
        return self.energies(x) + self.reference(x)

    def reference(self, x: Tensor) -> Tensor:
        """‖x − m‖²/2σ², (N,) float64."""
        if self.inverse_variance == 0:
            return torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        return squares(x.double() - self.reference_mean) * (self.inverse_variance / 2)

    def force(self, x: Tensor) -> Tensor:
        """∇U(x)/T with ∇E clipped; 0 where x is held. Always a new tensor: plans may use theirs again."""
        gradient = self.plan.gradient(x).to(x.dtype)
        if self.grad_clamp < math.inf:
            gradient = gradient.clamp(-self.grad_clamp, self.grad_clamp)
        if self.inverse_variance:
            gradient = gradient + (x - self.reference_mean) * self.inverse_variance
        force = gradient * (1.0 / self.temperature)
        return force if self.mask is None else force * self.mask

    def state(self, x: Tensor) -> State:
        return State(x, self.potential(x), self.force(x))

    def momentum(self, x: Tensor, **place: Any) -> Tensor:
        """p ~ N(0, I), 0 where x is held; `place` as in `ops.noise`."""
        draw = ops.noise(x.shape, device=x.device, **place)
        return draw if self.mask is None else draw * self.mask


def squares(x: Tensor) -> Tensor:
    """Σ x² of each sample, (N,) float64."""
    return x.double().square().reshape(x.shape[0], x.shape[1:].numel()).sum(1)


def leapfrog(
    x: Tensor,  # (N, ...)
    momentum: Tensor,  # (N, ...)
    at_x: Tensor,  # (N, ...), force(x)
    force: Force,
    *,
    step_size: float | Tensor,  # ε; a tensor (N, 1, ...) gives each sample its own
    steps: int,
    box: tuple[float, float] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x′, p′, force(x′)) after `steps` steps of  p ← p − (ε/2) F(x);  x ← x + ε p;  p ← p − (ε/2) F(x).

    At the walls of the box pixels are mirrored and their momentum turns. Run from (x′, −p′) it leads back to (x, −p).
    The energy error of a path of fixed length falls as ε². Float32 or float64, as x is.
    """
    held = None if mask is None else ~mask
    start = x
    momentum = momentum - step_size / 2 * at_x
    for k in range(steps):
        x = x + step_size * momentum
        if box is not None:
            x, momentum = _mirrored(x, momentum, *box)
        if held is not None:
            x = torch.where(held, start, x)  # to the bit, also where a held pixel lies outside the box
        at_x = force(x)
        momentum = momentum - (step_size if k < steps - 1 else step_size / 2) * at_x
    return x, momentum, at_x


def _mirrored(x: Tensor, momentum: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """A flight in a straight line between mirrors at `low` and `high`. What lies inside keeps its bits."""
    width = high - low
    phase = torch.remainder(x - low, 2 * width)
    turned = phase > width
    folded = torch.where(turned, high - (phase - width), low + phase).clamp(low, high)
    outside = (x < low) | (x > high)
    return torch.where(outside, folded, x), torch.where(outside & turned, -momentum, momentum)


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Where a path ends, and how likely it is to be accepted."""

    state: State
    momentum: Tensor
    log_ratio: Tensor  # (N,) float64, log of the acceptance probability: ≤ 0, −inf for what is not finite


def propose(target: Target, state: State, momentum: Tensor, step_size: float | Tensor, leapfrog_steps: int) -> Proposal:
    """The end of one path from `state`, and log min(1, exp(H − H′))."""
    x, end, force = leapfrog(
        state.x, momentum, state.force, target.force, step_size=step_size, steps=leapfrog_steps, box=target.box,
        mask=target.mask,
    )  # fmt: skip
    potential = target.potential(x)
    change = (potential - state.potential) / target.temperature + (squares(end) - squares(momentum)) / 2
    if target.coupled:
        change = change.sum().expand(change.shape)
    log_ratio = (-change).clamp(max=0.0)
    # A trajectory that became non-finite is a proposal of probability 0, and must not enter the state.
    log_ratio = torch.where(torch.isfinite(change), log_ratio, -torch.inf)
    return Proposal(State(x, potential, force), end, log_ratio)


def decide(state: State, proposal: Proposal, uniform: Tensor) -> tuple[State, Tensor]:
    """The next state, and which samples moved: those with u ≤ acceptance probability, u (N,) in (0, 1]."""
    accepted = uniform.double().log() <= proposal.log_ratio
    wide = accepted.reshape(-1, *[1] * (state.x.dim() - 1))
    new = proposal.state
    return (
        State(
            torch.where(wide, new.x, state.x),
            torch.where(accepted, new.potential, state.potential),
            torch.where(wide, new.force, state.force),
        ),
        accepted,
    )
