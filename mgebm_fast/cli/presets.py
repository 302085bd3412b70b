"""`mgebm presets`: what there is to train, and the keys of a configuration; `mgebm models`: what is trained already."""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer

from .options import Json, print_json


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

    Each preset comes with its method, the data that it takes where --data names no other (none needs a network), its
    number of updates, and the time they take.
    """
    from ..learning import METHODS, describe_keys, load_preset, preset_names

    if keys:
        entries = [dict(zip(("key", "expected", "default", "help"), row, strict=True)) for row in describe_keys()]
        text = "\n".join(f"{e['key']} = {_toml(e['default'])}\n    {e['help']} ({e['expected']})" for e in entries)
        typer.echo(json_module.dumps(entries, indent=1, ensure_ascii=False) if json else text)
        return
    configs = [load_preset(name) for name in preset_names()]
    if json:
        shown = ("name", "method", "data", "time", "sizes", "steps", "description")
        entries = [{key: getattr(config, key) for key in shown} for config in configs]
        typer.echo(json_module.dumps(entries, indent=1, ensure_ascii=False))
        return
    for config in configs:
        typer.echo(f"{config.name}\n    {config.description}")
        typer.echo(f"    {config.method} on {config.data}, {config.steps} updates, {config.time}")
        typer.echo(f"    {METHODS[config.method].about}")


def models(json: Json = False) -> None:
    """List the trained models that come with the package; their names stand for runs.

    \b
    Examples:
      mgebm models
      mgebm sample digits --num 64 --out samples.png
      mgebm evaluate digits

    A file or folder of the same name in the working folder comes first: `builtin:digits` is the model in any folder.
    The card of each says what it was trained on, how, and what was measured.
    """
    from ..learning import Run
    from ..learning.run.stored_run import SHIPPED, shipped_names

    entries = []
    for name in shipped_names():
        run, card = Run(SHIPPED / name), SHIPPED / name / "README.md"
        size = run.model_file().stat().st_size
        shown = {key: getattr(run.config, key) for key in ("data", "sizes", "channels", "steps", "description")}
        entries.append({"name": name, **shown, "bytes": size, "card": str(card)})
    if json:
        print_json(entries)
        return
    for entry in entries:
        side = entry["sizes"][-1]
        typer.echo(f"{entry['name']}\n    {side}×{side}, learnt from {entry['data']}, {entry['bytes'] / 1e6:.1f} MB")
        typer.echo(f"    {entry['card']}")


def _toml(value: object) -> str:
    """A default as a TOML file writes it."""
    return json_module.dumps(value, ensure_ascii=False)
