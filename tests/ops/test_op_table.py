"""The trace rule: an op has one name, found in every layer that the op table gives it, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mgebm_fast import native, ops

ROOT = Path(__file__).resolve().parents[2]
IN_PLACE = {"langevin_step", "edge_step", "dense_chain"}


def test_files_hold_just_the_ops_of_the_table():
    def stems(folder, ending):
        """Of the files in `folder`, and for csrc/ops in the folder of a large op."""
        return {path.name.removesuffix(ending) for path in (ROOT / folder).rglob(f"*{ending}")}

    assert stems("csrc/ops", "_cpu.cpp") == {op for op, layers in ops.TABLE.items() if layers.cpu}
    assert stems("csrc/ops", "_cuda.cu") == {op for op, layers in ops.TABLE.items() if layers.cuda}
    assert stems("csrc/ops", ".h") >= {op for op, layers in ops.TABLE.items() if layers.cpu or layers.cuda}
    triton = {op for op, layers in ops.TABLE.items() if layers.triton}
    assert triton <= stems("kernels", ".py")
    assert set(ops.TABLE) <= stems("tests/ops", ".py") | {
        p.stem.removeprefix("test_") for p in (ROOT / "tests/ops").iterdir()
    }
    assert set(ops.TABLE) <= {p.stem.removeprefix("bench_") for p in (ROOT / "bench/ops").iterdir()}


def python_of(op: str) -> list[Path]:
    """The file of an op, or the files of a large one."""
    folder = ROOT / "mgebm_fast/ops" / op
    return sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def source_of(op: str, ending: str) -> str:
    [path] = (ROOT / "csrc/ops").rglob(f"{op}{ending}")
    return path.read_text()


def test_the_table_of_compiled_ops_is_that_of_python():
    lines = re.findall(r"X\((\w+), \w+, (CPU\w*)\)", (ROOT / "csrc/op_table.h").read_text())
    lines = [line for line in lines if line != ("conv_chain", "CPU")]  # its params on a GPU have a line of their own
    expected = {op: "CPU_AND_CUDA" if layers.cuda else "CPU" for op, layers in ops.TABLE.items() if layers.cpu}
    assert dict(lines) == expected and len(lines) == len(expected)


def test_a_compiled_op_is_named_in_the_table_alone():
    glue = ["csrc/bindings.cpp", "csrc/dispatch.cpp", "csrc/dispatch.h", "setup.py"]
    for op in {op for op, layers in ops.TABLE.items() if layers.cpu} - {"conv_chain"}:  # whose workspace is bound too
        for path in glue:
            assert not re.search(rf"\b{op}(_cpu|_cuda)?\b", (ROOT / path).read_text()), (op, path)


def test_the_ground_includes_no_op():
    for path in (ROOT / "csrc/include").rglob("*"):
        assert path.is_dir() or '#include "ops/' not in path.read_text(), path


@pytest.mark.parametrize("op", list(ops.TABLE))
def test_layers_use_the_name(op):
    layers = ops.TABLE[op]
    public = op + "_" if op in IN_PLACE else op
    assert callable(getattr(ops, public))
    assert hasattr(torch.ops.mgebm_fast, public) == layers.traced
    assert any(f"def {op}_reference" in path.read_text() for path in python_of(op))
    if layers.cpu:
        assert f"void {op}_cpu(" in source_of(op, "_cpu.cpp")
        assert not native.available() or hasattr(native.module(), f"{op}_cpu")
    if layers.cuda:
        assert f"int {op}_cuda(" in source_of(op, "_cuda.cu")
    if layers.triton:
        assert f"def {public}(" in (ROOT / f"kernels/{op}.py").read_text()


def test_only_the_ops_call_the_compiled_module():
    callers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mgebm_fast").rglob("*.py")
        if any(f"{op}_{side}" in path.read_text() for op in ops.TABLE for side in ("cpu", "cuda"))
    }
    compiled = [op for op, layers in ops.TABLE.items() if layers.cpu or layers.cuda]
    assert callers <= {path.relative_to(ROOT).as_posix() for op in compiled for path in python_of(op)}
