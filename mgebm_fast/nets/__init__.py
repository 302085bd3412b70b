"""Energy nets: bottom-up ConvNets with one energy a sample, and the published architectures."""

from .energy_net import ConvSpec, EnergyNet
from .multigrid import VARIANTS, compact_layers, multigrid_layers, multigrid_net

__all__ = ["VARIANTS", "ConvSpec", "EnergyNet", "compact_layers", "multigrid_layers", "multigrid_net"]
