"""The conv plan against float64 in each norm mode and precision, what it keeps, and how it takes new weights."""

import copy

import pytest
import torch
from helpers.cases import covering
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mgebm_fast.errors import BackendError
from mgebm_fast.gradient import conv, energy_gradient, plan
from mgebm_fast.gradient.autograd import AutogradPlan
from mgebm_fast.gradient.conv import ConvPlan
from mgebm_fast.gradient.stack import read
from mgebm_fast.nets import ConvSpec, EnergyNet, multigrid_net
from mgebm_fast.ops.conv_chain import has_bfloat

LAYERS = [ConvSpec(6, 3), ConvSpec(5, 4, 2), ConvSpec(7, 3)]
PRECISIONS = ["fp32", "bf16", "fp16"]
# Relative L2 over a batch. Pre-activations near zero get the wrong sign in 16 bits, which is most of their error.
BOUNDS = {"fp32": 1e-5, "bf16": 0.15, "fp16": 0.05}
NETS = [
    pytest.param(
        dict(activation=activation, ndim=ndim, head=head, spectral_norm=spectral), id=f"{activation}-{ndim}d-{head}"
    )
    for activation, ndim, head, spectral in [
        ("leaky_relu", 2, "linear", False),
        ("leaky_relu", 1, "sum", True),
        ("relu", 2, "sum", False),
        ("relu", 3, "linear", False),
        ("none", 2, "linear", True),
        ("silu", 2, "linear", False),
        ("elu", 1, "linear", False),
    ]
]
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def trained(module):
    """Biases and norms away from where they start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in (p for p in module.parameters() if p.dim() == 1):
            p.add_(0.4 * torch.randn(p.shape, generator=generator))
    return module


def make(norm="none", seed=0, **options):
    net = trained(EnergyNet(8, 2, LAYERS, norm="batch" if norm == "frozen" else norm, seed=seed, **options))
    if norm != "frozen":
        return net
    with net.observing():
        net(images(net, n=32))
    return net.freeze_norm()


def images(net, n=5, scale=1.0):
    return scale * torch.randn(n, net.channels, *net.size, generator=torch.Generator().manual_seed(1))


def pixels(n, channels, size, device="cpu"):
    return 255 * torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def conv_plan(energy, x, precision):
    """The plan under test, whatever `plan` would choose here."""
    stack = read(energy, x)
    assert not isinstance(stack, str), stack
    return ConvPlan(stack, energy, precision)


def exact(energy, x):
    leaf = x.double().requires_grad_()
    return torch.autograd.grad(copy.deepcopy(energy).double()(leaf).sum(), leaf)[0]


def error(energy, x, precision):
    expected = exact(energy, x)
    got = conv_plan(energy, x, precision).gradient(x)
    assert got.shape == x.shape and torch.isfinite(got).all()
    return float((got.double() - expected).norm() / expected.norm())


def maps(energy, x):
    """The output of every layer that has one a sample."""
    found = []
    energy = copy.deepcopy(energy)
    for module in energy.modules():
        module.register_forward_hook(lambda module, inputs, output: found.append(output.detach()))
    energy.to(x.dtype)(x)
    return found


def signs_agree(energy, x):
    """Whether float32 has every unit on the side of its kink where float64 has it."""
    pairs = zip(maps(energy, x), maps(energy, x.double()), strict=True)
    return all(torch.equal(low > 0, high > 0) for low, high in pairs)


def first(nets, x):
    """The first of some nets on which float32 gets all signs right, as it does on most."""
    return next(net for net in nets if net.activation not in ("leaky_relu", "relu") or signs_agree(net, x))


@pytest.mark.parametrize("norm", ["none", "batch", "frozen"])
@pytest.mark.parametrize("options", NETS)
def test_fp32_is_autograd(options, norm):
    nets = [make(norm, seed, **options) for seed in range(4)]
    x = images(nets[0])
    net = first(nets, x)
    got, expected = conv_plan(net, x, "fp32").gradient(x), AutogradPlan(net, "test").gradient(x)
    assert got.dtype == torch.float32
    if norm == "none" and options["activation"] not in ("silu", "elu"):
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert error(net, x, "fp32") < BOUNDS["fp32"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("norm", ["none", "batch", "frozen"])
@pytest.mark.parametrize("options", NETS)
def test_sixteen_bits_are_near_float64(options, norm, precision):
    net = make(norm, **options)
    assert error(net, images(net, n=32), precision) < BOUNDS[precision]


@pytest.mark.parametrize(
    ("activation", "norm", "size"), covering(["leaky_relu", "relu", "silu", "elu"], ["none", "batch"], [4, 16])
)
def test_published_nets_on_byte_scale_pixels(size, norm, activation):
    width = {4: 0.5, 16: 0.25}[size]
    nets = [multigrid_net(size, width=width, norm=norm, activation=activation, seed=seed) for seed in range(8)]
    # In a small batch float32 gets all signs right; in a large one the share of wrong ones in 16 bits is a stable one.
    few, many = pixels(4, 3, size), pixels(32, 3, size)
    assert error(first(nets, few), few, "fp32") < BOUNDS["fp32"]
    for precision in ("bf16", "fp16"):
        assert error(nets[0], many, precision) < BOUNDS[precision]


def sequential(kind):
    torch.manual_seed(11)
    layers = [nn.Conv2d(2, 6, 3, padding="same"), nn.BatchNorm2d(6), nn.LeakyReLU(0.1, inplace=True)]
    layers += [nn.Conv2d(6, 8, 4, 2, 1), nn.ReLU()]
    if kind == "map":
        return nn.Sequential(*layers, nn.Conv2d(8, 1, 4), nn.Flatten(0))
    top = nn.Sequential(nn.Linear(128, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.0), nn.Linear(16, 1))
    return nn.Sequential(*layers, nn.Flatten(), top, nn.Flatten(0))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["map", "linear"])
def test_a_sequential_and_its_running_statistics(kind, mode, precision):
    net = trained(sequential(kind))
    x = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    net(x)
    net.train(mode == "train")
    before = copy.deepcopy(net.state_dict())
    assert error(net, x, precision) < BOUNDS[precision]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("slope", [-0.5, 0.0, 1.0, 1.5])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_any_slope(slope, norm):
    x = images(make())
    net = first([make(norm, seed, negative_slope=slope) for seed in range(4)], x)
    assert torch.equal(conv_plan(net, x, "fp32").gradient(x), AutogradPlan(net, "test").gradient(x))
    for precision in PRECISIONS:
        assert error(net, x, precision) < BOUNDS[precision]


def test_the_gradient_through_statistics_is_not_that_of_fixed_ones():
    net = make("batch")
    x = images(net)
    whole, half = conv_plan(net, x, "fp32").gradient(x), conv_plan(net, x[:3], "fp32").gradient(x[:3])
    assert (whole[:3] - half).norm() > 1e-2 * half.norm()
    # A map normalised by its batch does not see one constant added to all its pixels.
    inner = EnergyNet(8, 2, [ConvSpec(6, 1)], head="sum", norm="batch")
    x = images(inner)
    gradient = conv_plan(inner, x, "fp32").gradient(x)
    assert gradient.sum((0, 2, 3)).abs().max() < 1e-4 * gradient.abs().sum()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("size", [(9, 2), (2, 9), (9, 2, 1)])
def test_maps_that_narrow_to_one_pixel(size, precision):
    net = trained(EnergyNet(size, 3, [ConvSpec(8, 3), ConvSpec(8, 3, 2), ConvSpec(8, 3, 2)], ndim=len(size)))
    x = torch.randn(16, 3, *size, generator=torch.Generator().manual_seed(1))
    assert error(net, x, precision) < BOUNDS[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stride, padding", [(1, 4), (2, 3)])
def test_dilated_maps(stride, padding, precision):
    torch.manual_seed(4)
    # Every other window of a row misses a map of height 1; at stride 2 all of them do.
    dilated = nn.Conv2d(4, 40, (3, 1), (stride, 1), (padding, 0), (2, 1))
    layers = [nn.Conv2d(3, 4, 1), nn.SiLU(), dilated, nn.SiLU(), nn.Flatten(), nn.LazyLinear(1), nn.Flatten(0)]
    net = nn.Sequential(*layers)
    x = torch.randn(7, 3, 1, 11, generator=torch.Generator().manual_seed(1))
    net(x)
    if stride == 1:
        assert error(net, x, precision) < BOUNDS[precision]
    else:
        assert conv_plan(net, x, precision).gradient(x).abs().max() == 0


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layout_does_not_matter_and_x_is_untouched(precision, norm):
    net = multigrid_net(16, width=0.25, norm=norm)
    for n in (1, 5):
        x = images(net, n)
        before = x.clone()
        chosen = conv_plan(net, x, precision)
        plain = chosen.gradient(x)
        assert torch.equal(chosen.gradient(x.to(memory_format=torch.channels_last)), plain)
        assert torch.equal(x, before)
        # The plan keeps nothing of one call that another could meet.
        assert torch.equal(chosen.gradient(x), plain)


def prepared(chosen):
    """The tensors of a plan, which a captured graph would hold."""
    found = [chosen._head, chosen._unscale]
    for layer in chosen._layers:
        found += [layer.weight, layer.low, *([] if layer.bias is None else [layer.bias])]
        found += [] if layer.norm is None else [layer.norm.weight, layer.norm.bias]
    return found


@pytest.mark.parametrize("norm", ["none", "batch", "frozen"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_refresh_takes_the_present_weights_in_place(precision, norm):
    net = make(norm, spectral_norm=True)
    x = images(net)
    chosen = conv_plan(net, x, precision)
    before, places = chosen.gradient(x), [t.data_ptr() for t in prepared(chosen)]
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            parameter.mul_(1.5).add_(0.01 * index)
    assert torch.equal(chosen.gradient(x), before)
    chosen.refresh()
    assert torch.equal(chosen.gradient(x), conv_plan(net, x, precision).gradient(x))
    assert not torch.equal(chosen.gradient(x), before)
    assert [t.data_ptr() for t in prepared(chosen)] == places


def test_refresh_follows_folded_statistics_and_refuses_another_form():
    net = trained(sequential("linear")).eval()
    x = torch.randn(4, 2, 8, 8)
    chosen = conv_plan(net, x, "fp32")
    net.train()(x)
    with pytest.raises(BackendError, match="refresh: the energy's layers must be those that the plan was made for"):
        chosen.refresh()
    net.eval()
    chosen.refresh()
    assert torch.equal(chosen.gradient(x), conv_plan(net, x, "fp32").gradient(x))
    net.double()
    with pytest.raises(BackendError, match="refresh: the energy must still be a stack of convolutions, but 0.weight"):
        chosen.refresh()


def test_it_needs_no_gradients_and_leaves_none():
    net = make("batch")
    x = images(net)
    with torch.inference_mode():
        chosen = conv_plan(net, x, "fp32")
    chosen.refresh()
    got = chosen.gradient(x)
    assert not got.requires_grad and all(p.requires_grad and p.grad is None for p in net.parameters())


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled in it, and torch would import its compiler to say so (seconds)

    def now(self):
        self.storages = {key: value for key, value in self.storages.items() if not value[0].expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                del storage
        del tensor
        self.peak = max(self.peak, self.now())
        return result


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_memory(norm):
    net = multigrid_net(16, norm=norm, width=0.25)
    net.requires_grad_(False)
    x = pixels(4, 3, 16)
    peaks = {}
    for name in ["autograd", *PRECISIONS]:
        chosen = AutogradPlan(net, "") if name == "autograd" else conv_plan(net, x, name)
        with LiveBytes() as live:
            got = chosen.gradient(x)
            once = live.peak
            for _ in range(3):
                del got
                got = chosen.gradient(x)
        assert live.peak == once
        del chosen  # autograd's plan holds one number a sample
        assert live.now() == got.untyped_storage().nbytes()
        peaks[name] = once
    assert peaks["fp32"] < 0.9 * peaks["autograd"]
    assert peaks["bf16"] < 0.6 * peaks["autograd"] and peaks["fp16"] < 0.6 * peaks["autograd"]


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_overflow_of_float16_shows(norm):
    net = make(norm)
    x = images(net)
    with torch.no_grad():
        # Backward alone: the head's scale does not reach what the layers multiply on top of it.
        net.layers[0].weight.mul_(1e6)
        net.layers[2].weight.mul_(1e-6)
    down = conv_plan(net, x, "fp16").gradient(x)
    assert not torch.isfinite(down).all()
    assert torch.isfinite(conv_plan(net, x, "fp32").gradient(x)).all()


@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "silu", "elu", "none"])
def test_overflow_on_the_way_up_shows_too(activation):
    net = make("none", activation=activation)
    with torch.no_grad():
        # The maps leave float16's range, the gradient does not: the head is small, and the bottom is not scaled.
        net.layers[0].bias.fill_(1e5)
    x = images(net)
    assert not torch.isfinite(conv_plan(net, x, "fp16").gradient(x)).all()
    assert torch.isfinite(conv_plan(net, x, "fp32").gradient(x)).all()


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_the_head_of_any_size_fits_float16(scale):
    net = make("batch")
    with torch.no_grad():
        net.head.weight.mul_(scale)
    assert error(net, images(net, n=16), "fp16") < BOUNDS["fp16"]
    with torch.no_grad():
        net.head.weight.zero_()
    x = images(net)
    assert conv_plan(net, x, "fp16").gradient(x).abs().max() == 0


def test_auto_takes_sixteen_bits_where_they_are_fast(monkeypatch):
    net = make("batch")
    x = images(net)
    for fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(conv, "bfloat16_is_fast", lambda device, fast=fast: fast and device == "cpu")
        assert conv.auto_precision("cpu") == expected and conv.auto_precision("cuda") == "fp16"
        assert plan(net, x).precision == expected and f", {expected}" in str(plan(net, x).explain())
        assert str(plan(lambda x: x.flatten(1).sum(1), x).explain()).startswith("autograd, fp32")


@pytest.mark.parametrize(
    "precision, text",
    [
        ("fp32", "conv, fp32 (the chain rule by hand), because native: no compiler"),
        (
            "fp16",
            "conv, fp16 (the chain rule by hand; first convolution, statistics and accumulation in fp32), "
            "because native: no compiler",
        ),
    ],
)
def test_explain(precision, text):
    net = make()
    assert str(ConvPlan(read(net, images(net)), net, precision, "native: no compiler").explain()) == text


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_that_cannot_run_are_refused_with_the_layer(precision):
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(144, 1), nn.Flatten(0))
    x = torch.zeros(3, 2, 8, 8)
    assert str(plan(net, x).explain()).startswith("autograd, fp32, because layer 0 (Conv2d) has groups=2, because")
    if precision == "bf16" and has_bfloat():  # as a graph
        assert plan(net, x, precision).precision == "bf16"
        return
    with pytest.raises(BackendError, match=rf"in precision '{precision}' here.*layer 0 \(Conv2d\) has groups"):
        plan(net, x, precision)


def test_wrong_shapes_are_refused():
    net = make()
    with pytest.raises(ValueError, match=r"x must have shape \(N, 2, 8, 8\), got \(5, 2, 4, 4\)"):
        energy_gradient(net, torch.zeros(5, 2, 4, 4))
    chosen = conv_plan(net, images(net), "fp32")
    with pytest.raises(ValueError, match=r"gradient: x must have shape \(N, 2, 8, 8\), got \(5, 2, 4, 4\)"):
        chosen.gradient(torch.zeros(5, 2, 4, 4))
    single = EnergyNet(1, 2, [ConvSpec(3, 1)])
    with pytest.raises(ValueError, match="need two values a channel, got 1 samples on a feature map of 1 pix"):
        conv_plan(single, torch.zeros(2, 2, 1, 1), "fp32").gradient(torch.zeros(1, 2, 1, 1))


def test_an_empty_batch():
    net = make()
    for precision in PRECISIONS:
        assert conv_plan(net, images(net), precision).gradient(images(net, 0)).shape == (0, 2, 8, 8)


@cuda
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_cuda_against_float64_with_tf32_switched_on(precision, norm):
    net = multigrid_net(16, width=0.25, norm=norm, activation="silu", seed=3)
    x = pixels(8, 3, 16)
    expected = exact(net, x)
    net, x = net.cuda(), x.cuda()
    got = conv_plan(net, x, precision).gradient(x)
    assert got.is_contiguous() and torch.backends.cudnn.allow_tf32
    assert (got.cpu().double() - expected).norm() < BOUNDS[precision] * expected.norm()


@cuda
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_replays_the_plan_after_new_weights_too(precision, norm):
    net = multigrid_net(16, width=0.25, norm=norm).cuda()
    x = pixels(8, 3, 16, "cuda")
    chosen = conv_plan(net, x, precision)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            chosen.gradient(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = chosen.gradient(x)
    for factor in (1.0, 0.5):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(factor)
        chosen.refresh()
        graph.replay()
        assert torch.equal(held, chosen.gradient(x))
