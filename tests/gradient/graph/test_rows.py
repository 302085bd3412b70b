"""Energies with a constant for each sample (labels, noise levels, targets, masks) are native, whatever N is."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient.graph import MIN_STEPS, plan, read_graph
from mgebm_fast.gradient.plan import plan as plan_of
from mgebm_fast.ops.graph_chain import GraphChain
from mgebm_fast.ops.graph_chain.graph import Graph

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")
CLASSES = 5


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mg.nets.ResidualNet(8, 3, (8, 12), labels=CLASSES)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(x, y)


class FiLM(nn.Module):
    """A noise level by its Fourier features, which scale and shift the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 12))
        self.conv, self.norm, self.out = nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        sigma = 0.1 * (y + 1.0)
        angles = sigma.log()[:, None] * torch.arange(1.0, 5.0)
        angles = angles.to(x.dtype)
        scale, shift = self.embed(torch.cat([angles.sin(), angles.cos()], 1))[:, :, None, None].chunk(2, 1)
        h = F.silu(self.norm(self.conv(x)) * (1 + scale) + shift)
        return self.out(h).square().sum((1, 2, 3)) / sigma**2


class Concatenated(nn.Module):
    """A label's embedding beside the features, and its plane beside the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 4)
        self.conv = nn.Conv2d(7, 6, 3)
        self.net = nn.Sequential(nn.Linear(10, 16), nn.Softplus(), nn.Linear(16, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        planes = self.embed(y)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        h = torch.relu(self.conv(torch.cat([planes, x], 1))).mean((2, 3))
        return self.net(torch.cat([h, self.embed(y)], 1)).squeeze(1)


class Classifier(nn.Module):
    """A joint energy, −f(x)[y] (Grathwohl et al., 2020), and the cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(216, CLASSES))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        f = self.net(x)
        onehot = F.one_hot(y, CLASSES).float()
        return -(f * onehot).sum(1) + 0.3 * torch.logsumexp(f, 1)


