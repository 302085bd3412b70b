"""The benches of single ops: pytest-benchmark files of the clone, run in a process of their own."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

FOLDER = Path("bench", "ops")


def repository() -> Path | None:
    """The clone that this package runs from, None where it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / FOLDER).is_dir() and (root / "pyproject.toml").is_file() else None


def why_not() -> str:
    """What is missing to run them, and what to do; an empty string where nothing is."""
    if repository() is None:
        return (
            "the benches of the ops stand in the source folder, and this package was installed without it; "
            "clone the repository, then there: pip install -e '.[test]' && mgebm bench ops"
        )
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is missing; in the clone: pip install -e '.[test]'" if missing else ""


def run_ops(output: TextIO | None = None) -> list[dict[str, Any]]:
    """The rows of the ops' table; pytest's own output goes to `output`. ValueError where they cannot run or fail."""
    if reason := why_not():
        raise ValueError(f"bench ops: {reason}")
    root = repository()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "ops.csv")
        command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "--benchmark-columns=median,iqr"]
        done = subprocess.run([*command, "--csv", str(table)], cwd=root, stdout=output)
        if done.returncode or not table.is_file():
            raise ValueError(f"bench ops: `pytest {FOLDER}` must pass, it ended with exit code {done.returncode}")
        with table.open(newline="") as file:
            return list(csv.DictReader(file))
