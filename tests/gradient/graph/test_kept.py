"""Readings kept from call to call: no change of an energy is missed, and new weights give a new reading's bits."""

from __future__ import annotations

import copy
import functools
import gc
import random
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient.graph import MIN_STEPS, kept, plan, read_graph
from mgebm_fast.gradient.graph.watch import Unwatched, Watch, watch_of
from mgebm_fast.ops.graph_chain import GraphChain

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")
SCALE = 1.0


class Settings:
    power = 2

    def __init__(self) -> None:
        self.shift = 0.5


def scaled(h: Tensor) -> Tensor:
    return h * SCALE


class Net(nn.Module):
    """Keeps numbers wherever code commonly does."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 8)])
        self.settings, self.options, self.gains = Settings(), {"slope": 0.1}, [1.0, 2.0]
        self.register_buffer("centre", torch.full((3,), 0.25))
        self.outside = [nn.Linear(8, 1)]
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = x - self.centre
        for gain, layer in zip(self.gains, self.layers):
            h = gain * F.leaky_relu(layer(h), self.options["slope"])
        h = self.outside[0](torch.tanh(scaled(h) + self.settings.shift))[:, 0] * self.factor
        return h / self.temperature + x.pow(self.settings.power).sum(1)


def points() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(3))


def chain(energy: Any, x: Tensor) -> Tensor:
    return mg.langevin_sample(energy, x, steps=MIN_STEPS, drift=0.02, noise_std=0.0)


def by_hand(energy: Any, x: Tensor) -> Tensor:
    for _ in range(MIN_STEPS):
        leaf = x.clone().requires_grad_()
        x = x - 0.02 * torch.autograd.grad(energy(leaf).sum(), leaf)[0]
    return x


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The energies that were read."""
    found: list[Any] = []
    monkeypatch.setattr(plan, "read_graph", lambda energy, *rest: found.append(energy) or read_graph(energy, *rest))
    return found


def swapped(net: Net) -> None:
    net.layers[0], net.layers[1] = nn.Linear(3, 4), nn.Linear(4, 8)


def of_memory(net: Net) -> None:
    net.layers[1].weight.detach().numpy()[:] *= -2


def another_class(net: Net) -> None:
    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net.__class__ = Other


CHANGES: dict[str, Callable[[Net], Any]] = {
    "weights in place": lambda net: net.layers[0].weight.data.mul_(2),
    "weights as data": lambda net: setattr(net.layers[0].weight, "data", torch.ones(8, 3)),
    "weights by numpy": of_memory,
    "weights as their negative": lambda net: setattr(
        net.layers[0].weight, "data", torch._neg_view(net.layers[0].weight.data)
    ),
    "weights of a module outside": lambda net: net.outside[0].weight.data.neg_(),
    "a parameter": lambda net: setattr(net.layers[1], "weight", nn.Parameter(torch.ones(8, 8))),
    "a buffer": lambda net: net.centre.add_(1),
    "modules": swapped,
    "an item of a list": lambda net: net.gains.__setitem__(0, 3.0),
    "an item of a dict": lambda net: net.options.update(slope=0.9),
    "a module in a list": lambda net: net.outside.__setitem__(0, nn.Linear(8, 1)),
    "a number": lambda net: setattr(net, "temperature", 0.2),
    "a number of an object": lambda net: setattr(net.settings, "shift", -3.0),
    "a number of its class": lambda net: setattr(Settings, "power", 3),
    "a global": lambda net: globals().update(SCALE=-2.0),
    "code of a function": lambda net: globals().update(scaled=lambda h: h * 3),
    "code of a method": lambda net: setattr(net, "forward", types.MethodType(lambda self, x: x.exp().sum(1), net)),
    "code of a module of torch's": lambda net: setattr(
        net.layers[0], "forward", types.MethodType(lambda self, x: F.linear(x, -self.weight), net.layers[0])
    ),
    "its class": another_class,
    "a hook": lambda net: net.layers[0].register_forward_hook(lambda module, inputs, out: 3 * out),
    "a parametrization": lambda net: nn.utils.parametrizations.spectral_norm(net.layers[1]).eval(),
    "a global hook": lambda net: torch.nn.modules.module.register_module_forward_hook(lambda m, i, out: 1.5 * out),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str, monkeypatch: pytest.MonkeyPatch, readings: list[Any]) -> None:
    for place, attribute in ((Settings, "power"), (globals(), "SCALE"), (globals(), "scaled")):
        change = monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr
        change(place, attribute, place[attribute] if isinstance(place, dict) else getattr(place, attribute))
    net, x = Net(), points()
    before = chain(net, x)
    assert torch.equal(chain(net, x), before) and len(readings) == 1
    handle = CHANGES[name](net)
    try:
        own = by_hand(net, x)
        after = chain(net, x)
    finally:
        if name == "a global hook":
            handle.remove()
    assert float((own - before).abs().max()) > 1e-3  # the change is one
    torch.testing.assert_close(after, own, rtol=1e-5, atol=1e-5)


