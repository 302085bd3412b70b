"""Learning: what a run is (TrainConfig), how it is trained (MultiGridTrainer), and its folder (Run)."""

from .config import (
    LangevinConfig,
    OptimiserConfig,
    StabiliseConfig,
    TrainConfig,
    apply_overrides,
    describe_keys,
    load_config,
    load_preset,
    merge,
    preset_names,
)
from .contrastive import ContrastiveRule
from .loop import Loop, Outcome, UpdateRule, check_new
from .multigrid import MultiGridRule, build_model
from .run import Run, load_data
from .trainer import MultiGridTrainer, train

__all__ = [
    "ContrastiveRule",
    "LangevinConfig",
    "Loop",
    "MultiGridRule",
    "MultiGridTrainer",
    "OptimiserConfig",
    "Outcome",
    "Run",
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
]
