"""Small nets as people write them: each is read right, or refused by name and run by autograd with the right result."""

from __future__ import annotations

import re
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient.graph import MIN_STEPS, read_graph
from mgebm_fast.gradient.graph.tape import Tape
from mgebm_fast.gradient.plan import plan

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")
NETS: dict[str, tuple[type[nn.Module], str]] = {}  # name -> (class, what the refusal names; "" of one that is read)


def net(refused: str = ""):
    def put(kind: type[nn.Module]) -> type[nn.Module]:
        NETS[kind.__name__] = kind, refused
        return kind

    return put


@net()
class InPlaceFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.out = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.hardtanh_(self.conv(x).mul_(0.5), -0.4, 0.9)
        h = h.square().add_(1.0).mul_(2)
        return self.out(h.mean(dim=[2, 3])).view(-1)


@net()
class InPlaceSkip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.a(x))
        h = self.b(h)
        h += x
        return self.act(h).sum((1, 2, 3))


@net()
class OneByOneSkip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.skip = nn.Conv2d(3, 8, 1, stride=2, bias=False)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.body(x) + self.skip(x))
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1)).squeeze(-1)


@net()
class ModuleListLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(c, c + 2, 3) for c in (3, 5, 7))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i + 1 < len(self.blocks):
                x = F.gelu(x)
        return x.flatten(1).logsumexp(1)


@net()
class ModuleDictOfBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 3, padding=1)})
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([F.elu(branch(x)) for branch in self.branches.values()], dim=1)
        return self.head(h.mean((-1, -2)))[..., 0]


@net()
class SubclassOfSequential(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(OrderedDict(a=nn.Conv2d(3, 4, 4, 2, 1), act=nn.Tanh(), b=nn.Conv2d(4, 1, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x).squeeze()


@net()
class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 8)
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.conv(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(h.mean((2, 3))))))
        return self.out(h * gate[:, :, None, None]).flatten()


@net()
class GateOfOnePixel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.ReLU(), nn.Conv2d(2, 8, 1), nn.Sigmoid()
        )
        self.out = nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.conv(x))
        return self.out(self.gate(h) * h).square().sum((1, 2, 3))


@net()
class GateOfConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.value(x) * torch.sigmoid(self.gate(x))).sum(dim=(1, 2, 3))


@net()
class PixelsUnshuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 6, 3), nn.SiLU(), nn.Flatten(), nn.LazyLinear(1))
        self.net(torch.zeros(1, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, 0]


@net()
class Rearranged(nn.Module):
    """b c (h p) (w q) -> b (h w) (p q c), as einops has it, then a linear layer for every patch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(48, 6), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        patches = x.view(n, 3, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(n, 4, 48)
        return self.out(F.gelu(self.embed(patches)).flatten(1)).squeeze(1)


@net()
class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.conv(x)).mean((1, 2, 3))


@net()
class SpectralNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 5, 3))
        self.b = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.silu(self.a(x)).sum((2, 3))).flatten()


@net()
class OldSpectralNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.spectral_norm(nn.Conv2d(3, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).square().sum((1, 2, 3))


@net()
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(10, 192) / 14), nn.Parameter(torch.randn(10))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        h = torch.tanh(F.linear(flat, self.weight, self.bias))
        return ((flat - h @ self.weight) ** 2).sum(1)


@net("random")
class DropoutInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.0), nn.Linear(8, 1))
        self.noisy = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.noisy.train()(torch.ones(())) * 0 + self.net(x)[:, 0]


@net("a sum over the batch")
class DataDependentBranch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.pow(2).sum((1, 2, 3)) if x.mean() > 10 else x.abs().sum((1, 2, 3))


@net()
class BranchOnAWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x: Tensor) -> Tensor:
        energy = x.pow(2).sum((1, 2, 3))
        return energy * (self.scale if self.scale > 0 else 1 - self.scale)


@net()
class Standardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.5, 0.6, 0.7]).view(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean) / self.std).relu().sum((1, 2, 3))


@net()
class BatchNormInEval(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 10, 6))
        self.net(torch.randn(16, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.logsumexp(self.net(x).flatten(1), dim=-1)


@net("statistics of the batch|over the batch|var|writes")
class BatchNormOfTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).pow(3).mean((1, 2, 3))


@net()
class GroupNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.norm(self.conv(x))).square().mean(dim=[1, 2, 3])


@net()
class InstanceNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))).sum((1, 2, 3))


@net()
class ConvNeXtNorm(nn.Module):
    """A layer norm over channels, by permutations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.gelu(h).sum((1, 2, 3))


@net()
class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Hardswish())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sum(self.net(x).flatten(start_dim=1), dim=1)


