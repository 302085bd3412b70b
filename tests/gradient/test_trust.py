"""Nets that look like a stack and are another: each is read as it is, or runs by autograd; none runs as it was."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor

import mgebm_fast as mg
from mgebm_fast.gradient import energy_gradient, frozen_parameters, plan
from mgebm_fast.gradient.autograd import AutogradPlan
from mgebm_fast.gradient.stack import Stack, read
from mgebm_fast.nets import ConvSpec, EnergyNet
from mgebm_fast.ops.state import why_not_plain


def images(n=5):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def energy_net(**more):
    return EnergyNet(8, 3, [ConvSpec(6, 3, 2), ConvSpec(5, 3)], **{"norm": "none", "seed": 1, **more})


def sequential(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), *layers, nn.Flatten(), nn.Linear(96, 1), nn.Flatten(0)).eval()


def by_autograd(net, x):
    with frozen_parameters(net):
        return AutogradPlan(net, "test").gradient(x)


def changed(net, change):
    change(net)
    return net


class Noisy(nn.Module):
    def forward(self, weight):
        return weight * (1 + 0.5 * torch.rand_like(weight))


class Doubling(torch.Tensor):
    """A subclass whose functions are not those of its memory."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * out.as_subclass(torch.Tensor) if func is F.conv2d else out


def subclassed(net):
    net.layers[0]._parameters["weight"] = nn.Parameter(net.layers[0].weight.detach().as_subclass(Doubling))


CHANGES = {
    "slope of the net": lambda: changed(energy_net(), lambda n: setattr(n, "negative_slope", 0.9)),
    "slope of a layer": lambda: changed(energy_net(), lambda n: setattr(n.layers[0], "negative_slope", 0.9)),
    "activation of the net": lambda: changed(energy_net(), lambda n: setattr(n, "activation", "silu")),
    "activation of a layer": lambda: changed(energy_net(), lambda n: setattr(n.layers[1], "activation", "elu")),
    "score": lambda: changed(energy_net(), lambda n: setattr(n, "score", lambda x: x.sin().sum((1, 2, 3)))),
    "forward": lambda: changed(energy_net(), lambda n: setattr(n, "forward", lambda x: x.sin().sum((1, 2, 3)))),
    "weight of a layer": lambda: changed(
        energy_net(), lambda n: setattr(n.layers[0], "effective_weight", lambda: 2 * n.layers[0].weight)
    ),
    "activate": lambda: changed(energy_net(), lambda n: setattr(n.layers[0], "_activate", torch.tanh)),
    "convolve": lambda: changed(energy_net(), lambda n: setattr(n.layers[0], "_convolve", lambda x, *a: 2 * x)),
    "a layer more": lambda: changed(energy_net(), lambda n: n.layers.append(nn.Tanh())),
    "a layer less": lambda: changed(energy_net(head="sum"), lambda n: n.layers.pop(1)),
    "no head": lambda: changed(energy_net(), lambda n: setattr(n, "head", None)),
    "conv forward": lambda: changed(
        sequential(), lambda n: setattr(n[0], "_conv_forward", lambda x, w, b: 2 * F.conv2d(x, w, b, 2, 1))
    ),
    "backward hook": lambda: changed(
        sequential(), lambda n: n[0].register_full_backward_hook(lambda m, gi, go: tuple(2 * g for g in gi))
    ),
    "pre hook": lambda: changed(sequential(), lambda n: n[1].register_forward_pre_hook(lambda m, i: (2 * i[0],))),
    "class": lambda: changed(energy_net(), lambda n: setattr(n.layers[0], "__class__", Twice)),
    "subclass": lambda: changed(energy_net(), subclassed),
    "negative view": lambda: changed(
        energy_net(), lambda n: n.layers[0]._parameters.update(weight=torch._neg_view(n.layers[0].weight.detach()))
    ),
}


