"""The tables of a configuration that every method has. Those of one method alone stand in its module."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...noise import MAX_ATTEMPT
from .keys import MOST_STEPS, MOST_UPDATES, Choice, Flag, Many, Maybe, OverSteps, PerGrid, Real, Whole, key

_POSITIVE = Real(0, above=True)
_NOT_NEGATIVE = Real(0)
_POSITIVE_BY_STEP, _NOT_NEGATIVE_BY_STEP = PerGrid(OverSteps(_POSITIVE)), PerGrid(OverSteps(_NOT_NEGATIVE))


@dataclasses.dataclass(frozen=True)
class LangevinConfig:
    """`[langevin]`: the chain of every grid, x ← clamp(x − drift·(clip(∇E, ±c) + (x − m)/σ²) + noise_std·ε)."""

    steps: Any = key(30, PerGrid(Whole(1, MOST_STEPS)), "steps a grid, K", fixed=True)
    step_size: Any = key(None, Maybe(_POSITIVE_BY_STEP), "δ of the coupled form: drift δ²/2, noise noise_scale·δ")
    noise_scale: Any = key(1.0, _NOT_NEGATIVE_BY_STEP, "τ of the coupled form; 0 is noise-free descent")
    drift: Any = key(None, Maybe(_POSITIVE_BY_STEP), "drift of the decoupled form, with noise_std")
    noise_std: Any = key(None, Maybe(_NOT_NEGATIVE_BY_STEP), "noise of the decoupled form, with drift")
    reference_std: Any = key(None, Maybe(_POSITIVE_BY_STEP), "σ of the Gaussian reference; none: no reference")
    reference_mean: Any = key(0.0, PerGrid(Real()), "m of the Gaussian reference")
    grad_clamp: Any = key(None, Maybe(PerGrid(_POSITIVE)), "bound c on every entry of ∇E; none: no bound")
    clamp: bool = key(True, Flag(), "clamp pixels to value_range after every step")


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """`[optimiser]`: the update of every net, and what is done to its gradients before."""

    name: str = key("adam", Choice(("adam", "adamw", "muon", "sgd")), "update rule", fixed=True)
    lr: Any = key(1e-3, PerGrid(_POSITIVE), "learning rate")
    betas: tuple = key(
        (0.9, 0.999), Many(Real(0, 1, below=True), 2), "decay rates of the moments of adam, adamw and muon"
    )
    momentum: float = key(0.0, Real(0, 1, below=True), "momentum of sgd")
    muon_momentum: float = key(0.9, Real(0, 1, below=True), "momentum of muon's hidden layers")
    muon_rms: Any = key(0.5, PerGrid(_POSITIVE), "root mean square of an update of muon's hidden layers, over lr")
    weight_decay: float = key(0.0, _NOT_NEGATIVE, "L2 on the weights (decoupled in adamw and muon)")
    schedule: str = key("constant", Choice(("constant", "cosine", "linear", "step")), "learning rate over the run")
    warmup: int = key(0, Whole(0, MOST_UPDATES), "updates over which the rate climbs to lr")
    hold: float = key(0.0, Real(0, 1, below=True), "cosine, linear: share of the run at full rate before the decay")
    final_lr: float = key(0.0, Real(0, 1), "cosine, linear: factor that lr ends at")
    decay_every: int = key(1, Whole(1, MOST_UPDATES), "step: epochs between decays")
    decay_factor: float = key(1.0, Real(0, 1, above=True), "step: factor of a decay")
    grad_clip_norm: Any = key(None, Maybe(_POSITIVE), "bound on the gradient norm of each net")
    grad_clip_value: Any = key(None, Maybe(_POSITIVE), "bound on every gradient entry")
    grad_rescale_max: Any = key(None, Maybe(_POSITIVE), "each tensor's gradient is scaled so that max |g| <= this")
    per_layer_divide: bool = key(False, Flag(), "divide each layer's gradient by the area of its output feature map")


@dataclasses.dataclass(frozen=True)
class StabiliseConfig:
    """`[stabilise]`: what keeps a young energy from running away. Everything here is off at its default."""

    data_noise: Any = key(0.0, PerGrid(Real(0, 1e6)), "std of noise added to observed images, in value_range units")
    data_noise_clamp: bool = key(False, Flag(), "clamp observed images to value_range after their noise, as chains are")
    energy_l2: float = key(0.0, _NOT_NEGATIVE, "weight of mean E(observed)² + mean E(synthesised)² in the loss")
    ema: float = key(0.0, Real(0, 1, below=True), "decay of the averaged weights, used when sampling; 0: off")
    noise_anneal: Any = key(1.0, PerGrid(Real(0, 1)), "factor that chain and data noise fall to, linearly")
    noise_anneal_share: Any = key(
        1.0, PerGrid(Real(0, 1, above=True)), "share of the run after which noise is at that factor"
    )
    stiffness: Any = key(
        0.0, PerGrid(Real(0, 2)), "drift times curvature at samples, above which a net's data_noise grows; 0: no bound"
    )


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """`[watch]`: what counts as a collapse, besides numbers that are not finite and the bounds of `[rollback]`."""

    on: bool = key(True, Flag(), "look for run-away energies, collapsed samples and unlike batches, and keep the best")
    gap_growth: float = key(
        8.0,
        _NOT_NEGATIVE,
        "bound on the mean gap of 20 updates, in multiples of its highest before; 0: no bound",
    )
    gap_wall: float = key(0.25, Real(0, 1), "bound on the same mean, as a share of 1 / energy_l2; 0: no bound")
    clamped: float = key(0.9, Real(0, 1), "bound on the rms gradient of a chain over grad_clamp; 0: no bound")
    steepness: float = key(
        2.0, _NOT_NEGATIVE, "bound on the rms gradient of a chain, in multiples of its highest before; 0: no bound"
    )
    saturated: float = key(0.5, Real(0, 1), "bound on the share of pixels at the ends beyond the data's; 0: no bound")
    spread: float = key(3.0, _NOT_NEGATIVE, "bound on the factor between stds of samples and data; 0: no bound")
    patience: int = key(3, Whole(1, MOST_UPDATES), "records in a row of the last three before they count")


@dataclasses.dataclass(frozen=True)
class RollbackConfig:
    """`[rollback]`: what a diverging run does."""

    attempts: int = key(
        3, Whole(0, MAX_ATTEMPT), "times that a run which diverges goes back to its last good state; 0: it stops"
    )
    lr_factor: float = key(
        0.5,
        Real(0, 1, above=True),
        "each time, the learning rate is multiplied by this, for good; of several nets that of the one that ran away",
    )
    data_noise_factor: float = key(
        1.5,
        Real(1, 10),
        "each time, stabilise.data_noise of the same nets is multiplied by this, for good; none stays none",
    )
    gap_ratio: Any = key(
        30.0,
        Maybe(Real(1, above=True)),
        "bound on |mean E(observed) - mean E(synthesised)| of a grid, in multiples of its running mean; none: no bound",
    )
    gap_max: Any = key(None, Maybe(_POSITIVE), "bound on the same difference as it is, in energies; none: no bound")


# method -> its own table of keys, None for a method that has none; entered by `method.register`.
METHOD_TABLES: dict[str, type | None] = {}


def tables() -> dict[str, type]:
    """The methods' own tables of keys, by name."""
    return {name: table for name, table in METHOD_TABLES.items() if table is not None}
