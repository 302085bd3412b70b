"""What a model or data that a trainer is given settle of a configuration, and whether a given model fits one."""

from __future__ import annotations

from typing import Any

from ..data import Clips, ImageData
from ..errors import ConfigError
from ..models import EnergyModel, MultiGrid, SingleGrid
from ..nets import ResidualNet, ScoreNet
from .config.method import METHODS
from .config.train_config import TrainConfig
from .config.values import merge

# Where a model and a configuration are both given, these must agree.
_SHARED = ("sizes", "channels", "norm", "value_range")


def describe_model(model: EnergyModel) -> dict[str, Any]:
    """The configuration keys that a given model settles. ValueError where its chains cannot be written as keys."""
    first = model.nets[0]
    built = isinstance(first, ScoreNet)  # a module of one's own says nothing of these keys
    clamps = {chain.clamp for chain in model.langevin}
    if clamps not in ({None}, {model.value_range}):
        raise ValueError(
            "MultiGridTrainer: every chain of the model must clamp to its value_range "
            f"{model.value_range}, or none of them, got {sorted(map(str, clamps))}"
        )
    own = {}
    if isinstance(model, MultiGrid):
        own = {
            "conditional": bool(model.classes), "sample_steps": model.sample_steps, "denoise": model.denoise,
            "upsampling": model.upsampling, "cycles": model.cycles or None,
        }  # fmt: skip
    chains: dict[str, Any] = {"clamp": clamps == {model.value_range}}
    for name in (
        "steps", "step_size", "noise_scale", "drift", "noise_std", "reference_std", "reference_mean", "grad_clamp",
    ):  # fmt: skip
        values = [getattr(chain, name) for chain in model.langevin]
        alike = len(set(values)) == 1 and not isinstance(values[0], tuple)  # a list alone would be a value a net
        chains[name] = values[0] if alike else values
    return {
        "sizes": list(model.sizes),
        "channels": model.channels,
        "width": list(model.width) if isinstance(model.width, tuple) else model.width,
        "variant": model.variant,
        "depth": first.depth if isinstance(first, ResidualNet) else 1,
        "norm": "batch" if model.norm == "batch" else "none",
        "activation": first.activation if built else None,
        "spectral_norm": first.spectral_norm if built else False,
        "value_range": list(model.value_range),
        "batch_size": model.batch_size,
        "langevin": chains,
        "classes": list(model.classes),
        "multigrid": own,
    }


def check_fit(model: EnergyModel, config: TrainConfig) -> None:
    """ValueError unless `model` is what `config`, as its method reads it and with the classes of the data, trains."""
    for name in _SHARED:
        ours, theirs = getattr(config, name), getattr(model, name)
        if ours != theirs and not (name == "norm" and theirs == "frozen"):
            raise ValueError(f"MultiGridTrainer: config.{name} must be the model's, {theirs!r}, got {ours!r}")
    if isinstance(model, SingleGrid) and model.start != (start := METHODS[config.method].start.sampled_from):
        raise ValueError(
            f"MultiGridTrainer: the model's start must be {start!r}, what a sample of the method {config.method!r} "
            f"starts from, got {model.start!r}"
        )
    if not isinstance(model, MultiGrid):
        return
    conditional, named = getattr(config.options, "conditional", False), ", ".join(model.classes) or "none"
    if bool(model.classes) != conditional:
        raise ValueError(
            f"MultiGridTrainer: multigrid.conditional must be {str(not conditional).lower()} for a model with the "
            f"classes {named}, got {str(conditional).lower()}"
        )
    if conditional and tuple(model.classes) != tuple(config.classes):
        raise ValueError(
            f"MultiGridTrainer: the model's classes must be those of the data in their order, "
            f"{', '.join(config.classes)}, got {named}"
        )


def with_classes(config: TrainConfig, data: ImageData | Clips) -> TrainConfig:
    """The configuration with the names of the data's classes, where each is to have an energy of its own."""
    if not getattr(config.options, "conditional", False):
        return config
    if not isinstance(data, ImageData) or data.labels is None or len(data.class_names) < 2:
        got = "none" if not isinstance(data, ImageData) or data.labels is None else ", ".join(data.class_names)
        raise ConfigError(f"multigrid.conditional: data must have labels of two classes or more, got {got}")
    if config.classes and tuple(config.classes) != data.class_names:
        got = f"{', '.join(data.class_names)}"
        raise ConfigError(f"multigrid.conditional: data must be of the classes {', '.join(config.classes)}, got {got}")
    return merge(config, {"classes": list(data.class_names)})
