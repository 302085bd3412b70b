"""Diagnostics of any chain: a callback that measures it, and figures of how well it mixes.

recorder = Recorder(energy, chain)
chain(energy, x, callback=recorder)
trace = recorder.trace()
ess(trace.quantities["potential"])
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .. import noise
from ..gradient import plan
from ..gradient.holding import untouched
from ..gradient.plan import Energy
from ..ops.state import check_mask
from . import arguments
from .arguments import count
from .corrected import Corrected
from .coupling import coupling
from .langevin import Langevin
from .mcmc import MALA
from .metropolis import State, Target, propose, squares

PROJECTIONS = 8
_FEWEST = 4  # draws below which ESS and R-hat are meaningless


def arviz() -> ModuleType:
    """The arviz package; ModuleNotFoundError says how to get it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # 0.23 announces version 1, which gives the same figures
            import arviz
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'effective sample size and split R-hat need arviz: pip install "mgebm_fast[diagnostics]"', name="arviz"
        ) from error
    return arviz


def ess(draws: np.ndarray, *, method: str = "bulk") -> float | None:  # (draws, chains)
    """Effective sample size over all chains, by arviz: how many independent draws say as much of the mean.

        ESS = draws·chains / (1 + 2·Σ autocorrelations),  of rank-normalised split chains with method="bulk"

    None for fewer than 4 draws, and where it is not finite. Source: Vehtari et al. (Bayesian Analysis, 2021).
    """
    return _by_arviz("ess", draws, method)


def split_rhat(draws: np.ndarray, *, method: str = "rank") -> float | None:  # (draws, chains)
    """Split R-hat, by arviz: near 1 where halves of chains agree, above 1.01 where they still differ.

        R̂ = √( ((n − 1)/n·W + B/n) / W ),  W and B the variances within and between the halves, n draws each

    with method="split"; "rank" (default) is the larger of that of rank-normalised draws and of folded ones. None as in
    `ess`.
    """
    return _by_arviz("rhat", draws, method)


def _by_arviz(name: str, draws: np.ndarray, method: str) -> float | None:
    function = getattr(arviz(), name)
    values = _checked(name, draws)
    if len(values) < _FEWEST or not np.isfinite(values).all() or np.ptp(values) == 0:
        return None
    value = float(function(values.T, method=method))
    return value if math.isfinite(value) else None


