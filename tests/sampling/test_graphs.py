"""Chains from graphs. Without a GPU the graph is played by a trace of the same body: it holds what ran, operator by
operator, on the buffers that it ran on, and, as a CUDA graph does, nothing of Python and no look at a number."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from mgebm_fast.errors import BackendError, DivergenceError
from mgebm_fast.gradient import native, plan
from mgebm_fast.nets import multigrid_net
from mgebm_fast.sampling import Langevin, MultiGrid, chain, graphs, langevin_sample, memory

DYNAMICS = Langevin(3, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))


def net_of(norm="none", size=8, seed=0, **more):
    return multigrid_net(size, norm=norm, variant="compact", width=0.25, seed=seed, **more)


def images(n=5, size=8, seed=0):
    return 255 * torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def change_(module, factor=1.1):
    for parameter in module.parameters():
        parameter.mul_(factor)


def slots(module):
    return list(module.__dict__.get(graphs._SHELF, {}).values())


@pytest.fixture
def traced(monkeypatch):
    """Traces stand for CUDA graphs; the list grows by one with every capture."""
    captures = []

    def record(self, body, device):
        body()

        def outputs():
            body()
            return torch.zeros(())

        with torch.no_grad():
            trace = make_fx(outputs)()
        captures.append(trace)
        return trace

    def launch(x, grad, mask, numbers, placed, backend):
        torch.ops.mgebm_fast.langevin_step_(x, grad, mask, *numbers.arguments, *placed.arguments, backend)

    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs.Lane, "record", record)
    # What a trace holds: operators of torch's and of ours, not calls past the dispatcher.
    monkeypatch.setattr(chain, "launch", launch)
    monkeypatch.setattr(native, "why_not", lambda *_: "graphs are tested")
    return captures


@pytest.fixture
def no_eager_run(monkeypatch):
    """After a call of this, only graphs may make steps."""

    def forbid(*_):
        raise AssertionError("a chain ran outside its graph")

    return lambda: monkeypatch.setattr(memory, "advance_", forbid)


def same(energy, x, dynamics=DYNAMICS, **arguments):
    """Whether a run is bit for bit that of the chain without a graph."""
    expected = dynamics(energy, x, graph=False, **arguments)
    got = dynamics(energy, x, **arguments)
    return torch.equal(got, expected) and got.stride() == expected.stride()


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_capture_serves_every_batch_counter_and_weight(traced, norm, precision):
    net = net_of(norm, spectral_norm=True)
    for call in range(4):
        start = images(seed=call)
        assert same(net, start, seed=2**64 - 1 - call, first_sample=9 * call, first_step=5 * call, precision=precision)
        change_(net)
    assert len(traced) == 1 and [slot.runs for slot in slots(net)] == [4]


def test_from_the_second_run_on_no_step_is_made_outside_the_graph(traced, no_eager_run):
    net, x = net_of(), images()
    expected = [DYNAMICS(net, x, seed=seed, graph=False) for seed in range(4)]
    for seed in range(2):
        assert torch.equal(DYNAMICS(net, x, seed=seed), expected[seed])
    no_eager_run()
    for seed in range(2, 4):
        assert torch.equal(DYNAMICS(net, x, seed=seed), expected[seed])


def test_counters_may_be_tensors_and_ids_one_a_sample(traced):
    net = net_of()
    for call in range(3):
        counters = {"seed": torch.tensor(call - 2), "first_step": torch.tensor(7 * call)}
        assert same(net, images(), first_sample=torch.tensor(3 + call), **counters)
    for call in range(3):
        assert same(net, images(), first_sample=torch.tensor([5, 3, 2**32 - 1, call, 9]))
    assert len(traced) == 2


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (5, 3, 8, 8)])
def test_masks_are_inputs(traced, shape):
    net = net_of()
    for call in range(3):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(call)) < 0.5
        assert same(net, images(), mask=mask)
    assert same(net, images())  # a chain without one is another chain
    assert len(traced) == 1


def test_layouts_have_graphs_of_their_own_and_odd_ones_none(traced):
    net = net_of()
    for _ in range(3):
        assert same(net, images().to(memory_format=torch.channels_last))
        assert same(net, images().transpose(2, 3))
    assert len(traced) == 1


def test_other_shapes_and_dynamics_are_other_graphs_and_the_oldest_go(traced, monkeypatch):
    net = net_of()
    monkeypatch.setattr(graphs, "KEPT", 2)
    for n in range(1, graphs.KEPT + 3):
        assert same(net, images(n)) and same(net, images(n))
    assert len(traced) == graphs.KEPT + 2 and len(slots(net)) == graphs.KEPT
    # Annealed noise: no chain comes a second time, and none is captured.
    before = len(traced)
    for call in range(5):
        assert same(net, images(), Langevin(3, step_size=0.3, noise_scale=1.0 - call / 9))
    assert len(traced) == before


def test_a_callback_runs_without_a_graph(traced):
    net, steps = net_of(), []
    for _ in range(3):
        DYNAMICS(net, images(), callback=lambda step, x: steps.append(step))
    assert steps == [0, 1, 2] * 3 and not slots(net)
    with pytest.raises(ValueError, match="graph=True runs a chain whole"):
        DYNAMICS(net, images(), graph=True, callback=print)


def test_results_are_the_caller_s(traced):
    net, x = net_of(), images()
    first, second, third = (DYNAMICS(net, x, seed=s) for s in (0, 1, 2))
    kept = second.clone()
    third.zero_()
    assert torch.equal(second, kept)
    assert same(net, x, seed=4) and not torch.equal(first, second)


def test_a_start_that_requires_grad_or_inference_mode_changes_nothing(traced):
    net, x = net_of(), images().requires_grad_()
    for _ in range(3):
        assert same(net, x)
        with torch.inference_mode():
            assert same(net, x)


def test_a_chain_that_diverges_in_a_graph_names_its_step(traced):
    class Wild(nn.Module):
        def forward(self, x):
            return -((x - 100.0) / 10.0).pow(6).flatten(1).sum(1)

    wild, dynamics = Wild(), Langevin(8, step_size=0.05, noise_scale=0.1)
    calm = torch.full((2, 3, 4, 4), 100.0)
    for _ in range(3):
        dynamics(wild, calm, graph=True)
    with pytest.raises(DivergenceError, match=r"non-finite at step \d+") as caught:
        dynamics(wild, calm + 60.0, graph=True)
    with pytest.raises(DivergenceError) as expected:
        dynamics(wild, calm + 60.0, graph=False)
    assert str(caught.value) == str(expected.value)
    assert torch.isfinite(dynamics(wild, calm, graph=True)).all()


def huge(net, factor):
    """float16 ends at 65504: the first map of pixels of 255 passes it."""
    with torch.no_grad():
        net.layers[0].weight.mul_(factor)


@pytest.mark.parametrize("clamp", [None, (0.0, 255.0)])
def test_an_overflow_in_sixteen_bits_is_seen_and_made_again_in_fp32(clamp):
    net, x = net_of(), images()
    dynamics = Langevin(3, step_size=0.01, noise_scale=1.0, clamp=clamp, grad_clamp=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dynamics(net, x, precision="fp16")
    huge(net, 3e4)
    expected = dynamics(net, x, precision="fp32", seed=4)
    with pytest.warns(UserWarning, match="the fp16 gradient overflowed at step 6; the chain is run again in fp32"):
        got = dynamics(net, x, precision="fp16", seed=4, first_step=6)
    assert torch.equal(got, dynamics(net, x, precision="fp32", seed=4, first_step=6))
    steps = []
    with pytest.warns(UserWarning, match="overflowed at step 0"):
        got = dynamics(net, x, precision="fp16", seed=4, callback=lambda step, state: steps.append(step))
    assert torch.equal(got, expected) and steps == [0, 1, 2]
    with pytest.warns(UserWarning, match="trajectory: .*overflowed"):
        *_, (_, end) = dynamics.trajectory(net, x, precision="fp16", seed=4, every=2)
    assert torch.equal(end, expected)


def test_an_overflow_in_a_graph_is_made_again_too(traced):
    net, x = net_of(), images()
    dynamics = Langevin(3, step_size=0.01, clamp=(0.0, 255.0), grad_clamp=1.0)
    for _ in range(2):
        assert same(net, x, dynamics, precision="fp16")
    huge(net, 3e4)
    with pytest.warns(UserWarning, match="overflowed at step 0"):
        got = dynamics(net, x, precision="fp16")
    assert torch.equal(got, dynamics(net, x, precision="fp32", graph=False))
    huge(net, 1 / 3e4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(net, x, dynamics, precision="fp16")
    assert len(traced) == 1


def test_the_look_at_a_graph_s_run_can_be_left_to_the_caller(traced):
    net, x = net_of(), images()
    dynamics = Langevin(3, step_size=0.01, clamp=(0.0, 255.0), grad_clamp=1.0)
    expected = dynamics(net, x, precision="fp16", graph=False)
    with graphs.unread() as healthy, warnings.catch_warnings():
        warnings.simplefilter("error")
        for runs in range(3):
            assert torch.equal(dynamics(net, x, precision="fp16"), expected)
            assert [bool(verdict) for verdict in healthy] == [True] * runs  # the first run looks at itself
        huge(net, 3e4)
        dynamics(net, x, precision="fp16")
    assert [bool(verdict) for verdict in healthy] == [True, True, False]
    with pytest.warns(UserWarning, match="overflowed"):
        dynamics(net, x, precision="fp16")


def test_an_energy_that_became_another_one_is_captured_anew(traced):
    net, x = net_of(activation="leaky_relu"), images()
    for _ in range(3):
        assert same(net, x)
    handle = net.layers[0].register_forward_hook(lambda *_: None)
    assert "autograd" in DYNAMICS.explain(net, x) and same(net, x)
    handle.remove()
    for _ in range(3):
        assert same(net, x)
    assert len(traced) == 2


def test_copies_and_pickles_of_a_module_leave_its_graphs_behind(traced):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(144, 1), nn.Flatten(0))
    x, names = images(), list(net.state_dict())
    for _ in range(2):
        DYNAMICS(net, x)
    assert len(slots(net)) == len(traced) == 1
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not slots(other) and same(other, x)
    assert list(net.state_dict()) == names


def test_graphs_go_with_their_energy(traced):
    net = net_of()
    for _ in range(2):
        DYNAMICS(net, images())
    gone = weakref.ref(net)
    static = weakref.ref(slots(net)[0].static)
    traced.clear()
    del net
    gc.collect()
    assert gone() is None and static() is None


class Own(nn.Module):
    """No stack of convolutions, and it may look at its numbers."""

    def __init__(self, looks=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.looks = looks

    def forward(self, x):
        if self.looks and float(x.detach().sum()) < 0:
            return x.flatten(1).sum(1)
        return ((x - 100.0) / self.scale).square().flatten(1).sum(1)


def test_modules_of_any_kind_only_where_asked_for(traced):
    energy, x = Own(), images()
    for seed in range(3):
        assert same(energy, x, seed=seed)
    assert not traced
    assert "graph=True captures it" in DYNAMICS.explain(energy, x)
    assert "graph: no, because a function is not a module" in DYNAMICS.explain(lambda x: energy(x), x)
    for seed in range(3):
        expected = DYNAMICS(energy, x, seed=seed, graph=False)
        assert torch.equal(DYNAMICS(energy, x, seed=seed, graph=True), expected)
        change_(energy)
    assert len(traced) == 1
    # A parameter that lies elsewhere is not the one that was captured.
    energy.scale = nn.Parameter(torch.tensor(7.0))
    got = DYNAMICS(energy, x, graph=True)
    assert torch.equal(got, DYNAMICS(energy, x, graph=False))


def test_an_energy_that_looks_at_its_numbers_runs_without(traced):
    energy, x = Own(looks=True), images()
    for seed in range(4):
        got = DYNAMICS(energy, x, seed=seed, graph=True)
        assert torch.equal(got, DYNAMICS(energy, x, seed=seed, graph=False))
    assert not traced
    assert "graph: no, because its capture failed" in DYNAMICS.explain(energy, x, graph=True)


def test_what_cannot_be_had_is_refused_by_name():
    with pytest.raises(BackendError, match="langevin_sample: graph=True cannot be had: CUDA graphs are not for cpu"):
        langevin_sample(net_of(), images(), steps=2, step_size=0.1, graph=True)
    with pytest.raises(TypeError, match="graph must be True, False or None, got 1"):
        langevin_sample(net_of(), images(), steps=2, step_size=0.1, graph=1)


def test_explain_says_whether_a_graph_holds_the_chain(traced, monkeypatch):
    net, x = net_of(), images()

    def graph_of(**arguments):
        return DYNAMICS.explain(net, x, **arguments).split("graph: ")[1].split("; samples")[0]

    assert graph_of() == "captured at run 2 of this shape"
    for _ in range(2):
        DYNAMICS(net, x)
    assert graph_of() == "captured, and replayed from now on"
    assert graph_of(graph=False) == "no, because graph=False was asked for"
    monkeypatch.setenv("MGEBM_GRAPHS", "0")
    assert graph_of() == "no, because MGEBM_GRAPHS=0"


def test_a_static_chain_run_as_plain_code_is_the_chain():
    """On a CPU, with the native engine and its kernels: no trace, only the buffers."""
    from mgebm_fast.sampling.chain import prepare

    net = net_of()
    numbers = DYNAMICS.update()
    static = graphs.StaticChain(prepare(net, images(), 3, numbers, first_sample=1), images(), 3)
    for call in range(3):
        change_(net)
        x, where = images(seed=call), {"seed": call, "first_sample": 3 * call, "first_step": 2**31 + call}
        chain = prepare(net, x, 3, numbers, **where)
        static.refresh()
        static.load(x, None, chain.place)
        static.run_once()
        assert torch.equal(static.results()[0], DYNAMICS(net, x, **where)) and bool(static.healthy)


# --- cascades ---------------------------------------------------------------------------------------------------------


def model(norm="none", **more):
    return MultiGrid(
        (1, 2, 4, 8), channels=3, norm=norm, variant="compact", width=0.25, langevin=DYNAMICS, batch_size=5, **more
    )


def cascades(m, start, **arguments):
    """The cascade from its graph, and without one."""
    arguments = {"seed": 3, **arguments}
    return [m.cascade(start, graph=graph, **arguments) for graph in (None, False)]


def colours(n=5, seed=0):
    return 255 * torch.rand(n, 3, 1, 1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_capture_holds_all_grids_of_a_cascade(traced, norm, precision):
    m = model(norm)
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


def test_a_cascade_with_a_net_of_another_kind_is_not_captured_whole(traced):
    m = MultiGrid((1, 4, 8), langevin=DYNAMICS, nets=[Own(), net_of()])
    for call in range(4):
        got, expected = cascades(m, colours(seed=call))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(traced) == 1  # the second grid's chain, by itself
    assert "grid 1 (size 4)" in slots(m.nets[0])[0].refusal


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("norm", ["none", "batch"])
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


# --- on a GPU ---------------------------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@cuda
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("size", [4, 8])
def test_replay_equals_eager_bit_for_bit(norm, precision, size):
    net = net_of(norm, size).cuda()
    for call in range(4):
        x = images(9, size, seed=call).cuda()
        counters = dict(seed=2**64 - 1 - call, first_sample=9 * call, first_step=5 * call)
        expected = DYNAMICS(net, x, graph=False, precision=precision, **counters)
        assert torch.equal(DYNAMICS(net, x, precision=precision, **counters), expected)
        change_(net)
    (slot,) = slots(net)
    assert slot.static is not None and not slot.refusal


@cuda
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_cascade_s_replay_equals_eager_bit_for_bit(norm):
    m = model(norm).cuda()
    for call in range(4):
        got, expected = cascades(m, colours(seed=call).cuda(), first_step=3 * call)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        change_(m)
    assert slots(m.nets[0])[0].static is not None


@cuda
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_pipeline_on_streams_draws_the_same_samples(norm):
    m = model(norm).cuda()
    m.set_colours(colours(40).cuda())
    expected = m.sample(40, seed=1, graph=False)
    for _ in range(3):
        assert torch.equal(m.sample(40, seed=1, pipeline=True), expected)


@cuda
def test_any_module_is_captured_on_request_and_streams_take_turns():
    energy, x = Own().cuda(), images().cuda()
    expected = [DYNAMICS(energy, x, seed=seed, graph=False) for seed in range(6)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    got = []
    for seed in range(6):
        streams[seed % 2].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[seed % 2]):
            got.append(DYNAMICS(energy, x, seed=seed, graph=True))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@cuda
def test_memory_of_a_chain_does_not_grow_with_its_steps():
    net, x = net_of("batch").cuda(), images(64).cuda()
    peaks = []
    for steps in (2, 20):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Langevin(steps, step_size=0.3)(net, x, graph=False)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= peaks[0] + 4096


def test_plans_that_are_captured_can_be_refreshed():
    net, x = net_of(), images(2)
    made = plan(net, x, "fp32")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    stale = made.gradient(x)
    made.refresh()
    assert not torch.equal(made.gradient(x), stale)
    assert torch.equal(made.gradient(x), plan(net, x, "fp32").gradient(x))
