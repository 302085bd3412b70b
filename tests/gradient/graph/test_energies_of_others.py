"""Energies as papers' code has them: labels, mixtures, distances, losses, resampling, products of tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient.graph import MIN_STEPS, plan, read_graph
from mgebm_fast.gradient.plan import plan as plan_of
from mgebm_fast.ops.graph_chain import GraphChain

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")
N = 7


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    return kind().eval()


labels, T, rows = torch.arange(N) * 3 % 10, numbers(N).exp(), numbers(N, 5)
W, square, means, vector = numbers(12, 5), numbers(5, 5), numbers(6, 5), numbers(5)
known, images = numbers(N, 3, 8, 8) > 0, numbers(N, 3, 8, 8)
linear = made(lambda: nn.Linear(5, 10))
conv, wide = made(lambda: nn.Conv2d(3, 8, 3, padding=1)), made(lambda: nn.Conv2d(4, 4, 3))
classify = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(288, 10)))
decoder = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1)))
grouped = made(lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2))
experts = made(lambda: nn.ModuleList(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(3)))
prelu = made(lambda: nn.PReLU(8, init=0.3))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.first(x))
        return (self.last(torch.cat([self.up(F.silu(self.down(a))), a], 1)) * x).sum((1, 2, 3))


unet = made(UNet)
IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "score of a label": lambda x: -classify(x)[torch.arange(len(x)), labels],
    "score of a label, gathered": lambda x: -classify(x).gather(1, labels[:, None]).squeeze(1),
    "cross-entropy": lambda x: F.cross_entropy(classify(x), labels, reduction="none"),
    "entropy": lambda x: -(F.softmax(classify(x), 1) * F.log_softmax(classify(x), 1)).sum(1),
    "guided": lambda x: (1 + T) * -classify(x)[torch.arange(N), labels] + T * classify(x).logsumexp(1),
    "reconstruction": lambda x: 0.5 * ((x - decoder(x)) ** 2).sum((1, 2, 3)),
    "transposed, in groups": lambda x: grouped(conv(x)).square().sum((1, 2, 3)),
    "U-Net": lambda x: unet(x),
    "planes of a noise level": lambda x: (
        wide(torch.cat([x, T.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)], 1)).square().sum((1, 2, 3))
    ),
    "known pixels": lambda x: conv(torch.where(known, x, images)).square().sum((1, 2, 3)),
    "pixels shuffled": lambda x: F.pixel_shuffle(torch.tanh(conv(x)), 2).cos().sum((1, 2, 3)),
    "pixels unshuffled": lambda x: F.silu(F.pixel_unshuffle(x, 2)).square().mean((1, 2, 3)),
    "patches": lambda x: F.unfold(x, 3, padding=1, stride=2).tanh().square().sum((1, 2)),
    "contrast": lambda x: x.std((2, 3)).sum(1) + x.var((1, 2, 3)),
    "gated, PReLU": lambda x: (F.glu(conv(x), 1) + prelu(conv(x))[:, :4]).sum((1, 2, 3)),
    "einsum over channels": lambda x: torch.einsum("nchw,kc->nkhw", x[..., :4, ::3], W[:, :3]).square().sum((1, 2, 3)),
}
POINTS: dict[str, Callable[[Tensor], Tensor]] = {
    "RBM": lambda x: -(x @ vector) - F.softplus(F.linear(x, W)).sum(1),
    "Hopfield": lambda x: 0.5 * x.square().sum(1) - torch.logsumexp(3 * x @ W.T, 1) / 3,
    "mixture by cdist": lambda x: -torch.logsumexp(-0.5 * torch.cdist(x, means).pow(2), 1),
    "distribution": lambda x: -torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(6)),
        torch.distributions.Independent(torch.distributions.Normal(means, 1.0), 1),
    ).log_prob(x),
    "product of experts": lambda x: sum(expert(x) for expert in experts).squeeze(-1),
    "einsum, quadratic form": lambda x: torch.einsum("ni,ij,nj->n", x, square, x),
    "einsum of rows": lambda x: torch.einsum("nd,kd,nd->nk", x, W, rows).cos().sum(1),
    "a matrix a sample": lambda x: (x[:, None] @ rows[:, :, None] * T[:, None, None]).square().squeeze(),
    "vmap": lambda x: torch.func.vmap(lambda z: F.silu(z @ W.T).sum())(x),
    "piecewise": lambda x: (
        torch.where(x.abs() < 1, 0.5 * x**2, x.abs() - 0.5) + x * (((x > 0.3) & (rows < x)) | ~(x >= -1)).float()
    ).sum(1),
    "losses": lambda x: (
        F.huber_loss(x, rows, reduction="none", delta=0.7) + F.smooth_l1_loss(x, rows, reduction="none", beta=0.4)
        + F.mse_loss(x, torch.zeros_like(x), reduction="none")
    ).mean(1) + F.binary_cross_entropy_with_logits(linear(x), rows.repeat(1, 2).sigmoid(), reduction="none").sum(1),
    "functions": lambda x: (
        torch.erf(x) + torch.atan(x) + (x.abs() + 1).pow(1.5) + torch.cosh(x) - torch.sinh(0.3 * x)
        + F.softshrink(x, 0.2) + torch.logaddexp(x, vector) + torch.lerp(x, rows, 0.3) + x.sign() * x
        + torch.addcmul(vector, x, x, value=2.0) + torch.addcdiv(x, vector, x.square() + 1)
    ).sum(1),
    "cosine": lambda x: -F.cosine_similarity(x, rows, dim=1),
    "cosine to one vector": lambda x: -F.cosine_similarity(x, vector),
    "one-hot by writing": lambda x: (linear(x) * written(x)).sum(1),
    "masked": lambda x: x.masked_fill(rows > 0, 0.5).pow(3).sum(1),
}  # fmt: skip


def written(x: Tensor) -> Tensor:
    onehot = torch.zeros(len(x), 10)
    onehot[torch.arange(len(x)), labels] = 1.0
    return onehot


@pytest.mark.parametrize("name", [*IMAGES, *POINTS])
def test_gradient_is_autograds(name: str) -> None:
    energy, x = (IMAGES[name], images.roll(1, 0)) if name in IMAGES else (POINTS[name], rows.roll(1, 0) + 0.1)
    found = plan_of(energy, x, "fp32", steps=MIN_STEPS)
    assert found.explain().plan == "graph", found.explain()
    leaf = x.clone().requires_grad_()
    own = torch.autograd.grad(energy(leaf).sum(), leaf)[0]
    assert float((found.gradient(x) - own).norm()) <= 1e-5 * float(own.norm())


class Tokens(nn.Module):
    """Dense layers on each of five tokens, with and without a bias; in between what `mix` does to them."""

    def __init__(self, mix: Callable[[Tokens, Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.norm = mix, nn.LayerNorm(6)
        self.first, self.across, self.last = nn.Linear(4, 6), nn.Linear(5, 5, bias=False), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self, F.silu(self.first(x)))).squeeze(-1)


TOKENS: dict[str, Callable[[Tokens, Tensor], Tensor]] = {
    "points": lambda net, h: h.max(1)[0],
    "mixer": lambda net, h: (h + F.gelu(net.across(net.norm(h).mT)).mT).mean(1),
    "attention": lambda net, h: (torch.softmax(h @ net.norm(h).mT / 6**0.5, -1) @ h).mean(1),
    "torch's attention": lambda net, h: F.scaled_dot_product_attention(h, net.norm(h), h).mean(1),
    "free energy": lambda net, h: (torch.logsumexp(h, 2, keepdim=True) * net.norm(h)).mean(1),
    "rows": lambda net, h: net.norm(h).flatten(0, 1).tanh().unflatten(0, h.shape[:2]).mean(1),
}


@pytest.mark.parametrize("name", TOKENS)
def test_dense_layers_on_tokens(name: str) -> None:
    net, x = made(lambda: Tokens(TOKENS[name])), numbers(N, 5, 4)
    found = plan_of(net, x, "fp32", steps=MIN_STEPS)
    assert found.explain().plan == "graph", found.explain()
    leaf, exact = x.double().requires_grad_(), copy.deepcopy(net).double()
    own = torch.autograd.grad(exact(leaf).sum(), leaf)[0]
    assert float((found.gradient(x) - own).norm()) <= 1e-6 * float(own.norm())


def test_readings_of_softmax_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = made(lambda: Tokens(TOKENS["attention"])), numbers(N, 5, 4)
    plan_of(net, x, "fp32", steps=MIN_STEPS)
    with torch.no_grad():
        net.first.weight.mul_(1.1)
    monkeypatch.setattr(plan, "read_graph", None)
    got = plan_of(net, x, "fp32", steps=MIN_STEPS).gradient(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(net(leaf).sum(), leaf)[0], rtol=1e-4, atol=1e-6)


def test_tensors_that_choose_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices, masks and weights under a norm that change between calls: by the tape, or by another reading."""
    read: list[int] = []
    monkeypatch.setattr(plan, "read_graph", lambda *given: read.append(1) or read_graph(*given))
    index, mask, norm = torch.tensor([0, 2]), torch.tensor([True, False, True]), made(
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3))
    )  # fmt: skip

    def energy(x: Tensor) -> Tensor:
        h = torch.where(mask, norm(x), 0.0)
        return x[:, index].pow(2).sum(1) + h.pow(4).sum(1) + x.reshape(-1, 1, 5)[:, :, index].cos().sum((1, 2))

    x = rows
    for change in (lambda: None, lambda: index.add_(1), lambda: mask.logical_not_(), lambda: norm.bias.data.add_(1),
                   lambda: norm.parametrizations.weight.original.data.neg_(), lambda: mask.fill_(False)):  # fmt: skip
        change()
        got, state = mg.langevin_sample(energy, x, steps=MIN_STEPS, drift=1e-3, noise_std=0.0, precision="fp32"), x
        for _ in range(MIN_STEPS):
            leaf = state.clone().requires_grad_()
            state = state - 1e-3 * torch.autograd.grad(energy(leaf).sum(), leaf)[0]
        torch.testing.assert_close(got, state, rtol=1e-5, atol=1e-5)
    assert len(read) <= 3  # the first one, and one where pixels are chosen by other numbers


