"""Nets behind lambdas, partials, methods and containers: a chain leaves no trace in them, and asks them as if bare."""

import contextvars
import dataclasses
import functools
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import mgebm_fast as mg
from mgebm_fast.gradient import frozen_parameters, holding
from mgebm_fast.gradient.reach import modules_of
from mgebm_fast.sampling.coupling import coupling, randomness


class Counting(nn.Module):
    """A training buffer that is written in place, one that is replaced, and one that is made at the first call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.ones(3))
        self.register_buffer("made", None)

    def forward(self, x):
        self.calls += 1
        self.average = 0.9 * self.average + x.detach().mean((0, 2, 3))
        self.made = x.detach().sum() if self.made is None else self.made
        return x * (1 + 0.1 * self.average.sum() + 0.1 * self.calls + 0.01 * self.made.sin())


def net_of():
    torch.manual_seed(0)
    return nn.Sequential(
        Counting(), spectral_norm(nn.Conv2d(3, 4, 3, padding=1)), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 1),
        nn.Flatten(0),
    ).train()  # fmt: skip


@dataclasses.dataclass
class Holder:
    nets: dict

    def __call__(self, x):
        return self.nets["all"][0](x)

    def energy(self, x):
        return -self(x)


class Slotted:
    __slots__ = ("net",)

    def __call__(self, x):
        return self.net(x)


class Outside(nn.Module):
    """Holds a net that it does not register."""

    def __init__(self, net):
        super().__init__()
        self.parts = [{"net": (net,)}]

    def forward(self, x):
        return self.parts[0]["net"][0](x)


class Roundabout(dict):
    """A net at its class, found by a property that a method uses; and its base has attributes beside its items."""

    @property
    def net(self):
        return type(self).nets[0]()

    def energy(self, x):
        return self.net(x)

    def __call__(self, x):
        return self.energy(x)


def roundabout(net):
    Roundabout.nets = [weakref.ref(net)]
    return Roundabout()


def hooked(net):
    module = nn.Identity()
    module.register_forward_hook(lambda module, inputs, out: net(out))
    return module


def of_a_variable(net):
    variable = contextvars.ContextVar("net")
    variable.set(net)
    energy = functools.partial(lambda x: energy.net.get()(x))
    energy.net = variable
    return energy


class OfGlobals(nn.Module):
    def forward(self, x):
        return GLOBAL(x)


def slotted(net):
    holder = Slotted()
    holder.net = net
    return holder


GLOBAL = net_of()


def by_default(x, net=GLOBAL):
    return net(x)


WRAPPERS = {
    "lambda": lambda net: lambda x: -net(x),
    "nested": lambda net: (lambda f: lambda x: f(x))(lambda x: net(x)),
    "partial": lambda net: functools.partial(lambda scale, x, *, f: scale * f(x), 2.0, f=net),
    "method": lambda net: net.forward,
    "dataclass": lambda net: Holder({"all": [net]}),
    "method of a dataclass": lambda net: Holder({"all": [net]}).energy,
    "slots": slotted,
    "unregistered": Outside,
    "negative": mg.negative,
    "negative of a lambda": lambda net: mg.negative(lambda x: net(x)),
    "wraps": lambda net: functools.wraps(net.forward)(lambda x: net(x)),
    "lru_cache": lambda net: functools.lru_cache(maxsize=None)(lambda x: net(x)),
    "property": roundabout,
    "hook": hooked,
    "variable": of_a_variable,
}


def state_of(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_net_is_held_as_a_bare_one(name):
    net, x = net_of(), torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    energy, before, flags = WRAPPERS[name](net), state_of(net), [p.requires_grad for p in net.parameters()]
    assert net in list(modules_of(energy))
    runs = [mg.langevin_sample(energy, x, steps=3, step_size=0.1, seed=2) for _ in range(2)]
    assert torch.equal(*runs)
    assert net.state_dict().keys() == before.keys() and net[0].made is None
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == flags and net.training
    assert "BatchNorm2d" in coupling(energy, x)
    for chain in (mg.MALA(2, 0.1), mg.HMC(2, 2, 0.1)):
        with pytest.raises(ValueError, match="must treat samples apart, but a BatchNorm2d"):
            chain(energy, x)


def test_globals_and_defaults_are_reached():
    x, before = torch.randn(4, 3, 4, 4), state_of(GLOBAL)
    for energy in (by_default, lambda x: GLOBAL(x), OfGlobals()):
        mg.langevin_sample(energy, x, steps=2, step_size=0.1, seed=0)
        assert all(torch.equal(value, before[key]) for key, value in GLOBAL.state_dict().items())


def test_attributes_are_no_globals_of_their_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.GLOBAL = nn.Linear(3, 1)

        def forward(self, x):
            return self.GLOBAL(x)[:, 0]

    assert GLOBAL not in list(modules_of(Named()))


def test_old_spectral_norm_of_hooks_is_held_too():
    layer = torch.nn.utils.spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
    before = state_of(layer)
    mg.langevin_sample(lambda x: layer(x).flatten(1).sum(1), torch.randn(2, 3, 4, 4), steps=3, step_size=0.1, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_what_did_not_change_is_never_written():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0))
    net.eval()
    versions = [buffer._version for buffer in net.buffers()]
    mg.langevin_sample(net, torch.randn(2, 3, 4, 4), steps=2, step_size=0.1, seed=0)
    assert [buffer._version for buffer in net.buffers()] == versions


@pytest.mark.parametrize("training", [False, True])
def test_threads_may_sample_one_module(training):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0))
    net.train(training)
    before, x, failures = state_of(net), torch.randn(4, 3, 4, 4), []

    def work():
        try:
            for _ in range(15):
                mg.langevin_sample(net, x, steps=3, step_size=0.1)
        except BaseException as error:  # noqa: BLE001, shown by the assertion
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):  # another user of the net: its weights have gradients
        net(x).sum().backward() if not training else threads[0].join(0.01)
    assert not failures
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_what_a_chain_cannot_change_is_not_held(monkeypatch):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    net[2].requires_grad_(False)
    noted = []
    note = holding._note
    monkeypatch.setattr(holding, "_note", lambda module: (noted.append(module), note(module))[1])
    with holding.frozen_parameters(net):
        assert not any(p.requires_grad for p in net.parameters())
    assert noted == [net[0], net[1]]
    assert [p.requires_grad for p in net.parameters()] == [True] * 4 + [False] * 2


def test_holds_nest_and_end_with_an_error():
    net, x = net_of(), torch.randn(4, 3, 4, 4)
    before = state_of(net)
    with pytest.raises(RuntimeError, match="stop"), frozen_parameters(net):
        with frozen_parameters(lambda x: net(x)):
            net(x)
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_hold_that_fails_on_its_way_lets_go_of_what_it_held(monkeypatch):
    net, note = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), holding._note

    def without_memory(module):
        if module is net[1]:
            raise MemoryError
        return note(module)

    monkeypatch.setattr(holding, "_note", without_memory)
    with pytest.raises(MemoryError), frozen_parameters(net):
        pass
    assert all(p.requires_grad for p in net.parameters()) and not holding._held


def test_weights_that_code_computes_and_puts_in_a_modules_place_are_left_alone():
    net, factor = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    net._parameters["weight"] = factor * 2  # as inner loops of meta-learning do
    mg.langevin_sample(lambda x: net(x).squeeze(1), torch.zeros(3, 2), steps=2, step_size=0.1)
    assert net.weight.requires_grad and net.bias.requires_grad


def test_samples_that_code_couples_or_draws_for():
    x = torch.randn(6, 2, 3)
    assert coupling(lambda x: x.square().flatten(1).sum(1), x) == ""
    assert "samples beside it" in coupling(lambda x: (x - x.mean(0)).square().flatten(1).sum(1), x)
    with pytest.raises(ValueError, match="must treat samples apart"):
        mg.MALA(2, 0.1)(lambda x: (x - x.mean(0)).square().flatten(1).sum(1), x)
    drop = nn.Dropout(0.5)
    assert "Dropout is random" in randomness(lambda x: drop(x).sum((1, 2)))
    drop.eval()
    assert randomness(lambda x: drop(x).sum((1, 2)), x) == ""
    state = torch.get_rng_state()
    noisy = lambda x: (x * torch.rand(())).sum((1, 2))  # noqa: E731
    assert coupling(noisy, x) == "" and "from call to call" in randomness(noisy, x)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"must be a function of x, but a Dropout is random in train mode"):
        mg.MALA(2, 0.1)(lambda x: drop.train()(x).sum((1, 2)), x)


def test_modules_that_an_energy_reaches_and_does_not_run_do_not_couple_it():
    class Adversary:
        def __init__(self):
            self.generator, self.score = net_of(), nn.Sequential(nn.Flatten(), nn.Linear(6, 1), nn.Flatten(0))
            self.drop = nn.Dropout(0.5)

        def energy(self, x):
            return -self.score(x)

    x, adversary = torch.randn(4, 2, 3), Adversary()
    assert coupling(adversary.energy, x) == randomness(adversary.energy, x) == ""
    assert mg.MALA(2, 0.1)(adversary.energy, x, seed=0).accepted.shape == (2, 4)


class Trainer(nn.Module):
    """An energy whose class names a net that has nothing to do with it."""

    def forward(self, x):
        return x.square().flatten(1).sum(1)

    def loss(self, x):
        return GLOBAL(x)


def test_a_net_that_is_reached_and_not_run_decides_nothing():
    energy, x = Trainer(), torch.randn(4, 3, 4, 4)
    assert GLOBAL in list(modules_of(energy)) and coupling(energy, x) == randomness(energy, x) == ""
