"""From tables of values to a checked `TrainConfig`: a TOML file's, `key=value` words, and Python's mappings."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from .keys import MOST_ELEMENTS, Kind, Many, Maybe, PerGrid, Text, nearest, pick, shortened
from .method import METHODS
from .sections import METHOD_TABLES, tables
from .toml import parse
from .train_config import TrainConfig, all_keys, per_grid_keys, sections


def from_dict(values: Mapping[str, Any] | None, where: str = "config") -> TrainConfig:
    """A checked configuration; every key left out keeps its default. ConfigError names the key and what it must be.

    A `[langevin]` table starts from no form at all, so that it gives exactly one; without the table it is
    `LangevinConfig(drift=1.0, noise_std=0.03)`.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"must be a table of keys, got {values!r}", where)
    read: dict[str, Any] = {}
    for name, value in values.items():
        section = sections().get(name)
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
    finest takes the finest's, and the steps of samples are counted from there. `shifts` keep their share of the image.
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
    return _read_by_someone(from_dict(_settled(values, given, config.sizes), "--set"), given, "--set")


def merge(config: TrainConfig, changes: Mapping[str, Any], where: str = "config") -> TrainConfig:
    """`config` with the given keys replaced; a section takes a mapping of its own keys. The Python form of --set."""
    values, given = config.to_dict(), set()
    for name, value in changes.items():
        if isinstance(value, Mapping) and name in sections():
            read = {
                leaf: _read(_kind(f"{name}.{leaf}", where), f"{name}.{leaf}", v, where) for leaf, v in value.items()
            }
            values[name] = {**values.get(name, {}), **read}
            given |= {f"{name}.{leaf}" for leaf, entry in read.items() if entry is not None}
        else:
            values[name] = _read(_kind(name, where), name, value, where)
            given.add(name)
    return _read_by_someone(from_dict(_settled(values, given, config.sizes), where), given, where)


def _read_by_someone(config: TrainConfig, given: set[str], where: str) -> TrainConfig:
    """`config`; ConfigError where one of the keys `given` was set to what a run of it does not read. What it has from a
    base, a preset or another method is left alone."""
    method = METHODS[config.method]
    idle = dict(method.idle(config))
    if config.langevin.reference_std is None and not getattr(method.start, "at_reference_mean", False):
        idle["langevin.reference_mean"] = "without langevin.reference_std"
    if config.optimiser.name != "muon":
        idle |= dict.fromkeys(("optimiser.muon_rms", "optimiser.muon_momentum"), 'without optimiser.name = "muon"')
    if not any(pick(config.stabilise.data_noise, n) for n in range(len(config.sizes) - 1)):
        idle["stabilise.stiffness"] = "without stabilise.data_noise, which it raises"
    for name in sorted(given & idle.keys()):
        field = all_keys()[name][1]
        value = operator.attrgetter(name.replace(f"{config.method}.", "options."))(config)
        if value != field.default:
            default, got = (_written(field.metadata["kind"].shown(v)) for v in (field.default, value))
            raise ConfigError(f"{where}: {name} must be left at its default, {default}, {idle[name]}, got {got}")
    return config


def _written(value: Any) -> str:
    return shortened(list(value) if isinstance(value, tuple) else value)


# Matched by position, not by pixel size: only the finest net starts no other chain.
_BY_RANK = ("stabilise.noise_anneal", "stabilise.noise_anneal_share")
_FROM_THE_FINEST = ("multigrid.sample_steps",)  # beside `bank_grids`, which counts grids from there


def _settled(values: dict[str, Any], given: set[str], before: tuple[int, ...]) -> dict[str, Any]:
    """`values` after the keys `given` were set: without the form of the chain that a newly given one replaces,
    without the table of a method that was left, and with lists that had an entry for each net of the sizes `before`
    fitted to new sizes."""
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
    if "sizes" in given and "shifts" not in given:
        values["shifts"] = values.get("shifts", 0) * sizes[-1] // before[-1] if sizes else 0
    if "sizes" in given:
        for name in set(per_grid_keys()) - given:
            section, _, leaf = name.rpartition(".")
            table = values.get(section, {}) if section else values  # without those of other methods
            value = table.get(leaf)
            if isinstance(value, list):
                if name in _BY_RANK:  # the finest keeps the finest's, a coarse one takes the nearest coarse one's
                    coarse = before[1:-1] or before[1:]
                    fitted = [*(value[_nearest_size(size, coarse)] for size in sizes[1:-1]), value[-1]]
                elif name in _FROM_THE_FINEST:
                    fitted = [*value[:1] * len(sizes), *value][1 - len(sizes) :]
                else:
                    fitted = [value[_nearest_size(size, before[1:])] for size in sizes[1:]]
                if name == "begin" and fitted:
                    fitted[0] = 0.0  # the others start from it
                table[leaf] = fitted
        if "multigrid.cycles" not in given and (cycles := values.get("multigrid", {}).get("cycles")):
            values["multigrid"]["cycles"] = [size for size in cycles if size in sizes[1:-1]]
    return values