class Target(nn.Module):
    """A tether to an image of each sample's, known in some pixels, gated by a number a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("targets", torch.randn(CLASSES, 3, 8, 8))
        self.register_buffer("gates", torch.rand(CLASSES, 3, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        target, gate = self.targets[y], self.gates[y]
        known = target > 0
        near = ((x - target) * known).square().flatten(1).sum(1)
        return near + (torch.tanh(self.conv(x)) * gate).sum((1, 2, 3)) / (y + 1)


NETS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (Residual, FiLM, Concatenated, Classifier, Target)
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


def batch(n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)


def by_autograd(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(energy(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("name", NETS)
# One sample, fewer than are read on, as many, as many as channels of a net (6, 12), and several groups of samples.
@pytest.mark.parametrize("n", [1, 3, 6, 40])
def test_gradient_is_autograds(name: str, n: int) -> None:
    net, (x, y) = made(name), batch(n)
    found = plan_of(lambda x: net(x, y), x, "fp32", steps=MIN_STEPS)
    assert found.explain().plan == "graph", found.explain()
    if n > 1:
        assert f"constants of {n} samples" in str(found.explain())
    exact = by_autograd(lambda x: made(name).double()(x, y), x.double())
    own = by_autograd(lambda x: net(x, y), x)
    error = float((found.gradient(x).double() - exact).norm())
    assert error <= 2 * float((own.double() - exact).norm()) + 1e-6 * float(exact.norm())


PICKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gather": lambda f, y: f.gather(1, y[:, None])[:, 0],
    "take_along_dim": lambda f, y: torch.take_along_dim(f, y[:, None], 1)[:, 0],
    "rows kept": (lambda rows: lambda f, y: f[rows[len(y)], y])({n: torch.arange(n) for n in range(1, 6)}),
    "cross entropy": lambda f, y: -F.cross_entropy(f, y, reduction="none"),
}


@pytest.mark.parametrize("name", PICKED)
@pytest.mark.parametrize("n", range(1, 6))
def test_scores_of_labels_are_read_for_every_number_of_samples(name: str, n: int) -> None:
    pick, net, (x, y) = PICKED[name], made("Classifier").net, batch(n)  # type: ignore[attr-defined]
    energy = lambda x: -pick(net(x), y)  # noqa: E731
    found = plan_of(energy, x, "fp32", steps=MIN_STEPS)
    assert found.explain().plan == "graph", found.explain()
    torch.testing.assert_close(found.gradient(x), by_autograd(energy, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["Residual", "Target"])
def test_no_bit_depends_on_threads_or_company(name: str) -> None:
    net, (x, y) = made(name), batch(37)
    options: dict[str, Any] = {"steps": MIN_STEPS, "step_size": 0.05, "seed": 3}
    threads = torch.get_num_threads()
    try:
        whole = [
            (torch.set_num_threads(count), mg.langevin_sample(lambda x: net(x, y), x, **options))[1]
            for count in (1, 2, 3)
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[0], whole[1]) and torch.equal(whole[0], whole[2])
    for first, last in ((0, 1), (1, 20), (20, 36), (36, 37)):
        part, its = x[first:last], y[first:last]
        got = mg.langevin_sample(lambda x, its=its: net(x, its), part, first_sample=first, **options)
        assert torch.equal(got, whole[0][first:last])


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(plan, "read_graph", lambda energy, *rest: found.append(energy) or read_graph(energy, *rest))
    return found


@pytest.mark.parametrize("name", ["Residual", "Concatenated", "Target"])
def test_other_labels_need_no_other_reading(name: str, readings: list[Any]) -> None:
    net = made(name)

    def step(x: Tensor, y: Tensor) -> Tensor:
        return mg.langevin_sample(lambda x: net(x, y), x, steps=MIN_STEPS, step_size=0.05, seed=3, precision="fp32")

    for seed in range(3):
        x, y = batch(6, seed)
        got = step(x, y)
        assert torch.equal(got, step(x, y.clone()))
        state = x.clone()
        for k in range(MIN_STEPS):
            noise = mg.ops.noise(x.shape, seed=3, step=k)
            state = state - 0.05**2 / 2 * by_autograd(lambda x, y=y: net(x, y), state) + 0.05 * noise
        torch.testing.assert_close(got, state, rtol=1e-4, atol=1e-4)
    assert len(readings) == 1
    step(*batch(7))
    assert len(readings) == 2


def test_labels_out_of_range_are_refused_by_the_net(readings: list[Any]) -> None:
    net, (x, y) = made("Residual"), batch(6)
    energy = lambda x: net(x, y)  # noqa: E731
    mg.langevin_sample(energy, x, steps=MIN_STEPS, step_size=0.05)
    y[2] = CLASSES
    with pytest.raises(ValueError, match=f"values from .* to {CLASSES}"):
        mg.langevin_sample(energy, x, steps=MIN_STEPS, step_size=0.05)


def test_labels_that_steer_the_code_are_read_again(readings: list[Any]) -> None:
    def step(y: Tensor) -> Tensor:
        def energy(x: Tensor) -> Tensor:
            power = 2 if (y > 2).any() else 4
            few = y[y > 3]
            return (x.flatten(1) * (y[:, None] + 1)).pow(power).sum(1) * (1 + len(few))

        return mg.langevin_sample(energy, x, steps=MIN_STEPS, drift=1e-4, noise_std=0.0)

    x, _ = batch(4)
    for labels in ([0, 1, 2, 0], [0, 1, 1, 2], [0, 3, 1, 1], [4, 3, 1, 1], [4, 4, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]):
        y, state = torch.tensor(labels), x.clone()
        got = step(y)
        for _ in range(MIN_STEPS):
            power, count = 2 if max(labels) > 2 else 4, sum(label > 3 for label in labels)
            scaled = lambda x, p=power, c=count, y=y: (x.flatten(1) * (y[:, None] + 1)).pow(p).sum(1) * (1 + c)  # noqa: E731
            state = state - 1e-4 * by_autograd(scaled, state)
        torch.testing.assert_close(got, state, rtol=1e-5, atol=1e-5)
    assert len(readings) < 7


def test_a_constant_is_a_samples_by_its_place_not_by_its_length() -> None:
    """N equal to the channels, the classes, the pixels, the rows of a weight: torch's broadcasting alone decides."""
    n = 4
    torch.manual_seed(0)
    x, square, vector = torch.randn(n, n), torch.randn(n, n), torch.rand(n) + 0.5
    images = torch.randn(n, n, n, n)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor, int | None]] = [
        (lambda x: ((x @ square) * x).sum(1), x, None),  # a weight of N rows
        (lambda x: torch.logsumexp(x @ square.T, 1), x, None),  # patterns, as many as chains
        (lambda x: -torch.logsumexp(-((x[:, None] - square) ** 2).sum(-1), 1), x, None),
        (lambda x: (x * vector).pow(3).sum(1), x, None),  # a number a channel
        (lambda x: (x * vector[:, None]).pow(3).sum(1), x, n),  # a number a sample
        (lambda x: (x - square).pow(4).sum(1), x, n),
        (lambda x: x.pow(2).sum(1) * vector, x, n),
        (lambda x: (x * vector).pow(3).sum((1, 2, 3)), images, None),
        (lambda x: (x * vector[:, None, None]).pow(3).sum((1, 2, 3)), images, None),
        (lambda x: (x * square[..., None, None]).pow(3).sum((1, 2, 3)), images, n),
        (lambda x: (x * square).pow(3).sum((1, 2, 3)), images, None),
    ]
    for energy, start, samples in cases:
        graph = read_graph(energy, start)
        assert not isinstance(graph, str) and graph.samples == samples, graph
        torch.testing.assert_close(GraphChain(graph).gradient(start), by_autograd(energy, start), rtol=1e-4, atol=1e-4)
    # (N,) against (N, N) goes along the second dimension, and a transposed batch is none.
    for energy in (lambda x: (x.sum(1) * square).sum(1), lambda x: x.T.square().sum(1), lambda x: (x + x.T).sum(1)):
        assert "moves the batch to another place" in str(read_graph(energy, x))