def curved(moved: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: (moved(x) * 1.3).sin().flatten(1).sum(1)


pair = made(lambda: nn.Conv2d(6, 4, 3, padding=1))
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "mirrored": lambda x: conv(x) + conv(x.flip(-1)),
    "all flipped": lambda x: x * x.flip((1, 2, 3)),
    "rolled": lambda x: conv(x.roll((1, -2), (2, 3))) + conv(x).roll(1, 1),
    "indexed": lambda x: conv(x[:, [2, 0, 1]][..., torch.arange(15, -1, -2)]),
    "channels one by one": lambda x: torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1),
    "a row and a column": lambda x: x[:, :, 3].sin() + x[..., -2],
    "unbound": lambda x: sum(c * k for k, c in enumerate(x.unbind(1), 1)),
    "stacked": lambda x: pair(torch.stack([x, x**2], 1).flatten(1, 2)),
    "expanded": lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1),
    "grey": lambda x: x - x.mean(1, keepdim=True),
    "variance": lambda x: x.var(1, unbiased=False),
    "norms": lambda x: x.norm(dim=1),
    "normalised": lambda x: F.normalize(x.flatten(1), dim=1),
    "rows of a view": lambda x: F.layer_norm(x[:, :1, :6, :6].flatten(1).view(-1, 6, 6), (6,)),
    "greatest of a view": lambda x: x.mean((1, 2)).view(-1, 4, 4).max(1)[0],
    "a quadratic form": lambda x: x.flatten(1) * (x.flatten(1) @ FORM),
    "greatest of a reshaped channel": lambda x: x[:, 0].reshape(len(x), 32, 8).max(2)[0],
    "greatest of two maps": lambda x: torch.stack([x, x.tanh()], 1).max(1)[0],
    "greatest of groups of channels": lambda x: eight(x).reshape(len(x), 4, 2, 16, 16).max(2)[0],
    "greatest shared among pixels": lambda x: x.reshape(len(x), 384, 2).amax(2),
}
eight = made(lambda: nn.Conv2d(3, 8, 3, padding=1))
FORM = numbers(768, 768) / 30


