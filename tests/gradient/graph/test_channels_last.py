"""Energies whose tensors have their channels last for a while, against float64 autograd of the same code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast.gradient.graph import read_graph
from mgebm_fast.gradient.graph.watch import watch_of
from mgebm_fast.ops.graph_chain import GraphChain, layers

SHAPE = (6, 4, 5)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


WEIGHT, BIAS, BACK, SCALE = draw(8, 6) / 2.5, draw(8), draw(6, 8) / 3, draw(6)
OF_PIXELS, OF_ALL, OF_SAMPLES = draw(4, 5, 1), draw(4, 5, 6), draw(7, 1, 1, 6)
HALVES = draw(8, 4)


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def of(x: Tensor, constant: Tensor) -> Tensor:
    return constant.to(x.dtype)


def perceptron(h: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(h, of(h, WEIGHT), of(h, BIAS))), of(h, BACK))


def normed(h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], of(h, SCALE), None, 1e-5)


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "a block and back": lambda x: (x + perceptron(normed(last(x))).permute(0, 3, 1, 2)).square().sum((1, 2, 3)),
    "a block of tokens": lambda x: (
        (x + perceptron(normed(tokens(x))).transpose(1, 2).reshape(x.shape)).exp().mean((1, 2, 3))
    ),
    "a dense layer without a bias, first": lambda x: F.linear(last(x), of(x, WEIGHT)).tanh().sum((1, 2, 3)),
    "a layer norm of all elements": lambda x: F.layer_norm(last(x), (4, 5, 6), of(x, OF_ALL)).sin().sum((1, 2, 3)),
    "the mean over pixels": lambda x: F.silu(F.linear(perceptron(tokens(x)).mean(1), of(x, WEIGHT))).sum(1),
    "constants of channels and of pixels": lambda x: (
        (last(x) * of(x, SCALE) + of(x, OF_PIXELS)).square() * of(x, OF_PIXELS)
    ).sum((1, 2, 3)),
    "a gated unit": lambda x: (F.glu(F.linear(tokens(x), of(x, WEIGHT))).square() @ of(x, HALVES).T).sum((1, 2)),
    "halves of the channels": lambda x: (lambda a, b: (a * b.sigmoid()).square().sum((1, 2, 3)))(
        *F.linear(last(x), of(x, WEIGHT)).chunk(2, -1)
    ),
    "joined with constants": lambda x: (
        torch.cat([last(x), of(x, OF_ALL).expand(len(x), -1, -1, -1)], -1)[..., 3:9].sin().sum((1, 2, 3))
    ),
    "joined and cut": lambda x: torch.cat([last(x), last(x).abs()], -1)[..., 2:9].square().mean((1, 2, 3)),
    "products of two": lambda x: (last(x) * normed(last(x)) - 1 / (2 + last(x).square())).sum((1, 2, 3)),
    "another order": lambda x: normed(last(x)).permute(0, 2, 1, 3).flatten(1).cumsum(1).square().sum(1) / 100,
    "pixels to the right": lambda x: (lambda h: (h[:, 1:] * h[:, :-1]).sum((1, 2)))(normed(tokens(x))),
    "attention of one head": lambda x: (
        lambda h: (torch.softmax(h @ h.transpose(1, 2) / 3, -1) @ h).square().sum((1, 2))
    )(normed(tokens(x[:, :, :2, :2]))),
}


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_autograds(name: str) -> None:
    energy = CASES[name]
    x = torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(1))
    graph = read_graph(energy, x)
    assert not isinstance(graph, str), graph
    exact, own = (
        torch.autograd.grad(energy(leaf).sum(), leaf)[0].double()
        for leaf in (x.double().requires_grad_(), x.clone().requires_grad_())
    )
    error = float((GraphChain(graph).gradient(x).double() - exact).norm())
    assert float(exact.norm()) > 0.1
    assert error <= 3 * float((own - exact).norm()) + 1e-6 * float(exact.norm())


def test_a_row_for_each_sample() -> None:
    def energy(x: Tensor) -> Tensor:
        return (normed(last(x)) * of(x, OF_SAMPLES)).square().mean((1, 2, 3))

    x = torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(2))
    graph = read_graph(energy, x)
    assert not isinstance(graph, str), graph
    leaf = x.clone().requires_grad_()
    own = torch.autograd.grad(energy(leaf).sum(), leaf)[0]
    assert float((GraphChain(graph).gradient(x) - own).norm()) <= 1e-5 * float(own.norm())


ONE = {
    "one pixel": ((5, 1), lambda x: x.permute(0, 2, 1).squeeze(1)[:, 0].unsqueeze(1).square().sum(1)),
    "one pixel, flattened": ((5, 1), lambda x: x.permute(0, 2, 1).flatten(1).tanh().mean(1)),
    "one feature": ((5, 1), lambda x: x.permute(0, 2, 1).squeeze(1)[:, 0].square()),
    "one channel": ((1, 4, 5), lambda x: F.layer_norm(last(x), (4, 5, 1)).sin().sum((1, 2, 3))),
    "one patch": ((6, 4, 5), lambda x: F.linear(F.conv2d(x, of(x, PATCH)).permute(0, 2, 3, 1), of(x, WEIGHT)[:, :6])
                  .flatten(1).sin().sum(1)),
    "one token": ((6, 1, 1), lambda x: normed(tokens(x)).sin().flatten(1).sum(1) + perceptron(tokens(x)).square().sum(
        (1, 2)
    )),
    "as many samples as channels and pixels": ((3, 3), lambda x: F.linear(x.transpose(1, 2), of(x, SQUARE)).sin().sum(
        (1, 2)
    )),
}  # fmt: skip
PATCH, SQUARE = draw(6, 6, 4, 5) / 11, draw(3, 3)


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("samples", [1, 3])
def test_dimensions_of_one(name: str, samples: int) -> None:
    shape, energy = ONE[name]
    x = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(3))
    graph = read_graph(energy, x)
    assert not isinstance(graph, str), graph
    exact = torch.autograd.grad(energy(leaf := x.double().requires_grad_()).sum(), leaf)[0]
    torch.testing.assert_close(GraphChain(graph).gradient(x).double(), exact, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_large_maps_are_read_without_matrices(shape: tuple[int, ...]) -> None:
    """A matrix that puts 24·32·32 elements in another order would have 600 million entries."""

    def energy(x: Tensor) -> Tensor:
        h = F.conv2d(x, kernel)
        return F.silu(F.linear(last(h) if shape else tokens(h), wide)).sum(tuple(range(1, 4 if shape else 3)))

    kernel, wide = draw(24, 3, 1, 1).float(), draw(40, 24).float()
    graph = read_graph(energy, torch.empty(2, 3, 32, 32))
    assert not isinstance(graph, str), graph
    kernels = [layer.weight.numel() for layer in graph.layers if isinstance(layer, layers.Convolution)]
    assert max(kernels) == 40 * 24, [layer.name for layer in graph.layers]


class Block(nn.Module):
    """With a head that is linear in what the block gives, its last layer too: dE/dh is known behind both."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 1)
        self.each = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm, self.first, self.second = nn.LayerNorm(6), nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.gelu(self.first(self.norm(last(self.each(x))))))
        return self.head((x + h.permute(0, 3, 1, 2)).mean((2, 3))).squeeze(1) + 0.1 * x.square().mean((1, 2, 3))


def test_a_reading_is_kept_and_packed_again_from_other_weights() -> None:
    torch.manual_seed(3)
    net, x = Block(), torch.randn(2, *SHAPE)

    def ours() -> Tensor:
        return mg.langevin_sample(net, x, steps=16, step_size=0.5, noise_scale=0.0, precision="fp32", seed=0)

    def by_hand() -> Tensor:
        state = x
        for _ in range(16):
            leaf = state.detach().requires_grad_()
            state = state - 0.125 * torch.autograd.grad(net(leaf).sum(), leaf)[0]
        return state

    for _ in range(2):
        torch.testing.assert_close(ours(), by_hand(), rtol=0, atol=2e-6)
        watch = watch_of(net)
        assert watch is not None
        kept = dict(watch.kept)
        assert len(kept) == 1
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    torch.testing.assert_close(ours(), by_hand(), rtol=0, atol=2e-6)
    assert watch_of(net).kept == kept  # type: ignore[union-attr]  # and so was not read once more
