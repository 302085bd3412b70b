"""What is watched in a run so that it cannot collapse unseen.

Everything here reads numbers that updates measure anyway: it draws nothing, and changes no arithmetic of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....errors import DivergenceError
from ...config.train_config import TrainConfig
from ..distributed import Ranks

WINDOW = 100  # updates in the running mean of a gap; also the warm-up before bounds relative to the past apply
_FAST = 20  # updates in the running mean that shows where a gap stands now
# In energies: gaps below these have not run away, whatever they were before; nets whose gap is 0.003 in the mean have
# single ones of 0.2 in healthy runs. The second is of growth alone: without L2 energies have no scale.
_LEAST_GAP, _LEAST_FREE_GAP = 1.0, 100.0
_LEAST_CHANGE = 0.05  # of the range of pixels: a batch within this of the running mean is like the others
_IMAGES = 1.5  # images that may be unlike the others in a batch without it being so
_DEVIATIONS = 12.0  # mean absolute deviations beyond which a batch is unlike the others
_OF_BATCHES = {"mean": "mean of its pixels", "std": "std of its pixels", "step": "mean step between its neighbours"}
_GAP = "/gap"

_STEEP = (
    "stabilise.stiffness = 0.8 (more noise on the observed images of nets that are steep), stabilise.data_noise (at "
    "twice the noise of a chain's step nets are less steep, and chains overshoot less), optimiser.lr, or "
    "stabilise.noise_anneal (less annealing: gradients grow while the noise falls)"
)
_ADVICE = {
    "gap": (
        "stabilise.stiffness = 0.8 (more noise on the observed images of nets that are steep), optimiser.lr (halve it, "
        "of this net alone if others hold), stabilise.energy_l2 (the wall of the gap is at 1/energy_l2), or "
        "stabilise.data_noise, which must be at least the chain's own noise (with twice that nets are less steep)"
    ),
    "steepness": _STEEP,
    "clamped": _STEEP,
    "saturated": "langevin.drift or optimiser.lr; stabilise.data_noise_clamp must be true where chains are clamped",
    "spread": "langevin.noise_std or langevin.drift, optimiser.lr, or stabilise.data_noise",
    "batch": "the data (a damaged file, an array with other units); `mgebm train --strict` refuses unreadable images",
    "generator": "the generator's learning rate, or the step size of inference",
}


class RunAway(DivergenceError):
    """A run is collapsing: every number is finite still. `part` is what shows it: a net as metrics name it, "generator"
    or "data"; `kind` is which watch it was."""

    def __init__(self, message: str, part: str = "", kind: str = "gap") -> None:
        super().__init__(message)
        self.part, self.kind = part, kind

    @property
    def net(self) -> str:
        return in_words(self.part)

    @property
    def advice(self) -> str:
        return _ADVICE[self.kind]


def in_words(part: str) -> str:
    """What `part` of a `RunAway` is called: "the net of size 8" of "size_8"."""
    return f"the net of {part.replace('_', ' ')}" if part.startswith("size_") else f"the {part}"


class Watch:
    """Looks for a collapse in what updates measure. Per grid, with a = |mean E(observed) − mean E(synthesised)|,

        a > rollback.gap_max
        a > max(rollback.gap_ratio · m, 1)                      m: running mean of a over WINDOW updates
        f > watch.gap_growth · max(h, 1)  (without L2: 100)      f: running mean of a over 20 updates; h: the highest f
                                                                at least WINDOW updates ago
        f > watch.gap_wall / energy_l2                          at |gap| = 1/energy_l2 the loss cannot fall further
        g > watch.clamped                                       g: root mean square of the chain's gradient over
                                                                langevin.grad_clamp
        g > watch.steepness · h                                 h: the highest g at least WINDOW updates ago
        s > s(data) + watch.saturated                           s: share of pixels at an end of value_range
        r or 1/r > watch.spread                                 r: std of the samples' pixels over that of the data

    the last four over `watch.patience` records in a row. Bounds relative to the past begin after 2·WINDOW updates, that
    of g after 5·WINDOW, since young nets grow; the others but gap_max after WINDOW. A generator's residual and its
    latent variables are bounded as f is. A batch is refused before it is learnt from if it is not finite, or if the
    mean of its pixels, their std, or the mean step between neighbours leaves that of the batches before it by 12 mean
    absolute deviations, and by 5 % of the range and what one image and a half can do.

    The state is plain numbers, exact in JSON, so that a resumed run trips where the uninterrupted one does.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.count = self.batches = 0
        self.begun: dict[str, int] = {}  # the count that a grid was first seen at, where that was not 0
        self.means: dict[str, float] = {}  # of gaps
        self.levels: dict[str, list[float]] = {}  # mean now, its peak in this block, in the last, in those before
        self.steepness: dict[str, list[float]] = {}  # the block of updates; g's peak in it, the last, those before
        self.strikes: dict[str, int] = {}  # records in a row out of bounds
        self.of_batches: dict[str, list[float]] = {}  # running mean and mean absolute deviation
        self.rollback, self.bounds, self.value_range = config.rollback, config.watch, config.value_range
        self.log_every = config.log_every
        self.wall, self.least_gap = None, _LEAST_GAP if config.stabilise.energy_l2 else _LEAST_FREE_GAP
        if config.stabilise.energy_l2 and config.watch.gap_wall:
            self.wall = config.watch.gap_wall / config.stabilise.energy_l2

    # batches

    def check_batch(self, batch: Tensor, update: int) -> None:
        """RunAway where a batch, on the CPU, is unlike those before it; taken in otherwise."""
        if not self.bounds.on or batch.numel() < 2:
            return
        low, high = (0.0, 255.0) if batch.dtype == torch.uint8 else self.value_range
        pixels = batch.float()
        mean = pixels.mean()
        std = (pixels - mean).square_().mean().sqrt()  # torch.std takes 30 times as long
        steps = pixels.diff(dim=-1).abs_().mean() if batch.dim() > 1 and batch.shape[-1] > 1 else std
        shares = {
            name: float(number) / (high - low) for name, number in (("mean", mean), ("std", std), ("step", steps))
        }
        least, taken = max(_LEAST_CHANGE, _IMAGES / len(batch)), {}
        if not all(map(math.isfinite, shares.values())):
            raise RunAway(f"training: the batch of update {update} has pixels that are not finite", "data", "batch")
        count = self.batches
        for name, value in shares.items():
            centre, deviation = self.of_batches.get(name, [value, 0.0])
            distance = abs(value - centre)
            if count >= WINDOW and distance > max(_DEVIATIONS * deviation, least):
                raise RunAway(
                    f"training: the batch of update {update} is unlike those before it: the {_OF_BATCHES[name]} is "
                    f"{value:.3g} of the range, where it was {centre:.3g} ± {deviation:.2g}",
                    "data",
                    "batch",
                )
            share = 1 / min(WINDOW, count + 1)
            taken[name] = [centre + (value - centre) * share, deviation + (distance - deviation) * share]
        self.of_batches, self.batches = taken, count + 1

    # measurements

    def check(self, metrics: Mapping[str, float], update: int) -> None:
        """Take in what update number `update` (from 1) measured; RunAway where it is out of bounds: those of
        `[rollback]` hold without `watch.on` too."""
        gaps = {name.removesuffix(_GAP): abs(value) for name, value in metrics.items() if name.endswith(_GAP)}
        for grid, gap in gaps.items():
            if self.count and grid not in self.means:
                self.begun[grid] = self.count
            self._check_gap(grid, gap, update)
        self.count += 1
        for grid, gap in gaps.items():
            before = self.means.get(grid, 0.0)
            self.means[grid] = before + (gap - before) / min(WINDOW, self._age(grid))
            if self.bounds.on:
                self._check_level(grid, gap, update, "gap", self.wall)
        if not self.bounds.on:
            return
        for name in ("generator/residual", "latent/mean_square"):
            if name in metrics:
                self._check_level(name, abs(metrics[name]), update, "generator", None)
        if update % self.log_every == 0:  # where a run stopped there may be a record, which a longer one does not have
            self._check_samples(metrics, update)

    def _age(self, name: str) -> int:
        """Updates taken in since the grid, or whatever has a level of its own, began."""
        return self.count - self.begun.get(name, 0)

    def check_together(self, ranks: Ranks, metrics: Mapping[str, float], update: int, logged: bool) -> None:
        """`check` for all ranks alike: what records alone have is of one rank's part, and there the first decides."""
        if ranks.size == 1 or not logged:
            return self.check(metrics, update)
        said = ""
        try:
            self.check(metrics, update)
        except RunAway as error:
            said = "\n".join((error.part, error.kind, str(error)))
        if said := ranks.tell(said):
            part, kind, words = said.split("\n", 2)
            raise RunAway(words, part, kind)

    def _check_gap(self, grid: str, gap: float, update: int) -> None:
        highest, ratio, bounds = self.rollback.gap_max, self.rollback.gap_ratio, []
        if highest is not None:
            bounds.append((highest, "rollback.gap_max"))
        if ratio is not None and self._age(grid) >= WINDOW and (mean := self.means[grid]) > 0:
            bounds.append((max(ratio * mean, _LEAST_GAP), f"{ratio:g} times its running mean, rollback.gap_ratio"))
        for bound, name in bounds:
            if gap > bound:
                raise self._ran_away(grid, gap, bound, name, update)

    def _check_level(self, name: str, value: float, update: int, kind: str, wall: float | None) -> None:
        """`value` of this update against the highest running mean that it had before, and against a wall."""
        mean, peak, last, highest = self.levels.get(name, [value, 0.0, 0.0, 0.0])
        age = self._age(name)
        mean += (value - mean) / min(_FAST, age)
        growth, least = self.bounds.gap_growth, _LEAST_GAP if kind == "generator" else self.least_gap
        if growth and age > 2 * WINDOW and mean > (bound := growth * max(highest, least)):
            raise self._ran_away(name, mean, bound, f"{growth:g} times its highest before, watch.gap_growth", update)
        if wall is not None and age > WINDOW and mean > wall:
            share = f"{self.bounds.gap_wall:g} of the wall that stabilise.energy_l2 sets, watch.gap_wall"
            raise self._ran_away(name, mean, wall, share, update)
        peak = max(peak, mean)
        if self.count % WINDOW == 0:  # the block of updates that ends here counts as past when the next has ended
            peak, last, highest = 0.0, peak, max(highest, last)
        self.levels[name] = [mean, peak, last, highest]

    def _ran_away(self, name: str, value: float, bound: float, which: str, update: int) -> RunAway:
        if "/" in name:
            words = f"training: {name} ran away at update {update}: {value:.3g}, more than {bound:.3g} ({which})"
            return RunAway(words, "generator", "generator")
        grid = name.replace("_", " ")
        return RunAway(
            "training: the mean energies of observed and synthesised images ran away from each other at update "
            f"{update}: {value:.3g} apart at {grid}, more than {bound:.3g} ({which})",
            name,
        )

    def _check_samples(self, metrics: Mapping[str, float], update: int) -> None:
        """What records alone have: gradients at their bound, saturated pixels, and spread."""
        found = {}
        for name, value in metrics.items():
            grid, _, what = name.partition("/")
            if what == "gradient_clamped" and self.bounds.clamped and value > self.bounds.clamped:
                found[name] = (
                    "clamped",
                    f"the gradient of its chain is at {value:.0%} of langevin.grad_clamp, more than "
                    f"{self.bounds.clamped:.0%} (watch.clamped)",
                )
            elif what == "gradient_clamped" and (highest := self._steepest_before(grid, value)):
                if self.bounds.steepness and value > self.bounds.steepness * highest:
                    found[name] = (
                        "steepness",
                        f"the gradient of its chain is {value / highest:.2g} times its highest before, more than "
                        f"{self.bounds.steepness:g} (watch.steepness)",
                    )
            elif what == "saturated" and self.bounds.saturated and value > self.bounds.saturated:
                found[name] = (
                    "saturated",
                    f"{value:.0%} more of its samples' pixels than of the data's are at the ends of value_range, where "
                    f"{self.bounds.saturated:.0%} may be (watch.saturated)",
                )
            elif what == "spread" and self.bounds.spread:
                apart = value if value >= 1 else 1 / max(value, 1e-30)
                if not apart <= self.bounds.spread:
                    found[name] = (
                        "spread",
                        f"the std of its samples' pixels is {value:.3g} times the data's, more than a factor of "
                        f"{self.bounds.spread:g} away (watch.spread)",
                    )
        old = [name for name in found if self._age(name.partition("/")[0]) > WINDOW]
        counts = {name: self.strikes.get(name, 0) + 1 for name in old}
        if any(name.endswith("/spread") for name in metrics):  # a record, and not an update between records
            self.strikes = counts
            for name, times in counts.items():
                if times >= self.bounds.patience:
                    kind, words = found[name]
                    grid = name.partition("/")[0]
                    said = f"training: {grid.replace('_', ' ')} collapses at update {update}: {words}"
                    raise RunAway(said, grid, kind)

    def _steepest_before(self, grid: str, value: float) -> float:
        """The highest of a grid's values at least WINDOW updates ago; 0 while it is young. Takes this one in."""
        now = self.count // WINDOW
        block, peak, last, highest = self.steepness.get(grid, [now, 0.0, 0.0, 0.0])
        if block != now:  # the block that ended counts as past when the next has ended
            peak, last, highest = 0.0, peak, max(highest, last)
        self.steepness[grid] = [now, max(peak, value), last, highest]
        return highest if self._age(grid) > 5 * WINDOW else 0.0

    # what a checkpoint holds of it

    def state(self) -> dict[str, Any]:
        return {
            "count": self.count, "means": dict(self.means), "levels": {k: list(v) for k, v in self.levels.items()},
            "strikes": dict(self.strikes), "batches": self.batches,
            "steepness": {k: list(v) for k, v in self.steepness.items()},
            "of_batches": {k: list(v) for k, v in self.of_batches.items()}, "begun": dict(self.begun),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        self.count, self.means = int(state.get("count", 0)), dict(state.get("means", {}))
        self.levels = {k: list(v) for k, v in state.get("levels", {}).items()}
        self.strikes = dict(state.get("strikes", {}))
        self.steepness = {k: list(v) for k, v in state.get("steepness", {}).items()}
        self.batches = int(state.get("batches", 0))
        self.of_batches = {k: list(v) for k, v in state.get("of_batches", {}).items()}
        self.begun = dict(state.get("begun", {}))
