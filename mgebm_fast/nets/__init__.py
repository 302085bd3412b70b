"""Nets: bottom-up nets with one energy a sample, the published architectures, and top-down generators."""

from .energy_net import ConvSpec, EnergyNet
from .generator import DeconvSpec, Generator, generator_layers
from .multigrid import VARIANTS, compact_layers, from_config, multigrid_layers, multigrid_net, residual_stages
from .negative import Negative, negative
from .residual import ResidualNet
from .score_net import ScoreNet

__all__ = [
    "VARIANTS",
    "ConvSpec",
    "DeconvSpec",
    "EnergyNet",
    "Generator",
    "Negative",
    "ResidualNet",
    "ScoreNet",
    "compact_layers",
    "from_config",
    "generator_layers",
    "multigrid_layers",
    "multigrid_net",
    "negative",
    "residual_stages",
]
