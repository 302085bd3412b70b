"""Langevin chains and the multi-grid cascade."""

from .langevin import Langevin, langevin_sample
from .multigrid import MultiGrid
from .single import SingleGrid

__all__ = ["Langevin", "MultiGrid", "SingleGrid", "langevin_sample"]
