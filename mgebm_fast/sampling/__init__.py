"""Langevin chains, exact chains (MALA, HMC), and the multi-grid cascade."""

from .langevin import Langevin, langevin_sample
from .mcmc import HMC, MALA
from .multigrid import MultiGrid
from .single import SingleGrid

__all__ = ["HMC", "MALA", "Langevin", "MultiGrid", "SingleGrid", "langevin_sample"]
