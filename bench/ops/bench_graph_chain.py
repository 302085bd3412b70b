"""Chains of the energies that people write, K steps in one native call, against the loop by hand (autograd.grad, frozen
weights, fp32) on the same net. "bytes" are the net's weights, times are of the whole chain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast.gradient.graph import read_graph
from mgebm_fast.learning.config import build_model, load_preset
from mgebm_fast.ops.conv_chain import prefers_bfloat
from mgebm_fast.ops.graph_chain import GraphChain, gradient_reference


class Block(nn.Module):
    """norm, SiLU, convolution, twice; a skip; an average pool."""

    def __init__(self, inputs: int, outputs: int, groups: int, pool: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(groups, c) if groups else nn.Identity() for c in (inputs, outputs)])
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.silu(self.norms[1](self.first(F.silu(self.norms[0](x)))))) + self.skip(x)
        return F.avg_pool2d(h, 2) if self.pool else h


class Residual(nn.Module):
    """Four blocks of 64 to 128 channels; the mean of the top map, a linear layer."""

    def __init__(self, groups: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.blocks = nn.Sequential(
            Block(64, 64, groups, True), Block(64, 128, groups, True), Block(128, 128, groups, True),
            Block(128, 128, groups, False),
        )  # fmt: skip
        self.head = nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.blocks(self.stem(x))).mean((2, 3))).squeeze(1)


class ConvSilu(nn.Module):
    """Four convolutions in a forward of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(3, 64, 3, 1), (64, 64, 4, 2), (64, 128, 4, 2), (128, 128, 4, 2)]
        self.convolutions = nn.ModuleList([nn.Conv2d(i, o, k, s, 1) for i, o, k, s in widths])
        self.head = nn.Linear(128, 1)

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = F.silu(convolution(x))
        return self.head(x.mean((2, 3))).squeeze(1)


class WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)])
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](x))
        return (x if self.skip is None else self.skip(h)) + self.second(F.relu(self.norms[1](self.first(h))))


class Classifier(nn.Module):
    """A wide residual net (16 layers, width 4) read as the energy −log Σ exp of its logits, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16, 64, 128, 256]
        blocks = [
            WideBlock(widths[g] if first else widths[g + 1], widths[g + 1], 2 if first and g else 1)
            for g in range(3)
            for first in (True, False)
        ]
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.Sequential(*blocks)
        self.norm, self.head = nn.BatchNorm2d(256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.blocks(self.stem(x))))
        return -torch.logsumexp(self.head(F.adaptive_avg_pool2d(h, 1).flatten(1)), 1)


class SeparableBlock(nn.Module):
    """A depthwise 7×7 convolution; a layer norm and two dense layers of each pixel, channels last; a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.each = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.first, self.second = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.each(x).permute(0, 2, 3, 1))
        return x + self.second(F.gelu(self.first(h))).permute(0, 3, 1, 2)


class Separable(nn.Module):
    """Patches of 2×2 pixels, two blocks of 64 channels, a linear layer on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 64, 2, 2), nn.Sequential(SeparableBlock(64), SeparableBlock(64))
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3))).squeeze(1)


class Autoencoder(nn.Module):
    """The energy is the squared error of a narrow net that repeats x."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.SiLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.SiLU(), nn.Flatten(),
            nn.Linear(4096, 64), nn.SiLU(),
        )  # fmt: skip
        self.decode = nn.Sequential(
            nn.Linear(64, 4096), nn.SiLU(), nn.Unflatten(1, (64, 8, 8)), nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.SiLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return (self.decode(self.encode(x)) - x).square().sum((1, 2, 3))


class TotalVariation(nn.Module):
    """Absolute differences of neighbours: no weights."""

    def forward(self, x: Tensor) -> Tensor:
        across, down = x[..., 1:] - x[..., :-1], x[:, :, 1:] - x[:, :, :-1]
        return across.abs().sum((1, 2, 3)) + down.abs().sum((1, 2, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1), nn.Flatten(0))


def dense_top(size: int):
    return lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * size**2, 128), nn.ReLU(),
        nn.Linear(128, 1), nn.Flatten(0),
    )  # fmt: skip


class Attention(nn.Module):
    """Patches of 4×4 pixels as tokens, two layers of attention of four heads: no engine reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, 4)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2)).mean(1)).squeeze(1)


class Swish(torch.autograd.Function):
    """x σ(x) with a backward of its own."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return upstream * (s + x * s * (1 - s))


class OwnFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 64, 3, 2, 1), nn.Conv2d(64, 64, 3, 2, 1)
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Swish.apply(self.second(Swish.apply(self.first(x)))).mean((2, 3))).squeeze(1)


def net_of(size: int, **settings: str):
    return lambda: mg.nets.multigrid_net(size, norm="none", **settings)


