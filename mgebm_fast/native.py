"""The compiled module `_C`, loaded once; a failure is kept and told when someone asks for it."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

# torch first: its OpenMP runtime is then the one that `_C` binds to, and both share a single pool of threads.
import torch

from .errors import BackendError


def _load() -> ModuleType:
    module = importlib.import_module("._C", __package__)
    wanted = os.environ.get("MGEBM_SIMD", "auto")
    if not module.set_isa(wanted):
        raise ValueError(
            f"MGEBM_SIMD must be auto or a set that this CPU has, of {', '.join(module.isas())}, got {wanted!r}"
        )
    return module


_module: ModuleType | None = None
load_error: Exception | None = None
try:
    _module = _load()
except ImportError as error:
    load_error = error


def available() -> bool:
    """Whether the compiled module was loaded."""
    return _module is not None


def module() -> ModuleType:
    """The compiled module, or a BackendError that says why there is none."""
    if _module is None:
        raise BackendError(
            f"the native backend is not available: {load_error}. Build it with `pip install -e .` "
            "(a C++17 compiler is all it needs); `mgebm doctor` shows what was found"
        )
    return _module


def why_no_cuda() -> str:
    """Why the native CUDA kernels cannot be used here; an empty string when they can."""
    if _module is None:
        return f"the compiled module did not load: {load_error}"
    if not _module.cuda_archs():
        return "it was built without CUDA: no nvcc was found, or MGEBM_CUDA=0 was set, when it was installed"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device here"
    return ""


def isa() -> str:
    """The instruction set that the C++ loops use on this CPU: amx, avx512bf16, avx512, avx2 or portable."""
    return module().isa()