@net()
class UpAndDown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 4, 2, 1), nn.Conv2d(11, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(F.silu(self.down(x)), scale_factor=2, mode="nearest")
        return self.up(torch.cat((h, x), dim=1)).pow(2).mean((1, 2, 3))


@net()
class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 4, 2, 1), nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.up(F.silu(self.down(x))) - x).pow(2).sum((1, 2, 3))


@net()
class SplitAndStacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        return (torch.tanh(a) * b).sum((1, 2, 3)) - 0.1 * torch.max(a.flatten(1), 1)[0]


@net()
class Mixer(nn.Module):
    """Dense layers along the tokens and along the channels in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 2, 2), nn.LayerNorm(24)
        self.along_tokens, self.along_channels = nn.Linear(16, 16), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).flatten(2).transpose(1, 2)
        h = h + self.along_tokens(self.norm(h).transpose(1, 2)).transpose(1, 2)
        return (h + F.gelu(self.along_channels(self.norm(h)))).square().mean((1, 2))


@net()
class Autoencoder(nn.Module):
    """The energy is how badly a narrow net repeats x."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(96, 10), nn.SiLU())
        self.decode = nn.Sequential(
            nn.Linear(10, 96), nn.SiLU(), nn.Unflatten(1, (6, 4, 4)), nn.ConvTranspose2d(6, 3, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.decode(self.encode(x)) - x).square().sum((1, 2, 3))


@net()
class Patches(nn.Module):
    """Patches as rows of a reshaped tensor, 48 numbers each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(48, 40), nn.Linear(40, 5), nn.Linear(20, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.reshape(len(x), 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(len(x), 4, 48)
        return self.head(F.silu(self.second(F.silu(self.first(patches)))).flatten(1)).squeeze(1)


@net("transpose 1 moves the batch")
class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(x.shape[0], 32, 6)
        return self.attend(tokens, tokens, tokens, need_weights=False)[0].square().sum((1, 2))


@net("writes|index|copy|where|ge|masked|relu")
class WritesIntoAPart(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        h[:, 0] = h[:, 0] * 2
        return h.pow(2).sum((1, 2, 3))


@net("float64|_to_copy|double")
class InDoublePrecision(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double().pow(4).sum((1, 2, 3)).float()


@net("writes|counts")
class CountsItsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.pow(2).sum((1, 2, 3))


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name][0]().eval()


@pytest.mark.parametrize("name", NETS)
def test_it_is_read_right_or_refused_by_name(name: str) -> None:
    energy, x = made(name), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = NETS[name][1]
    found = plan(energy, x, "fp32", steps=MIN_STEPS)
    report = found.explain()
    if expected:
        assert report.plan == "autograd" and re.search(expected, report.why_not_faster[-1]), str(report)
    else:
        assert report.plan == "graph", str(report)
    leaf = x.double().requires_grad_()
    exact = torch.autograd.grad(made(name).double()(leaf).sum(), leaf)[0]
    if name != "InDoublePrecision":
        torch.testing.assert_close(found.gradient(x).double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    # And a chain of it, twice, with weights that change between the calls.
    for _ in range(2):
        state = x.clone()
        got = mg.langevin_sample(energy, x, steps=MIN_STEPS, drift=1e-3, noise_std=0.0)
        for _ in range(MIN_STEPS):
            leaf = state.requires_grad_()
            state = (state - 1e-3 * torch.autograd.grad(energy(leaf).sum(), leaf)[0]).detach()
        torch.testing.assert_close(got, state, rtol=1e-5, atol=1e-5)
        for parameter in energy.parameters():
            parameter.data.mul_(1.05)


@pytest.mark.parametrize("part", [nn.Upsample(scale_factor=2), nn.ReflectionPad2d(5), nn.ZeroPad2d(3),
                                  nn.Upsample(scale_factor=2, mode="bilinear")], ids=repr)  # fmt: skip
def test_a_larger_map_takes_no_more_ops_to_be_read(part: nn.Module) -> None:
    def ops(size: int) -> int:
        tapes: list[Tape] = []
        assert not isinstance(read_graph(lambda x: part(x).sum((1, 2, 3)), torch.zeros(2, 3, size, size), tapes), str)
        return len(tapes[0]._ops)

    assert ops(48) == ops(8)
