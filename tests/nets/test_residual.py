"""Residual nets: the function itself, every size, what is stored, and their gradient on the native engine."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import mgebm_fast as mg
from mgebm_fast.gradient import plan
from mgebm_fast.learning.methods.optim import map_areas
from mgebm_fast.nets import ConvSpec, EnergyNet, ResidualNet, from_config, multigrid_net, residual_stages


def images(n, channels, *size, seed=0):
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(seed))


def randomised(net, seed=5):
    """The net with random biases, so that none hides at its initial 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return net


def by_hand(net, x, act):
    """f(x) from torch's functions, the blocks written out: two stages, the second wider, one block each."""
    conv, pool = ((F.conv1d, F.avg_pool1d), (F.conv2d, F.avg_pool2d), (F.conv3d, F.avg_pool3d))[x.dim() - 3]
    weights = {name: parameter.to(x.dtype) for name, parameter in net.named_parameters()}

    def layer(name, h):
        weight = weights[f"{name}.weight"]
        if net.spectral_norm:
            weight = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)
        return conv(h, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    h = layer("layers.0", x)
    h = pool(h + layer("layers.1.second", act(layer("layers.1.first", act(h)))), 2)
    h = layer("layers.2.shortcut", h) + layer("layers.2.second", act(layer("layers.2.first", act(h))))
    h = act(h)
    h = {"linear": h.flatten(1), "mean": h.flatten(2).mean(2), "sum": h.flatten(2).sum(2)}[net.head_kind]
    head = weights["head.weight"]
    return h @ (head / head.norm() if net.spectral_norm else head)[0] + weights["head.bias"]


@pytest.mark.parametrize(
    ("size", "options", "act"),
    [
        ((8, 8), {}, F.silu),
        ((7, 6), {"head": "mean", "activation": "leaky_relu", "negative_slope": 0.1}, lambda h: F.leaky_relu(h, 0.1)),
        ((9,), {"head": "sum", "activation": "elu"}, F.elu),
        ((4, 5, 6), {}, F.silu),
    ],
)
def test_energy_is_minus_the_score_written_out(size, options, act):
    net = randomised(ResidualNet(size, 2, [5, 6], ndim=len(size), seed=1, **options))
    x = images(3, 2, *size)
    torch.testing.assert_close(net(x).double(), -by_hand(net, x.double(), act), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net.score(x), -net(x), rtol=0, atol=0)


def test_spectral_norm_divides_every_weight():
    net = randomised(ResidualNet(8, 2, [5, 6], spectral_norm=True))
    x = images(3, 2, 8, 8)
    for _ in range(50):
        with net.observing():
            net(x)
    torch.testing.assert_close(net(x).double(), -by_hand(net, x.double(), F.silu), rtol=1e-3, atol=1e-3)


def test_every_size_has_a_net():
    for size in range(2, 65):
        net = multigrid_net(size, 1, 0.1, variant="residual")
        assert net(images(2, 1, size, size)).shape == (2,)
        assert size >> (len(net.stages) - 1) == net.top_pixels**0.5
    assert residual_stages(64) == (32, 64, 128, 128, 128)
    assert residual_stages(4) == (32, 64) and residual_stages(2) == residual_stages(7) == (32,)


def test_a_models_depth_is_that_of_its_nets_and_its_trainers():
    model = mg.MultiGrid((1, 4), channels=1, width=0.1, variant="residual", depth=2, value_range=(-1, 1))
    assert model.nets[0].depth == 2 and model.from_config(model.config()).nets[0].depth == 2
    data = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    config = mg.MultiGridTrainer(model, data, device="cpu", quiet=True).config
    assert config.depth == 2 and mg.learning.config.build_model(config).nets[0].depth == 2
    with pytest.raises(ValueError, match="multigrid_net: depth must be 1 for a variant without residual blocks, got 2"):
        mg.MultiGrid((1, 4), depth=2)


def test_work_areas_and_parameters_are_counted():
    net = ResidualNet(8, 3, [4, 6], depth=2)
    assert [tuple(layer.weight.shape[:3]) for layer in net.convolutions] == [
        (4, 3, 3), *[(4, 4, 3)] * 4, (6, 4, 3), (6, 6, 3), (6, 4, 1), *[(6, 6, 3)] * 2
    ]  # fmt: skip
    assert net.macs() == 64 * 9 * (4 * 3 + 4 * 16) + 16 * (9 * (24 + 3 * 36) + 24) + 6 * 16
    areas = map_areas(net)
    assert areas[id(net.layers[1].first.weight)] == 64 and areas[id(net.layers[4].second.bias)] == 16
    assert id(net.head.weight) not in areas


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((8, 8), {}),
        ((16, 16), {"depth": 2, "activation": "leaky_relu", "spectral_norm": True}),
        ((9, 6), {"head": "mean"}),
        ((12,), {"head": "sum"}),
        ((4, 4, 4), {}),
    ],
)
def test_gradient_on_the_native_engine_is_float64s(size, options):
    net = randomised(ResidualNet(size, 2, [6, 8], ndim=len(size), seed=3, **options))
    x = images(5, 2, *size)
    made = plan(net, x, steps=30)
    assert made.explain().plan == "graph"
    double = copy.deepcopy(net).double()
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(double(leaf).sum(), leaf)
    leaf32 = x.clone().requires_grad_()
    (torchs,) = torch.autograd.grad(net(leaf32).sum(), leaf32)
    bound = 2 * (torchs.double() - expected).norm() + 1e-7 * expected.norm()
    assert (made.gradient(x).double() - expected).norm() <= bound


