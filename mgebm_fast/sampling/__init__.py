"""Langevin chains and the multi-grid cascade."""

from .langevin import Langevin, langevin_sample
from .multigrid import MultiGrid

__all__ = ["Langevin", "MultiGrid", "langevin_sample"]
