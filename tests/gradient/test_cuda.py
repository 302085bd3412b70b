"""The fused plan of GPUs over the ops' references, on a CPU; tests/kernels has it over the kernels themselves."""

import copy
import types

import pytest
import torch
from torch import nn

from mgebm_fast.errors import BackendError
from mgebm_fast.gradient.cuda import FusedPlan, why_not
from mgebm_fast.gradient.dense import split_of
from mgebm_fast.gradient.stack import read
from mgebm_fast.nets import multigrid_net
from mgebm_fast.ops import counters, dense_chain
from mgebm_fast.ops.edge_step import NO_BAD_STEP
from mgebm_fast.ops.langevin_step import langevin_step_reference
from mgebm_fast.ops.update import update

NUMBERS = update(step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0), grad_clamp=2.0)
# The roundings of 16 bits, and the signs that they turn: bounds of issue and design.
BOUNDS = {"fp16": 0.05, "bf16": 0.15}


def images(n=4, channels=3, size=8, seed=0):
    return 255 * torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def net_of(norm, activation="leaky_relu", size=8, seed=0, **more):
    return multigrid_net(size, norm=norm, activation=activation, variant="compact", width=0.5, seed=seed, **more)


def plan_of(energy, x, precision="fp16", backend="reference"):
    stack = read(energy, x)
    assert not isinstance(stack, str), stack
    return FusedPlan(stack, energy, precision, backend)


def exact(energy, x):
    """∇E by autograd in float64."""
    twin = copy.deepcopy(energy).double()
    leaf = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(twin(leaf).sum(), leaf)
    return gradient


def place(n, x, step=0, **more):
    return counters.check("test", n, x[0].numel(), x.device, seed=5, first_sample=3, step=step, stream=7, **more)


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "silu", "elu", "none"])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_the_gradient_is_autograd_s_within_16_bits(size, norm, activation, precision):
    net, x = net_of(norm, activation, size), images(size=size, n=32)
    got = plan_of(net, x, precision).gradient(x)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert error(got, exact(net, x)) < BOUNDS[precision]


def test_sequentials_and_their_odd_geometries():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(5, 7, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), nn.BatchNorm2d(7), nn.SiLU(),
        nn.Conv2d(7, 9, 3, padding=1, bias=False), nn.LeakyReLU(0.3), nn.Conv2d(9, 4, 2), nn.ELU(), nn.Flatten(),
        nn.Linear(4 * 3 * 6, 11), nn.ReLU(), nn.Linear(11, 1), nn.Flatten(0),
    )  # fmt: skip
    x = torch.randn(3, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    assert error(plan_of(net, x).gradient(x), exact(net, x)) < 0.05


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [4, 8])
def test_a_chain_is_its_steps_and_each_is_the_langevin_step_of_the_gradient(size, masked, norm):
    net, x = net_of(norm, size=size), images(size=size)
    plan = plan_of(net, x)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    whole, steps = x.clone(), x.clone()
    plan.advance_(whole, place(4, x, step=10), 4, NUMBERS, mask)
    for k in range(4):
        before = steps.clone()
        plan.advance_(steps, place(4, x, step=10 + k), 1, NUMBERS, mask)
        expected = before.clone()
        langevin_step_reference(expected, exact(net, before), mask, NUMBERS, place(4, x, step=10 + k))
        # δ²/2 = 0.045 of a gradient that is wrong by a few per cent.
        torch.testing.assert_close(steps, expected, rtol=0, atol=5e-3)
    assert torch.equal(whole, steps)
    assert int(plan.bad_step) == NO_BAD_STEP


def test_counters_may_lie_on_the_device():
    net, x = net_of("none"), images()
    plan, numbers, tensors = plan_of(net, x), x.clone(), x.clone()
    plan.advance_(numbers, place(4, x, step=6), 3, NUMBERS, None)
    where = counters.check(
        "test", 4, x[0].numel(), x.device, seed=torch.tensor(5), first_sample=torch.tensor([3, 4, 5, 6]),
        step=torch.tensor(6), stream=7,
    )  # fmt: skip
    plan.advance_(tensors, where, 3, NUMBERS, None)
    assert torch.equal(numbers, tensors)


@pytest.mark.parametrize("norm, size", [("batch", 8), ("none", 8), ("none", 4)])
def test_refresh_takes_new_weights_at_the_old_addresses(norm, size):
    net, x = net_of(norm, size=size, spectral_norm=True), images(size=size)
    plan = plan_of(net, x)

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value]
        if isinstance(value, (list, tuple)):
            return [t for part in value for t in tensors(part)]
        return [t for part in vars(value).values() for t in tensors(part)] if hasattr(value, "__dict__") else []

    def held():
        return [t.data_ptr() for name, v in vars(plan).items() if name != "_energy" for t in tensors(v)]

    addresses = held()
    assert len(addresses) > 8
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.3).add_(0.01)
    plan.refresh()
    assert held() == addresses
    fresh = plan_of(net, x)
    got, expected = x.clone(), x.clone()
    plan.advance_(got, place(4, x), 2, NUMBERS, None)
    fresh.advance_(expected, place(4, x), 2, NUMBERS, None)
    assert torch.equal(got, expected) and torch.equal(plan.gradient(x), fresh.gradient(x))


