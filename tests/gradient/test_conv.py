"""The conv plan against autograd and float64, and what it leaves to autograd."""

import copy

import pytest
import torch

from mgebm_fast.errors import BackendError
from mgebm_fast.gradient import bfloat16_pays, energy_gradient, plan
from mgebm_fast.gradient.autograd import AutogradPlan
from mgebm_fast.gradient.conv import ConvPlan
from mgebm_fast.nets import ConvSpec, EnergyNet, multigrid_net

LAYERS = [ConvSpec(6, 3), ConvSpec(5, 4, 2), ConvSpec(7, 3)]
NETS = [
    pytest.param(
        dict(activation=activation, ndim=ndim, head=head, spectral_norm=spectral), id=f"{activation}-{ndim}d-{head}"
    )
    for activation, ndim, head, spectral in [
        ("leaky_relu", 2, "linear", False),
        ("leaky_relu", 1, "sum", True),
        ("relu", 2, "sum", False),
        ("relu", 3, "linear", False),
        ("none", 2, "linear", True),
        ("silu", 2, "linear", False),
        ("elu", 1, "linear", False),
    ]
]


def make(seed=0, **options):
    return EnergyNet(8, 2, LAYERS, norm="none", seed=seed, **options)


def images(net, n=5, scale=1.0):
    return scale * torch.randn(n, net.channels, *net.size, generator=torch.Generator().manual_seed(1))


def exact(net, x):
    leaf = x.double().requires_grad_()
    return torch.autograd.grad(copy.deepcopy(net).double()(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("options", NETS)
def test_fp32_is_autograd(options):
    net = make(**options)
    x = images(net)
    chosen = plan(net, x, "fp32")
    assert isinstance(chosen, ConvPlan)
    got, expected = chosen.gradient(x), AutogradPlan(net, "test", "").gradient(x)
    if options["activation"] in ("silu", "elu"):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(got, expected)
    assert (got.double() - exact(net, x)).norm() < 2e-5 * exact(net, x).norm()


@pytest.mark.parametrize("options", NETS)
def test_bf16_is_near_float64(options):
    net = make(**options)
    x = images(net, n=32)
    got = plan(net, x, "bf16").gradient(x)
    assert got.dtype == torch.bfloat16 and got.shape == x.shape
    assert (got.double() - exact(net, x)).norm() < 0.1 * exact(net, x).norm()


@pytest.mark.parametrize("size", [4, 16, 64])
@pytest.mark.parametrize("precision, bound", [("fp32", 1e-2), ("bf16", 0.15)])
def test_published_nets_on_byte_scale_pixels(size, precision, bound):
    # In fp32 a flipped activation sign costs up to 4e-3; bf16's bound is the design's.
    net = multigrid_net(size, width=0.5, norm="none", seed=3)
    x = 255 * torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    got = plan(net, x, precision).gradient(x)
    assert (got.double() - exact(net, x)).norm() < bound * exact(net, x).norm()


def test_a_frozen_net_runs_by_hand():
    net = multigrid_net(4, width=0.25)
    x = 255 * torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with net.observing():
        net(x)
    frozen = net.freeze_norm()
    assert isinstance(plan(frozen, x), ConvPlan)
    assert torch.equal(plan(frozen, x).gradient(x), AutogradPlan(frozen, "test", "").gradient(x))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layout_does_not_matter_and_x_is_untouched(precision):
    net = multigrid_net(16, width=0.25, norm="none")
    x = images(net)
    before = x.clone()
    chosen = plan(net, x, precision)
    plain = chosen.gradient(x)
    assert torch.equal(chosen.gradient(x.to(memory_format=torch.channels_last)), plain)
    assert torch.equal(x, before)
    # The plan keeps nothing of one call that another could meet.
    assert torch.equal(chosen.gradient(x), plain)


def test_the_plan_keeps_the_weights_that_it_was_made_with():
    net = make()
    x = images(net)
    chosen = plan(net, x, "bf16")
    before = chosen.gradient(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    assert torch.equal(chosen.gradient(x), before)


def test_it_needs_no_gradients_and_leaves_none():
    net = make()
    x = images(net)
    got = plan(net, x).gradient(x)
    assert not got.requires_grad and all(p.requires_grad and p.grad is None for p in net.parameters())


class Doubled(EnergyNet):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    net = make()
    net.layers[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return net


@pytest.mark.parametrize(
    "net, reason",
    [
        (Doubled(8, 2, LAYERS, norm="none"), "Doubled is not an EnergyNet"),
        (EnergyNet(8, 2, LAYERS), "norm='batch' couples the samples"),
        (hooked(), "layers.0 has hooks"),
        (make().double(), "a parameter is torch.float64"),
    ],
)
def test_what_it_cannot_take_goes_to_autograd_and_says_why(net, reason):
    x = images(net)
    assert reason in plan(net, x).explain() and plan(net, x).explain().startswith("autograd, fp32, because")
    with pytest.raises(BackendError, match="precision 'bf16' needs the conv plan"):
        plan(net, x, "bf16")
    assert not bfloat16_pays(net, x)


def test_a_net_that_observes_goes_to_autograd():
    net = make(spectral_norm=True)
    with net.observing():
        assert "observing" in plan(net, images(net)).explain()
    assert isinstance(plan(net, images(net)), ConvPlan)


def test_wrong_shapes_are_refused_as_the_net_refuses_them():
    net = make()
    with pytest.raises(ValueError, match=r"x must have shape \(N, 2, 8, 8\), got \(5, 2, 4, 4\)"):
        energy_gradient(net, torch.zeros(5, 2, 4, 4))
