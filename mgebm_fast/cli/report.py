"""`mgebm presets` and `mgebm doctor`: what there is to train, and what this machine can do."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer


def presets(
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects on stdout.")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every key of a configuration instead.")] = False,
) -> None:
    """List the presets that `mgebm train` knows, or the keys that --set and TOML files take.

    \b
    Examples:
      mgebm presets
      mgebm presets --keys
      mgebm presets --json
    """
    from ..learning import describe_keys, load_preset, preset_names

    if keys:
        entries = [dict(zip(("key", "expected", "default", "help"), row, strict=True)) for row in describe_keys()]
        text = "\n".join(f"{e['key']} = {_toml(e['default'])}\n    {e['help']} ({e['expected']})" for e in entries)
        typer.echo(json_module.dumps(entries, indent=1, ensure_ascii=False) if json else text)
        return
    configs = [load_preset(name) for name in preset_names()]
    if json:
        shown = ("name", "method", "data", "sizes", "steps", "description")
        entries = [{key: getattr(config, key) for key in shown} for config in configs]
        typer.echo(json_module.dumps(entries, indent=1, ensure_ascii=False))
        return
    for config in configs:
        ladder = "→".join(str(size) for size in config.sizes)
        typer.echo(f"{config.name}\n    {config.description}")
        typer.echo(f"    {config.method} on {config.data}, sizes {ladder}, {config.steps} updates")


def doctor(json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False) -> None:
    """Say what was built, what is usable on this machine, and why the rest is not and how to get it.

    \b
    Examples:
      mgebm doctor
      mgebm doctor --json
      python -m mgebm_fast            (the same)
    """
    from ..doctor import examine, render

    report = examine()
    typer.echo(json_module.dumps(report, indent=1, ensure_ascii=False) if json else render(report))


def _toml(value: object) -> str:
    """A default as a TOML file writes it; `none` where the key is left out."""
    return "none" if value is None else json_module.dumps(value, ensure_ascii=False)
