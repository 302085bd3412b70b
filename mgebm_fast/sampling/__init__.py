"""Langevin chains, exact chains (MALA, HMC), and the multi-grid cascade."""

from .convnet import Frame, GenerativeConvNet
from .generated import CoopNets, GeneratorModel
from .langevin import Langevin, langevin_sample
from .mcmc import HMC, MALA
from .model import Model
from .multigrid import MultiGrid
from .single import SingleGrid
from .spatial_temporal import SpatialTemporal

__all__ = [
    "HMC",
    "MALA",
    "CoopNets",
    "Frame",
    "GenerativeConvNet",
    "GeneratorModel",
    "Langevin",
    "Model",
    "MultiGrid",
    "SingleGrid",
    "SpatialTemporal",
    "langevin_sample",
]
