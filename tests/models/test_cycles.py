"""V-cycles of a sample: down to block means at a coarser size, and up again through the finer grids' chains."""

import contextlib

import numpy as np
import pytest
import torch

from mgebm_fast import noise
from mgebm_fast.data import ImageData
from mgebm_fast.errors import DivergenceError, Refused
from mgebm_fast.evaluation import evaluate_by_size
from mgebm_fast.evaluation.diagnosis import diagnose
from mgebm_fast.models import MultiGrid
from mgebm_fast.models.model import Group
from mgebm_fast.sampling import Langevin, graphs, langevin_sample
from mgebm_fast.sampling.cascade import cascade, enlarged

LAW = {"drift": 0.5, "noise_std": 0.1, "clamp": (-1.0, 1.0)}


def model(sizes=(1, 2, 4, 8), **more):
    more = {"langevin": Langevin(3, **LAW), "value_range": (-1.0, 1.0), "variant": "compact", "width": 0.25, **more}
    m = MultiGrid(sizes, channels=2, norm="none", **more)
    colours = 2 * torch.rand(20, 2, generator=torch.Generator().manual_seed(0)) - 1
    m.set_colours(colours, *([torch.arange(20) % 2] if "classes" in more else []))
    return m


@pytest.mark.parametrize("upsampling", ["nearest", "linear"])
def test_a_cycle_is_block_means_and_the_finer_chains_with_further_noise(upsampling):
    m = model(upsampling=upsampling, sample_steps=[3, 4, 5])
    start = m.draw_colours(6, seed=5)
    found = m.cascade(
        start, seed=5, first_sample=7, first_step=100, langevin=m.sampling, cycles=(2, 4), precision="fp32"
    )
    x, grids, steps = start, [start], [100, 100, 100]

    def climb(x, first):
        for grid in range(first, 4):
            x = langevin_sample(
                m.nets[grid - 1], enlarged(x, m.sizes[grid], upsampling), steps=2 + grid, seed=5, first_sample=7,
                first_step=steps[grid - 1], stream=noise.stream(noise.Purpose.SAMPLING, grid), precision="fp32", **LAW,
            )  # fmt: skip
            grids[grid:] = [x]
            steps[grid - 1] += 2 + grid
        return x

    x = climb(start, 1)
    grids[1] = x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
    x = climb(grids[1], 2)
    grids[2] = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    steps[1] += 4  # a counter counts on over a cycle that leaves the grid out, too
    climb(grids[2], 3)
    for ours, expected in zip(found, grids, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_samples_take_the_model_s_own_and_no_training_call_does():
    m, plain = model(cycles=[4, 4]), model()
    assert m.cycles == (4, 4) and model(cycles=2).cycles == (2,)
    starts = m.draw_colours(5, seed=1)
    x = m.sample(5, seed=1, return_grids=True)
    assert all(map(torch.equal, x, m.cascade(starts, seed=1, cycles=(4, 4))))
    assert torch.equal(m.cascade(starts, seed=1)[-1], plain.sample(5, seed=1))
    once = plain.sample(5, seed=1, return_grids=True)
    assert torch.equal(x[1], once[1]) and not torch.equal(x[-1], once[-1])
    assert torch.equal(m.sample(5, seed=1, batch_size=2, precision="fp32"), m.sample(5, seed=1, precision="fp32"))


def test_every_step_is_counted_and_called_back_with_its_grid():
    m, calls = model(sample_steps=[2, 3, 4], cycles=[2, 4]), []
    m.sample(2, seed=0, callback=lambda grid, step, x: calls.append((grid, x.shape[-1], step)))
    first, second, third = (
        [(g, 2**g, turn * (g + 1) + k) for g in (1, 2, 3) for k in range(g + 1)] for turn in (0, 1, 2)
    )
    assert calls == first + second[2:] + third[5:] and len(calls) == m.steps_of_sample
    assert model(sample_steps=[2, 3, 4]).steps_of_sample == 9


def test_known_pixels_and_the_planes_of_classes_are_held_through_cycles():
    known = torch.linspace(-1, 1, 3)[:, None, None, None].expand(3, 2, 8, 8)
    mask = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 4:] = True
    for m in (model(cycles=[4]), model(cycles=[2, 4], classes=["a", "b"])):
        seen = []
        x = m.sample(
            3, seed=0, known=known, mask=mask, callback=lambda grid, step, x, seen=seen: seen.append(x.clone())
        )
        assert torch.equal(x[:, :, :4], known[:, :, :4]) and bool(torch.isfinite(x).all())
        fine = [live for live in seen if live.shape[-1] == 8]
        assert len(fine) == 3 * (1 + len(m.cycles)) and all(
            torch.equal(live[:, :2, :4], known[:, :, :4]) for live in fine
        )
        for live in seen if m.classes else []:
            assert torch.equal(live[:, 2:], live[:, 2:, :1, :1].expand_as(live[:, 2:]))
            assert torch.equal(live[:, 2:, 0, 0], seen[0][:, 2:, 0, 0])


