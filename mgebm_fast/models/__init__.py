"""What is trained, stored and sampled: nets with their chains, generators, and the files that hold them."""

from .convnet import Frame, GenerativeConvNet
from .generated import CoopNets, GeneratorModel
from .model import Model
from .multigrid import MultiGrid
from .single import SingleGrid
from .spatial_temporal import SpatialTemporal

__all__ = [
    "CoopNets",
    "Frame",
    "GenerativeConvNet",
    "GeneratorModel",
    "Model",
    "MultiGrid",
    "SingleGrid",
    "SpatialTemporal",
]
