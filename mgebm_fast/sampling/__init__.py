"""Chains of any energy: Langevin chains, exact chains (MALA, HMC), and the cascade of sizes."""

from ..ops.varying import Schedule
from .langevin import Langevin, langevin_sample
from .mcmc import HMC, MALA

__all__ = ["HMC", "MALA", "Langevin", "Schedule", "langevin_sample"]
