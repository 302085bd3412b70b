"""Energies read from their own code: gradients against autograd's in float64, and what is refused by name."""

from __future__ import annotations

import copy
import functools
import gc
import math
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient.graph import MIN_STEPS, read_graph
from mgebm_fast.gradient.plan import plan
from mgebm_fast.ops.graph_chain import GraphChain

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")


class Block(nn.Module):
    """A residual block, the norm and the function before the convolutions, that may halve its map."""

    def __init__(self, inputs: int, outputs: int, norm: str, pool: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.utils.parametrizations.spectral_norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        made = {"group": lambda c: nn.GroupNorm(4, c), "batch": nn.BatchNorm2d, "none": lambda c: nn.Identity()}[norm]
        self.norms = nn.ModuleList([made(inputs), made(outputs)])
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(F.silu(self.norms[0](x)))
        h = self.second(F.silu(self.norms[1](h))) + self.skip(x)
        return F.avg_pool2d(h, 2) if self.pool else h


class Residual(nn.Module):
    def __init__(self, norm: str = "none", classes: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Block(16, 16, norm, True), Block(16, 24, norm, True), Block(24, 24, norm, False))
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.blocks(self.stem(x))).sum((2, 3))
        out = self.head(h)
        return out[:, 0] if out.shape[1] == 1 else -torch.logsumexp(out, 1)


def residual(norm: str = "none", classes: int = 1) -> Residual:
    torch.manual_seed(1)
    net = Residual(norm, classes)
    net.train()
    with torch.no_grad():
        net(torch.randn(8, 3, 8, 8))  # running statistics, power iterations
    return net.eval()


def sequential(*parts: nn.Module) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(*parts).eval()


