"""The shape of the house: what is packaged, and that imports point downward only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "mgebm_fast"
# A layer imports from those after it, never from those before it.
LAYERS = [
    "cli",
    "benchmarks",
    "evaluation",
    "learning",
    "sampling",
    "gradient",
    "nets",
    "ops",
    "data",
    "native",
    "noise",
    "errors",
]


def test_every_package_is_installed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES.rglob("__init__.py")}
    assert set(setuptools["packages"]) == found | {"mgebm_fast.kernels"}


def imported_layers(path: Path) -> set[str]:
    """First package component below mgebm_fast of everything that a file imports."""
    package = ["mgebm_fast", *path.relative_to(SOURCES).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "mgebm_fast" and len(name) > 1}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_downward(layer):
    files = [SOURCES / f"{layer}.py"] if (SOURCES / f"{layer}.py").exists() else sorted((SOURCES / layer).rglob("*.py"))
    assert files
    above = set(LAYERS[: LAYERS.index(layer)])
    for path in files:
        wrong = imported_layers(path) & above
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}, which stand above it"
