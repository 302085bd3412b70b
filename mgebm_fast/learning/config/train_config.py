"""What a training run is: a frozen value with every key of it, and the tables of its keys."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

from ...errors import ConfigError, InputError, Refused
from ...gradient import PRECISIONS
from ...nets import VARIANTS
from ...nets.layers import ACTIVATIONS
from ...sampling import Langevin, Schedule
from .keys import (
    MOST_CHANNELS,
    MOST_GRIDS,
    MOST_LENGTH,
    MOST_SAMPLES,
    MOST_SIDE,
    MOST_UPDATES,
    Auto,
    Choice,
    Flag,
    Kind,
    Many,
    Maybe,
    PerGrid,
    Real,
    Text,
    Whole,
    key,
    pick,
)
from .sections import (
    METHOD_TABLES,
    LangevinConfig,
    OptimiserConfig,
    RollbackConfig,
    StabiliseConfig,
    WatchConfig,
    tables,
)
from .toml import written


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run. Every key has a default, a kind that checks it, and a line of help (`describe_keys`).

    `options` holds the method's own keys, the table of its name in a TOML file; None for a method that has none.
    """

    name: str = key("custom", Text(), "name of the preset or configuration")
    description: str = key("", Text(), "one line on what it is")
    time: str = key("not measured", Text(), "what the preset takes, and on what")
    method: str = key("multigrid", Choice(METHOD_TABLES), "update rule", fixed=True)
    data: str = key("digits", Text(), "built-in set, path, or torchvision name")
    classes: tuple = key((), Many(Text()), "names of the classes to learn; empty: all", fixed=True)
    channels: int = key(1, Whole(1, MOST_CHANNELS), "1 grey, 3 colour", fixed=True)
    sizes: tuple = key(
        (1, 2, 4, 8),
        Many(Whole(1, MOST_LENGTH), most=MOST_GRIDS),  # a clip of sound has so many samples
        "the grids, coarse to fine; the first has no net",
        fixed=True,
    )
    width: Any = key(
        1.0,
        PerGrid(Real(0, 64, above=True)),
        "multiplies hidden channels; of a list, methods of one net take the last",
        fixed=True,
    )
    variant: str = key("compact", Choice(VARIANTS), "family of nets", fixed=True)
    depth: int = key(1, Whole(1, 64), "residual blocks a stage, of the variant residual; 1 for others", fixed=True)
    norm: str = key("none", Choice(("batch", "none")), "normalisation of the nets", fixed=True)
    activation: Any = key(
        None,
        Auto(Choice(ACTIVATIONS)),
        "activation of the nets; auto: the variant's own",
        fixed=True,
    )
    spectral_norm: bool = key(False, Flag(), "spectral normalisation of every weight", fixed=True)
    value_range: tuple = key((-1.0, 1.0), Many(Real(-1e6, 1e6), 2), "what pixel values 0 and 255 become", fixed=True)
    begin: Any = key(
        0.0,
        PerGrid(Real(0, 1, below=True)),
        "share of the run after which a net begins, its chains and its learning; 0 of the coarsest",
    )
    steps: int = key(1000, Whole(0, MOST_UPDATES), "parameter updates")
    seed: int = key(0, Whole(0, 2**64 - 1), "seed of everything that is drawn", fixed=True)
    batch_size: int = key(64, Whole(1, MOST_SAMPLES), "observed images and chains an update", fixed=True)
    batch_parts: int = key(
        1,
        Whole(1, MOST_SAMPLES),
        "equal parts of a batch, run one by one or by ranks; 1 under ranks: one a rank",
        fixed=True,
    )
    checkpoint_every: int = key(250, Whole(0, MOST_UPDATES), "updates between checkpoints; 0: only the last")
    sample_every: int = key(250, Whole(0, MOST_UPDATES), "updates between sample pictures; 0: only the last")
    log_every: int = key(10, Whole(1, MOST_UPDATES), "updates between lines of metrics")
    keep_checkpoints: int = key(3, Whole(1, MOST_UPDATES), "newest checkpoints kept")
    flips: bool = key(False, Flag(), "mirror half of the observed images, left to right", fixed=True)
    shifts: int = key(
        0, Whole(0, MOST_SIDE), "observed images are moved by up to so many pixels, mirrored at the border", fixed=True
    )
    precision: str = key(
        "auto",
        Choice(PRECISIONS),
        "precision of gradients in chains, and in learning on CPUs: auto is 16 bits where it pays",
    )
    learning_precision: str = key(
        "auto",
        Choice(("auto", "fp32", "tf32", "bf16")),
        "precision in which nets learn on a GPU: auto is fp32 where `precision` is, else tf32",
    )
    graph: Any = key(
        None, Auto(Flag()), "updates as CUDA graphs: auto: where a GPU can; true: or an error that says why not; false"
    )
    start_from: Any = key(
        None, Maybe(Text()), "run, checkpoint or model file whose weights training starts from", fixed=True
    )
    start_optimiser: bool = key(False, Flag(), "take the optimiser's state of `start_from` as well", fixed=True)
    langevin: LangevinConfig = dataclasses.field(default_factory=lambda: LangevinConfig(drift=1.0, noise_std=0.03))
    optimiser: OptimiserConfig = dataclasses.field(default_factory=OptimiserConfig)
    stabilise: StabiliseConfig = dataclasses.field(default_factory=StabiliseConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    rollback: RollbackConfig = dataclasses.field(default_factory=RollbackConfig)
    options: Any = None

    def __post_init__(self) -> None:
        if self.options is None and (table := METHOD_TABLES[self.method]) is not None:
            object.__setattr__(self, "options", table())

    def model_arguments(self) -> dict[str, Any]:
        """What every model of energy nets takes from a configuration."""
        return {
            "channels": self.channels,
            "langevin": self.dynamics(),
            "norm": self.norm,
            "activation": self.activation,
            "spectral_norm": self.spectral_norm,
            "value_range": self.value_range,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def first_updates(self) -> tuple[int, ...]:
        """The update, from 0, that each net begins at: after `begin` of the run, and no later than its last one."""
        shares = [pick(self.begin, index) for index in range(len(self.sizes) - 1)]
        return tuple(max(0, min(self.steps - 1, math.floor(share * self.steps + 1e-9))) for share in shares)

    def paced_as(self, before: TrainConfig, made: int, named: Collection[str] = ()) -> TrainConfig:
        """This configuration, of the run `before` that goes on after `made` updates with other `steps`: rates, noise
        and the nets that are to join are those of a run of so many steps; nets that learn already joined when they did.

        named: keys that were set by hand, and stay.
        """
        firsts = before.first_updates()
        if self.steps in (0, before.steps) or self.sizes != before.sizes or "begin" in named or not any(firsts):
            return self
        joins = [
            first if first < made else max(made, share)
            for first, share in zip(firsts, self.first_updates(), strict=True)
        ]
        return dataclasses.replace(self, begin=tuple(min(first, self.steps - 1) / self.steps for first in joins))

    def noise_factors(self, iteration: int) -> tuple[float, ...]:
        """The factor of chain and data noise of each net at update `iteration`.

        Linear from 1 to noise_anneal, reached at noise_anneal_share of the updates that the net makes, and constant
        from there. Where noise falls to the end, as the learning rate does, the weights lag behind it, and samples vary
        less than the data.
        """
        factors = []
        for index, first in enumerate(self.first_updates()):
            until = pick(self.stabilise.noise_anneal_share, index) * (self.steps - first - 1)
            passed = min(1.0, max(0, iteration - first) / max(1.0, until))
            factors.append(1.0 + (pick(self.stabilise.noise_anneal, index) - 1.0) * passed)
        return tuple(factors)

    def dynamics(self, noise_factors: Sequence[float] | None = None) -> tuple[Langevin, ...]:
        """The chain of each net, its noise multiplied by its factor. ConfigError where the numbers do not fit."""
        section, chains = self.langevin, []
        for index in range(len(self.sizes) - 1):
            fields = {f.name: pick(getattr(section, f.name), index) for f in dataclasses.fields(section)}
            fields["clamp"] = self.value_range if section.clamp else None
            if noise_factors is not None:
                name = "noise_std" if fields["noise_std"] is not None else "noise_scale"
                value, factor = fields[name], noise_factors[index]
                fields[name] = tuple(v * factor for v in value) if isinstance(value, tuple) else value * factor
            try:
                chains.append(Langevin(**fields))
            except Refused as error:
                raise ConfigError(f"langevin.{error.words}, at size {self.sizes[index + 1]}") from None
            except InputError as error:
                raise ConfigError(f"{error.words} (a key is cleared by --set langevin.KEY=none)", "langevin") from None
        return tuple(chains)

    def to_dict(self) -> dict[str, Any]:
        """Plain TOML types, from which `from_dict` makes this configuration again. Keys that hold nothing by default
        and hold nothing here are left out."""
        values = _plain(self)
        return values if self.options is None else {**values, self.method: _plain(self.options)}

    def to_toml(self) -> str:
        return written(self.to_dict())


@functools.cache
def sections() -> dict[str, type]:
    """The tables of a configuration, by name: those of every run, and those of the methods."""
    common = {
        "langevin": LangevinConfig, "optimiser": OptimiserConfig, "stabilise": StabiliseConfig,
        "watch": WatchConfig, "rollback": RollbackConfig,
    }  # fmt: skip
    return {**common, **tables()}


@functools.cache
def all_keys() -> dict[str, tuple[type, dataclasses.Field]]:
    keys: dict[str, tuple[type, dataclasses.Field]] = {}
    for field in dataclasses.fields(TrainConfig):
        if "kind" in field.metadata:
            keys[field.name] = (TrainConfig, field)
    for name, section in sections().items():
        keys.update({f"{name}.{leaf.name}": (section, leaf) for leaf in dataclasses.fields(section)})
    return keys


def describe_keys() -> list[tuple[str, str, Any, str]]:
    """(key, what it may hold, default, help) of every key, for documentation and `--help`."""
    return [
        (name, field.metadata["kind"].expected, field.metadata["kind"].shown(field.default), field.metadata["doc"])
        for name, (_, field) in all_keys().items()
    ]


def default_of(name: str) -> Any:
    """The default of a key, as `to_dict` gives it; None where it is left out there."""
    field = all_keys()[name][1]
    return None if field.default is None else _listed(field.metadata["kind"].shown(field.default))


def fixed_keys(method: str) -> list[str]:
    """The keys that a resumed run of `method` may not change, since the states of the run depend on them."""
    others = tables().keys() - {method}
    return [
        name
        for name, (_, field) in all_keys().items()
        if field.metadata["fixed"] and name.partition(".")[0] not in others
    ]


def _per_grid(kind: Kind) -> bool:
    return isinstance(kind.kind if isinstance(kind, Maybe) else kind, PerGrid)


@functools.cache
def per_grid_keys() -> list[str]:
    """The keys that may have one value for each net."""
    return [name for name, (_, field) in all_keys().items() if _per_grid(field.metadata["kind"])]


def _plain(section: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if "kind" not in field.metadata:  # a table; that of the method's own keys has another name
            values |= {field.name: _plain(value)} if field.name != "options" else {}
        elif value is not None or field.default is not None:
            values[field.name] = _listed(field.metadata["kind"].shown(value))
    return values


def _listed(value: Any) -> Any:
    if isinstance(value, Schedule):
        return dataclasses.asdict(value)
    return [_listed(entry) for entry in value] if isinstance(value, (list, tuple)) else value