def test_a_chain_runs_on_the_graph_plan_and_says_so():
    net = multigrid_net(8, 1, 0.2, variant="residual")
    explained = mg.Langevin(20, drift=1.0, noise_std=0.03).explain(net, images(4, 1, 8, 8))
    assert (explained.plan, explained.precision, explained.coupling) == ("graph", "fp32", "")


def test_a_description_rebuilds_the_net_and_only_this_one():
    net = ResidualNet((4, 6), 2, [3, 5, 5], depth=2, activation="elu", head="mean", spectral_norm=True, seed=4)
    again = from_config(net.config())
    again.load_state_dict(net.state_dict())
    x = images(2, 2, 4, 6)
    for other in (again, net.freeze_norm(), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(other) is ResidualNet and torch.equal(other(x), net(x))
    assert net(images(2, 2, 9, 7)).shape == (2,)  # a pooled head takes other sizes
    assert isinstance(from_config(EnergyNet(4, 1, [ConvSpec(2, 3)]).config()), EnergyNet)
    net.layers[1].activation = "relu"
    with pytest.raises(ValueError, match="ResidualNet: layers must be those that it was built with"):
        net.config()


def labelled():
    net = ResidualNet(8, 2, [5, 6], labels=3, seed=1)
    for block in net.layers[1:3]:
        torch.nn.init.normal_(block.label_bias, generator=torch.Generator().manual_seed(2))
    return net


def test_a_label_is_a_bias_of_every_block():
    net, x, labels = labelled(), images(4, 2, 8, 8), torch.tensor([2, 0, 1, 2])
    one_by_one = torch.cat([net(x[i : i + 1], int(label)) for i, label in enumerate(labels)])
    torch.testing.assert_close(net(x, labels), one_by_one)
    plain = ResidualNet(8, 2, [5, 6], seed=1)
    assert torch.equal(ResidualNet(8, 2, [5, 6], labels=3, seed=1)(x, labels), plain(x))
    with torch.no_grad():  # a bias of a convolution beside it is the same
        for own, other in zip(net.layers[1:3], plain.layers[1:3]):
            other.second.bias += own.label_bias[1]
    torch.testing.assert_close(net(x, 1), plain(x))
    again = from_config(net.config())
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x, labels), net(x, labels)) and "labels" not in plain.config()
    assert torch.equal(net.freeze_norm()(x, 0), net(x, 0))


def test_chains_of_one_label_and_of_many_run_natively():
    net, x, labels = labelled(), images(4, 2, 8, 8), torch.tensor([2, 0, 1, 2])
    law = mg.Langevin(20, drift=0.1, noise_std=0.03)
    for label in (1, labels):
        energy = lambda x, label=label: net(x, label)  # noqa: E731
        assert law.explain(energy, x).plan == "graph"
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        torch.testing.assert_close(plan(energy, x, steps=20).gradient(x), expected, rtol=1e-4, atol=1e-6)
    got = law(lambda x: net(x, labels), x, seed=0)
    assert torch.equal(got[2:3], law(lambda x: net(x, 1), x[2:3], seed=0, first_sample=2))


@pytest.mark.parametrize(
    ("labels", "label", "message"),
    [
        (None, 1, "ResidualNet: label must be None for a net without labels, got int"),
        (3, None, r"label must be an int in \[0, 3\), or an int64 tensor \(4,\) of such, got None"),
        (3, 3, "got 3"),
        (3, torch.tensor([0, 1]), r"got torch.int64 of shape \(2,\)"),
        (3, torch.tensor([0, 1, 2, 3]), "got values from 0 to 3"),
        (3, torch.zeros(4), "got torch.float32"),
    ],
)
def test_labels_that_are_refused(labels, label, message):
    with pytest.raises(ValueError, match=message):
        ResidualNet(4, 1, [2], labels=labels)(images(4, 1, 4, 4), label)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": []}, "stages must hold at least one number of channels, got none"),
        ({"stages": [4, 0]}, "ResidualNet: stages must be"),
        ({"stages": [4] * 5}, r"stages must be at most 4 for size \(8, 8\), got 5"),
        ({"depth": 0}, "depth must be"),
        ({"head": "max"}, "head must be one of linear, mean, sum, got 'max'"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"negative_slope": float("nan")}, "negative_slope must be a finite number, got nan"),
        ({"ndim": 4}, "ndim must be 1, 2 or 3, got 4"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResidualNet(**{"size": 8, "channels": 1, "stages": [4], **arguments})


def test_wrong_inputs_are_named():
    net = ResidualNet(8, 1, [2, 2])
    with pytest.raises(ValueError, match=r"ResidualNet: x must have shape \(N, 1, 8, 8\), got \(2, 1, 6, 6\)"):
        net(torch.zeros(2, 1, 6, 6))
    with pytest.raises(ValueError, match="x must have at least 2 pixels a dimension"):
        ResidualNet(8, 1, [2, 2], head="sum")(torch.zeros(2, 1, 1, 4))
    with pytest.raises(ValueError, match="norm must be none for variant 'residual'"):
        multigrid_net(8, variant="residual", norm="batch")
