"""What a training run is: frozen values, made of a table, changed by `key=value`, and written back whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from ...gradient import PRECISIONS
from ...nets.layers import ACTIVATIONS
from ...sampling import Langevin
from .keys import (
    MOST_CHANNELS,
    MOST_ELEMENTS,
    MOST_LENGTH,
    MOST_SAMPLES,
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
    nearest,
    pick,
    shortened,
)
from .method import METHODS, tables
from .sections import LangevinConfig, OptimiserConfig, RollbackConfig, StabiliseConfig
from .toml import parse, written


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run. Every key has a default, a kind that checks it, and a line of help (`describe_keys`).

    `options` holds the method's own keys, the table of its name in a TOML file; None for a method that has none.
    """

    name: str = key("custom", Text(), "name of the preset or configuration")
    description: str = key("", Text(), "one line on what it is")
    time: str = key("not measured", Text(), "what the preset takes, and on what")
    method: str = key("multigrid", Choice(METHODS), "update rule", fixed=True)
    data: str = key("digits", Text(), "built-in set, path, or torchvision name")
    classes: tuple = key((), Many(Text()), "names of the classes to learn; empty: all", fixed=True)
    channels: int = key(1, Whole(1, MOST_CHANNELS), "1 grey, 3 colour", fixed=True)
    sizes: tuple = key(
        (1, 2, 4, 8),
        Many(Whole(1, MOST_LENGTH), most=16),  # of a clip of sound, its samples
        "the grids, coarse to fine; the first has no net",
        fixed=True,
    )
    width: float = key(1.0, Real(0, 64, above=True), "multiplies hidden channels", fixed=True)
    variant: str = key("compact", Choice(("A", "B", "compact")), "family of nets", fixed=True)
    norm: str = key("none", Choice(("batch", "none")), "normalisation of the nets", fixed=True)
    activation: Any = key(
        None,
        Auto(Choice(ACTIVATIONS)),
        "of the nets; auto: the variant's own",
        fixed=True,
    )
    spectral_norm: bool = key(False, Flag(), "spectral normalisation of every weight", fixed=True)
    value_range: tuple = key((-1.0, 1.0), Many(Real(-1e6, 1e6), 2), "what pixel values 0 and 255 become", fixed=True)
    steps: int = key(1000, Whole(0, MOST_UPDATES), "parameter updates")
    seed: int = key(0, Whole(0, 2**64 - 1), "of everything that is drawn", fixed=True)
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
    precision: str = key("auto", Choice(PRECISIONS), "of the gradient inside chains: auto is 16 bits where that pays")
    langevin: LangevinConfig = dataclasses.field(default_factory=lambda: LangevinConfig(drift=1.0, noise_std=0.03))
    optimiser: OptimiserConfig = dataclasses.field(default_factory=OptimiserConfig)
    stabilise: StabiliseConfig = dataclasses.field(default_factory=StabiliseConfig)
    rollback: RollbackConfig = dataclasses.field(default_factory=RollbackConfig)
    options: Any = None

    def __post_init__(self) -> None:
        if self.options is None:
            object.__setattr__(self, "options", METHODS[self.method].options())

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

    def noise_factors(self, iteration: int) -> tuple[float, ...]:
        """What chain and data noise of each net are multiplied by at update `iteration`.

        Linear from 1 to noise_anneal, reached at noise_anneal_share of the run, and constant from there. Where noise
        falls to the end, as the learning rate does, the weights lag behind it, and samples vary less than the data.
        """
        factors = []
        for index in range(len(self.sizes) - 1):
            until = pick(self.stabilise.noise_anneal_share, index) * (self.steps - 1)
            passed = min(1.0, iteration / max(1.0, until))
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
                fields[name] *= noise_factors[index]
            try:
                chains.append(Langevin(**fields))
            except (TypeError, ValueError) as error:
                reason = str(error).removeprefix("Langevin: ")
                raise ConfigError(f"langevin: {reason} (a key is cleared by --set langevin.KEY=none)") from None
        return tuple(chains)

    def to_dict(self) -> dict[str, Any]:
        """Plain TOML types; keys that hold none are left out."""
        values = dataclasses.asdict(self)
        options = values.pop("options")
        return _plain(values if options is None else {**values, self.method: options})

    def to_toml(self) -> str:
        return written(self.to_dict())


@functools.cache
def _sections() -> dict[str, type]:
    """The tables of a configuration, by name: those of every run, and those of the methods."""
    common = {
        "langevin": LangevinConfig, "optimiser": OptimiserConfig, "stabilise": StabiliseConfig,
        "rollback": RollbackConfig,
    }  # fmt: skip
    return {**common, **tables()}