@pytest.mark.parametrize("name", MOVED)
def test_elements_of_a_map_are_moved_without_large_matrices(name: str) -> None:
    energy, x = curved(MOVED[name]), numbers(5, 3, 16, 16)
    graph = read_graph(energy, x)
    assert not isinstance(graph, str), graph
    weights = [tensor for _, tensor in graph.tensors() if tensor.numel() > 1 << 14]
    assert all(torch.equal(weight, FORM.T) for weight in weights)
    exact = torch.autograd.grad(energy(leaf := x.clone().requires_grad_()).sum(), leaf)[0]
    torch.testing.assert_close(plan_of(energy, x, "fp32", steps=MIN_STEPS).gradient(x), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("energy", [
    lambda x: (x[:, 1:] - x[:, :-1]).square().sum(1), lambda x: x.roll(3, 1).sin().sum(1) + x.flip(1).cos().sum(1),
])  # fmt: skip
def test_many_elements_are_moved_without_much_memory(energy: Callable[[Tensor], Tensor]) -> None:
    """Were the places of as many samples asked for as there are elements, they would take 13 GB."""
    x = numbers(2, 40_000)
    graph = read_graph(energy, x)
    assert not isinstance(graph, str), graph
    exact = torch.autograd.grad(energy(leaf := x.clone().requires_grad_()).sum(), leaf)[0]
    torch.testing.assert_close(GraphChain(graph).gradient(x), exact, rtol=1e-5, atol=1e-5)


SMALLER, LARGER = numbers(8, 3, 4, 4) / 7, numbers(4, 8, 3, 3) / 8


def by(x: Tensor, weight: Tensor, **options: int) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), **options)


