"""MALA and HMC: frozen descriptions of exact chains, to call as a `Langevin` is called."""

from __future__ import annotations

import dataclasses

from .corrected import Corrected
from .langevin import Langevin


@dataclasses.dataclass(frozen=True)
class MALA(Corrected):
    """K steps of the Metropolis-adjusted Langevin algorithm, whose chains have exp(−U/T) as their exact law:

        x′ = x − (δ²/2)·∇U(x)/T + δ·ε,   U(x) = E(x) + ‖x − m‖²/2σ²
        accepted with probability min(1, π(x′)q(x|x′) / π(x)q(x′|x))

    which is Hamiltonian Monte Carlo with one leapfrog step. About 57 % accepted is the most efficient (Roberts and
    Rosenthal, 1998).

    Args:
        steps: K ≥ 1.
        step_size: δ > 0.
        reference_std, reference_mean: σ and m of the Gaussian reference; None: no reference.
        temperature: T > 0.
        box: (low, high): the law is exp(−U/T) inside and nothing outside; paths are mirrored at its walls. None: none.
        grad_clamp: a bound on every entry of ∇E in proposals; the law stays exact.
        jitter: each sample's step is δ·(1 ± jitter), uniform, drawn again at every step; in [0, 1).

    Source: Besag (1994); Roberts and Tweedie (1996).
    """

    steps: int
    step_size: float
    reference_std: float | None = None
    reference_mean: float = 0.0
    temperature: float = 1.0
    box: tuple[float, float] | None = None
    grad_clamp: float | None = None
    jitter: float = 0.0

    @property
    def path(self) -> int:
        return 1

    @classmethod
    def correcting(cls, langevin: Langevin) -> MALA:
        """The exact chain whose proposals are the steps of `langevin`, but that its clamp becomes mirrors.

        A step with drift d and noise s proposes for exp(−U/T) at T = s²/2d, with δ = s. ValueError for noise-free ones.
        """
        numbers = langevin.update(where="MALA")
        if numbers.noise_std == 0:
            raise ValueError("MALA: a chain to correct must have noise_std > 0, got 0: noise-free descent has no law")
        return cls(
            steps=langevin.steps,
            step_size=numbers.noise_std,
            reference_std=langevin.reference_std,
            reference_mean=langevin.reference_mean,
            temperature=numbers.noise_std**2 / (2 * numbers.drift),
            box=langevin.clamp,
            grad_clamp=langevin.grad_clamp,
        )


@dataclasses.dataclass(frozen=True)
class HMC(Corrected):
    """K steps of Hamiltonian Monte Carlo: fresh momenta N(0, I), `leapfrog_steps` leapfrog steps of size ε, then

        accepted with probability min(1, exp(H(x, p) − H(x′, p′))),   H(x, p) = U(x)/T + ‖p‖²/2

    The chain has exp(−U/T) as its exact law. About 65 % accepted is the most efficient (Beskos et al., 2013). On a
    target with one dominant period a path may return to where it began: `jitter` breaks that.

    Args:
        steps: K ≥ 1 proposals.
        leapfrog_steps: L ≥ 1, gradients to a proposal.
        step_size: ε > 0.
        others: as in `MALA`.

    Source: Duane et al. (1987); Neal (2011).
    """

    steps: int
    leapfrog_steps: int
    step_size: float
    reference_std: float | None = None
    reference_mean: float = 0.0
    temperature: float = 1.0
    box: tuple[float, float] | None = None
    grad_clamp: float | None = None
    jitter: float = 0.0

    @property
    def path(self) -> int:
        return self.leapfrog_steps