class Gated(nn.Module):
    """Two inputs of a product, a skip over a concatenation, and numbers that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 12)
        self.gate = nn.Linear(5, 12)
        self.temperature = 0.7

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x)) * torch.sigmoid(self.gate(x))
        h = torch.cat([h, x], 1)
        return (h**2).sum(-1) / self.temperature + 0.1 * h[:, 3]


def cuts(x: Tensor) -> Tensor:
    inner = (x[:, 1:, ::2, 1:-1] ** 3).sum((1, 2, 3))
    return inner + (x.flip(3)[:, :1] - x[:, :1]).abs().flatten(1).sum(1)


def mlp() -> nn.Sequential:
    return sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1), nn.Flatten(0))


MEANS = torch.tensor([[0.0, 1.0], [2.0, -1.0], [-1.5, 0.5]])
MIXTURE = torch.tensor([[1.0, 0.3, 0.0], [0.3, 2.0, 0.1], [0.0, 0.1, 0.5]])


def learnt_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    for numbers in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(numbers, 0.5, 2)
    return norm


IMAGES = {
    "residual": residual,
    "residual, group norm": lambda: residual("group"),
    "residual classifier, running statistics": lambda: residual("batch", 10),
    "a forward of its own": lambda: (lambda net: lambda x: net(x).mean((1, 2, 3)) * 3)(
        sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 4, 2, 1), nn.Mish())
    ),
    "pools, norms, padding": lambda: sequential(
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.LeakyReLU(0.1, inplace=True), nn.MaxPool2d(2),
        nn.InstanceNorm2d(6, affine=True), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(6, 5, 3, dilation=2),
        nn.Softplus(beta=2), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.LayerNorm(45), nn.ELU(0.8), nn.Linear(45, 1),
        nn.Flatten(0),
    ),
    "circular padding and max pools with padding": lambda: sequential(
        nn.ReplicationPad2d(1), nn.Conv2d(3, 6, 3), nn.MaxPool2d(3, 2, 1), nn.SELU(), nn.ZeroPad2d((0, 1, 2, 0)),
        nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.CELU(1.5), nn.Flatten(), nn.Linear(72, 1),
        nn.Flatten(0),
    ),
    "an MLP on images": lambda: sequential(
        nn.Flatten(), nn.Linear(192, 32), nn.Tanh(), nn.Linear(32, 32), nn.Hardtanh(-0.5, 0.5), nn.Linear(32, 1),
        nn.Flatten(0),
    ),
    "a quadratic of all pixels": lambda: lambda x: 0.5 * x.square().sum((1, 2, 3)) + x.mean((1, 2, 3)),
    "cuts of a map": lambda: cuts,
    "weight norm": lambda: sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.SiLU(), nn.Flatten(), nn.Linear(144, 1),
        nn.Flatten(0),
    ),
    "grouped convolutions": lambda: sequential(
        nn.Conv2d(3, 24, 3), nn.SiLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Hardswish(),
        nn.Conv2d(24, 36, 3, stride=2, groups=3, bias=False), nn.Hardsigmoid(), nn.Conv2d(36, 6, 1, groups=2),
        nn.Flatten(), nn.Linear(24, 1), nn.Flatten(0),
    ),
    "a channel by itself": lambda: sequential(
        nn.Conv2d(3, 20, 1), nn.Conv2d(20, 20, 5, 2, 3, 2, groups=20, bias=False), learnt_norm(20), nn.SiLU(),
        nn.Conv2d(20, 20, 3, padding=1, groups=20, padding_mode="reflect"), nn.Flatten(), nn.Linear(180, 1),
        nn.Flatten(0),
    ),
    "pads with the other side": lambda: sequential(
        nn.Conv2d(3, 6, 3, padding=(2, 1), padding_mode="circular"), nn.SiLU(), nn.AdaptiveMaxPool2d((5, 2)),
        nn.Flatten(), nn.Linear(60, 1), nn.Flatten(0),
    ),
    "greatest pixels": lambda: lambda x: (
        x.amax((2, 3)).square().sum(1) + x.flatten(1).min(1)[0] + x.amin(2).exp().sum((1, 2))
        + x[:, :2].flatten(1).max(1)[0]
    ),
    "logarithms near 1": lambda: lambda x: (
        (torch.log1p(x * x) + torch.expm1(x) + torch.rsqrt(1 + x * x)).sum((1, 2, 3))
    ),
    "a shared layer": lambda: (lambda conv: lambda x: torch.relu(conv(torch.relu(conv(x)))).sum((1, 2, 3)))(
        sequential(nn.Conv2d(3, 3, 3, padding=1))
    ),
}  # fmt: skip
ROWS = torch.randn(7, 99, generator=torch.Generator().manual_seed(6)) / 10
POINTS = {
    "MLP": (2, mlp),
    "mixture": (2, lambda: lambda x: -torch.logsumexp(-0.5 * ((x[:, None] - MEANS) ** 2).sum(-1), 1)),
    "rosenbrock": (2, lambda: lambda x: (1 - x[:, 0]) ** 2 + 10 * (x[:, 1] - x[:, 0] ** 2) ** 2),
    "quadratic form": (3, lambda: lambda x: 0.5 * ((x @ MIXTURE) * x).sum(1)),
    "double well": (4, lambda: lambda x: ((x**2 - 1) ** 2).sum(1) + x.cos().sum(-1) - torch.sin(3 * x)[..., 0]),
    "distance from a shell": (3, lambda: lambda x: (x.norm(dim=1) - 2) ** 2),
    "gated": (5, lambda: (torch.manual_seed(3), Gated())[1]),
    "partial": (3, lambda: functools.partial(lambda a, x: a * F.softplus(x).sum(1), 0.3)),
    "greatest features": (11, lambda: lambda x: (
        x.max(1)[0] - 2 * torch.min(x[:, 3:], 1)[0] + torch.maximum(x, 0.3 * x * x).sum(1)
        + torch.minimum(x, torch.tensor(0.1)).square().sum(1)
    )),
    "a dense layer and a norm on many rows": (3, lambda: lambda x: F.linear(
        F.layer_norm((x[:, :, None] * torch.arange(1, 100.0) / 20).sin(), (99,)), ROWS
    ).square().sum((1, 2))),
    "stacked": (2, lambda: lambda x: torch.stack([x[:, 0] * 2, x[:, 1] - x[:, 0]], 1).pow(2).sum(1).sqrt()),
}  # fmt: skip
OTHERS = {
    "a sequence": ((3, 8), lambda: sequential(
        nn.Conv1d(3, 4, 5, padding=2, padding_mode="circular"), nn.SiLU(), nn.MaxPool1d(3, 2, 1), nn.Flatten(),
        nn.Linear(16, 1), nn.Flatten(0),
    )),
    "a volume": ((2, 4, 4, 4), lambda: sequential(
        nn.Conv3d(2, 4, 3, groups=2, padding=1), nn.SiLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(32, 1),
        nn.Flatten(0),
    )),
}  # fmt: skip
CASES = {name: ((3, 8, 8), make) for name, make in IMAGES.items()}
CASES |= OTHERS
CASES |= {name: ((size,), make) for name, (size, make) in POINTS.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_autograds(name: str) -> None:
    shape, make = CASES[name]
    energy = make()
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(5))
    graph = read_graph(energy, x)
    assert not isinstance(graph, str), graph
    leaf = x.clone().requires_grad_()
    own = torch.autograd.grad(energy(leaf).sum(), leaf)[0]
    got = GraphChain(graph).gradient(x)
    assert float((got - own).norm()) <= 2e-5 * float(own.norm())
    # And of another batch than it was read for, of another length.
    more = torch.randn(11, *shape)
    leaf = more.clone().requires_grad_()
    own = torch.autograd.grad(energy(leaf).sum(), leaf)[0]
    assert float((GraphChain(graph).gradient(more) - own).norm()) <= 2e-5 * float(own.norm())
    made = plan(energy, x, steps=MIN_STEPS)
    assert made.explain().plan == ("native" if name == "weight norm" else "graph"), made.explain()  # that is a stack


@pytest.mark.parametrize("name", ["residual", "MLP", "mixture", "a shared layer"])
def test_chain_is_the_loops(name: str) -> None:
    """A whole chain by `langevin_sample` against the loop by hand with the same noise."""
    shape, make = CASES[name]
    energy, steps = make(), MIN_STEPS + 4
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(5))
    got = mg.langevin_sample(energy, x, steps=steps, step_size=0.05, clamp=(-4, 4), seed=9)
    state = x.clone()
    for k in range(steps):
        leaf = state.clone().requires_grad_()
        gradient = torch.autograd.grad(energy(leaf).sum(), leaf)[0]
        noise = mg.ops.noise(x.shape, seed=9, step=k)
        state = (state - 0.05**2 / 2 * gradient + 0.05 * noise).clamp(-4, 4)
    assert float((got - state).abs().max()) < 1e-4
    assert mg.Langevin(steps, step_size=0.05).explain(energy, x).plan == "graph"


def frozen_in_time() -> object:
    calls = [0]

    def energy(x: Tensor) -> Tensor:
        calls[0] += 1
        return x.pow(2).sum(1) * calls[0]

    return energy


class Straight(torch.autograd.Function):
    """A gradient that is not that of its forward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def hooked() -> nn.Module:
    net = sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))
    net[1].register_forward_hook(lambda *_: None)
    return net


