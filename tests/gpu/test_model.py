"""docs/gpu.md against the script that makes it: the tables of what is cheap to make are made again."""

import runpy
from pathlib import Path

import pytest
import torch
from helpers.resident_host import Stage

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("triton")
    return runpy.run_path(str(ROOT / "scripts/gpu_model.py"))


@pytest.mark.parametrize("name", ["B:4:128", "compact:2:132"])
def test_kernels_are_those_that_the_package_launches(model, name):
    variant, size, batch = name.split(":")
    found = model["section"](model["Chain"](variant, int(size), int(batch)))
    remedy = "run scripts/gpu_model.py"
    assert found.text in PAGE, remedy
    assert f"| {' | '.join(found.row)} |" in PAGE, remedy


def test_the_resident_chain_is_as_laid_out(model):
    text = model["resident_section"]([*model["COMPACT"], *model["RESIDUAL"]])
    assert text.strip() in PAGE, "run scripts/gpu_model.py"
    assert model["markdown"](model["HEADS"], model["CONSTANTS"]) in PAGE, "run scripts/gpu_model.py"


def test_a_layers_kernel_counts_what_it_moves_and_computes(model):
    """16 × 16 pixels of 8 channels to 8 × 8 of 32, by 3 × 3: by hand."""
    chain = model["Chain"]("compact", 16, 5)
    kernels = {kernel.name: kernel for kernel in map(model["kernel_of"], model["captured_step"](chain))}
    forward = kernels["convolution 32 → 64, 3×3, 8×8 pixels"]
    assert forward.flop == 2 * 5 * 64 * 64 * 32 * 9
    assert forward.moved == 2 * (5 * 256 * 32 + 64 * 32 * 9 + 5 * 64 * 64)
    backward = kernels["data gradient 64 → 32, 3×3, 8×8 pixels"]
    assert (backward.flop, backward.moved) == (forward.flop, forward.moved)
    assert kernels["edge_step"].moved == 5 * 3 * 256 * 8 + 5 * 256 * 32 * 2


def test_measured_times_stand_beside_predictions(model, tmp_path):
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    columns = "table,case,contender,precision,status,unit,ms,norm,batch,device"
    rows = [
        "chains,4,mgebm_auto,fp16,ok,step,0.0815,batch,128,NVIDIA H200",
        "chains,4,plain_loop,tf32,ok,step,0.9,batch,128,NVIDIA H200",
        "chains,4,mgebm_auto,fp16,ok,step,7.0,batch,100,NVIDIA H200",
        "chains,64,mgebm_auto,fp16,gradient off,step,,batch,128,NVIDIA H200",
    ]
    (folder / "chains.csv").write_text("\n".join([columns, *rows]))
    assert model["measured_cell"](model["Chain"]("B", 4, 128), tmp_path) == "H200 81.5"
    assert model["measured"](model["Chain"]("B", 64, 128), tmp_path) == {}


def test_the_phases_of_a_step(model):
    """40 pixels of one sample: three tiles of 16 rows, by 32 columns though 8 are asked for."""
    stage = Stage(torch.ones(8, 1, 1), None, (1,), (0,), (1,), "none", (40,), (40,))
    forward, edge, update = model["phases"](model["Layout"]([stage], samples=1))
    assert [phase.name for phase in (forward, edge, update)] == ["forward 1", "edge", "update"]
    assert (forward.products, edge.products) == (3 * 4, 3 * 2)
    assert model["Phase"]("", products=629).clocks == 1000 + model["BARRIER"]
