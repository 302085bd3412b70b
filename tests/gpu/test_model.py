"""docs/gpu.md against the script that makes it: the tables of what is cheap to make are made again."""

import dataclasses
import importlib
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


def test_kernels_that_are_not_written_are_compared_on_the_page(model):
    for text in (
        model["placement_section"](model["COMPACT"][-1]),
        model["coupled_section"](),
        model["inside_section"](),
    ):
        assert text.strip() in PAGE, "run scripts/gpu_model.py"


def test_convolutions_with_statistics_inside_read_maps_in_place_of_passes(model):
    """Two layers of 100 and 40 bytes, by hand."""
    kernel = model["Kernel"]
    step = [
        kernel("sub", 7), kernel("convolution a", 50, 3, 0.7), kernel("batch_norm_act", 100),
        kernel("batch_norm_act_apply", 200), kernel("convolution b", 60, 3, 0.7),
        kernel("batch_norm_act", 80, clocks=9),
        kernel("batch_norm_act_sums", 40), kernel("batch_norm_act_backward", 80), kernel("data gradient b", 60, 3, 0.6),
        kernel("batch_norm_act_sums", 200), kernel("batch_norm_act_backward", 300), kernel("edge_step", 30, 1, 0.6),
    ]  # fmt: skip
    found = [(one.name, one.moved, one.rate) for one in model["with_statistics_inside"](step, 0.5)]
    assert found == [
        ("sub", 7, 1.0), ("convolution a", 50, 0.5), ("convolution b", 60, 0.5), ("data gradient b", 200, 0.5),
        ("edge_step", 130, 0.6), ("sums at the top", 40, 1.0),
    ]  # fmt: skip


def test_a_step_of_coupled_samples_waits_for_all_blocks(model):
    """Of three layers: six barriers of the grid, six exchanges of a tile, reading what was held and the
    numbers of 8 tiles after each, and weights that 8 tiles read twice."""
    (kernel,) = map(model["kernel_of"], model["captured_step"](model["COUPLED"]))
    weights = 2 * (64 * 384 + 384 * 512 + 512 * 1024)
    clock, l2 = model["H200"].clock, model["H200"].l2
    waits = 6 * model["GRID_BARRIER"] * 1e-6 * clock + 6 * (model["EXCHANGE"] + 2 * model["L2_TRIP"]) + model["NORMALS"]
    assert kernel.name == "dense_chain" and kernel.clocks == pytest.approx(waits + 8 * 2 * weights / l2 * clock)


def test_blocks_share_rows_and_columns_out(model):
    """32 rows of 24 channels from 40 inputs, by hand: columns alone in three blocks, or by halves of the rows too."""
    placements = importlib.import_module("gpu_placements")
    step = placements.Exchange(rows=32, columns=24, depth=40, received=10_000, statistics=16)
    rate = model["H100"].l2 / model["H100"].processors / model["H100"].clock
    assert step.clocks(1, 3, model["H100"]) == pytest.approx((32 * 10_000 + 8 * 16) / rate)
    assert step.best((1, 2), 6, model["H100"]) == pytest.approx((16 * 10_000 + 2 * 8 * 16) / rate)
    still = dataclasses.replace(step, received=0, statistics=0)  # 2 × 3 × 3 products by one block alone
    assert still.clocks(1, 1, model["H100"]) == pytest.approx(18 / placements.WARP_PRODUCT)


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
    columns = "table,case,contender,precision,status,unit,ms,norm,batch,explain,device"
    rows = [
        "chains,4,mgebm_auto,fp16,ok,step,0.0815,batch,128,gradient: fused,NVIDIA H200",
        "chains,4,plain_loop,tf32,ok,step,0.9,batch,128,,NVIDIA H200",
        "chains,4,mgebm_auto,fp16,ok,step,7.0,batch,100,gradient: fused,NVIDIA H200",
        "chains,64,mgebm_auto,fp16,gradient off,step,,batch,128,,NVIDIA H200",
        "chains,compact-8,mgebm_auto,fp16,ok,step,0.0035,none,132,gradient: resident,NVIDIA H200",
        "chains,residual-8,mgebm_auto,fp16,ok,step,0.007,none,132,gradient: resident,NVIDIA H200",
    ]
    (folder / "chains.csv").write_text("\n".join([columns, *rows]))
    chain = model["Chain"]
    assert model["measured_cell"](chain("B", 4, 128), tmp_path) == "H200 81.5"
    assert model["measured"](chain("B", 64, 128), tmp_path) == {}
    assert model["measured"](chain("compact", 8, 132), tmp_path) == {}  # what replaced the plan that is asked for
    assert model["measured"](chain("compact", 8, 132), tmp_path, resident_plan=True) == {"H200": 3.5}
    assert "| compact 8×8, batch 132 | 1 |" in model["resident_section"]([chain("compact", 8, 132)], tmp_path)
    assert "| H200 3.5 |" in model["resident_section"]([chain("compact", 8, 132)], tmp_path)