def wall() -> nn.Module:
    """A texture's net: wide kernels first."""
    return nn.Sequential(
        nn.Conv2d(3, 100, 15, 3, 7), nn.ReLU(), nn.Conv2d(100, 64, 5, 1, 2), nn.ReLU(), nn.Conv2d(64, 30, 3, 1, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(30 * 75 * 75, 1), nn.Flatten(0),
    )  # fmt: skip


def preset_net(name: str):
    return lambda: build_model(load_preset(name)).nets[0]


IMAGE = (3, 32, 32)
# energy, how it is made, shape of x, batch, steps: from 16 on an energy is read as a graph
CASES = [
    ("residual net, SiLU, average pools", Residual, IMAGE, 16, 16),
    ("residual net, SiLU, average pools", Residual, IMAGE, 64, 16),
    ("conv-SiLU ×4, mean, linear", ConvSilu, IMAGE, 16, 16),
    ("WideResNet-16-4 classifier, −logsumexp", Classifier, IMAGE, 16, 16),
    ("residual net, group norm", lambda: Residual(8), IMAGE, 16, 16),
    ("depthwise 7×7 and layer norms, channels last", Separable, IMAGE, 1, 100),
    ("depthwise 7×7 and layer norms, channels last", Separable, IMAGE, 16, 16),
    ("autoencoder, squared error", Autoencoder, IMAGE, 1, 100),
    ("autoencoder, squared error", Autoencoder, IMAGE, 64, 16),
    ("total variation", TotalVariation, IMAGE, 64, 16),
    ("MLP 2-64-64-1, SiLU", mlp, (2,), 64, 100),
    ("MLP 2-64-64-1, SiLU", mlp, (2,), 1024, 100),
    ("conv, Linear(8192, 128)", dense_top(32), (3, 32, 32), 8, 16),
    ("conv, Linear(32768, 128)", dense_top(64), (3, 64, 64), 8, 16),
    ("conv, Linear(131072, 128)", dense_top(128), (3, 128, 128), 8, 16),
    ("published 16", net_of(16), (3, 16, 16), 1, 20),
    ("published 64", net_of(64), (3, 64, 64), 1, 20),
    ("compact 64", net_of(64, variant="compact"), (3, 64, 64), 1, 20),
    ("compact 64", net_of(64, variant="compact"), (3, 64, 64), 8, 16),
    ("net of chimes", preset_net("chimes"), (1, 16384), 3, 16),
    ("net of fire", preset_net("fire"), (3, 20, 32, 32), 3, 16),
    ("texture net", wall, (3, 224, 224), 1, 16),
]


def by_hand(energy, x: Tensor, steps: int) -> None:
    state = x
    for _ in range(steps):
        leaf = state.detach().requires_grad_()
        gradient = torch.autograd.grad(energy(leaf), leaf)[0]
        state = state - 0.00005 * gradient + 0.01 * torch.randn_like(state)


@pytest.mark.parametrize(("name", "make", "shape", "samples", "steps"), CASES)
def bench_graph_chain(report, device, name, make, shape, samples, steps):
    if device != "cpu":
        pytest.skip("a CPU engine")
    torch.manual_seed(0)
    net = make().eval().requires_grad_(False)
    x = torch.randn(samples, *shape)
    graph = read_graph(net, x)
    few = x[:4]
    expected = gradient_reference(graph, few)
    assert (GraphChain(graph).gradient(few) - expected).norm() < 1e-4 * expected.norm()

    def ours(precision="fp32"):
        mg.langevin_sample(net, x, steps=steps, step_size=0.01, precision=precision, seed=0)

    weights = sum(p.numel() for p in net.parameters()) * 4
    others = {"plain_loop": lambda: by_hand(lambda state: net(state).sum(), x, steps)}
    if prefers_bfloat():
        others["auto"] = lambda: ours("auto")
    case = f"{name} on {'×'.join(map(str, x.shape))}"
    report("graph_chain", case, weights, ours, steps=steps, **others)


@pytest.mark.parametrize(("name", "make"), [("attention", Attention), ("a function of one's own", OwnFunction)])
def bench_autograd_chain(report, device, name, make):
    """What no engine reads, also by torch.compile, ours and by hand."""
    if device != "cpu":
        pytest.skip("chains on a CPU")
    torch.manual_seed(0)
    net, steps = make().eval().requires_grad_(False), 16
    x = torch.randn(16, *IMAGE)
    compiled = torch.compile(lambda state: net(state).sum())

    def ours(**options):
        mg.langevin_sample(net, x, steps=steps, step_size=0.01, precision="fp32", seed=0, **options)

    weights = sum(p.numel() for p in net.parameters()) * 4
    report(
        "graph_chain", f"{name} on {'×'.join(map(str, x.shape))}", weights, ours, steps=steps,
        plain_loop=lambda: by_hand(lambda state: net(state).sum(), x, steps),
        compiled=lambda: ours(compile=True), compiled_by_hand=lambda: by_hand(compiled, x, steps),
    )  # fmt: skip


@pytest.mark.parametrize(("size", "samples"), [(8, 16), (16, 64)])
def bench_one_step(report, device, size, samples):
    """A loop of one's own that makes a step a call: what was read and packed at the call before is used again."""
    if device != "cpu":
        pytest.skip("chains on a CPU")
    net = net_of(size, variant="compact")().requires_grad_(False)
    x = torch.randn(samples, 3, size, size)
    weights = sum(p.numel() for p in net.parameters()) * 4

    def ours():
        mg.langevin_sample(net, x, steps=1, step_size=0.01, seed=0)

    case = f"a step of compact {size} on {'×'.join(map(str, x.shape))}"
    report("conv_chain", case, weights, ours, plain_step=lambda: by_hand(lambda state: net(state).sum(), x, 1))
