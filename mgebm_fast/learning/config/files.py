"""Configurations from files: the presets of the package, and TOML files of one's own."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ... import files
from ...errors import ConfigError, suggest
from .toml import MOST_BYTES, parse
from .train_config import TrainConfig
from .values import from_dict, merge

PRESETS = Path(__file__).resolve().parents[2] / "presets"


def load_config(name_or_path: str | Path) -> TrainConfig:
    """A preset by its name, or a TOML file by its path. ConfigError for anything else, with the nearest name."""
    text = str(name_or_path)
    if text in preset_names():
        return load_preset(text)
    path = Path(name_or_path)
    if path.exists() and not path.is_dir():
        return _load_file(path, str(path))
    if path.suffix == ".toml" or "/" in text:
        reason = "a folder" if path.is_dir() else "no such file"
        if (path / "config.toml").is_file():
            own = shlex.quote(str(path))
            reason = f"the folder of a run: it goes on with --out {own} --resume, and {own}/config.toml begins another"
        raise ConfigError(f"config: must be a preset or a TOML file, got {text!r} ({reason})")
    names = preset_names()
    raise ConfigError(f"preset: must be one of {', '.join(names)}, or a TOML file, got {text!r}{suggest(text, names)}")


def load_preset(name: str) -> TrainConfig:
    """A preset that comes with the package."""
    names = preset_names()
    if name not in names:
        raise ConfigError(f"preset: must be one of {', '.join(names)}, got {name!r}{suggest(name, names)}")
    return _load_file(PRESETS / f"{name}.toml", f"preset {name}")


def preset_base(name: str) -> str | None:
    """The preset that a preset takes its keys from, where there is one."""
    return parse((PRESETS / f"{name}.toml").read_text(encoding="utf-8")).get("base")


def preset_names() -> list[str]:
    """The presets that come with the package, the default first."""
    return sorted((path.stem for path in PRESETS.glob("*.toml")), key=lambda name: (name != "digits", name))


def _load_file(path: Path, where: str) -> TrainConfig:
    try:
        # Windows editors begin a file with a byte order mark.
        values = parse(files.read_regular(Path(os.path.realpath(path)), MOST_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{where}: must be a TOML file that can be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: must be a TOML file, got a syntax error: {error}") from None
    base = values.pop("base", None)
    if base is None:
        return from_dict(values, where)
    if not isinstance(base, str) or base not in preset_names():
        names = preset_names()
        raise ConfigError(f"{where}: base must be one of {', '.join(names)}, got {base!r}{suggest(str(base), names)}")
    # A derived configuration does not inherit what describes its base.
    own = {name: getattr(TrainConfig, name) for name in ("name", "description", "time")}
    return merge(load_preset(base), {**own, **values}, where)
