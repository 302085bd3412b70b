"""The updates of a run in their order: their batches, and what the watch finds in them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..distributed import Ranks
from ..feed import Batches
from ..rule import UpdateRule
from .watch import RunAway, Watch

_OTHERS = 3  # draws of other images for an update whose batch was refused, before the data are at fault as a whole


class Updates:
    """The updates of a rule, in their order, and what the watch finds in them.

    `at` is the update that is looked at: of an error, the one that it is about.
    """

    def __init__(
        self, rule: UpdateRule, batches: Batches, watch: Watch, ranks: Ranks, say: Callable[[str], None]
    ) -> None:
        self.rule, self.batches, self.watch, self.ranks, self._say = rule, batches, watch, ranks, say
        self.at = self._seen = 0  # _seen: batches that the watch has taken in
        self._others: dict[int, int] = {}  # updates whose batch was refused: which draw of other images they have
        self.headline = ""

    def begin(self, iteration: int) -> None:
        """Go on from another state."""
        self.rule.forget()
        self.at = self._seen = iteration
        self._others = {}

    def launch(self, iteration: int, detail: bool) -> dict[str, float] | None:
        """Launch an update; None where one before it could not be applied: `at`, which is made again."""
        self.at = iteration
        try:
            batch = self._batch(iteration)
        except RunAway:  # unless an update before was the first to go wrong
            if self.collect(iteration, False, wait=True) is None:
                return None
            raise
        self.rule.launch(batch, iteration, detail=detail)
        return {}

    def _batch(self, iteration: int) -> Tensor:
        """The batch of an update, or other images where the watch refuses it; RunAway where it refuses those too.

        What was refused before a run was stopped is refused again when it is resumed, and the same images come instead.
        """
        if self.ranks.size > 1 or iteration < self._seen:
            return self.batches.batch(iteration, self._others.get(iteration, 0))
        refused: RunAway | None = None
        for other in range(1 if self.rule.knows_images else 1 + _OTHERS):
            batch = self.batches.batch(iteration, other)
            try:
                self.watch.check_batch(batch, iteration + 1)
            except RunAway as error:
                refused = refused or error
                continue
            self._seen = iteration + 1
            if refused:
                self._others[iteration] = other
                self._say(f"{refused}; left out, other images in its place")
            return batch
        assert refused is not None
        raise refused

    def collect(self, launched: int, logged: bool, *, wait: bool) -> dict[str, float] | None:
        """The metrics of the last of so many updates, {} where they are not here yet; None where one of them could not
        be applied: `at`, which is made again. RunAway where the watch finds a collapse, on all ranks alike."""
        metrics: dict[str, float] = {}
        found, following = self.rule.collect(launched, wait=wait)
        for self.at, metrics in found:
            last = self.at + 1 == launched
            self.watch.check_together(self.ranks, metrics, self.at + 1, logged and last)
        if found:
            self.headline = self.rule.headline(metrics)
        self.at = following
        return metrics if following == launched else None

    def settle(self, launched: int) -> int:
        """Read what a run launched that an error or a second signal ended; how many updates were made."""
        self.collect(launched, False, wait=True)
        return self.at
