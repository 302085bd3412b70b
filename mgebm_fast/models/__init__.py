"""What is trained, stored and sampled: nets with their chains, generators, and the files that hold them."""

from .convnet import Frame, GenerativeConvNet
from .energies import EnergyModel
from .generated import CoopNets, GeneratorModel
from .model import Model
from .multigrid import MultiGrid
from .single import OneNet, SingleGrid
from .spatial_temporal import SpatialTemporal

__all__ = [
    "CoopNets",
    "EnergyModel",
    "Frame",
    "GenerativeConvNet",
    "GeneratorModel",
    "Model",
    "MultiGrid",
    "OneNet",
    "SingleGrid",
    "SpatialTemporal",
]
