"""Another process with all that this one has imported: a fork, since a new Python takes seconds to import torch."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch


def standard_streams() -> None:
    """Python's streams write to descriptors 1 and 2 again: pytest put its own in their place."""
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))


def start(said: Path, function: Callable[..., object], *arguments: object) -> BaseProcess:
    """A child that calls a function, on one thread, and says in the file `said` what it says; it ends as a program."""

    def run() -> None:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        standard_streams()
        torch.set_num_threads(1)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process