def test_a_model_file_keeps_them(tmp_path):
    m = model(cycles=[4, 2])
    m.save(tmp_path / "model.safetensors")
    again = MultiGrid.load(tmp_path / "model.safetensors")
    assert again.cycles == (4, 2) and torch.equal(again.sample(3, seed=1), m.sample(3, seed=1))
    assert "cycles" not in model().config()


@pytest.mark.parametrize("cycles", [1, 8, 3, (4, 8), "4", "", b"\x04", [4.0], [True], None])
def test_sizes_that_no_sample_can_go_down_to_are_refused(cycles):
    with pytest.raises(Refused, match="MultiGrid: cycles must hold sizes among 2, 4, got"):
        model(cycles=cycles)
    with pytest.raises(Refused, match="cascade: cycles must hold sizes among 2, 4, got"):
        model().cascade(torch.zeros(1, 2, 1, 1), cycles=cycles)
    m = model(cycles=4)
    with pytest.raises(Refused, match="MultiGrid: cycles must hold sizes among 2, 4, got"):
        m.cycles = cycles
    assert m.cycles == (4,)
    with pytest.raises(Refused, match="cycles must be empty, of two sizes"):
        model((1, 8), cycles=4)


def test_what_looks_at_single_chains_goes_up_once():
    m, data = model(cycles=[4]), ImageData(np.random.default_rng(0).integers(0, 256, (20, 2, 8, 8), dtype=np.uint8))
    found = [diagnose(each, num=4, seed=1) for each in (m, model())]
    assert [r.figures["recorded"] for r in found[0].chains] == [r.figures["recorded"] for r in found[1].chains]
    assert "of the first way up alone, without V-cycles" in found[0].notes
    assert "of the first way up alone, without V-cycles" not in found[1].notes
    by_size = [evaluate_by_size(each, data, data, num=6, progress=False)["kid"] for each in (m, model())]
    assert by_size[0] == by_size[1] and m.cycles == (4,)


def test_explain_has_a_line_for_each():
    lines = model(cycles=[2, 4]).explain().splitlines()
    assert lines[:-2] == model().explain().splitlines()
    assert "size 2 start" in lines[-2] and "size 4 start" in lines[-1]


def test_a_pipeline_is_refused():
    session = graphs.Session(on=lambda *inputs: contextlib.nullcontext())
    with pytest.raises(Refused, match="pipeline must be False for a model with V-cycles"):
        model(cycles=[4])._sample_group(Group(2, 0, 0, graph=session))


def test_an_error_names_the_grid_of_the_model():
    def torn(x):
        return (x * torch.nan).flatten(1).sum(1)

    start = torch.zeros(2, 2, 4, 4)
    with pytest.raises(DivergenceError, match=r"cascade: grid 3 \(size 8\)"):
        cascade([torn], (4, 8), [Langevin(3, **LAW)], start, first_grid=2, seed=0)