class Twice(mg.nets.layers.ConvLayer):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_net_gives_its_own_gradient(name):
    net, x = CHANGES[name](), images()
    torch.testing.assert_close(energy_gradient(net, x, precision="fp32"), by_autograd(net, x), rtol=1e-4, atol=1e-6)


def test_hooks_of_all_modules_are_seen():
    net, x = sequential(nn.ReLU()), images()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, out: 2 * out)
    try:
        assert read(net, x) == "hooks are registered for all modules"
        torch.testing.assert_close(energy_gradient(net, x), by_autograd(net, x))
    finally:
        handle.remove()
    assert isinstance(read(net, x), Stack)


def test_a_method_replaced_on_a_class_is_seen(monkeypatch):
    monkeypatch.setattr(EnergyNet, "score", lambda self, x: x.sin().sum((1, 2, 3)))
    assert read(energy_net(), images()) == "EnergyNet.score was replaced"


def test_parametrisations_that_draw_in_eval_mode_are_not_read():
    net = sequential()
    parametrize.register_parametrization(net[0], "weight", Noisy(), unsafe=True)
    assert "weight that is random" in read(net.eval(), images())


def test_a_reading_is_compared_with_autograd_once_and_refused_with_a_warning(monkeypatch):
    x = images()
    net = sequential(nn.ReLU())
    assert not isinstance(plan(net, x), AutogradPlan)
    wrong = sequential(nn.ReLU())
    with monkeypatch.context() as patch:  # code that no static check knows of
        patch.setattr(torch.nn.functional, "relu", lambda x, inplace=False: torch.tanh(x))
        with pytest.warns(UserWarning, match="looks like a stack of convolutions, but its gradient is .* away from"):
            made = plan(wrong, x)
        assert isinstance(made, AutogradPlan)
        torch.testing.assert_close(made.gradient(x), by_autograd(wrong, x))
    calls = []
    net.register_buffer("unused", torch.zeros(()))
    monkeypatch.setattr("mgebm_fast.gradient.verify._compared", lambda *arguments: calls.append(arguments) or "")
    plan(net, x), plan(net, x)
    assert not calls  # its form was compared above
    net[1] = nn.LeakyReLU(0.5)
    plan(net, x), plan(net, x)
    assert len(calls) == 1


def normed():
    return sequential(nn.BatchNorm2d(6))


REFUSED_BY_TORCH = {
    "flatten": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(5), nn.Linear(216, 1), nn.Flatten(0)),
    "dilation": lambda: changed(sequential(), lambda n: setattr(n[0], "dilation", (0, 0))),
    "eps": lambda: changed(normed(), lambda n: setattr(n[1], "eps", -1.0)),
    "width": lambda: changed(sequential(), lambda n: setattr(n[2], "weight", nn.Parameter(torch.zeros(1, 95)))),
    "bias": lambda: changed(sequential(), lambda n: setattr(n[0], "bias", nn.Parameter(torch.zeros(5)))),
    "norm": lambda: changed(
        sequential(nn.BatchNorm2d(6)), lambda n: setattr(n[1], "weight", nn.Parameter(torch.ones(5)))
    ),
    "half of the statistics": lambda: changed(
        sequential(nn.BatchNorm2d(6)), lambda n: setattr(n[1], "running_var", None)
    ),
    "head": lambda: changed(energy_net(), lambda n: setattr(n.head, "weight", nn.Parameter(torch.zeros(1, 79)))),
    "hole": lambda: changed(sequential(nn.ReLU()), lambda n: n._modules.update({"1": None})),
}


@pytest.mark.parametrize("name", REFUSED_BY_TORCH)
def test_what_torch_refuses_is_refused(name):
    net = REFUSED_BY_TORCH[name]()
    assert isinstance(read(net, images()), str)
    if name == "eps" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        return  # torch 2.9 computes with it
    with pytest.raises((RuntimeError, TypeError, IndexError, ValueError, NotImplementedError)):
        energy_gradient(net, images())


