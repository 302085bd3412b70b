"""What is read as a stack of convolutions gives the same energies; what is not says which layer stands in the way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from mgebm_fast.gradient.stack import Stack, read
from mgebm_fast.nets import ConvSpec, EnergyNet, multigrid_net

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ACTIVATE = {
    "none": lambda y, slope: y,
    "relu": lambda y, slope: y.clamp_min(0),
    "leaky_relu": lambda y, slope: torch.where(y > 0, y, slope * y),
    "silu": lambda y, slope: y / (1 + torch.exp(-y)),
    "elu": lambda y, slope: torch.where(y > 0, y, torch.expm1(y)),
}
SLOPES = {"none": 1.0, "relu": 0.0, "silu": 1.0, "elu": 1.0}


def value(stack, x):
    """Σ head · top in float64, by the letter of the description: the energy up to a constant."""
    h = x.double()
    for stage in stack.stages:
        assert tuple(h.shape[2:]) == stage.in_size
        bias = None if stage.bias is None else stage.bias.double()
        h = CONVOLVE[stack.ndim](h, stage.weight.double(), bias, stage.stride, stage.padding, stage.dilation)
        assert tuple(h.shape[2:]) == stage.out_size
        if stage.norm is not None:
            channel = (1, -1, *[1] * stack.ndim)
            variance, mean = torch.var_mean(h, [0, *range(2, h.dim())], correction=0, keepdim=True)
            h = (h - mean) / torch.sqrt(variance + stage.norm.eps)
            h = h * stage.norm.weight.double().view(channel) + stage.norm.bias.double().view(channel)
        assert stage.slope == SLOPES.get(stage.activation, stage.slope)
        h = ACTIVATE[stage.activation](h, stage.slope)
    assert stack.head.shape == h.shape[1:] and stack.head.dtype == torch.float32
    return (h * stack.head.double()).flatten(1).sum(1)


def check(energy, x):
    """The stack of an energy, after a look that it gives its energies up to one constant."""
    stack = read(energy, x)
    assert isinstance(stack, Stack), stack
    with torch.no_grad():
        expected = copy.deepcopy(energy).double()(x.double())
    difference = value(stack, x) - expected
    spread = expected.std() + expected.abs().max()
    assert expected.shape == (len(x),) and expected.std() > 0
    assert (difference - difference[0]).abs().max() < 1e-5 * spread
    return stack


def images(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def shaken(module, *tensors):
    """Biases and norms as training leaves them; with them what else is given."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in [*(p for p in module.parameters() if p.dim() == 1), *tensors]:
            tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return module


@pytest.mark.parametrize("norm", ["none", "batch", "frozen"])
@pytest.mark.parametrize(
    "ndim, head, activation, spectral",
    [
        (1, "linear", "elu", True),
        (2, "sum", "leaky_relu", False),
        (2, "linear", "relu", True),
        (3, "linear", "silu", False),
    ],
)
def test_an_energy_net(norm, ndim, head, activation, spectral):
    layers = [ConvSpec(6, 3), ConvSpec(5, 4, 2), ConvSpec(7, 3)]
    net = EnergyNet(
        7, 2, layers, norm="batch" if norm == "frozen" else norm, ndim=ndim, head=head, activation=activation,
        spectral_norm=spectral,
    )  # fmt: skip
    x = images(4, 2, *[7] * ndim)
    shaken(net)
    if norm == "frozen":
        with net.observing():
            net(x)
        net = net.freeze_norm()
    stack = check(net, x)
    assert (stack.ndim, stack.channels, stack.size) == (ndim, 2, (7,) * ndim)
    assert all((stage.norm is not None) == (norm == "batch") for stage in stack.stages)
    assert [stage.name for stage in stack.stages] == ["layers.0", "layers.1", "layers.2"]


