"""The shape of the house: what is packaged, how imports point, and how large files and functions are."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "mgebm_fast"
# A file imports from its own layer and from those after it, never from those before it.
LAYERS = [
    ["cli", "__main__"],
    ["benchmarks", "evaluation", "export", "doctor"],
    ["learning", "learning.trainer"],
    ["learning.methods"],
    ["learning.run"],
    ["learning.config"],
    ["models"],
    ["sampling"],
    ["gradient"],
    ["nets", "ops", "energies"],
    ["kernels"],
    ["data"],
    ["native", "noise", "files", "pictures", "tables"],
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


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(module: str) -> set[str]:
    """The modules of the package that a file imports, wherever in the file it does, for a type checker alone too."""
    path = MODULES[module]
    package = ["mgebm_fast", *path.relative_to(SOURCES).parts[:-1]]
    found = set()
    for node in ast.walk(tree(path)):
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


def test_imports_point_downward():
    levels = {module: level_of(module) for module in MODULES}
    assert {module for module, level in levels.items() if level is None} <= {"presets", "shipped"}, "of no layer"
    above = [
        f"{module} imports {name}, which stands above it"
        for module, own in levels.items()
        if own is not None
        for name in sorted(imports(module))
        if (level_of(name) or 99) < own
    ]
    assert not above


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


MOST_LINES, MOST_FILES, MOST_PARAMETERS = 350, 16, 8


def test_files_stay_readable():
    """One subject a file: of the package, of csrc/ and of kernels/."""
    found = (path for folder in ("csrc", "kernels") for path in (ROOT / folder).rglob("*.*"))
    sources = [path for path in found if path.suffix != ".pyc"]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*MODULES.values(), *sources]}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_folders_answer_one_question_each():
    """Tables (TOML) do not count, nor does what makes a folder a package."""
    folders = [path.parent for path in SOURCES.rglob("__init__.py")] + [
        path for path in (ROOT / "csrc").rglob("*") if path.is_dir()
    ]
    counted = {
        folder: sum(path.is_file() and path.suffix != ".toml" and path.stem != "__init__" for path in folder.iterdir())
        for folder in folders
    }
    assert {folder: count for folder, count in counted.items() if count > MOST_FILES} == {}


def functions(node: ast.AST, owner: ast.ClassDef | None = None):
    """(function, its class or None) of every function below `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child, owner
        yield from functions(child, child if isinstance(child, ast.ClassDef) else None)


def is_command(function: ast.FunctionDef) -> bool:
    """Whether a command line's options are its parameters: they are annotated for typer."""
    return any("typer." in ast.unparse(arg.annotation) for arg in function.args.args if arg.annotation is not None)


def spelt_out(function: ast.FunctionDef, owner: ast.ClassDef | None) -> bool:
    """Public and documented, with its options by keyword alone: a signature that is read, not a bundle passed on."""
    public = function.name in ("__init__", "__call__") or not function.name.startswith("_")
    public = public and (owner is None or not owner.name.startswith("_"))
    documented = ast.get_docstring(function) or (owner is not None and ast.get_docstring(owner))
    return public and bool(documented) and len(function.args.posonlyargs) + len(function.args.args) <= 5


def test_functions_take_few_parameters():
    """Three kinds are exempt: commands, public signatures that spell their options out, and the layers of an op
    (`ops/`), which repeat its schema argument by argument because torch passes it so."""
    modules = {module: path for module, path in MODULES.items() if not module.startswith("ops.")}
    found = [(module, *each) for module, path in modules.items() for each in functions(tree(path))]
    for module, function, owner in found:
        names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
        count = len([name for name in names if not (owner is not None and name in ("self", "cls"))])
        exempt = count <= MOST_PARAMETERS or is_command(function) or spelt_out(function, owner)
        assert exempt, (
            f"{module}.{function.name} takes {count} parameters: a value with fields says what belongs together"
        )


def test_no_test_module_imports_another():
    """What several share lies in tests/helpers or in a conftest."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not any(part.startswith("test_") for name in names for part in name.split(".")), path.name


def test_the_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:csrc|kernels|mgebm_fast|tests|bench|docs|scripts)/[\w/.]+)`", text)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_an_activation_needs_its_function_alone(monkeypatch):
    """What CONTRIBUTING says: entered in nets/layers.py, it runs by autograd until a plan has it."""
    import torch

    import mgebm_fast as mg
    from mgebm_fast.nets import energy_net, layers

    monkeypatch.setitem(layers._FUNCTIONS, "softplus", torch.nn.functional.softplus)
    monkeypatch.setattr(energy_net, "ACTIVATIONS", (*layers.ACTIVATIONS, "softplus"))
    net = mg.nets.multigrid_net(4, channels=1, norm="none", variant="compact", width=0.1).eval()
    net = mg.EnergyNet.from_config({**net.config(), "activation": "softplus"}, seed=0)
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    chain = mg.Langevin(steps=1, drift=1.0, noise_std=0.0)
    assert "'softplus', which no plan computes by hand" in str(chain.explain(net, x))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf).sum(), leaf)
    torch.testing.assert_close(chain(net, x, precision="fp32"), x - gradient)
