"""The law of the chain for the Triton kernel on machines without a GPU: in a process where Triton interprets."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def test_law_of_the_interpreted_triton_kernel():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: `pip install triton`")
    if importlib.util.find_spec("mgebm_fast.kernels") is None:
        pytest.skip("mgebm_fast.kernels is there only where the package is installed: `pip install -e .`")
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
        pytest.skip("test_law.py runs the Triton kernel itself here")
    # The longest chains, other scales, and targets with a single term are left to the compiled backends.
    chosen = (
        "cpu-triton and not 1.0-40 and not 1.0-30 and not 0.3-10 and not 0.4-3.0 and not 20.0-9.0 and not energy- "
        "and not reference-"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", str(HERE / "test_law.py"), str(HERE / "test_langevin.py")]
        + ["-k", chosen, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "SKIPPED" not in run.stdout, run.stdout[-2000:]