class NamedAsClocks(nn.Module):
    """Layers and numbers under names of functions that give another result at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.open, self.time = nn.Linear(3, 8), nn.Linear(8, 1), 0.5

    def random(self, h: Tensor) -> Tensor:
        return torch.tanh(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.open(self.random(self.input(x)))[:, 0] * self.time


def test_attributes_may_have_any_name(readings: list[Any]) -> None:
    net, x = NamedAsClocks(), points()
    before = chain(net, x)
    assert torch.equal(chain(net, x), before) and len(readings) == 1
    net.time = 2.0
    torch.testing.assert_close(chain(net, x), by_hand(net, x), rtol=1e-5, atol=1e-5)


def test_large_energies_have_few_readings(monkeypatch: pytest.MonkeyPatch, readings: list[Any]) -> None:
    monkeypatch.setattr(plan, "_MOST_UNUSED", 99)
    net, batches = Net(), [points()[:n] for n in (5, 4, 3)]
    numbers = sum(tensor.numel() for tensor in watch_of(net).tensors)
    for allowed, readings_made in ((3 * numbers, 3), (2 * numbers, 6), (numbers - 1, 6)):
        net = Net()
        monkeypatch.setattr(kept, "_MOST_NUMBERS", allowed)
        del readings[:]
        for x in (*batches, *batches):
            assert torch.equal(chain(net, x), chain(Net(), x))
        assert sum(energy is net for energy in readings) == readings_made


def test_closures_and_functions_made_for_each_call(readings: list[Any]) -> None:
    net, x, factor = Net(), points(), 1.0

    def energy() -> Callable[[Tensor], Tensor]:
        return lambda x: net(x) * factor

    before = chain(energy(), x)
    assert torch.equal(chain(energy(), x), before) and len(readings) == 1
    factor = -0.5
    torch.testing.assert_close(chain(energy(), x), by_hand(energy(), x), rtol=1e-5, atol=1e-5)
    net = Net()
    net.layers[0].bias.data.fill_(2)
    torch.testing.assert_close(chain(energy(), x), by_hand(energy(), x), rtol=1e-5, atol=1e-5)
    assert torch.equal(chain(net.forward, x), chain(net, x))


def of_several(*parts: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*parts).eval()


FILLED = {
    "points": ((2,), lambda: of_several(nn.Linear(2, 9), nn.SiLU(), nn.Linear(9, 17), nn.SiLU(), nn.Linear(17, 1))),
    "tied": ((6,), lambda: (lambda one: of_several(one, nn.SiLU(), one, nn.Tanh(), nn.Linear(6, 1)))(nn.Linear(6, 6))),
    "images": ((3, 9, 9), lambda: of_several(
        nn.Conv2d(3, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.GELU(), nn.Conv2d(5, 7, 2, 2, bias=False), nn.SiLU(),
        nn.Flatten(), nn.Linear(112, 1),
    )),
    "ours": ((3, 8, 8), lambda: mg.nets.ResidualNet(8, 3, [4, 6]).eval()),
}  # fmt: skip


@pytest.mark.parametrize("name", FILLED)
def test_new_weights_give_the_bits_of_a_new_reading(name: str, readings: list[Any]) -> None:
    shape, make = FILLED[name]
    net = make()
    energy = net if name == "ours" else lambda x: net(x)[:, 0]
    x = torch.randn(4, *shape)
    for step in range(4):
        made = plan.plan_of(energy, x, "test", "fp32")
        graph = read_graph(energy, x)
        assert torch.equal(made.gradient(x), GraphChain(graph).gradient(x))
        for parameter in net.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1 * step)
    assert len(readings) == 1


def test_weights_that_code_computes_with_are_read_again(readings: list[Any]) -> None:
    net = of_several(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.SiLU(), nn.Linear(4, 1), nn.Flatten(0))
    energy, x = (lambda x: net(x)), points()
    for _ in range(3):
        torch.testing.assert_close(chain(energy, x), by_hand(energy, x), rtol=1e-5, atol=1e-5)
        net[0].parametrizations.weight.original0.data.mul_(3)
    assert len(readings) == 3


def test_places_that_code_takes_from_a_tensor_may_change() -> None:
    x, order = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(1)), torch.arange(5)
    energy = lambda x: (x * x[..., order].sin()).sum((1, 2, 3))  # noqa: E731
    for _ in range(3):
        torch.testing.assert_close(chain(energy, x), by_hand(energy, x), rtol=1e-5, atol=1e-5)
        order.copy_(order.roll(1).flip(0))


def test_weights_that_become_infinite_are_refused() -> None:
    net, x = Net(), points()
    chain(net, x)
    net.layers[0].bias.data[0] = torch.inf
    made = plan.plan_of(net, x, "test")
    assert isinstance(made, str) and "weights must be finite" in made


GENERATOR = np.random.default_rng(0)
LIBRARIES, threads, seed = {"torch": torch}, torch.get_num_threads, torch.random.initial_seed
STEPS = iter(range(100))


@pytest.mark.parametrize(
    "energy",
    [
        lambda x: x.pow(2).sum(1) * (1 + random.random()),
        lambda x: x.pow(2).sum(1) * float(GENERATOR.normal()),
        lambda x: x.pow(2).sum(1) * next(STEPS),
        lambda x: x.pow(2).sum(1) * torch.from_numpy(WEIGHTS).sum(),
        lambda x: x.pow(2).sum(1) * torch.get_num_threads(),
        lambda x: x.pow(2).sum(1) * eval("SCALE"),  # noqa: S307
        lambda x: x.pow(2).sum(1) * scaled.__globals__["SCALE"],
        lambda x: x.pow(2).sum(1) * len(locals()),
        lambda x: x.pow(2).sum(1) * [torch][0].get_num_threads(),
        lambda x, library=torch: x.pow(2).sum(1) * library.get_num_threads(),
        lambda x: x.pow(2).sum(1) * LIBRARIES["torch"].get_num_threads(),
        lambda x: x.pow(2).sum(1) * threads(),
        lambda x: x.pow(2).sum(1) * seed(),
    ],
    ids="random generator iterator array state text globals locals handed_on default container renamed "
    "renamed_function".split(),
)
def test_what_may_change_unseen_is_not_watched(energy: Any) -> None:
    with pytest.raises(Unwatched):
        Watch(energy)
    assert watch_of(energy) is None


WEIGHTS = np.ones(3, dtype=np.float32)


def test_what_is_not_read_is_not_tried_again(readings: list[Any]) -> None:
    net, x = of_several(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1), nn.Flatten(0)).train(), points()
    reasons = [plan.plan_of(net, x, "test") for _ in range(3)]
    assert len(readings) == 1 and len(set(reasons)) == 1 and "Dropout" in str(reasons[0])
    assert isinstance(plan.plan_of(net.eval(), x, "test"), plan.GraphPlan)


def test_weights_that_a_search_does_not_find_are_not_kept(readings: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = {"w": torch.ones(3)}
    energy, x = (lambda x: (x.pow(2) * torch.hidden["w"]).sum(1)), points()  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "hidden", hidden, raising=False)
    for _ in range(2):
        torch.testing.assert_close(chain(energy, x), by_hand(energy, x), rtol=1e-5, atol=1e-5)
        hidden["w"].mul_(1.5)
    assert len(readings) == 2


def test_a_watch_keeps_nothing_alive() -> None:
    net, x = Net(), points()
    held = [net]
    energy = lambda x: held[0](x)  # noqa: E731  (its code stays)
    chain(energy, x)
    watch = watch_of(energy)
    assert watch is not None and watch.kept
    gone, weight = weakref.ref(net), weakref.ref(net.layers[0].weight)
    held.clear()
    del net
    gc.collect()
    assert gone() is None and weight() is None and not watch.kept


def test_a_copy_has_a_reading_of_its_own() -> None:
    net, x = Net(), points()
    before = chain(net, x)
    other = copy.deepcopy(net)
    other.temperature = 0.1
    assert torch.equal(chain(net, x), before)
    torch.testing.assert_close(chain(other, x), by_hand(other, x), rtol=1e-5, atol=1e-5)


class WithAttributes(float):
    pass


class Tables(dict):
    """Can be watched, unlike a dict of Python's own."""


