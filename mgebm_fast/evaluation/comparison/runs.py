"""The runs of a comparison: which presets, with which seeds, and what is there of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data import ImageData
from ...data.fingerprint import difference
from ...errors import ConfigError
from ...learning import Run, TrainConfig, load_config, load_preset, preset_names
from ...learning.config.files import preset_base
from ...learning.run.checkpoint import listed, step_of

COMPARED = ("single-grid-cd", "cd", "pcd", "short-run", "cooperative")  # methods of the default contenders, in order
# Keys that may differ between a stored run and the comparison: results do not depend on them.
_IRRELEVANT = (
    "description", "time", "checkpoint_every", "sample_every", "log_every", "keep_checkpoints",
)  # fmt: skip


def contenders(first: str) -> list[str]:
    """What a preset is compared with unless others are named: those based on it, of the methods in `COMPARED`."""
    if first not in preset_names():
        raise ConfigError(f"compare: presets must be named where the first is no preset, got {first!r} alone")
    methods = {name: load_preset(name).method for name in preset_names() if preset_base(name) == first}
    names = [name for method in COMPARED for name in methods if methods[name] == method]
    if not names:
        raise ConfigError(f"compare: presets to compare {first!r} with must be named, since none is based on it")
    return names


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of a comparison: a preset's configuration with its seed, and where the run lies."""

    preset: str
    config: TrainConfig
    folder: Path

    @property
    def figures(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def title(self) -> str:
        return f"{self.preset}, seed {self.config.seed}"


def check_alike(configs: Sequence[TrainConfig]) -> None:
    """ConfigError where presets of a comparison would not learn from the same images, as their files name them."""
    names = [config.name for config in configs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"compare: presets must differ in name, got {twice!r} twice")
    first = configs[0]
    for config in configs:
        if config.method == "spatial-temporal":
            raise ConfigError(f"compare: presets must be of images, got {config.name!r}, of the method {config.method}")
        for name, ours, theirs in (
            ("data", config.data, first.data),
            ("classes", config.classes, first.classes),
            ("channels", config.channels, first.channels),
            ("the finest of sizes", config.sizes[-1], first.sizes[-1]),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"compare: presets must learn from the same images, but {name} of {config.name!r} is {ours!r} "
                    f"and of {first.name!r} {theirs!r}"
                )


def entries(configs: Sequence[TrainConfig], seeds: Sequence[int], out: Path) -> list[Entry]:
    """The runs of a comparison, preset by preset, of configurations that name the classes of class-conditional models
    (`with_classes`), as stored ones do."""
    return [
        Entry(config.name, dataclasses.replace(config, seed=seed), out / config.name / f"seed-{seed}")
        for config in configs
        for seed in seeds
    ]


def state(entry: Entry) -> str:
    """ "finished", "unfinished" or "missing". ConfigError where the folder holds a run with another configuration."""
    if not (entry.folder / "config.toml").is_file():
        return "missing"
    stored, wanted = _flat(load_config(entry.folder / "config.toml")), _flat(entry.config)
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise ConfigError(
                f"compare: {key} must be {wanted.get(key)!r}, as this comparison trains {entry.title}, got "
                f"{stored.get(key)!r} in {entry.folder}; move that run away, or choose another --out"
            )
    checkpoints = listed(entry.folder / "checkpoints")
    behind = bool(checkpoints) and step_of(checkpoints[-1]) < entry.config.steps
    run = Run(entry.folder)
    return "finished" if run.collapse or (run.finished and not behind) else "unfinished"


def check_data(entry: Entry, training: ImageData) -> None:
    """ConfigError where a run learnt from other images than these, by the fingerprint that it keeps of them."""
    stored = Run(entry.folder).fingerprint()
    if stored and (differs := difference(stored, training.fingerprint())):
        raise ConfigError(
            f"compare: data must be the images that {entry.title} learnt from, but {differs}; move "
            f"{entry.folder} away, or choose another --out"
        )


def _flat(config: TrainConfig) -> dict[str, Any]:
    """The keys that a run depends on, sections written out with dots."""
    keys: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if isinstance(value, dict):
            keys |= {f"{name}.{leaf}": entry for leaf, entry in value.items()}
        elif name not in _IRRELEVANT:
            keys[name] = value
    return keys
