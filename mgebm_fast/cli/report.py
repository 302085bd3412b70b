"""`mgebm presets` and `mgebm doctor`: what there is to train, and what this machine can do."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer


def presets(json: Annotated[bool, typer.Option("--json", help="Print a list of objects on stdout.")] = False) -> None:
    """List the presets that `mgebm train` knows.

    \b
    Examples:
      mgebm presets
      mgebm presets --json
    """
    from ..learning.config import load_preset, preset_names

    configs = [load_preset(name) for name in preset_names()]
    if json:
        keys = ("name", "method", "data", "sizes", "steps", "description")
        entries = [{key: getattr(config, key) for key in keys} for config in configs]
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