MODULE: Any = types.ModuleType("of_the_user")
PACKAGE: Any = types.ModuleType("package_of_the_user")
PACKAGE.inner = MODULE
GAINS = torch.ones(3)
TABLE, NUMBER, ARRAY = Tables({1.0: GAINS}), WithAttributes(1.0), np.ones(1).view(np.recarray)


def alpha_of(module: Any) -> float:
    return module.alpha


def importing(x: Tensor) -> Tensor:
    import of_the_user

    return of_the_user.alpha * x.square().sum(1)


def weighted(factor: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: float(factor()) * (x.square() * GAINS).sum(1)


UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "an attribute of a module, by name": weighted(lambda: getattr(MODULE, "alpha")),  # noqa: B009
    "an attribute of a module, by its dict": weighted(lambda: MODULE.__dict__["alpha"]),
    "a module that is handed on": weighted(lambda: alpha_of(MODULE)),
    "a module of a module that is handed on": weighted(lambda: alpha_of(PACKAGE.inner)),
    "a module in a partial": functools.partial(lambda module, x: module.alpha * x.square().sum(1), MODULE),
    "a module that is imported in a function": importing,
    "an attribute of a number": weighted(lambda: NUMBER.alpha),  # type: ignore[attr-defined]
    "an attribute of a tensor": weighted(lambda: GAINS.alpha),  # type: ignore[attr-defined]
    "a tensor's gradient": weighted(lambda: 1.0 if GAINS.grad is None else 3.0),
    "whether a tensor requires gradients": weighted(lambda: 3.0 if GAINS.requires_grad else 1.0),
    "a tensor by numpy's functions": weighted(lambda: np.asarray(GAINS[0].detach())),
    "a tensor as text": weighted(lambda: str(GAINS.detach()).count("3") + 1),
    "keys of a mapping": lambda x: sum(key * (x.square() * value).sum(1) for key, value in TABLE.items()),  # type: ignore
    "a kind of numpy's arrays": weighted(lambda: ARRAY[0]),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_cannot_be_seen_is_read_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "of_the_user", MODULE)
    energy, x, results = UNSEEN[name], points(), []
    try:
        for alpha in (1.0, 3.0):
            MODULE.alpha = NUMBER.alpha = GAINS.alpha = ARRAY[0] = alpha  # type: ignore[attr-defined]
            if alpha != 1:
                TABLE.clear()
                GAINS.mul_(alpha)
                GAINS.requires_grad_().grad = torch.ones(3)
            TABLE[alpha] = GAINS
            results.append(chain(energy, x))
            torch.testing.assert_close(results[-1], by_hand(energy, x))
    finally:
        GAINS.requires_grad_(False).fill_(1.0).grad = None
        TABLE.clear()
        TABLE[1.0] = GAINS
    assert not torch.allclose(*results)


def test_another_kind_of_target_is_not_refused_for_one_that_was() -> None:
    def asked(target: Tensor) -> str:
        energy = lambda x: (x - target).square().sum(1).float()  # noqa: E731
        return mg.Langevin(MIN_STEPS, step_size=0.1).explain(energy, points()).plan

    assert [asked(torch.ones(3, dtype=kind)) for kind in (torch.float64, torch.float32)] == ["autograd", "graph"]


def test_a_variable_that_is_not_assigned_yet() -> None:
    energy = lambda x: x.square().sum(1) if len(x) else later  # noqa: E731, F821
    chain(energy, points())
    later = 1  # noqa: F841
