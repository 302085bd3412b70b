"""Multi-grid energy-based models of images, sampled and trained at the speed of the hardware.

Names load when they are first used, so that `import mgebm_fast` and `mgebm --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import data, energies, evaluation, gradient, learning, models, nets, noise, ops, pictures, sampling
    from .errors import BackendError, CheckpointError, ConfigError, DataError, DivergenceError
    from .learning import MultiGridTrainer, load
    from .models import MultiGrid
    from .nets import EnergyNet, negative
    from .sampling import HMC, MALA, Langevin, Schedule, langevin_sample

__version__ = "0.1.0"

_MODULES = (
    "data", "energies", "evaluation", "gradient", "learning", "models", "nets", "noise", "ops", "pictures", "sampling",
)  # fmt: skip
_NAMES = {
    "BackendError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "DivergenceError": "errors",
    "EnergyNet": "nets",
    "HMC": "sampling",
    "Langevin": "sampling",
    "MALA": "sampling",
    "MultiGrid": "models",
    "MultiGridTrainer": "learning",
    "Schedule": "sampling",
    "langevin_sample": "sampling",
    "load": "learning",
    "negative": "nets",
}

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "EnergyNet",
    "HMC",
    "Langevin",
    "MALA",
    "MultiGrid",
    "MultiGridTrainer",
    "Schedule",
    "data",
    "energies",
    "evaluation",
    "gradient",
    "langevin_sample",
    "learning",
    "load",
    "models",
    "negative",
    "nets",
    "noise",
    "ops",
    "pictures",
    "sampling",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _NAMES:
        value = globals()[name] = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
