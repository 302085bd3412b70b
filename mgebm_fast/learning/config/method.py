"""The registry of methods: one entry each, made by the modules of `learning/methods`.

An entry holds every fact of a method, so that TOML files, `--set`, `mgebm train` and `mgebm presets` need no other
place to learn of a new one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ...data import builtin, load
from ...models import Model
from .sections import METHOD_TABLES
from .train_config import TrainConfig


def _load_images(
    config: TrainConfig, *, source: Any = None, split: str = "train", strict: bool = False, like: Any = None
) -> Any:
    return load(
        builtin.explicit(config.data) if source is None else source,
        size=config.sizes[-1],
        channels=config.channels,
        classes=list(config.classes) or None,
        split=split,
        strict=strict,
        like=like,
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """A learning method: an update rule and an initial state over the one loop of every run.

    Keys of `table` that a resumed run may not change are marked `fixed` where they are declared (`keys.key`).
    """

    name: str
    about: str  # one line for `mgebm presets`
    model: type[Model]  # what it trains; model files name its class
    rule: Callable[..., Any]  # (model, config, *, images: how many the data set has) -> UpdateRule
    build_model: Callable[[TrainConfig], Any]  # the untrained model; ConfigError where the keys do not fit each other
    work: Callable[[Any, TrainConfig], float]  # (model, config) -> multiply-accumulates an update and image (`work`)
    table: type | None = None  # the method's own keys, at `[name]` in a TOML file
    narrow: Callable[[TrainConfig], TrainConfig] = lambda config: config  # the configuration as the method uses it
    start: Any = None  # where the chains of a method of one net begin in training (`baselines.InitialState`)
    # keys that a run of a configuration does not read, and why: the end of "must be left at its default …"
    idle: Callable[[TrainConfig], Mapping[str, str]] = lambda config: {}
    takes: str = "images"  # or "clips", of a recording
    load_data: Callable[..., Any] = _load_images  # (config, *, source, split, strict, like) -> ImageData or Clips


METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known by its name."""
    assert method.name not in METHODS, method.name
    METHODS[method.name], METHOD_TABLES[method.name] = method, method.table


def build_model(config: TrainConfig) -> Any:
    """The untrained model that a configuration describes, of the class that its method trains."""
    return METHODS[config.method].build_model(config)


def load_data(
    config: TrainConfig, *, source: Any = None, split: str = "train", strict: bool = False, like: Any = None
) -> Any:
    """The data that a configuration names, as its method takes them: an `ImageData` at the finest size and with the
    configuration's channels and classes, or `Clips` of a recording.

    `source` replaces `config.data`; `strict` refuses a set with an image that cannot be read; by `like`, the
    fingerprint of a run's data, images are divided as they were then.
    """
    return METHODS[config.method].load_data(config, source=source, split=split, strict=strict, like=like)
