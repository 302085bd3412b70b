"""The native plan: when it runs, that it sees new weights when told to, and what it says of itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mgebm_fast as mg
from mgebm_fast import native as compiled
from mgebm_fast.gradient import energy_gradient, plan
from mgebm_fast.gradient.native import NativePlan

pytestmark = pytest.mark.skipif(not compiled.available(), reason=f"no compiled module: {compiled.load_error}")


def small(norm="none"):
    return mg.EnergyNet(8, 3, [mg.nets.ConvSpec(8, 3), mg.nets.ConvSpec(12, 3, 2)], norm=norm, activation="silu")


def images(samples=16):
    return torch.rand(samples, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def float64(net, x):
    return energy_gradient(net.double(), x.double()).float()


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_refresh_takes_the_present_weights_and_nothing_else_does(norm):
    net, x = small(norm), images()
    made = plan(net, x, "fp32")
    assert isinstance(made, NativePlan)
    before = made.gradient(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(made.gradient(x), before)
    made.refresh()
    torch.testing.assert_close(made.gradient(x), float64(net, x), rtol=1e-4, atol=1e-6)


def test_refresh_with_statistics_over_a_map_of_one_pixel():
    net = mg.EnergyNet(4, 3, [mg.nets.ConvSpec(8, 3, 2), mg.nets.ConvSpec(8, 3, 2)], norm="batch", activation="silu")
    x = torch.rand(5, 3, 4, 4)
    made = plan(net, x, "fp32")
    made.refresh()
    torch.testing.assert_close(made.gradient(x), float64(net, x), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="more than one value a channel"):
        made.gradient(x[:1])


def test_it_says_what_it_does_and_why_not_faster():
    x = images()
    before = compiled.isa()
    try:
        assert compiled.module().set_isa("portable")
        said = str(mg.Langevin(steps=2, step_size=0.1).explain(small(), x))
        assert "native, fp32 (portable), all steps in one call, because bf16 is not faster" in said
        said = str(mg.Langevin(steps=2, step_size=0.1).explain(small(), x, backend="reference"))
        assert "native, fp32 (portable), because" in said and "in one call" not in said
        assert str(plan(small(), x, "bf16").explain()).startswith("conv, bf16")
    finally:
        compiled.module().set_isa(before)


def test_batch_statistics_without_eps_are_left_to_torch():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0), nn.Flatten(), nn.Linear(144, 1), nn.Flatten(0))
    assert "has eps 0" in str(plan(net, images()).explain())


@pytest.mark.parametrize("activation", [nn.SiLU, nn.GELU])
def test_a_chain_leaves_no_trace_in_a_net(activation):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), activation(), nn.Flatten(), nn.Linear(144, 1), nn.Flatten(0)
    ).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mg.langevin_sample(net, images(), steps=3, step_size=0.1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
