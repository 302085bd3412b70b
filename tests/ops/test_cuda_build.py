"""What the CUDA compiler makes of the kernels, with no GPU: no spills, no approximate or flushing arithmetic."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/ops").rglob("*_cuda.cu"))
NVCC = shutil.which("nvcc") or next(
    (p for p in (f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc",) if os.access(p, os.X_OK)), None
)
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc here")


def compile_cuda(source: Path, output: Path, *flags: str) -> str:
    setup = (ROOT / "setup.py").read_text()
    shared = re.search(r'NVCC_FLAGS = "([^"]*)"', setup)[1].split()
    command = [
        NVCC,
        *shared,
        f"-I{ROOT / 'csrc/include'}",
        f"-I{ROOT / 'csrc'}",
        *flags,
        str(source),
        "-o",
        str(output),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
@pytest.mark.parametrize("arch", ["80", "90"])
def test_no_spills(source, arch, tmp_path):
    log = compile_cuda(
        source, tmp_path / "x.o", "-c", "-Xptxas", "-v", "-gencode", f"arch=compute_{arch},code=sm_{arch}"
    )
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert frames and all(frame == ("0", "0", "0") for frame in frames), log
    assert "warning" not in log, log


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_ptx_rounds_as_the_host_does(source, tmp_path):
    compile_cuda(source, tmp_path / "x.ptx", "-ptx", "-gencode", "arch=compute_90,code=compute_90")
    ptx = (tmp_path / "x.ptx").read_text()
    assert ".entry" in ptx
    assert not re.findall(r"\.approx|\.ftz", ptx)
    if source.stem.startswith(("noise", "langevin_step")):
        assert "fma.rn.f32" in ptx and "sqrt.rn.f32" in ptx


def test_contiguous_kernels_move_128_bits(tmp_path):
    for stem, wanted in (("langevin_step", ("ld.global.v4", "st.global.v4")), ("upsample", ("st.global.v4",))):
        compile_cuda(
            ROOT / f"csrc/ops/{stem}_cuda.cu", tmp_path / "x.ptx", "-ptx", "-gencode", "arch=compute_90,code=compute_90"
        )
        ptx = (tmp_path / "x.ptx").read_text()
        assert all(instruction in ptx for instruction in wanted)
