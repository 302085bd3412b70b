"""Graphs and the energies that they are of: changed, copied, gone, of other kinds than stacks."""

import copy
import gc
import pickle
import weakref

import torch
from helpers.graph_cases import DYNAMICS, Own, cascades, change_, colours, images, model, net_of, same, slots
from torch import nn

from mgebm_fast.gradient import plan


def test_an_energy_that_became_another_one_is_captured_again(traced):
    net, x = net_of(activation="leaky_relu"), images()
    for _ in range(3):
        assert same(net, x)
    handle = net.layers[0].register_forward_hook(lambda *_: None)
    assert "autograd" in str(DYNAMICS.explain(net, x)) and same(net, x)
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


def test_modules_of_any_kind_only_where_asked_for(traced):
    energy, x = Own(), images()
    for seed in range(3):
        assert same(energy, x, seed=seed)
    assert not traced
    assert "graph=True captures it" in str(DYNAMICS.explain(energy, x))
    assert "graph: no, because a function is not a module" in str(DYNAMICS.explain(lambda x: energy(x), x))
    for seed in range(3):
        expected = DYNAMICS(energy, x, seed=seed, graph=False)
        assert torch.equal(DYNAMICS(energy, x, seed=seed, graph=True), expected)
        change_(energy)
    assert len(traced) == 1
    # A parameter that lies elsewhere is not the one that was captured.
    energy.scale = nn.Parameter(torch.tensor(7.0))
    got = DYNAMICS(energy, x, seed=0, graph=True)
    assert torch.equal(got, DYNAMICS(energy, x, seed=0, graph=False))


def test_an_energy_that_looks_at_its_numbers_runs_without(traced):
    energy, x = Own(looks=True), images()
    for seed in range(4):
        got = DYNAMICS(energy, x, seed=seed, graph=True)
        assert torch.equal(got, DYNAMICS(energy, x, seed=seed, graph=False))
    assert not traced
    assert "graph: no, because its capture failed" in str(DYNAMICS.explain(energy, x, graph=True))


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


def test_a_plan_and_its_graphs_go_with_the_energy_at_once(traced):
    """No collection is needed: nothing that is kept refers to the energy."""
    net = net_of()
    for _ in range(2):
        DYNAMICS(net, images())
    (slot,) = slots(net)
    gone = [weakref.ref(net), weakref.ref(slot.static), weakref.ref(slot.static.plan)]
    assert not [name for name in vars(net) if name.startswith("_mgebm")]
    traced.clear()
    gc.collect()
    gc.disable()
    try:
        del net, slot
        assert [reference() for reference in gone] == [None] * 3
    finally:
        gc.enable()


def test_a_cascade_lets_go_of_nets_that_its_model_dropped(traced):
    m = model()
    for _ in range(2):
        m.cascade(colours(), seed=3)
    dropped = weakref.ref(m.nets[1])
    m.nets[1] = net_of(size=4, seed=1)
    traced.clear()
    gc.collect()
    assert dropped() is None
    for call in range(3):
        got, expected = cascades(m, colours(seed=call))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
