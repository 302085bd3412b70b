"""Learning: what a run is (config), how it runs (run), what it learns (methods), and the trainer over them."""

from .config import (
    METHODS,
    LangevinConfig,
    Method,
    OptimiserConfig,
    RollbackConfig,
    StabiliseConfig,
    TrainConfig,
    apply_overrides,
    build_model,
    describe_keys,
    load_config,
    load_data,
    load_preset,
    merge,
    preset_names,
)
from .methods import ABPRule, ContrastiveRule, CooperativeRule, MultiGridRule, SingleGridRule, work
from .run import Loop, Outcome, Run, UpdateRule, check_new, load
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
    "load",
    "load_config",
    "load_data",
    "load_preset",
    "merge",
    "preset_names",
    "train",
    "work",
]
