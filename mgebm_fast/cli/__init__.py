"""The command line `mgebm`. Nothing heavy is imported before a command runs, so that `--help` is quick."""

from .app import app, main

__all__ = ["app", "main"]
