"""How a run runs: the loop, its batches, its folder and checkpoints, going on, going back, and several ranks."""

from .folder import check_new
from .loop import Loop, Outcome
from .rule import UpdateRule
from .stored_run import Run, load

__all__ = ["Loop", "Outcome", "Run", "UpdateRule", "check_new", "load"]
