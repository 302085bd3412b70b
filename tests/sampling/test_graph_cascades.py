"""Cascades and pipelines from graphs."""

import pytest
import torch
from helpers import resident_host
from helpers.graph_cases import DYNAMICS, Own, cascades, change_, colours, images, model, net_of, slots

from mgebm_fast.errors import BackendError, DivergenceError
from mgebm_fast.gradient.conv import ConvPlan
from mgebm_fast.gradient.resident import ResidentPlan
from mgebm_fast.gradient.stack import read
from mgebm_fast.models import MultiGrid
from mgebm_fast.ops.conv_chain import resident
from mgebm_fast.sampling import graphs, running


@pytest.mark.parametrize(
    ("norm", "precision", "upsampling"),
    [("none", "fp32", "nearest"), ("batch", "fp16", "nearest"), ("none", "fp32", "linear")],
)
def test_one_capture_holds_all_grids_of_a_cascade(traced, norm, precision, upsampling):
    m = model(norm, upsampling=upsampling)
    for call in range(4):
        got, expected = cascades(
            m, colours(seed=call), seed=call, first_step=[3 * call, 4 * call, 0], precision=precision
        )
        assert [tuple(g.shape) for g in got] == [(5, 3, s, s) for s in (1, 2, 4, 8)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        change_(m)
    assert len(traced) == 1


def test_known_pixels_are_inputs_of_the_cascade_s_graph(traced, no_eager_run):
    m, made = model(), []
    for call in range(4):
        mask = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(call)) < 0.4
        mask[:, :, :4] = call % 2 == 0
        made.append((colours(seed=call), {"known": images(seed=call), "mask": mask}))
    expected = [cascades(m, start, **held)[1] for start, held in made]
    for (start, held), result in zip(made, expected, strict=True):
        got = m.cascade(start, seed=3, **held)
        assert all(torch.equal(a, b) for a, b in zip(got, result, strict=True))
    no_eager_run()
    again = m.cascade(made[0][0], seed=3, **made[0][1])
    assert all(torch.equal(a, b) for a, b in zip(again, expected[0], strict=True)) and len(traced) == 1


def test_samples_of_a_model_come_from_its_cascade_s_graph(traced, no_eager_run):
    m = model("batch")
    m.set_colours(colours(20))
    expected = m.sample(12, seed=1)
    m.sample(10, seed=0, graph=None)
    m.sample(10, seed=0, graph=None)
    assert len(traced) == 1
    no_eager_run()
    assert torch.equal(m.sample(12, seed=1), expected)


def test_an_unhealthy_cascade_names_its_grid(traced):
    m = model()
    for _ in range(3):
        m.cascade(colours(), seed=0, precision="fp32")
    with torch.no_grad():
        m.nets[1].head.weight.fill_(float("nan"))
    with pytest.raises(DivergenceError, match=r"cascade: grid 2 \(size 4\): the chain became non-finite at step 0"):
        m.cascade(colours(), seed=0, precision="fp32")


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_way_up_after_a_cycle_is_captured_with_its_own_noise(traced, norm):
    m = model(norm)
    for call in range(4):
        got, expected = cascades(m, colours(seed=call), first_step=3 * call, cycles=[4])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert traced


def test_a_cascade_with_a_net_of_another_kind_is_not_captured_whole(traced):
    m = MultiGrid((1, 4, 8), langevin=DYNAMICS, nets=[Own(), net_of()])
    for call in range(4):
        got, expected = cascades(m, colours(seed=call))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(traced) == 1  # the second grid's chain, by itself
    assert "grid 1 (size 4)" in slots(m.nets[0])[0].refusal


@pytest.mark.parametrize(("norm", "held"), [("none", True), ("batch", False)])
def test_a_pipeline_draws_the_same_samples(traced, no_eager_run, norm, held):
    m, known = model(norm), {}
    m.set_colours(colours(20))
    if held:
        mask = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
        known = {"known": images(20), "mask": mask}
    expected = m.sample(20, seed=1, graph=False, return_grids=True, **known)
    got = m.sample(20, seed=1, pipeline=True, return_grids=True, **known)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(traced) == 3  # a graph a grid, each in a lane of its own
    assert len({id(slot.lane) for net in m.nets for slot in slots(net)}) == 3
    no_eager_run()
    assert torch.equal(m.sample(20, seed=1, pipeline=True, **known), expected[-1])


def test_a_pipeline_that_diverges_names_the_grid_and_one_that_cannot_be_is_refused(traced):
    m = model()
    m.set_colours(colours(20))
    m.sample(20, seed=1, pipeline=True, precision="fp32")
    with torch.no_grad():
        m.nets[1].head.weight.fill_(float("nan"))
    with pytest.raises(DivergenceError, match=r"grid 2 \(size 4\): the chain became non-finite"):
        m.sample(20, seed=1, pipeline=True, precision="fp32")
    with pytest.raises(ValueError, match="pipeline=True runs chains whole"):
        m.sample(20, seed=1, pipeline=True, callback=print)
    graphs.DEVICES = ("cuda",)  # undone by the fixture
    with pytest.raises(BackendError, match="sample: pipeline=True needs a CUDA device, the model is on cpu"):
        m.sample(20, seed=1, pipeline=True)


@pytest.mark.parametrize(
    ("resident_sizes", "held", "upsampling", "launches"),
    [
        ((2, 4, 8), False, "nearest", 1), ((2, 4), False, "nearest", 1), ((2, 4, 8), True, "nearest", 3),
        ((2, 4, 8), False, "linear", 3),
    ],
)  # fmt: skip
def test_resident_chains_of_a_cascade_share_a_launch(monkeypatch, resident_sizes, held, upsampling, launches):
    """Those of the coarsest sizes, where nothing but replication lies between them; the same bits as launch by launch.
    The kernel's own source runs, on the host."""
    counted = []

    def launch(chains, nets, x, bad_step):
        counted.append(len(chains))
        bad_step.clamp_(max=resident_host.launch(chains, nets, len(x)))

    def plan(energy, x, *arguments, **more):
        if x.shape[-1] in resident_sizes:
            return ResidentPlan(read(energy, x), energy, x)
        return ConvPlan(read(energy, x), energy, "fp16")

    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs.Lane, "record", lambda self, body, device: body() or body)
    monkeypatch.setattr(resident, "launch", launch)
    monkeypatch.setattr(resident, "limits_of", lambda device: resident.H100)
    monkeypatch.setattr(running, "plan", plan)
    m, start, known = model(upsampling=upsampling), colours(3), {}
    if held:
        known = {"known": images(3), "mask": torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5}
    got, expected = [m.cascade(start, seed=3, first_step=[6, 0, 2], graph=graph, **known) for graph in (None, False)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    counted.clear()
    got = m.cascade(start, seed=3, first_step=[6, 0, 2], **known)
    assert len(counted) % launches == 0 and len(counted) <= 2 * launches  # a capture runs its body once before
    counted.clear()
    again = m.cascade(start, seed=3, first_step=[6, 0, 2], **known)
    assert len(counted) == launches and sum(counted) == len(resident_sizes)
    for results in (got, again):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
