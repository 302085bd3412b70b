"""Backends that can run here, as (backend, device) pairs; every op test takes each of them."""

from __future__ import annotations

import pytest
import torch

from mgebm_fast import native, ops

PAIRS = [("reference", "cpu"), ("native", "cpu"), ("reference", "cuda"), ("native", "cuda"), ("triton", "cuda")]


def runnable(op: str) -> list:
    """pytest parameters (backend, device) for `op`; those that cannot run here are skipped with the reason."""
    pairs = []
    for backend, device in PAIRS:
        if backend == "triton" and not ops.TABLE[op].triton:
            continue
        if device == "cuda" and not torch.cuda.is_available():
            reason = "no CUDA device"
        else:
            reason = ops.unavailable(op, backend, torch.device(device))
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        pairs.append(pytest.param((backend, device), id=f"{backend}-{device}", marks=marks))
    return pairs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", runnable(metafunc.module.OP))


@pytest.fixture(params=["amx", "avx512", "avx2", "portable"])
def isa(request):
    """Each instruction set of the C++ loops in turn, where this CPU has it."""
    if not native.available():
        pytest.skip(f"the compiled module did not load: {native.load_error}")
    before = native.isa()
    if not native.module().set_isa(request.param):
        pytest.skip(f"this CPU or this build has no {request.param}")
    yield request.param
    native.module().set_isa(before)


@pytest.fixture
def threads():
    """A function that sets torch's thread count, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
