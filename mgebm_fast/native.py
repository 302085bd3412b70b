"""The compiled module `_C`, loaded once; a failure is kept, and raised when the module is needed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from pathlib import Path
from types import ModuleType

# torch first: its OpenMP runtime is then the one that `_C` binds to, and both share a single pool of threads.
import torch

from . import stamp
from .errors import BackendError

PACKAGE = Path(__file__).resolve().parent


def _load() -> ModuleType:
    """The compiled module of this package, stale or not; an ImportError says why there is none."""
    spec = importlib.util.find_spec("._C", __package__)
    if spec is None or spec.origin is None:
        others = ", ".join(sorted(path.name for path in PACKAGE.glob("_C.*")))
        raise ImportError(f"{PACKAGE} has none for this Python" + (f", only {others}" if others else ""))
    if cut := stamp.why_cut(Path(spec.origin)):
        raise ImportError(cut)
    try:
        module = importlib.import_module("._C", __package__)
    except Exception as error:  # whatever a file of that name does when it is loaded
        raise ImportError(f"{spec.origin} cannot be loaded: {error}") from error
    if not hasattr(module, "sources"):
        raise ImportError(f"{spec.origin} is not of mgebm_fast, or of an old version")
    return module


def _choose_instructions(module: ModuleType) -> None:
    wanted = os.environ.get("MGEBM_SIMD", "auto")
    if not module.set_isa(wanted):
        raise ValueError(
            f"MGEBM_SIMD must be auto or a set that this CPU has, of {', '.join(module.isas())}, got {wanted!r}"
        )


def _warn_of(error: ImportError) -> None:
    """A source tree that is imported because Python was started in it hides an installed copy."""
    slow = "plain torch takes the place of the native engine, slowly"
    root = stamp.source_root(PACKAGE)
    if root is None or list(PACKAGE.glob("_C.*")):
        message = f"the compiled module of mgebm_fast cannot be used: {error}; {slow}. Reinstall: {_HOW}"
    else:
        message = (
            f"mgebm_fast is imported from the source tree {root}, which was not built; {slow}. Install it "
            f"with `{_HOW}`, or, where an installed copy is meant, start Python in another folder"
        )
    warnings.warn(message, RuntimeWarning, stacklevel=2)


_HOW = stamp.how_to_install(PACKAGE)
_module: ModuleType | None = None
load_error: Exception | None = None
stale = ""  # why the module that was found may not be used: its functions may take other arguments
try:
    _module = _load()
except ImportError as error:
    load_error = error
    _warn_of(error)
else:
    stale = stamp.why_stale(PACKAGE, _module.sources())
    if not stale:
        _choose_instructions(_module)


def why_not() -> str:
    """Why the compiled module cannot be used; an empty string when it can."""
    if stale:
        return f"the compiled module is stale: {stale}"
    return "" if _module is not None else f"the compiled module did not load: {load_error}"


def available() -> bool:
    """Whether the compiled module can be used. A stale one is an error, not a slow run: BackendError."""
    if stale:
        raise BackendError(why_not())
    return _module is not None


def module() -> ModuleType:
    """The compiled module, or a BackendError that says why there is none."""
    if not available():
        raise BackendError(
            f"the native backend is not available: {load_error}. Reinstall: {_HOW} "
            "(a C++17 compiler is all it needs); `mgebm doctor` shows what was found"
        )
    assert _module is not None
    return _module


def why_no_cuda() -> str:
    """Why the native CUDA kernels cannot be used here; an empty string when they can."""
    if why_not():
        return why_not()
    if not module().cuda_archs():
        return "it was built without CUDA: no nvcc was found, or MGEBM_CUDA=0 was set, when it was installed"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    return ""


def isa() -> str:
    """The instruction set that the C++ loops use on this CPU: amx, avx512bf16, avx512, avx2 or portable."""
    return module().isa()
