"""What the CUDA compiler makes of the kernels, with no GPU: no spills, no approximate or flushing arithmetic."""

from __future__ import annotations

import re

import pytest
from helpers.cuda_code import SOURCES, Code, code_of


@pytest.fixture(params=SOURCES)
def code(request) -> Code:
    return code_of(request.param)


def ptx_of(code: Code) -> str:
    if not code.ptx:
        pytest.skip("the module was built without PTX: MGEBM_CUDA_ARCHS")
    return code.ptx


def test_no_spills(code):
    """Neither a stack frame nor local memory in any kernel, for each architecture that was built."""
    assert code.frames
    assert not any(sum(frames) for frames in code.frames.values()), code.frames


def test_ptx_rounds_as_the_host_does(code, request):
    ptx = ptx_of(code)
    assert ".entry" in ptx
    assert not re.findall(r"\.approx|\.ftz", ptx)
    if request.node.callspec.params["code"].startswith(("noise", "langevin_step")):
        assert "fma.rn.f32" in ptx and "sqrt.rn.f32" in ptx


def test_contiguous_kernels_move_128_bits():
    for stem, wanted in (("langevin_step", ("ld.global.v4", "st.global.v4")), ("upsample", ("st.global.v4",))):
        ptx = ptx_of(code_of(f"{stem}_cuda"))
        assert all(instruction in ptx for instruction in wanted)
