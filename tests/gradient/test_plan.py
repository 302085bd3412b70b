"""What every plan promises a chain: its protocol, the weights that it has, and that it is not copied."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import mgebm_fast as mg
from mgebm_fast.errors import BatchTooLargeError, DivergenceError
from mgebm_fast.gradient import GradientPlan, PlanReport, energy_gradient, plan
from mgebm_fast.gradient.autograd import AutogradPlan
from mgebm_fast.gradient.conv import ConvPlan
from mgebm_fast.gradient.stack import read
from mgebm_fast.nets import ConvSpec, EnergyNet


def images(n=4):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net_of(**more):
    return EnergyNet(8, 3, [ConvSpec(6, 3, 2), ConvSpec(5, 3)], **{"norm": "none", "activation": "relu", **more})


HELD = net_of()  # plans refer to their energy weakly


def plans():
    net, x = HELD, images()
    return [plan(net, x), ConvPlan(read(net, x), net, "fp32"), AutogradPlan(net, "test", ("it was asked for",))]


@pytest.mark.parametrize("made", plans(), ids=lambda made: type(made).__name__)
def test_plans_have_the_declared_protocol_and_are_not_copied(made):
    assert isinstance(made, GradientPlan) and isinstance(made.explain(), PlanReport)
    assert made.gradient(images()).shape == (4, 3, 8, 8) and made.bad_step is None
    made.refresh()
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="points into memory of its own: it cannot be copied or stored"):
            duplicate(made)


def test_a_plan_does_not_keep_its_energy():
    net, x = net_of(), images()
    made, gone = plan(net, x), weakref.ref(net)
    del net
    assert gone() is None and made.gradient(x).shape == x.shape  # of the weights that it took
    with pytest.raises(ReferenceError, match="the energy of this plan was deleted"):
        made.refresh()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["layers.0.bias", "layers.1.weight", "head.weight"])
def test_weights_that_are_not_finite_stop_a_chain(place, value):
    net = net_of()
    with torch.no_grad():
        net.get_parameter(place).flatten()[0] = value
    with pytest.raises(DivergenceError, match="langevin_sample: the (energy's weights must|chain became)"):
        mg.langevin_sample(net, images(), steps=2, step_size=0.1, clamp=(-3.0, 3.0))


@pytest.mark.parametrize("energy", [lambda net: net, lambda net: lambda x: net(x)], ids=["native", "autograd"])
def test_weights_that_a_callback_changes_count_from_the_next_step_on(energy):
    chain, x = mg.Langevin(3, step_size=0.3), images()
    nets = net_of(), net_of()
    state = x

    def change(net):
        with torch.no_grad():
            net.layers[0].weight.data.mul_(-1.3)  # past the version counter
        net.negative_slope = net.negative_slope / 2
        net.activation = "leaky_relu"

    for k in range(3):
        state = mg.langevin_sample(
            energy(nets[0]), state, steps=1, step_size=0.3, seed=5, first_step=k, precision="fp32"
        )
        change(nets[0])
    got = chain(energy(nets[1]), x, seed=5, precision="fp32", callback=lambda step, x: change(nets[1]))
    torch.testing.assert_close(got, state, rtol=1e-5, atol=1e-5)


def test_errors_of_a_user_s_code_are_not_taken_for_a_lack_of_memory():
    sizes = []

    def energy(x):
        sizes.append(len(x))
        raise RuntimeError("not enough memory for my cache of 3 entries, out of memory")

    with pytest.raises(RuntimeError, match="my cache of 3 entries") as caught:
        mg.langevin_sample(energy, images(8), steps=1, step_size=0.1)
    assert not isinstance(caught.value, BatchTooLargeError) and sizes == [8]

    def too_large(x):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: not enough memory: of 9 bytes")

    with pytest.raises(BatchTooLargeError, match="one sample .* not enough memory: of 9 bytes") as caught:
        with pytest.warns(UserWarning, match="do not fit in memory"):
            mg.langevin_sample(too_large, images(2), steps=1, step_size=0.1)
    assert "DefaultCPUAllocator" in str(caught.value.__cause__)


def test_x_and_energies_of_other_kinds_are_named():
    with pytest.raises(TypeError, match=r"energy_gradient: x must be a floating-point tensor, got torch\.uint8"):
        energy_gradient(net_of(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    low = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0)).bfloat16()
    with pytest.raises(TypeError, match="energy must take float32 x, got one with bfloat16 weights"):
        energy_gradient(low, images())
