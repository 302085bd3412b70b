"""The kernels twice in one process: interpreted (numpy on CPU tensors) and as functions the compiler takes.

Triton decides at decoration, so each form is a package of its own, loaded while the switch stands as wanted.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pathlib
import sys
import types

import pytest
import torch

_HERE = pathlib.Path(__file__).parent
_KERNELS = _HERE.parents[1] / "kernels"
_NAMES = sorted(path.stem for path in _KERNELS.glob("*.py") if path.stem != "__init__")


def _import_triton() -> bool:
    """Import Triton in its compiling form, whatever the environment says: its own library decides at import too."""
    asked = os.environ.pop("TRITON_INTERPRET", None)
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    finally:
        if asked is not None:
            os.environ["TRITON_INTERPRET"] = asked
    return True


_HAVE_TRITON = _import_triton()


def _module(name: str, path: pathlib.Path, **options: object) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, **options)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def load(interpret: bool) -> types.SimpleNamespace:
    """The modules of kernels/, and probe (tests/helpers/probe.py)."""
    if not _HAVE_TRITON:
        pytest.skip("triton is not installed: `pip install triton`")
    import triton
    from triton import knobs

    if not interpret and not isinstance(triton.language.cdiv, triton.runtime.JITFunction):
        pytest.skip("triton was imported with TRITON_INTERPRET=1, and cannot compile")

    _index_interpreted_scalars()
    package = f"kernels_{'interpreted' if interpret else 'compiled'}"
    with knobs.runtime.scope():
        knobs.runtime.interpret = interpret
        _module(package, _KERNELS / "__init__.py", submodule_search_locations=[str(_KERNELS)])
        modules = {name: importlib.import_module(f"{package}.{name}") for name in _NAMES}
        modules["probe"] = _module(f"{package}.probe", _HERE.parent / "helpers" / "probe.py")
    return types.SimpleNamespace(**modules)


def _index_interpreted_scalars() -> None:
    """Triton 3.6 turns its interpreted scalars, arrays of one entry, into ints in a way that numpy 2.4 refuses."""
    from triton.runtime import interpreter

    if getattr(interpreter, "_indexes_scalars", False):
        return
    patched = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        patched(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor, interpreter._indexes_scalars = patch_lang_tensor, True


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What is compiled here is kept for this run alone, and its cubins are found."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.fixture
def interpreted() -> types.SimpleNamespace:
    return load(True)


@pytest.fixture
def compiled() -> types.SimpleNamespace:
    return load(False)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Where a launcher is run: "cpu" interpreted, "cuda" compiled."""
    return request.param


@pytest.fixture
def kernels(device: str) -> types.SimpleNamespace:
    return load(device == "cpu")