def sequential(kind):
    """(a Sequential, the shape of one of its samples, the number of its stages) of each kind that can be read."""
    torch.manual_seed(3)
    if kind == "linear":
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 1), nn.Flatten(0)]
        return nn.Sequential(*layers), (3, 6, 6), 1
    if kind == "one map":
        layers = [nn.Conv2d(3, 8, 4, 2, 1, bias=False), nn.LeakyReLU(0.1, inplace=True), nn.Conv2d(8, 1, 3)]
        return nn.Sequential(*layers, nn.Flatten(0)), (3, 6, 6), 1
    if kind == "activated energy":
        return nn.Sequential(nn.Conv1d(2, 4, 3), nn.SiLU(), nn.Conv1d(4, 1, 4), nn.ELU(), nn.Flatten(0)), (2, 6), 2
    if kind == "nested":
        act = nn.LeakyReLU(0.3)  # one module in two places
        block = nn.Sequential(nn.Conv2d(5, 6, 3, dilation=2, padding="same"), nn.Identity(), act)
        top = nn.Sequential(nn.Flatten(), nn.Linear(6 * 12, 9), nn.Dropout(0.0), nn.SiLU(), nn.Linear(9, 1))
        return nn.Sequential(nn.Conv2d(2, 5, (3, 2), (2, 1), (1, 0)), act, block, top, nn.Flatten(0)), (2, 6, 5), 3
    if kind == "norms":
        layers = [nn.Conv2d(2, 5, 3, padding="valid"), nn.BatchNorm2d(5, eps=1e-2), nn.ReLU()]
        top = [nn.Flatten(), nn.Linear(5 * 9, 8), nn.BatchNorm1d(8, affine=False), nn.SiLU(), nn.Linear(8, 1)]
        return nn.Sequential(*layers, *top, nn.Flatten(0)), (2, 5, 5), 2
    if kind == "3d":
        layers = [nn.Conv3d(1, 4, (1, 3, 3), 2, (0, 1, 1)), nn.BatchNorm3d(4), nn.ELU(), nn.Conv3d(4, 3, 1)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 2 * 9, 1), nn.Flatten(0)), (1, 4, 5, 6), 2
    if kind == "no head left":
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 1), nn.Flatten(0)), (3, 2, 2), 1
    layers = [spectral_norm(nn.Conv2d(2, 4, 3)), nn.ReLU(), nn.Flatten(), weight_norm(nn.Linear(4 * 9, 1))]
    return nn.Sequential(*layers, nn.Flatten(0)).eval(), (2, 5, 5), 1


KINDS = ["linear", "one map", "activated energy", "nested", "norms", "3d", "no head left", "parametrised"]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequential(kind, mode):
    net, shape, stages = sequential(kind)
    if kind != "parametrised":
        shaken(net, *(b for b in net.buffers() if b.dim())).train(mode == "train")
    before = copy.deepcopy(net.state_dict())
    x = images(5, *shape)
    if mode == "eval" and kind == "3d":
        net[1].track_running_stats, net[1].running_mean, net[1].running_var = False, None, None
    stack = read(net, x)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])  # reading changes nothing
    coupled = kind in ("norms", "3d") and (mode == "train" or kind == "3d")
    assert any(stage.norm is not None for stage in check(net, x).stages) == coupled
    assert len(stack.stages) == stages
    if kind == "nested":
        assert [stage.name for stage in stack.stages] == ["0", "2.0", "3.1"]


def test_a_bias_before_batch_statistics_is_left_out_and_running_statistics_are_folded_in():
    net, shape, _ = sequential("norms")
    x = images(5, *shape)
    for stage in read(net, x).stages:
        assert stage.bias is None and stage.norm is not None
    for stage in read(net.eval(), x).stages:
        assert stage.bias is not None and stage.norm is None


class Doubled(EnergyNet):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Conv2d):
    pass


def hooked(module):
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return module


def own_forward():
    net = multigrid_net(4, norm="none", width=0.1)
    net.layers[1].forward = lambda x: x
    return net


def foreign_layer():
    net = multigrid_net(4, norm="none", width=0.1)
    net.layers[1] = nn.Identity()
    return net


def chain(*layers):
    return nn.Sequential(*layers)


def ended(*layers):
    """An energy net of 3×4×4 pixels around layers that keep the map of 6×4×4."""
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *layers, nn.Flatten(), nn.Linear(96, 1), nn.Flatten(0))