def from_dict(values: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """A checked configuration; every key left out keeps its default. ConfigError names the key and what it must be.

    A `[langevin]` table starts from no form at all, so that it gives exactly one; without the table it is
    `LangevinConfig(drift=1.0, noise_std=0.03)`.
    """
    read: dict[str, Any] = {}
    for name, value in values.items():
        section = _sections().get(name)
        if section is None:
            read[name] = _read(_kind(name, where), name, value, where)
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{where}: {name} must be a table of keys such as {name}.{_first(section)}, got {value!r}"
            )
        entries = {k: _read(_kind(f"{name}.{k}", where), f"{name}.{k}", v, where) for k, v in value.items()}
        if name in tables() and name != (method := values.get("method", TrainConfig.method)):
            raise ConfigError(
                f"{where}: {name} holds keys of the method {name!r}, the method of this run is {method!r}"
            )
        read["options" if name in tables() else name] = section(**entries)
    config = TrainConfig(**read)
    try:
        _check_together(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def apply_overrides(config: TrainConfig, overrides: Iterable[str]) -> TrainConfig:
    """`config` with `key=value` assignments: TOML values, bare words as strings, `none` to clear an optional key.

    Lists may leave out their brackets (`sizes=1,2,4`), and a list of strings may be one word (`classes=automobile`).
    `langevin.step_size` replaces a decoupled form, and `langevin.drift` a coupled one. New `sizes` take lists with a
    value for each net along: a size keeps its value, a new one takes that of the nearest size; of annealed noise the
    finest takes the finest's.
    """
    values, given = config.to_dict(), set()
    for override in overrides:
        name, equals, text = override.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(f"--set: must be key=value, got {shortened(override)}")
        kind = _kind(name, "--set")
        section, _, leaf = name.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        value = _read(kind, name, _value(text.strip(), kind), "--set")
        target[leaf] = value
        given |= {name} if value is not None else set()
    return from_dict(_settled(values, given, config.sizes), "--set")


def merge(config: TrainConfig, changes: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """`config` with the given keys replaced; a section takes a mapping of its own keys. The Python form of --set."""
    values, given = config.to_dict(), set()
    for name, value in changes.items():
        if isinstance(value, Mapping) and name in _sections():
            values[name] = {**values.get(name, {}), **value}
            given |= {f"{name}.{leaf}" for leaf, entry in value.items() if entry is not None}
        else:
            values[name] = _read(_kind(name, where), name, value, where)
            given.add(name)
    return from_dict(_settled(values, given, config.sizes), where)


def _settled(values: dict[str, Any], given: set[str], before: tuple[int, ...]) -> dict[str, Any]:
    """`values` after the keys `given` were set: without the form of the chain that a newly given one replaces,
    without the table of a method that was left, without keys that hold none, and with lists that had an entry for
    each net of the sizes `before` fitted to new sizes."""
    for name in tables().keys() - {values["method"]}:
        if not any(key.startswith(f"{name}.") for key in given):
            values.pop(name, None)
    forms = {"step_size": ("drift", "noise_std"), "drift": ("step_size", "noise_scale")}
    for name, replaced in forms.items():
        if f"langevin.{name}" in given:
            for other in replaced:
                if f"langevin.{other}" not in given:
                    values["langevin"].pop(other, None)
    sizes = values["sizes"]
    if "sizes" in given:
        for name in set(_per_grid_keys()) - given:
            section, _, leaf = name.partition(".")
            value = values[section].get(leaf)
            if isinstance(value, list):
                if name in _BY_RANK:  # the finest keeps the finest's, a coarse one takes the nearest coarse one's
                    coarse = before[1:-1] or before[1:]
                    fitted = [*(value[_nearest_size(size, coarse)] for size in sizes[1:-1]), value[-1]]
                else:
                    fitted = [value[_nearest_size(size, before[1:])] for size in sizes[1:]]
                values[section][leaf] = fitted
    return {
        name: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }


def _nearest_size(size: int, among: Sequence[int]) -> int:
    """The index of the size with the smallest ratio to `size`, the smaller one of two."""
    return min(range(len(among)), key=lambda i: max(size / among[i], among[i] / size))


def describe_keys() -> list[tuple[str, str, Any, str]]:
    """(key, what it may hold, default, help) of every key, for documentation and `--help`."""
    return [
        (name, field.metadata["kind"].expected, field.metadata["kind"].shown(field.default), field.metadata["doc"])
        for name, (_, field) in _fields().items()
    ]


@functools.cache
def _fields() -> dict[str, tuple[type, dataclasses.Field]]:
    found: dict[str, tuple[type, dataclasses.Field]] = {}
    for field in dataclasses.fields(TrainConfig):
        if "kind" in field.metadata:
            found[field.name] = (TrainConfig, field)
    for name, section in _sections().items():
        found.update({f"{name}.{leaf.name}": (section, leaf) for leaf in dataclasses.fields(section)})
    return found


def _per_grid(kind: Kind) -> bool:
    return isinstance(kind.kind if isinstance(kind, Maybe) else kind, PerGrid)


@functools.cache
def _per_grid_keys() -> list[str]:
    """The keys, outside the methods' tables, that may have one value for each net."""
    methods = tables().values()
    return [
        name
        for name, (section, field) in _fields().items()
        if section not in methods and _per_grid(field.metadata["kind"])
    ]


def fixed_keys(method: str) -> list[str]:
    """The keys that a resumed run of `method` may not change, since the states of the run depend on them."""
    others = tables().keys() - {method}
    return [
        name
        for name, (_, field) in _fields().items()
        if field.metadata["fixed"] and name.partition(".")[0] not in others
    ]


# Matched by position, not by pixel size: only the finest net starts no other chain.
_BY_RANK = ("stabilise.noise_anneal", "stabilise.noise_anneal_share")


def _first(section: type) -> str:
    return dataclasses.fields(section)[0].name


def _kind(name: str, where: str) -> Kind:
    if name in _sections():
        raise ConfigError(
            f"{where}: {name} is a table of keys, set one of them, such as {name}.{_first(_sections()[name])}"
        )
    if name not in _fields():
        raise ConfigError(f"{where}: unknown key {shortened(name)}{nearest(name, list(_fields()))}")
    return _fields()[name][1].metadata["kind"]


def _read(kind: Kind, name: str, value: Any, where: str) -> Any:
    try:
        return kind.read(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {name} must be {kind.expected}, got {shortened(value)}{error}") from None


def _value(text: str, kind: Kind) -> Any:
    """The TOML value of a command-line word. A bare word is a string, `1,2,4` a list."""
    inner = kind.kind if isinstance(kind, (Auto, Maybe)) else kind
    if isinstance(inner, Text):
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
    for candidate in (text, f"[{text}]") if isinstance(inner, (Many, PerGrid)) else (text,):
        try:
            parsed = parse(f"value = {candidate}")
        except ValueError:
            continue
        if list(parsed) == ["value"]:
            return parsed["value"]
    if isinstance(inner, Many) and isinstance(inner.kind, Text):
        return [word.strip() for word in text.strip("[]").split(",") if word.strip()]
    return text


def _check_together(config: TrainConfig) -> None:
    """What no key can say alone."""
    sizes = config.sizes
    if len(sizes) < 2 or sizes[0] != 1:
        raise ConfigError(f"sizes must start at 1 and hold at least one more size, got {list(sizes)}")
    for coarse, fine in zip(sizes, sizes[1:], strict=False):
        if fine <= coarse or fine % coarse:
            raise ConfigError(
                f"sizes must grow, each dividing the next, as in [1, 4, 16, 64], got {list(sizes)} "
                f"({coarse} does not divide {fine})"
            )
    if config.batch_size % config.batch_parts:
        raise ConfigError(f"batch_parts must divide batch_size, {config.batch_size}, got {config.batch_parts}")
    low, high = config.value_range
    if not low < high:
        raise ConfigError(f"value_range must be [low, high] with low < high, got {list(config.value_range)}")
    for name in _per_grid_keys():
        section, _, leaf = name.partition(".")
        value = getattr(getattr(config, section), leaf)
        if isinstance(value, tuple) and len(value) != len(sizes) - 1:
            raise ConfigError(
                f"{name} must be one value, or a list of {len(sizes) - 1} for the nets of sizes "
                f"{list(sizes[1:])}, got {len(value)} values"
            )
    elements = config.batch_size * config.channels * sizes[-1] ** 2
    if METHODS[config.method].takes == "images" and elements >= MOST_ELEMENTS:
        raise ConfigError(
            f"batch_size must leave a batch below {MOST_ELEMENTS} pixels, at {config.channels} channels and size "
            f"{sizes[-1]}, got {config.batch_size}"
        )
    config.dynamics()


def _plain(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _plain(value) for name, value in values.items() if value is not None}
    return [_plain(value) for value in values] if isinstance(values, (list, tuple)) else values