def test_refresh_refuses_what_has_become_another_energy():
    net, x = net_of("none"), images()
    plan = plan_of(net, x)
    net.activation = "silu"
    with pytest.raises(BackendError, match="layers must be those|must be one that"):
        plan.refresh()


@pytest.mark.parametrize("norm, size", [("batch", 8), ("none", 8)])
def test_an_overflow_is_noted_with_its_step(norm, size):
    net, x = net_of(norm, size=size), images(size=size)
    with torch.no_grad():
        net.layers[0].weight.mul_(1e4)
    plan = plan_of(net, x)
    plan.advance_(x.clone(), place(4, x, step=12), 3, NUMBERS, None)
    assert int(plan.bad_step) == 12
    assert not bool(torch.isfinite(plan.gradient(x)).all())


def test_no_samples_and_no_steps():
    net, x = net_of("none"), images()
    plan = plan_of(net, x)
    plan.advance_(x[:0].clone(), place(0, x), 3, NUMBERS, None)
    same = x.clone()
    plan.advance_(same, place(4, x), 0, NUMBERS, None)
    assert torch.equal(same, x)


def test_layouts_of_x_are_one_chain():
    for size in (4, 8):
        net, x = net_of("none", size=size), images(size=size)
        plan = plan_of(net, x)
        rows, last = x.clone(), x.clone(memory_format=torch.channels_last)
        plan.advance_(rows, place(4, x), 2, NUMBERS, None)
        plan.advance_(last, place(4, x), 2, NUMBERS, None)
        assert torch.equal(rows, last)


@pytest.mark.parametrize(
    "energy, shape, precision, reason",
    [
        (net_of("none"), (4, 3, 8, 8), "fp32", "it is for 16 bits"),
        (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(24, 1), nn.Flatten(0)), (4, 3, 8),
         "fp16", "x has 1 spatial dimensions"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, stride=3), nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0)), (4, 3, 8, 8),
         "fp16", "0 has stride 3, its edge kernel takes up to 2"),
        (nn.Sequential(nn.Conv2d(17, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 1), nn.Flatten(0)), (4, 17, 8, 8),
         "fp16", "17 channels, and stride² · channels is 128"),
    ],
)  # fmt: skip
def test_what_it_cannot_take_is_named(energy, shape, precision, reason):
    x = torch.zeros(shape)
    assert reason in why_not(read(energy, x), x, precision, "reference")


def test_small_nets_are_dense():
    x = images(size=4)
    assert str(plan_of(net_of("none", size=4), x).explain()).startswith("dense, fp16 (")
    assert str(plan_of(net_of("batch", size=4), x, "bf16").explain()).startswith("dense, bf16 (")
    assert str(plan_of(net_of("batch"), images()).explain()).startswith("fused, fp16 (")
    assert split_of(x, 4096) == 1


@pytest.mark.parametrize(
    "samples, widest, expected",
    [(64, 256, 4), (64, 512, 8), (64, 64, 1), (128, 4096, 16), (1056, 4096, 2), (16, 4096, 32), (5000, 4096, 1)],
)
def test_no_program_of_a_tile_is_without_columns(monkeypatch, samples, widest, expected):
    """A program beyond the widest layer's blocks of 64 columns would only wait at the barriers."""
    cards = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cards)
    x = types.SimpleNamespace(device=torch.device("cuda"), shape=(samples, 48))
    assert split_of(x, widest) == expected


def test_a_head_that_grows_is_scaled_by_its_present_size():
    """The scale lies on the device, where a captured launch reads it: a number would stay as captured."""
    net, x = net_of("none", size=4), images(size=4)
    plan, seen = plan_of(net, x), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_chain, "launch", lambda x, net, steps, scale, *rest: seen.append(scale))
        plan.advance_(x.clone(), place(4, x), 2, NUMBERS, None)
        (scale,) = seen
        largest = float(scale) * float(net.head.weight.detach().abs().max())
        with torch.no_grad():
            net.head.weight.mul_(2.0**12)
        plan.refresh()
    assert 2 <= largest < 4 and 2 <= float(scale) * float(net.head.weight.detach().abs().max()) < 4


def test_default_dtype_of_the_process_does_not_matter():
    net, x = net_of("none"), images()
    expected = x.clone()
    plan_of(net, x).advance_(expected, place(4, x), 2, NUMBERS, None)
    torch.set_default_dtype(torch.float64)
    try:
        got = x.clone()
        plan_of(net, x).advance_(got, place(4, x), 2, NUMBERS, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("size", [4, 8, 16, 64])
def test_on_a_gpu_the_kernels_are_the_references(size, norm, precision):
    net = multigrid_net(size, norm=norm).cuda()
    x = images(size=size, n=6).cuda()
    plan = plan_of(net, x, precision, "triton")
    assert error(plan.gradient(x), exact(net, x)) < BOUNDS[precision]
    fast, slow = x.clone(), x.clone()
    plan.advance_(fast, place(6, x), 3, NUMBERS, None)
    plan_of(net, x, precision, "reference").advance_(slow, place(6, x), 3, NUMBERS, None)
    assert float((fast - slow).abs().mean()) < 0.02
