"""What a net learns: the native engine's gradients, means and statistics are autograd's."""

from __future__ import annotations

import copy

import pytest
import torch

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient.stack import Stack
from mgebm_fast.learning.methods import contrast as module
from mgebm_fast.learning.methods.contrast import contrast, readable
from mgebm_fast.nets import ConvSpec

pytestmark = pytest.mark.skipif(
    not native.available() or native.isa() == "portable", reason="the engine learns with AVX2 or more"
)


def energy_net(size=(6, 6), channels=2, **options):
    layers = [ConvSpec(8, 3), ConvSpec(20, 3, 2)]
    return mg.EnergyNet(size, channels, layers, ndim=len(size), **{"norm": "none", "seed": 3} | options)


NETS = {
    "none": energy_net,
    "batch": lambda: energy_net(norm="batch"),
    "frozen": lambda: energy_net(norm="batch"),  # frozen below
    "spectral": lambda: energy_net(spectral_norm=True),
    "spectral and batch": lambda: energy_net(norm="batch", spectral_norm=True),
    "sum of the top map": lambda: energy_net(head="sum", activation="relu"),
    "one dimension": lambda: energy_net((17,), 1, activation="silu"),
    "three dimensions": lambda: energy_net((4, 5, 6), 3, activation="elu"),
}


def made(name):
    net = NETS[name]()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    generator = torch.Generator().manual_seed(0)
    real, chain = (torch.randn(n, net.channels, *net.size, generator=generator) for n in (9, 7))
    if name == "frozen":
        with net.observing(), torch.no_grad():
            net(real)
        net = net.freeze_norm()
    return net, real, chain


def by_autograd(monkeypatch, net, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(module, "readable", lambda *_: "it is asked for")
        return contrast(net, *arguments)


@pytest.mark.parametrize("name", NETS)
def test_the_engine_learns_what_autograd_does(monkeypatch, name):
    net, real, chain = made(name)
    other = copy.deepcopy(net)
    net.head is None or net.head.bias.requires_grad_(name != "none")  # a parameter that does not learn
    assert isinstance(readable(net, real, chain), Stack)
    parameters = [p for p in net.parameters() if p.requires_grad]
    names = {n for n, p in net.named_parameters() if p.requires_grad}
    found = contrast(net, parameters, real, chain, 0.05)
    expected = by_autograd(
        monkeypatch, other, [p for n, p in other.named_parameters() if n in names], real, chain, 0.05
    )
    for gradient, value, parameter in zip(found[0], expected[0], parameters, strict=True):
        assert gradient.shape == parameter.shape and gradient.is_contiguous()
        torch.testing.assert_close(gradient, value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=1e-5)
    for (where, buffer), value in zip(net.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, value, rtol=1e-5, atol=1e-6, msg=where)
    assert not any(m.observe for m in net.modules() if hasattr(m, "observe"))


def test_a_layer_that_the_energy_leaves_out_learns_nothing(monkeypatch):
    net, real, chain = made("none")
    extra = torch.nn.Parameter(torch.ones(3))
    gradients, *_ = contrast(net, [*net.parameters(), extra], real, chain, 0.0)
    assert torch.equal(gradients[-1], torch.zeros(3))


class Subclass(mg.EnergyNet):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(net):
    net.layers[0].register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize(
    "net, reason",
    [
        (Subclass(6, 2, [ConvSpec(8, 3)], norm="none"), "Subclass is not an EnergyNet"),
        (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 1), torch.nn.Flatten(0)), "Sequential"),
        (hooked(energy_net()), "hooks"),
        (energy_net().double(), "float64"),
    ],
    ids=["subclass", "sequential", "hooks", "double"],
)
def test_other_nets_learn_by_autograd(net, reason):
    dtype = next(net.parameters()).dtype
    real, chain = torch.randn(3, 2, 6, 6, dtype=dtype), torch.randn(3, 2, 6, 6, dtype=dtype)
    assert reason in readable(net, real, chain)
    gradients, *_ = contrast(net, list(net.parameters()), real, chain, 0.01)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_one_value_a_channel_is_refused_as_by_the_net():
    net = mg.EnergyNet(2, 1, [ConvSpec(4, 2, 2), ConvSpec(4, 3, 2)], norm="batch")
    x = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match="more than one value a channel"):
        contrast(net, list(net.parameters()), x, x, 0.0)