def counting() -> nn.Module:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x.pow(2).sum(1)

    return Counting()


def inside_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.square().sum(1)
    return scale * x.sum(1)


def viewed_in_place(x: Tensor) -> Tensor:
    h = x * 1
    part = h[:, :2]
    h.mul_(2)
    return part.pow(2).sum(1)


REFUSED = {
    "control flow": (lambda: lambda x: x.sum(1) if float(x.pow(2)[:, 0].max()) > 0 else -x.sum(1), "max"),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.Flatten(0)), "Dropout"),
    "noise inside": (lambda: lambda x: (x + torch.randn(3)).pow(2).sum(1), "random"),
    "hooks": (hooked, "hooks"),
    "buffers written": (counting, "writes into a tensor"),
    "custom function": (lambda: lambda x: Straight.apply(x).pow(2).sum(1), "custom autograd.Function"),
    "no_grad": (lambda: inside_no_grad, "no_grad"),
    "attention of several heads": (
        lambda: lambda x: F.scaled_dot_product_attention(*[x[:, :, None, None].expand(-1, 3, 2, 2)] * 3).sum((1, 2, 3)),
        "view 1 makes",
    ),
    "over the batch": (lambda: lambda x: (x - x.mean(0)).pow(2).sum(1), "over the batch"),
    "a view after a change in place": (lambda: viewed_in_place, "changed in place"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Flatten(0)),
        "statistics of the batch|writes",
    ),
    "float64 inside": (lambda: lambda x: x.double().pow(2).sum(1).float(), "_to_copy"),
    "an equality": (lambda: lambda x: torch.where(x == 0, x, -2 * x).sum(1), "eq"),
    "the wrong shape": (lambda: lambda x: x.pow(2).sum(1, keepdim=True), "returns"),
    "a sample alone": (lambda: lambda x: x.pow(2).sum(1) + x[0].sum(), "one sample"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named_and_runs_by_autograd(name: str) -> None:
    make, expected = REFUSED[name]
    energy, x = make(), torch.randn(4, 3)
    reason = read_graph(energy, x)
    assert isinstance(reason, str)
    assert re.search(expected, reason), reason
    made = plan(energy, x, steps=100)
    assert made.explain().plan == "autograd" or name == "batch statistics", made.explain()


def test_another_function_is_found_by_comparison() -> None:
    """Code that looks like another function: its reading is compared with autograd on other samples, and dropped."""
    energy = lambda x: (x * x).sum(1) * (2 if len(x) > 3 else 1)  # noqa: E731
    x = torch.randn(4, 3)
    assert not isinstance(read_graph(energy, x), str)
    report = plan(energy, x, steps=100).explain()
    assert report.plan == "autograd" and "not trusted" in report.why_not_faster[-1]


def test_an_energy_that_changes_with_every_call_is_not_trusted() -> None:
    report = plan(frozen_in_time(), torch.randn(4, 3), steps=100).explain()
    assert report.plan == "autograd" and "asked again" in report.why_not_faster[-1]


class Counting(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.pow(2).sum(1) * (5.0 if self.calls > 8 else 1.0)


def by_list() -> Callable[[Tensor], Tensor]:
    calls: list[int] = []
    return lambda x: x.pow(2).sum(1) * (5.0 if calls.append(1) or len(calls) > 8 else 1.0)


def by_iterator() -> Callable[[Tensor], Tensor]:
    scales = iter([1.0] * 8 + [5.0] * 99)
    return lambda x: x.pow(2).sum(1) * next(scales)


@pytest.mark.parametrize("make", [Counting, by_list, by_iterator])
def test_code_that_counts_its_calls_is_run_at_every_step(make: Callable[[], Any]) -> None:
    energy, x = make(), torch.ones(4, 3)
    report = plan(energy, x, steps=100).explain()
    assert report.plan == "autograd" and "as a counter does" in report.why_not_faster[-1]
    if make is Counting:  # whose counter the reading put back
        got = mg.langevin_sample(energy, x, steps=MIN_STEPS, drift=0.01, noise_std=0.0)
        torch.testing.assert_close(got, x * 0.98**8 * 0.9 ** (MIN_STEPS - 8))
        assert energy.calls == MIN_STEPS


@pytest.mark.parametrize("energy", [
    lambda x: x.pow(2).sum(1) * (5.0 if len(x) > 256 else 1.0),
    lambda x: x.pow(2).sum(1) * (5.0 if x.numel() > 900 else 1.0),
])  # fmt: skip
def test_code_that_goes_another_way_with_many_samples(energy: Callable[[Tensor], Tensor]) -> None:
    assert plan(energy, torch.ones(256, 3), steps=100).explain().plan == "graph"
    report = plan(energy, torch.ones(400, 3), steps=100).explain()
    assert report.plan == "autograd" and "not trusted" in report.why_not_faster[-1]


def test_values_of_the_moment() -> None:
    """Weights, Python numbers and modes are those of the call, also for one callable used again."""
    net = CASES["gated"][1]()
    x = torch.randn(4, 5)
    options = {"steps": MIN_STEPS, "step_size": 0.1, "seed": 1}
    first = mg.langevin_sample(net, x, **options)
    net.temperature = 0.35
    second = mg.langevin_sample(net, x, **options)
    assert not torch.equal(first, second)
    assert torch.equal(second, mg.langevin_sample(copy.deepcopy(net), x, **options))
    with torch.no_grad():
        net.inner.weight.mul_(2)
    assert not torch.equal(mg.langevin_sample(net, x, **options), second)


def test_a_reading_leaves_no_trace() -> None:
    net = residual("batch", 10)
    before = copy.deepcopy(net.state_dict())
    mg.langevin_sample(net, torch.randn(2, 3, 8, 8), steps=MIN_STEPS, step_size=0.01)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_few_steps_and_callbacks_keep_to_autograd() -> None:
    """Reading costs as much as some steps save: single steps, as in a training loop, are not read."""
    net, x = CASES["MLP"][1](), torch.randn(4, 2)
    seen: list[int] = []
    assert "graph" in " ".join(mg.Langevin(1, step_size=0.1).explain(lambda x: net(x), x).why_not_faster)
    mg.langevin_sample(lambda x: net(x), x, steps=40, step_size=0.1, callback=lambda k, _: seen.append(k))
    assert seen == list(range(40))


@pytest.mark.parametrize("name", ["residual", "MLP", "an MLP on images"])
def test_inference_mode(name: str) -> None:
    shape, make = CASES[name]
    net, x, options = make(), torch.randn(3, *shape), {"steps": MIN_STEPS, "step_size": 0.1, "seed": 1}
    expected = mg.langevin_sample(net, x, **options)
    with torch.inference_mode():
        assert torch.equal(mg.langevin_sample(net, x, **options), expected)


def test_weights_that_are_not_finite() -> None:
    net = CASES["MLP"][1]()
    with torch.no_grad():
        net[0].bias[0] = math.nan
    with pytest.raises(mg.DivergenceError):
        mg.langevin_sample(lambda x: net(x), torch.randn(4, 2), steps=30, step_size=0.1)