@pytest.mark.parametrize("slope", [float("nan"), float("inf"), torch.tensor(0.2), True])
def test_slopes_that_are_no_finite_numbers_are_not_read(slope):
    net = sequential(nn.LeakyReLU())
    net[1].negative_slope = slope
    assert "has slope" in read(net, images())


@pytest.mark.parametrize("place", ["weight", "bias", "x"])
def test_tensors_with_memory_elsewhere_never_reach_native_code(place):
    net, x = energy_net(), images()
    if place == "x":
        with pytest.raises(TypeError, match="langevin_sample: x must be a plain tensor, got a TwoTensor"):
            mg.langevin_sample(net, TwoTensor(x, x), steps=1, step_size=0.1)
        for name, value in {"mask": x > 0, "first_sample": torch.arange(len(x)), "seed": torch.tensor(1)}.items():
            with pytest.raises(TypeError, match=f"langevin_sample: {name} must be a plain tensor, got a TwoTensor"):
                mg.langevin_sample(net, x, steps=1, step_size=0.1, **{name: TwoTensor(value, value.clone())})
        return
    held = net.layers[0]._parameters
    for other in (held[place].detach().to("meta"), held[place].detach().to_sparse()):
        spoilt = copy.deepcopy(net)
        spoilt.layers[0]._parameters[place] = nn.Parameter(other)
        assert isinstance(read(spoilt, x), str)
    held[place] = nn.Parameter(TwoTensor(held[place].detach(), held[place].detach()))
    assert "is a " in read(net, x)
    for energy, name in ((net, f"layers.0.{place}"), (lambda x: net(x), f"EnergyNet.layers.0.{place}")):
        with pytest.raises(TypeError, match=f"langevin_sample: energy must have plain .* but {name} is a TwoTensor"):
            mg.langevin_sample(energy, x, steps=1, step_size=0.1)


def test_what_is_plain():
    base = torch.zeros(4, 3)
    shrunk = torch.zeros(4)
    shrunk.untyped_storage().resize_(0)
    plain = [base, base.T, base[::2], nn.Parameter(base), torch.empty(()).expand(5)]
    assert [why_not_plain(tensor) for tensor in plain] == [""] * len(plain)
    others = [
        base.as_subclass(Doubling), TwoTensor(base, base), base.to_sparse(), torch._neg_view(base), base.to("meta"),
        torch.zeros(2, dtype=torch.complex64).conj(), shrunk, None,
    ]  # fmt: skip
    assert all(why_not_plain(tensor) for tensor in others)
    torch.vmap(lambda row: (row, seen.append(why_not_plain(row)))[0])(base) if (seen := []) == [] else None
    assert seen == ["wrapped by a transform of torch's"]


def test_the_negative_of_a_net_is_read_and_that_of_code_is_not():
    net, x = energy_net(), images()
    torch.testing.assert_close(energy_gradient(mg.negative(net), x), -energy_gradient(net, x), rtol=0, atol=0)
    assert type(plan(mg.negative(net), x)) is type(plan(net, x))
    assert isinstance(plan(mg.negative(lambda x: net(x)), x), AutogradPlan)
    twice = mg.negative(mg.negative(sequential(nn.ReLU())))
    torch.testing.assert_close(energy_gradient(twice, x), energy_gradient(twice.f.f, x), rtol=0, atol=0)
    assert torch.equal(pickle.loads(pickle.dumps(mg.negative(net)))(x), -net(x))
    assert torch.equal(copy.deepcopy(mg.negative(net))(x), -net(x))
    with pytest.raises(TypeError, match="negative: f must be a module or a callable.*got int"):
        mg.negative(3)


def test_a_net_that_is_first_asked_in_inference_mode_is_trusted():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1), nn.Flatten(0)), images()
    other = copy.deepcopy(net)
    expected = str(plan(other, x, "fp32").explain())
    with torch.inference_mode():
        mg.langevin_sample(net, x, steps=1, step_size=0.1, precision="fp32")
    assert str(plan(net, x, "fp32").explain()) == expected
