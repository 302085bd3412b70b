"""What a run has come to multiply learning rates and the noise on observed images by, beside its configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .distributed import Ranks

MOST_GROWTH = 4.0  # of the noise on observed images, by stiffness
# An update's: twice the noise after 460 updates, half of what was added gone after 1,400.
_UP, _DOWN = 1.0015, 1.0005
_CALM = 0.75  # of the bound: where stiffness is below this share of it, noise goes back


@dataclasses.dataclass(frozen=True)
class Factors:
    """Of one net."""

    rate: float = 1.0  # of its learning rate
    data_noise: float = 1.0  # of the noise on its observed images


class Growth:
    """The factor of the noise on each net's observed images that keeps its chains from overshooting.

    Where drift times the curvature of an energy is above 1, chains vary more the steeper it is, and a net that is to
    make them vary less runs away. What bounds the curvature is noise on observed images. With the record of an update,
    u updates after the last one, where k is the net's `stiffness` (`methods.synthesis.largest_curvature`) and its bound
    is `stabilise.stiffness`, none where that is 0,

        factor <- min(4, factor · 1.0015^u)         where k > bound
        factor <- max(1, factor / 1.0005^u)         where k < 3/4 bound
    """

    def __init__(self, bounds: Mapping[str, float]) -> None:
        self.bounds = {net: bound for net, bound in bounds.items() if bound}  # by the nets' names in metrics
        self.factors: dict[str, float] = {}
        self._last = 0  # update of the last record

    def take(self, metrics: Mapping[str, float], update: int, ranks: Ranks) -> bool:
        """Take in the record of update number `update`, of the first rank for all; whether a factor is another now."""
        if not self.bounds:
            return False
        found = {net: k for net in self.bounds if (k := metrics.get(f"{net}/stiffness")) is not None}
        if ranks.size > 1:
            found = json.loads(ranks.tell(json.dumps(found)))
        before, updates = dict(self.factors), update - self._last
        for net, stiffness in found.items():
            factor, bound = self.factors.get(net, 1.0), self.bounds[net]
            if stiffness > bound:
                self.factors[net] = min(MOST_GROWTH, factor * _UP**updates)
            elif stiffness < _CALM * bound and factor > 1.0:
                self.factors[net] = max(1.0, factor / _DOWN**updates)
        self._last = update
        return self.factors != before

    def state(self) -> dict[str, Any]:
        """Plain numbers, exact in JSON."""
        return {"factors": dict(self.factors), "last": self._last}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.factors, self._last = dict(state.get("factors", {})), int(state.get("last", 0))