def _nearest_size(size: int, among: Sequence[int]) -> int:
    """The index of the size with the smallest ratio to `size`, the smaller one of two."""
    return min(range(len(among)), key=lambda i: max(size / among[i], among[i] / size))


def _first(section: type) -> str:
    return dataclasses.fields(section)[0].name


def _kind(name: str, where: str) -> Kind:
    if name in sections():
        raise ConfigError(
            f"{where}: {name} is a table of keys, set one of them, such as {name}.{_first(sections()[name])}"
        )
    if name not in all_keys():
        raise ConfigError(f"{where}: unknown key {shortened(name)}{nearest(name, list(all_keys()))}")
    return all_keys()[name][1].metadata["kind"]


def _read(kind: Kind, name: str, value: Any, where: str) -> Any:
    try:
        return kind.read(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {name} must be {kind.expected}, got {shortened(value)}{error}") from None


def _value(text: str, kind: Kind) -> Any:
    """The TOML value of a command-line word. A bare word is a string, `1,2,4` a list."""
    inner = kind.kind if isinstance(kind, Maybe) else kind
    if isinstance(inner, Text):
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text
    candidates = [text, f"[{text}]"] if isinstance(inner, (Many, PerGrid)) else [text]
    if isinstance(inner, PerGrid):  # words in tables: {start=1, end=0.1, shape=cosine}
        candidates += [re.sub(r"=\s*([a-z]+)\s*(?=[,}])", r'="\1"', candidate) for candidate in candidates]
    for candidate in candidates:
        try:
            parsed = parse(f"value = {candidate}")
        except ValueError:
            continue
        if list(parsed) == ["value"] and (isinstance(parsed["value"], list) or not isinstance(inner, Many)):
            return parsed["value"]
    if isinstance(inner, Many) and isinstance(inner.kind, Text):
        return [word.strip() for word in text.strip("[]").split(",") if word.strip()]
    return text


def _check_together(config: TrainConfig) -> None:
    """Raise for values that do not fit each other."""
    sizes = config.sizes
    if len(sizes) < 2 or sizes[0] != 1:
        raise ConfigError(f"sizes must start at 1 and hold at least one more size, got {list(sizes)}")
    for coarse, fine in zip(sizes, sizes[1:], strict=False):
        if fine <= coarse or fine % coarse:
            raise ConfigError(
                f"sizes must grow, each dividing the next, as in [1, 4, 16, 64], got {list(sizes)} "
                f"({coarse} does not divide {fine})"
            )
    if config.depth != 1 and config.variant != "residual":
        raise ConfigError(
            f"depth must be 1 for the variant {config.variant!r}, which has no blocks, got {config.depth}"
        )
    if config.batch_size % config.batch_parts:
        raise ConfigError(f"batch_parts must divide batch_size, {config.batch_size}, got {config.batch_parts}")
    low, high = config.value_range
    if not low < high:
        raise ConfigError(f"value_range must be [low, high] with low < high, got {list(config.value_range)}")
    for name in per_grid_keys():
        section, _, leaf = name.rpartition(".")
        if section in METHOD_TABLES and section != config.method:
            continue
        value = getattr(config.options, leaf) if section == config.method else operator.attrgetter(name)(config)
        if isinstance(value, tuple) and len(value) != len(sizes) - 1:
            raise ConfigError(
                f"{name} must be one value, or a list of {len(sizes) - 1} for the nets of sizes "
                f"{list(sizes[1:])}, got {len(value)} values"
            )
    for size in getattr(config.options, "cycles", None) or ():
        if size not in sizes[1:-1]:
            between = f"sizes among {list(sizes[1:-1])}, those between the first and the finest"
            raise ConfigError(f"{config.method}.cycles must hold {between}, got {size}")
    begins = [pick(config.begin, index) for index in range(len(sizes) - 1)]
    if begins[0] != 0 or sorted(begins) != begins:
        got = list(config.begin) if isinstance(config.begin, tuple) else config.begin
        raise ConfigError(
            "begin must be a list, with 0 for the coarsest net, which the others start from, that never falls from "
            f"there on, or 0, got {got}"
        )
    if config.shifts >= sizes[-1]:
        raise ConfigError(f"shifts must be below the finest size, {sizes[-1]}, got {config.shifts}")
    elements = config.batch_size * config.channels * sizes[-1] ** 2
    if METHODS[config.method].takes == "images" and elements >= MOST_ELEMENTS:
        raise ConfigError(
            f"batch_size must leave a batch below {MOST_ELEMENTS} pixels, at {config.channels} channels and size "
            f"{sizes[-1]}, got {config.batch_size}"
        )
    config.dynamics()
