"""What a net learns: the native engine's gradients, means and statistics are autograd's."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from sklearn.datasets import load_digits

import mgebm_fast as mg
from mgebm_fast import native, ops
from mgebm_fast.gradient.stack import Stack
from mgebm_fast.learning.methods import contrast as module
from mgebm_fast.learning.methods.contrast import contrast, readable
from mgebm_fast.nets import ConvSpec, multigrid_net

pytestmark = pytest.mark.skipif(
    not native.available() or native.isa() == "portable", reason="the engine learns with AVX2 or more"
)


def energy_net(size=(6, 6), channels=2, **options):
    layers = [ConvSpec(8, 3), ConvSpec(20, 3, 2)]
    return mg.EnergyNet(size, channels, layers, ndim=len(size), **{"norm": "none", "seed": 3} | options)


def energy_net_of(width):
    return mg.EnergyNet((6, 6), 2, [ConvSpec(width, 3), ConvSpec(20, 3, 2)], norm="none", seed=3)


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


@pytest.fixture
def multiplies_bfloat(monkeypatch):
    """A CPU that is said to multiply bfloat16, faster than float32; the engine computes it all the same, slowly."""
    for place in (module, importlib.import_module("mgebm_fast.ops.conv_learn")):
        monkeypatch.setattr(place, "has_bfloat", lambda: True)
    monkeypatch.setattr(module, "prefers_bfloat", lambda: True)


def trained(grid):
    """A net of the model of digits, images and its own samples: what is learnt is a small difference."""
    model = mg.load("digits")
    images = ops.pyramid(torch.from_numpy(load_digits().images[:32] / 8 - 1).float()[:, None], model.sizes)[grid]
    return model.nets[grid - 1].requires_grad_(), images, model.sample(32, seed=0, return_grids=True)[grid]


def young(size, channels, variant="compact", width=1.0, **options):
    net = multigrid_net(size, channels, width, variant=variant, **options)
    draw = torch.Generator().manual_seed(size)
    real, chain = (torch.randn(16, channels, size, size, generator=draw) for _ in range(2))
    return net, real.clamp(-1, 1), chain


LEARNERS = {
    "compact 4": lambda: young(4, 1, norm="none"),
    "compact 8, batch": lambda: young(8, 3),
    "compact 8, spectral": lambda: young(8, 1, norm="none", spectral_norm=True),
    "compact 16": lambda: young(16, 3, norm="none"),
    "published 4": lambda: young(4, 3, "B"),
    "published 16": lambda: young(16, 3, "B", 0.25),
    "published 16, no norm": lambda: young(16, 3, "B", 0.25, norm="none"),
    "trained 2": lambda: trained(1),
    "trained 4": lambda: trained(2),
    "trained 8": lambda: trained(3),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_bfloat16_operands_move_no_gradient_by_three_percent(monkeypatch, name, multiplies_bfloat):
    net, real, chain = LEARNERS[name]()
    exact = copy.deepcopy(net).double()
    found, *energies = contrast(net, list(net.parameters()), real, chain, 0.01, "auto")
    expected, *_ = by_autograd(monkeypatch, exact, list(exact.parameters()), real.double(), chain.double(), 0.01)
    errors = {
        path: float((gradient - value).norm() / value.norm())
        for (path, _), gradient, value in zip(net.named_parameters(), found, expected, strict=True)
        # Nearly nothing is left of a bias's gradient where both batches have one sign.
        if value.norm() > 1e-9
    }
    assert 1e-4 < max(errors.values()) <= 0.03, errors


def test_the_precision_of_the_run_says_which_operands_are_rounded(monkeypatch, multiplies_bfloat):
    net, real, chain = made("none")

    def gradient(precision, net=net):
        return contrast(net, list(net.parameters()), real, chain, 0.0, precision)[0][0]

    exact = gradient("fp32")
    assert torch.equal(gradient("fp16"), exact)
    assert not torch.equal(gradient("bf16"), exact)
    assert torch.equal(gradient("auto"), exact)  # nothing in eight channels would gain
    wide = energy_net_of(16)
    assert not torch.equal(gradient("auto", wide), gradient("fp32", wide))
    monkeypatch.setattr(module, "prefers_bfloat", lambda: False)
    assert torch.equal(gradient("auto", wide), gradient("fp32", wide))
    monkeypatch.setattr(module, "has_bfloat", lambda: False)
    assert torch.equal(gradient("bf16"), exact)


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


@pytest.mark.parametrize(
    "name", ["compact 4", "published 16", "compact 8, spectral", "trained 8", "residual 8", "bytes"]
)
def test_bfloat16_maps_move_gradients_by_seven_percent_at_most(name):
    """As learning_precision = "bf16" learns on a GPU; here torch's own kernels round in the same places."""
    if name == "residual 8":
        net, real, chain = young(8, 3, "residual", norm=None)
    elif name == "bytes":  # of which bfloat16 would lose up to half a unit
        net, *batches = young(16, 3, "B", 0.25)
        real, chain = (127.5 * (x + 1) for x in batches)
    else:
        net, real, chain = LEARNERS[name]()
    exact = copy.deepcopy(net).double()
    found, *energies = module._by_autograd(net, list(net.parameters()), real, chain, 0.01, True)
    expected, *sums = module._by_autograd(exact, list(exact.parameters()), real.double(), chain.double(), 0.01, False)
    assert {tensor.dtype for tensor in (*found, *energies, *net.buffers())} <= {torch.float32, torch.int64}
    error = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)]).norm()
    assert 1e-3 < error / torch.cat([b.flatten() for b in expected]).norm() <= 0.07
    torch.testing.assert_close(torch.stack(energies).double(), torch.stack(sums), rtol=1e-2, atol=1e-3)
    for buffer, value in zip(net.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(buffer, value.to(buffer.dtype), rtol=1e-2, atol=1e-3)
