"""`mgebm doctor`: what this machine can do."""

from __future__ import annotations

import json as json_module

import typer

from .options import Json


def doctor(json: Json = False) -> None:
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