def smaller(x: Tensor) -> Tensor:
    return by(x, SMALLER)


ONE_PIXEL: dict[str, Callable[[Tensor], Tensor]] = {
    "a padded convolution": lambda x: by(smaller(x), LARGER, padding=2),
    "padding": lambda x: by(F.pad(smaller(x), (2, 2, 2, 2), mode="replicate"), LARGER),
    "a depthwise convolution": lambda x: by(smaller(x), LARGER[0][:, None], padding=1, groups=8),
    "its own shape": lambda x: smaller(x).sigmoid() * smaller(x.cos()),
}


@pytest.mark.parametrize("name", ONE_PIXEL)
def test_a_convolution_over_all_of_x_gives_a_map_of_one_pixel(name: str) -> None:
    energy, x = curved(ONE_PIXEL[name]), numbers(5, 3, 4, 4)
    made = plan_of(energy, x, "fp32", steps=MIN_STEPS)
    assert made.explain().plan == "graph", made.explain()
    exact = torch.autograd.grad(energy(leaf := x.double().requires_grad_()).sum(), leaf)[0]
    torch.testing.assert_close(made.gradient(x).double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


PER_SAMPLE = numbers(5, 3, 1, 1)
FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "total variation": lambda x: (
        (x[..., 1:] - x[..., :-1]).abs().sum((1, 2, 3)) + (x[:, :, 1:] - x[:, :, :-1]).abs().sum((1, 2, 3))
    ),
    "a function of the mean": lambda x: x.exp().mean((2, 3)).square().sum(1),
    "numbers of channels": lambda x: (x * NUMBERS[:3, None, None] + x.square() * NUMBERS).tanh().sum((1, 2, 3)),
    "numbers of samples": lambda x: (PER_SAMPLE[: len(x)] * x).sin().sum((1, 2, 3)),
    "a norm of the sample": lambda x: F.layer_norm(x, x.shape[1:]).exp().sum((1, 2, 3)),
    "channels apart": lambda x: torch.cat([x[:, 1:], x[:, :1].cos()], 1).pow(4).sum((1, 2, 3)),
    "rolled and flipped": lambda x: (x.roll(2, 3) * x.flip(2)).sin().flatten(1).sum(1),
    "a dense top": lambda x: F.silu(F.linear(x.sin().flatten(1), FORM[:9].to(x.dtype))).sum(1),
}
NUMBERS = numbers(16)


@pytest.mark.parametrize("name", FLAT)
def test_energies_of_single_numbers_are_read_as_features(name: str) -> None:
    """Whose maps of three channels would take the room of sixteen."""
    energy, x = FLAT[name], numbers(5, 3, 16, 16)
    graph = read_graph(energy, x)
    assert not isinstance(graph, str), graph
    assert (graph.x.channels, graph.x.size) == (768, ())
    exact = torch.autograd.grad(energy(leaf := x.double().requires_grad_()).sum(), leaf)[0]
    chain = GraphChain(graph)
    torch.testing.assert_close(chain.gradient(x).double(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))
    # With noise, which belongs to elements of the image.
    got = mg.langevin_sample(energy, x, steps=MIN_STEPS, step_size=0.01, precision="fp32", seed=3)
    by_hand = x.clone()
    for step in range(MIN_STEPS):
        by_hand = mg.langevin_sample(
            energy, by_hand, steps=1, step_size=0.01, precision="fp32", seed=3, first_step=step
        )
    torch.testing.assert_close(got, by_hand, rtol=1e-5, atol=1e-5)


def test_maps_whose_pixels_are_neighbours_stay_maps() -> None:
    graph = read_graph(lambda x: conv(x.sin()).square().flatten(1).sum(1), numbers(2, 3, 16, 16))
    assert not isinstance(graph, str) and graph.x.size == (16, 16)


def test_matrices_that_are_most_of_the_work_leave_an_energy_to_autograd() -> None:
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1)))

    def asked(energy: Callable[[Tensor], Tensor], size: int) -> str:
        return str(plan_of(energy, numbers(5, 3, size, size), "fp32", steps=MIN_STEPS).explain())

    summed = curved(lambda x: x.cumsum(2))
    assert asked(summed, 8).startswith("graph")
    report = asked(summed, 16)
    assert report.startswith("autograd") and "summed by matrices of 590,592 entries" in report
    assert asked(lambda x: summed(x) + net(x).sin().flatten(1).sum(1), 16).startswith("graph")
