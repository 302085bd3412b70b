"""What a run has come to multiply learning rates and the noise on observed images by, beside its configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from ..distributed import Ranks

MOST_GROWTH = 4.0  # of the noise on observed images, by stiffness
_UP, _DOWN = 1.0015, 1.0005  # an update's: twice the noise after 460 updates, half of that again after 1,400
_MOST_UPDATES = 100  # that one record counts for: it is a measurement at 16 images
_CALM = 0.75  # of the bound: where stiffness is below this share of it, noise goes back


@dataclasses.dataclass(frozen=True)
class Factors:
    """Of one net."""

    rate: float = 1.0  # of its learning rate
    data_noise: float = 1.0  # of the noise on its observed images


class Growth:
    """The factor of the noise on each net's observed images that keeps its chains from overshooting.

    Where drift times the curvature of an energy is above 1, chains vary more the steeper it is, and a net that is to
    make them vary less runs away. What bounds the curvature is noise on observed images. With each record, where k is
    the net's `stiffness` (`methods.synthesis.largest_curvature`), and u the number of updates between two records, at
    most 100,

        factor <- min(4, factor · 1.0015^u)         where k > bound
        factor <- max(1, factor / 1.0005^u)         where k < 3/4 bound

    Args:
        bounds: `stabilise.stiffness` of the nets that have a bound and noise, by their names in metrics.
        log_every: updates between two records.
    """

    def __init__(self, bounds: Mapping[str, float], log_every: int) -> None:
        self.bounds, self._updates = bounds, min(log_every, _MOST_UPDATES)
        self.factors: dict[str, float] = {}

    def take(self, metrics: Mapping[str, float], ranks: Ranks) -> bool:
        """Take in a record, of the first rank for all; whether a factor is another now."""
        if not self.bounds:
            return False
        found = {net: k for net in self.bounds if (k := metrics.get(f"{net}/stiffness")) is not None}
        if ranks.size > 1:
            found = json.loads(ranks.tell(json.dumps(found)))
        before = dict(self.factors)
        for net, stiffness in found.items():
            factor, bound = self.factors.get(net, 1.0), self.bounds[net]
            if stiffness > bound:
                self.factors[net] = min(MOST_GROWTH, factor * _UP**self._updates)
            elif stiffness < _CALM * bound and factor > 1.0:
                self.factors[net] = max(1.0, factor / _DOWN**self._updates)
        return self.factors != before

    def restore(self, factors: Mapping[str, float]) -> None:
        """Take over `factors` of a state; a net whose bound was taken away since begins anew."""
        self.factors = {net: float(factor) for net, factor in factors.items() if net in self.bounds}
