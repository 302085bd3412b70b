"""What a run learns: one module a method, entered into `config.METHODS` in the order of these imports."""

from .multigrid import MultiGridRule  # isort: skip
from .baselines import SingleGridRule  # isort: skip
from .convnet import ConvNetRule  # isort: skip
from .frame import FrameRule  # isort: skip
from .cooperative import CooperativeRule  # isort: skip
from .abp import ABPRule  # isort: skip
from .spatial_temporal import SpatialTemporalRule  # isort: skip
from .contrastive import ContrastiveRule
from .work import with_work_of, work

__all__ = [
    "ABPRule",
    "ContrastiveRule",
    "ConvNetRule",
    "CooperativeRule",
    "FrameRule",
    "MultiGridRule",
    "SingleGridRule",
    "SpatialTemporalRule",
    "with_work_of",
    "work",
]
