"""Nets: bottom-up ConvNets with one energy a sample, the published architectures, and top-down generators."""

from .energy_net import ConvSpec, EnergyNet
from .generator import DeconvSpec, Generator, generator_layers
from .multigrid import VARIANTS, compact_layers, multigrid_layers, multigrid_net
from .negative import Negative, negative

__all__ = [
    "VARIANTS",
    "ConvSpec",
    "DeconvSpec",
    "EnergyNet",
    "Generator",
    "Negative",
    "compact_layers",
    "generator_layers",
    "multigrid_layers",
    "multigrid_net",
    "negative",
]
