"""What a run is: its keys and their tables, the files and presets that give them, and the methods' entries."""

from .files import load_config, load_preset, preset_names
from .method import METHODS, Method, build_model, load_data
from .sections import LangevinConfig, OptimiserConfig, RollbackConfig, StabiliseConfig
from .train_config import TrainConfig, describe_keys
from .values import apply_overrides, merge

__all__ = [
    "METHODS",
    "LangevinConfig",
    "Method",
    "OptimiserConfig",
    "RollbackConfig",
    "StabiliseConfig",
    "TrainConfig",
    "apply_overrides",
    "build_model",
    "describe_keys",
    "load_config",
    "load_data",
    "load_preset",
    "merge",
    "preset_names",
]
