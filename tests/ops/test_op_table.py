"""The trace rule: an op has one name, found in every layer that the op table gives it, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mgebm_fast import native, ops

ROOT = Path(__file__).resolve().parents[2]
IN_PLACE = {"langevin_step", "edge_step", "dense_chain"}


def test_files_hold_just_the_ops_of_the_table():
    def stems(folder, ending):
        return {path.name.removesuffix(ending) for path in (ROOT / folder).glob(f"*{ending}")}

    assert stems("csrc/ops", "_cpu.cpp") == {op for op, layers in ops.TABLE.items() if layers.cpu}
    assert stems("csrc/ops", "_cuda.cu") == {op for op, layers in ops.TABLE.items() if layers.cuda}
    assert stems("csrc/ops", ".h") == {op for op, layers in ops.TABLE.items() if layers.cpu or layers.cuda}
    triton = {op for op, layers in ops.TABLE.items() if layers.triton}
    assert triton <= stems("kernels", ".py")
    assert set(ops.TABLE) <= stems("tests/ops", ".py") | {
        p.stem.removeprefix("test_") for p in (ROOT / "tests/ops").iterdir()
    }
    assert set(ops.TABLE) <= {p.stem.removeprefix("bench_") for p in (ROOT / "bench/ops").iterdir()}


@pytest.mark.parametrize("op", list(ops.TABLE))
def test_layers_use_the_name(op):
    layers = ops.TABLE[op]
    public = op + "_" if op in IN_PLACE else op
    assert callable(getattr(ops, public))
    assert hasattr(torch.ops.mgebm_fast, public) == layers.traced
    assert f"def {op}_reference" in (ROOT / f"mgebm_fast/ops/{op}.py").read_text()
    bindings = (ROOT / "csrc/bindings.cpp").read_text()
    if layers.cpu:
        assert f"void {op}_cpu(" in (ROOT / f"csrc/ops/{op}_cpu.cpp").read_text()
        assert f'add_op(m, "{op}"' in bindings
        assert not native.available() or hasattr(native.module(), f"{op}_cpu")
    if layers.cuda:
        assert f"int {op}_cuda(" in (ROOT / f"csrc/ops/{op}_cuda.cu").read_text()
    if layers.triton:
        assert f"def {public}(" in (ROOT / f"kernels/{op}.py").read_text()


def test_only_the_ops_call_the_compiled_module():
    callers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mgebm_fast").rglob("*.py")
        if any(f"{op}_{side}" in path.read_text() for op in ops.TABLE for side in ("cpu", "cuda"))
    }
    assert callers == {f"mgebm_fast/ops/{op}.py" for op, layers in ops.TABLE.items() if layers.cpu or layers.cuda}
