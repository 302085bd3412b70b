"""The shape of the house: what is packaged, how imports point, and how large files and functions are."""

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
# A file imports from its own layer and from those after it, never from those before it.
LAYERS = [
    ["cli", "__main__"],
    ["benchmarks", "evaluation", "doctor"],
    ["learning", "learning.trainer"],
    ["learning.methods"],
    ["learning.run"],
    ["learning.config"],
    ["models"],
    ["sampling"],
    ["gradient"],
    ["nets", "ops"],
    ["kernels"],
    ["data"],
    ["native", "noise", "files", "pictures"],
    ["errors", "checks", "stamp"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCES.rglob("*.py"))
    if path != SOURCES / "__init__.py"
}


def test_every_package_is_installed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES.rglob("__init__.py")}
    assert set(setuptools["packages"]) == found | {"mgebm_fast.kernels"}


def level_of(module: str) -> int | None:
    """The layer of the longest prefix of `module` that has one; None for what belongs to no layer."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in LEVEL:
            return LEVEL[".".join(parts[:end])]
    return None


def is_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST):
    """Every node below `node`, but for what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child):
            continue
        yield child
        yield from statements(child)


def imports(module: str) -> set[str]:
    """The modules of the package that a file imports, wherever in the file it does."""
    path = MODULES[module]
    package = ["mgebm_fast", *path.relative_to(SOURCES).parts[:-1]]
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*source, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "mgebm_fast" and len(name) > 1:
                whole = ".".join(name[1:])
                found.add(whole if whole in MODULES else whole.rpartition(".")[0] or whole)
    return {name for name in found if name in MODULES or name == "kernels"} - {module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module):
    own = level_of(module)
    assert own is not None or module == "presets", f"{module} belongs to no layer of LAYERS"
    wrong = sorted(name for name in imports(module) if own is not None and (level_of(name) or 99) < own)
    assert not wrong, f"{module} imports {', '.join(wrong)}, which stand above it"


def test_no_circles():
    """No file imports itself by way of others. A package's own files may import each other, not their `__init__`."""
    graph = {module: imports(module) for module in MODULES}
    state: dict[str, int] = {}
    circles = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for name in sorted(graph.get(module, ())):
            if state.get(name) == 1:
                circles.append(" -> ".join([*path[path.index(name) :], name]))
            elif name not in state:
                visit(name, [*path, name])
        state[module] = 2

    for module in graph:
        if module not in state:
            visit(module, [module])
    assert not circles


def parameters(node: ast.FunctionDef) -> int:
    arguments = node.args
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