def test_rows_beyond_those_that_are_compared_first() -> None:
    """Labels that differ in late samples alone, taken by the length of the batch."""
    y = torch.zeros(300, dtype=torch.long)
    y[290:] = 1
    table, x = torch.tensor([[1.0, 1.0], [3.0, -2.0]]), torch.randn(300, 2)
    energy = lambda x: (x * table[y[: len(x)]]).square().sum(1)  # noqa: E731
    found = plan_of(energy, x, steps=MIN_STEPS)
    assert found.explain().plan == "graph"
    torch.testing.assert_close(found.gradient(x), by_autograd(energy, x))
    for constant in (lambda x: x.square().sum(1) + torch.zeros(len(x)), lambda x: x.square().sum(1) * y.new_ones(300)):
        assert read_graph(constant, x).samples is None  # the same for all


def test_another_number_of_samples_is_refused() -> None:
    x = torch.randn(5, 3)
    graph = read_graph(lambda z: (z - x).square().sum(1), x)
    assert isinstance(graph, Graph)
    with pytest.raises(ValueError, match="x must have the 5 samples of the graph's constants, got 4"):
        GraphChain(graph).gradient(x[:4])


def test_threads_keep_their_own_labels() -> None:
    """Calls of one function's closures in several threads share a reading, never the labels."""
    net, cases = made("Residual"), [batch(6, seed) for seed in range(4)]

    def step(case: tuple[Tensor, Tensor]) -> Tensor:
        x, y = case
        return mg.langevin_sample(lambda x: net(x, y), x, steps=MIN_STEPS, step_size=0.05, seed=3, precision="fp32")

    expected = list(map(step, cases))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(step, cases * 5))
    assert all(torch.equal(a, b) for a, b in zip(got, expected * 5, strict=True))
