"""Chains of any energy: Langevin chains, exact chains (MALA, HMC), and the cascade of sizes."""

from .langevin import Langevin, langevin_sample
from .mcmc import HMC, MALA

__all__ = ["HMC", "MALA", "Langevin", "langevin_sample"]
