"""Chains from graphs: what one capture serves, and when there is none. A trace plays the graph (`traced`)."""

import pytest
import torch
from helpers.graph_cases import DYNAMICS, change_, images, net_of, same, slots

from mgebm_fast.errors import BackendError
from mgebm_fast.sampling import Langevin, graphs, langevin_sample


@pytest.mark.parametrize(
    ("norm", "precision"), [("none", "fp32"), ("batch", "fp32"), ("batch", "bf16"), ("none", "fp16")]
)
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


def test_one_graph_serves_annealed_chains(traced):
    """Step sizes and noise are read from memory: training that anneals them captures a chain once."""
    net, x = net_of(), images()
    for call in range(5):
        assert same(net, x, Langevin(3, step_size=0.3, noise_scale=1.0 - call / 9, reference_std=1.0 + call))
    assert len(traced) == 1
    for call in range(4):  # a schedule, a value a sample and a tether are other graphs
        steps, samples = torch.linspace(0.1, 0.3 + call, 3), torch.linspace(0.1, 1.0 + call, len(x))
        law = Langevin(3, step_size=steps, noise_scale=samples, reference_std=0.5, reference_mean=x + call)
        assert same(net, x, law)
    assert len(traced) == 2


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


def test_what_cannot_be_had_is_refused_by_name():
    with pytest.raises(BackendError, match="langevin_sample: graph=True cannot be had: CUDA graphs are not for cpu"):
        langevin_sample(net_of(), images(), steps=2, step_size=0.1, graph=True)
    with pytest.raises(TypeError, match="graph must be True, False or None, got 1"):
        langevin_sample(net_of(), images(), steps=2, step_size=0.1, graph=1)


def test_explain_says_whether_a_graph_holds_the_chain(traced, monkeypatch):
    net, x = net_of(), images()

    def graph_of(**arguments):
        return DYNAMICS.explain(net, x, **arguments).graph

    assert graph_of() == "captured at run 2 of this shape"
    for _ in range(2):
        DYNAMICS(net, x)
    assert graph_of() == "captured, and replayed from now on"
    assert graph_of(graph=False) == "no, because graph=False was asked for"
    monkeypatch.setenv("MGEBM_GRAPHS", "0")
    assert graph_of() == "no, because MGEBM_GRAPHS=0"


def test_a_static_chain_run_as_plain_code_is_the_chain():
    """On a CPU, with the native engine and its kernels: no trace, only the buffers."""
    from mgebm_fast.sampling.running import prepare
    from mgebm_fast.sampling.static import StaticChain

    net = net_of()
    static = StaticChain(prepare(net, images(), 3, DYNAMICS, first_sample=1).chain, images(), 3)
    for call in range(3):
        change_(net)
        x, where = images(seed=call), {"seed": call, "first_sample": 3 * call, "first_step": 2**31 + call}
        chain = prepare(net, x, 3, DYNAMICS, **where).chain
        static.refresh()
        static.load(x, None, chain.place, chain.numbers)
        static.run_once()
        assert torch.equal(static.results()[0], DYNAMICS(net, x, **where)) and bool(static.healthy)
