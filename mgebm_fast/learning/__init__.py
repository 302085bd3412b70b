"""Learning: what a run is (TrainConfig), by which method (METHODS), how it is trained, and its folder (Run)."""

from .abp import ABPRule
from .baselines import SingleGridRule
from .config import TrainConfig, apply_overrides, describe_keys, merge
from .config_files import load_config, load_preset, preset_names
from .contrastive import ContrastiveRule
from .cooperative import CooperativeRule
from .loop import Loop, Outcome
from .methods import METHODS, Method, build_model, work
from .multigrid import MultiGridRule
from .resuming import check_new
from .rule import UpdateRule
from .run import Run, load_data
from .sections import LangevinConfig, OptimiserConfig, RollbackConfig, StabiliseConfig
from .trainer import MultiGridTrainer, train

__all__ = [
    "METHODS",
    "ABPRule",
    "ContrastiveRule",
    "CooperativeRule",
    "LangevinConfig",
    "Loop",
    "Method",
    "MultiGridRule",
    "MultiGridTrainer",
    "OptimiserConfig",
    "Outcome",
    "RollbackConfig",
    "Run",
    "SingleGridRule",
    "StabiliseConfig",
    "TrainConfig",
    "UpdateRule",
    "apply_overrides",
    "build_model",
    "check_new",
    "describe_keys",
    "load_config",
    "load_data",
    "load_preset",
    "merge",
    "preset_names",
    "train",
    "work",
]