def autocorrelation(draws: np.ndarray, lags: int | None = None) -> np.ndarray:  # (draws, chains) -> (lags,)
    """ρ_t for t = 0 … lags − 1, about the mean of all chains, so that chains that sit apart stay correlated:

        ρ_t = Σ_chains Σ_k (y_k − ȳ)(y_{k+t} − ȳ)/(n − t)  /  Σ_chains Σ_k (y_k − ȳ)²/n

    `lags` defaults to half the draws. All NaN where nothing varies.
    """
    values = _checked("autocorrelation", draws)
    n = len(values)
    lags = max(1, n // 2) if lags is None else lags
    if not 1 <= lags <= n:
        raise ValueError(f"autocorrelation: lags must be in [1, {n}], the number of draws, got {lags}")
    away = values - values.mean()
    length = 1 << (2 * n - 1).bit_length()
    spectrum = np.abs(np.fft.rfft(away, length, axis=0)) ** 2
    sums = np.fft.irfft(spectrum.sum(1), length)[:lags] / (n - np.arange(lags))
    variance = np.square(away).sum() / n
    return sums / variance if variance > 0 else np.full(lags, np.nan)


def _checked(where: str, draws: np.ndarray) -> np.ndarray:
    values = np.asarray(draws, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{where}: draws must have shape (draws, chains), got {values.shape}")
    return values


@dataclasses.dataclass(frozen=True)
class Trace:
    """What was measured of N chains after R of their steps; arrays (R, N) float64."""

    steps: np.ndarray  # (R,) int64, noise counters of the recorded steps
    energy: np.ndarray  # E(x)
    potential: np.ndarray  # U(x), the reference included
    gradient_to_noise: np.ndarray | None  # rms of a step's drift over rms of its noise; None for noise-free chains
    log_acceptance: np.ndarray | None  # log of the Metropolis acceptance of a step from there; None for noise-free ones
    quantities: dict[str, np.ndarray]  # what ESS and R-hat are of: potential, mean and projections of moving pixels
    states: list[tuple[int, Tensor]]  # (step, the first few samples), on the CPU

    @property
    def acceptance(self) -> np.ndarray | None:
        return None if self.log_acceptance is None else np.exp(self.log_acceptance)

    def after(self, share: float) -> Trace:
        """The trace without the first `share` of its records."""
        if not 0 <= share < 1:
            raise ValueError(f"after: share must be in [0, 1), got {share}")
        first = int(share * len(self.steps))

        def later(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[first:]

        return dataclasses.replace(
            self,
            steps=self.steps[first:],
            energy=self.energy[first:],
            potential=self.potential[first:],
            gradient_to_noise=later(self.gradient_to_noise),
            log_acceptance=later(self.log_acceptance),
            quantities={name: values[first:] for name, values in self.quantities.items()},
        )


class Recorder:
    """A callback(step, x) for a chain; batches that run one after the other become one trace.

    The acceptance of a step is that of the Metropolis-corrected chain: for MALA and HMC their own, for a `Langevin`
    that of `MALA.correcting`, the chance that one of its steps would be kept if steps were corrected for exp(−U/T),
    T = noise²/(2·drift). Where the energy couples samples it is that of the whole batch. A chain whose numbers vary has
    no one law: there is no acceptance, and the reference in U is that of its last step.

    Args:
        energy, chain: those of the chain.
        every: record the first of every `every` steps.
        mask: that of the chain.
        seed, first_sample, grid: of the momenta that acceptance is measured with. seed=None: a fresh one, drawn from
            `generator` or torch's global CPU generator.
        keep, states: how many samples' states are kept, and how often, from the first record to the last.
    """

    def __init__(
        self,
        energy: Energy,
        chain: Langevin | Corrected,
        *,
        every: int = 1,
        mask: Tensor | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        first_sample: int = 0,
        grid: int = 0,
        keep: int = 8,
        states: int = 9,
    ) -> None:
        self.coupled = ""  # why the samples of a batch are coupled, once the chain made a step
        self._energy, self._every, self._mask = energy, count(every, "every", "Recorder"), mask
        drawn = noise.resolve_seed(arguments.counter(seed), generator, torch.device("cpu"), "Recorder")
        self._place = {"seed": drawn, "stream": noise.stream(noise.Purpose.MOMENTUM, grid)}
        self._first_sample, self._keep = first_sample, keep
        self._exact = chain if isinstance(chain, Corrected) else _exact(chain)
        self._plain = chain.by_step()[-1] if isinstance(chain, Langevin) else None
        recorded = -(-chain.steps // every)
        self._shown = {round(i) for i in np.linspace(0, recorded - 1, max(2, states))}
        self._batches: list[list[dict]] = []
        self._states: list[tuple[int, Tensor]] = []
        self._last, self._count = math.inf, 0  # so that the first step begins a batch
        self._target: Target | None = None
        self._projections: Tensor | None = None

    def __call__(self, step: int, x: Tensor) -> None:
        if step <= self._last:  # another batch of the same chain
            if self._batches:
                self._first_sample += len(self._batches[-1][0]["energy"])
            self._batches.append([])
            self._count, self._target = 0, None
        self._last = step
        if self._count % self._every == 0:
            with torch.no_grad(), untouched(self._energy):
                self._record(step, x.detach())
        self._count += 1

    def _record(self, step: int, x: Tensor) -> None:
        records = self._batches[-1]
        if len(self._batches) == 1 and len(records) in self._shown:
            self._states.append((step, x[: self._keep].cpu().clone()))
        target = self._target = self._target or self._make_target(x)
        energy = target.energies(x)
        potential = energy + target.reference(x)
        values = {"step": step, "energy": energy, "potential": potential}
        moved = torch.ones_like(x[:1], dtype=torch.bool) if target.mask is None else target.mask
        updated = moved.expand(x.shape).flatten(1).sum(1)
        if self._exact is not None:
            force = target.force(x)
            values["gradient_to_noise"] = self._exact.step_size / 2 * (squares(force) / updated).sqrt()
            momentum = target.momentum(x, step=step + 1, first_sample=self._first_sample, **self._place)
            proposal = propose(target, State(x, potential, force), momentum, self._exact.step_size, self._exact.path)
            values["log_acceptance"] = proposal.log_ratio
        flat = torch.where(moved, x, 0).double().flatten(1)  # what is held would keep chains apart for ever
        mean = flat.sum(1, keepdim=True) / updated.clamp(min=1)[:, None]
        values["quantities"] = torch.cat([mean, flat @ self._directions(flat)], 1)
        records.append(
            {key: value.cpu().numpy() if isinstance(value, Tensor) else value for key, value in values.items()}
        )

    def _make_target(self, x: Tensor) -> Target:
        self.coupled = coupling(self._energy, x)
        if self._exact is not None:
            return self._exact.target(self._energy, x, mask=self._mask, precision="fp32", coupled=bool(self.coupled))
        assert self._plain is not None
        mask = None if self._mask is None else check_mask(self._mask, x, "Recorder")
        return Target(
            self._energy, plan(self._energy, x, "fp32", "Recorder"), self._plain.inverse_variance,
            self._plain.reference_mean, mask=mask, where="Recorder",
        )  # fmt: skip

    def _directions(self, flat: Tensor) -> Tensor:
        """(elements, PROJECTIONS) fixed random directions of unit length, the same in every session."""
        if self._projections is None:
            draw = torch.randn(
                flat.shape[1], PROJECTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
            self._projections = (draw / draw.norm(dim=0)).to(flat.device)
        return self._projections

    def trace(self, samples: int | None = None) -> Trace:
        """What was recorded, of the first `samples` chains; ValueError before anything was."""
        if not self._batches:
            raise ValueError("Recorder: the chain must have made a step before its trace is asked for")

        def joined(key: str) -> np.ndarray | None:
            if key not in self._batches[0][0]:
                return None
            return np.concatenate([np.stack([r[key] for r in batch]) for batch in self._batches], 1)[:, :samples]

        energy, potential, quantities = joined("energy"), joined("potential"), joined("quantities")
        assert energy is not None and potential is not None and quantities is not None
        names = ["mean", *(f"projection {i + 1}" for i in range(PROJECTIONS))]
        return Trace(
            steps=np.array([record["step"] for record in self._batches[0]]),
            energy=energy,
            potential=potential,
            gradient_to_noise=joined("gradient_to_noise"),
            log_acceptance=joined("log_acceptance"),
            quantities={"potential": potential, **{name: quantities[:, :, i] for i, name in enumerate(names)}},
            states=self._states,
        )


def _exact(chain: Langevin) -> MALA | None:
    return None if chain.varying or chain.update().noise_std == 0 else MALA.correcting(chain)