REFUSED = {
    "Doubled is not an EnergyNet or nn.Sequential": lambda: Doubled(4, 3, [ConvSpec(6, 3)], norm="none"),
    "function is not an EnergyNet": lambda: lambda x: x.sum((1, 2, 3)),
    "layer layers.0 (ConvLayer) has hooks": lambda: (n := multigrid_net(4, width=0.1), hooked(n.layers[0]))[0],
    "the net has hooks": lambda: hooked(multigrid_net(4, width=0.1)),
    "layer layers.1 (ConvLayer) has a forward of its own": own_forward,
    "layer layers.1 (Identity) is not one of EnergyNet's own": foreign_layer,
    "layers.0.weight is torch.float64 on cpu": lambda: multigrid_net(4, norm="none", width=0.1).double(),
    "x must have shape (N, 3, 8, 8), got (5, 3, 4, 4)": lambda: multigrid_net(8, norm="none", width=0.1),
    "layer 1 (Conv2d) has groups=2": lambda: ended(nn.Conv2d(6, 6, 3, padding=1, groups=2)),
    "layer 1 (Conv2d) has padding_mode='reflect'": lambda: ended(nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")),
    "layer 1 (Conv2d) has padding='same' and an even kernel": lambda: ended(nn.Conv2d(6, 6, 2, padding="same")),
    "layer 1 (Conv2d) takes 7 channels, got a feature map of 6": lambda: ended(nn.Conv2d(7, 6, 1)),
    "layer 1 (Conv2d) has a kernel larger than its feature map": lambda: ended(nn.Conv2d(6, 6, 5)),
    "layer 1 (Conv1d) takes 1 spatial dimensions, got 2": lambda: ended(nn.Conv1d(6, 6, 1)),
    "layer 1 (Scaled) is of no kind": lambda: ended(Scaled(6, 6, 1)),
    "layer 1 (AvgPool2d) is of no kind": lambda: ended(nn.AvgPool2d(1)),
    "layer 1.0 (Tanh) is of no kind": lambda: ended(chain(nn.Tanh())),
    "layer 1 (ELU) has alpha=2.0": lambda: ended(nn.ELU(2.0)),
    "layer 2 (ReLU) comes right after no convolution": lambda: ended(nn.SiLU(), nn.ReLU()),
    "layer 0 (ReLU) comes right after no convolution": lambda: chain(nn.ReLU(), ended()),
    "layer 2 (BatchNorm2d) comes right after no convolution": lambda: ended(nn.ReLU(), nn.BatchNorm2d(6)),
    "layer 2 (BatchNorm2d) follows another batch norm": lambda: ended(nn.BatchNorm2d(6), nn.BatchNorm2d(6)),
    "layer 1 (BatchNorm2d) does not fit a feature map of shape (6, 4, 4)": lambda: ended(nn.BatchNorm2d(5)),
    "layer 2 (BatchNorm1d) normalises every pixel": lambda: ended(nn.Flatten(), nn.BatchNorm1d(96)),
    "layer 1 (Dropout2d) is random in train mode": lambda: ended(nn.Dropout2d(0.1)),
    "layer 1 (Conv2d) has parametrisations and is in train mode": lambda: ended(spectral_norm(nn.Conv2d(6, 6, 1))),
    "layer 1 (Flatten) gives neither": lambda: ended(nn.Flatten(2)),
    "layer 1 (Linear) comes without a Flatten before it": lambda: ended(nn.Linear(4, 4)),
    "layer 2 (Linear) takes 95 features, got 96": lambda: ended(nn.Flatten(), nn.Linear(95, 4)),
    "layer 1 (Flatten) gives neither (N, features) nor one energy": lambda: chain(nn.Conv2d(3, 1, 3), nn.Flatten(0)),
    "it returns feature maps of shape (1, 1, 1)": lambda: chain(nn.Conv2d(3, 1, 4), nn.Flatten()),
    "layer 2 (ReLU) comes after the Flatten that gives": lambda: chain(nn.Conv2d(3, 1, 4), nn.Flatten(0), nn.ReLU()),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_read_names_the_layer(reason):
    got = read(REFUSED[reason](), images(5, 3, 4, 4))
    assert isinstance(got, str) and reason in got


@pytest.mark.parametrize(
    "x, reason",
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.float16), "x is torch.float16"),
        (torch.zeros(2, 48), "x must have 1, 2 or 3 spatial dimensions, got shape (2, 48)"),
        (torch.zeros(2, 3, 4, 4, device="meta"), "is torch.float32 on cpu"),
        (torch.zeros(3, 4, 4), "layer 0 (Conv2d) takes 2 spatial dimensions, got 1"),
    ],
)
def test_what_x_must_be(x, reason):
    assert reason in read(ended(nn.ReLU()), x)


def test_a_net_that_observes_cannot_be_read():
    net = multigrid_net(4, width=0.1, spectral_norm=True)
    with net.observing():
        assert read(net, images(2, 3, 4, 4)) == "the net is observing data"
    assert isinstance(read(net, images(2, 3, 4, 4)), Stack)


@pytest.mark.parametrize("net", [EnergyNet(1, 2, [ConvSpec(3, 1)]), chain(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))])
def test_statistics_of_one_value_cannot_be_read(net):
    assert "has batch statistics, and one value a channel" in read(net, torch.zeros(1, 2, 1, 1))