def test_measured_kernels_stand_beside_predicted_ones(model, tmp_path):
    """The recorded step of a chain, its convolutions of two launches each: the column adds them up."""
    profile = runpy.run_path(str(ROOT / "scripts/gpu_profile.py"))
    chain = model["Chain"]("compact", 8, 132)
    kernels = [model["kernel_of"](event).name for event in model["captured_step"](chain)]
    step = []
    for name in kernels:
        library = name.startswith(("convolution ", "data gradient "))
        own = name in model["_MOVED"]
        step += (
            [("void cudnn::transposed<float>(int)", 2.0), ("sm90_xmma", 3.0)]
            if library
            else [(f"{name}_kernel" if own else "void at::native::elementwise<4>(int)", 1.5)]
        )
    warm = [("Memcpy HtoD", 9.0), *step, *step, *[(name, 3 * time) for name, time in step], *step]
    found = profile["of_a_step"]([(profile["short"](name), time) for name, time in warm], 4)
    assert found[0] == ("at::native::elementwise", 1.5) and len(found) == len(step)
    names = ("case", "batch", "norm", "device", "kernel", "us")
    rows = [f"compact-8,132,none,NVIDIA H200,{name},{time}" for name, time in found]
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200/kernels.csv").write_text("\n".join([",".join(names), *rows]))
    text = model["section"](chain, tmp_path).text
    assert "measured on H200, µs |" in text and "| edge_step | 0.74 | 0.08 | 3.2 | 3.2 | launch | 1.5 |" in text
    assert text.count("| launch | 5.0 |") == sum(name.startswith(("convolution ", "data")) for name in kernels)
    whole = [("refill", 1.0), ("mgebm::conv_chain_kernel", 36.0)]
    assert profile["of_a_step"](whole, 12) == [("mgebm::conv_chain_kernel", 3.0)]
    with pytest.raises(ValueError, match="no two launches of edge_step among 1"):
        profile["of_a_step"]([("gemm", 1.0)], 12)
    assert model["attributed"](["sub 1", "bias_act"], [("a", 1.0), ("b", 1.0), ("bias_act_kernel", 1.0)]) == []


def test_the_phases_of_a_step(model):
    """40 pixels of one sample: three tiles of 16 rows, by 32 columns though 8 are asked for."""
    stage = Stage(torch.ones(8, 1, 1), None, (1,), (0,), (1,), "none", (40,), (40,))
    forward, edge, update = model["phases"](model["Layout"]([stage], samples=1))
    assert [phase.name for phase in (forward, edge, update)] == ["forward 1", "edge", "update"]
    assert (forward.products, edge.products) == (3 * 4, 3 * 2)
    assert importlib.import_module("gpu_predictions").Phase("", products=629).clocks == 1000 + model["BARRIER"]
