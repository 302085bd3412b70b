"""batch_norm_act's kernels against torch's batch norm in float64, interpreted or on a GPU; and their code."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import each
from helpers.compiling import accesses, build, check_unspilled, record, specialisation
from torch.nn import functional

ACTIVATIONS = {
    "none": lambda v: v,
    "relu": functional.relu,
    "leaky_relu": lambda v: functional.leaky_relu(v, 0.2),
    "silu": functional.silu,
    "elu": functional.elu,
}
SHAPES = [(2, 8, 3, 5), (3, 5, 4, 4), (2, 40, 4, 6), (1, 3, 1, 7), (6, 16), (4, 3, 5), (2, 3, 2, 3, 8)]


def laid_out(tensor, layout):
    return tensor if layout == "nchw" or tensor.dim() == 2 else tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def case(shape, layout, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator)
    z = z * torch.linspace(0.5, 3, shape[1]).reshape(-1, *[1] * (len(shape) - 2)) + 2
    z, grad = (laid_out(t.to(dtype), layout).to(device) for t in (z, grad))
    return z, grad, weight.to(device), bias.to(device)


def expected(z, grad, weight, bias, activation):
    """(y, dz) in float64 on the CPU."""
    z = z.cpu().double().requires_grad_()
    y = functional.batch_norm(z, None, None, weight.cpu().double(), bias.cpu().double(), True, 0.0, 1e-5)
    y = ACTIVATIONS[activation](y)
    (dz,) = torch.autograd.grad(y, z, grad.cpu().double().expand_as(z))
    return y.detach(), dz


def there_and_back(kernels, z, grad, weight, bias, activation, head=None):
    module, device = kernels.batch_norm_act, z.device
    tickets = torch.zeros(z.shape[1], dtype=torch.int32, device=device)
    statistics = torch.full((2, z.shape[1]), torch.nan, device=device)
    y = None if head is not None else torch.full_like(z, torch.nan)
    module.batch_norm_act(z, weight, bias, y, statistics, tickets, activation=activation, slope=0.2)
    # In place on the gradient, where there is one.
    dz = torch.full_like(z, torch.nan) if head is not None else grad.clone()
    upstream = None if head is not None else dz
    module.batch_norm_act_backward(
        upstream, z, statistics, weight, bias, head, dz, tickets, activation=activation, slope=0.2
    )
    assert not tickets.any()
    return y, dz, statistics


def close(got, wanted, dtype):
    tight = dict(rtol=2e-5, atol=2e-5) if dtype == torch.float32 else dict(rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(got.cpu().double(), wanted, **tight)


@pytest.mark.parametrize(("shape", "layout", "dtype"), each(SHAPES, ["nchw", "nhwc"], [torch.float32, torch.float16]))
def test_there_and_back(kernels, device, shape, layout, dtype, monkeypatch):
    if (dtype == torch.float16) == (layout == "nchw"):  # by two launches; else by one
        monkeypatch.setattr(kernels.batch_norm_act, "SINGLE_ROWS", 0)
    z, grad, weight, bias = case(shape, layout, dtype, device)
    y, dz, statistics = there_and_back(kernels, z, grad, weight, bias, "leaky_relu")
    wanted_y, wanted_dz = expected(z, grad, weight, bias, "leaky_relu")
    close(y, wanted_y, dtype)
    close(dz, wanted_dz, dtype)
    over = [0, *range(2, z.dim())]
    variance, mean = torch.var_mean(z.cpu().double(), over, correction=0)
    torch.testing.assert_close(statistics[0].cpu().double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(statistics[1].cpu().double(), (variance + 1e-5).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(kernels, device, activation):
    z, grad, weight, bias = case((3, 8, 4, 4), "nhwc", torch.float32, device)
    y, dz, _ = there_and_back(kernels, z, grad, weight, bias, activation)
    wanted_y, wanted_dz = expected(z, grad, weight, bias, activation)
    close(y, wanted_y, torch.float32)
    close(dz, wanted_dz, torch.float32)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_head_stands_for_the_gradient_of_every_sample(kernels, device, layout):
    z, grad, weight, bias = case((3, 8, 4, 6), layout, torch.float32, device)
    head = grad[0]
    flat = (head if layout == "nchw" else head.movedim(0, -1)).contiguous().reshape(-1)
    _, dz, _ = there_and_back(kernels, z, grad, weight, bias, "relu", head=flat)
    close(dz, expected(z, head, weight, bias, "relu")[1], torch.float32)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_many_runs_and_many_tiles(kernels, device, layout, single, monkeypatch):
    """Several programs a channel block or one, runs of several tiles, and a last tile that is not full."""
    monkeypatch.setattr(kernels.batch_norm_act, "SINGLE_ROWS", 270 if single else 269)
    monkeypatch.setattr(kernels.batch_norm_act, "REDUCING_TILE", 64)
    monkeypatch.setattr(kernels.batch_norm_act, "APPLYING_TILE", 64)
    monkeypatch.setattr(kernels.batch_norm_act, "MAX_SPLITS", 8)
    z, grad, weight, bias = case((5, 3, 6, 9), layout, torch.float32, device)
    y, dz, _ = there_and_back(kernels, z, grad, weight, bias, "leaky_relu")
    wanted_y, wanted_dz = expected(z, grad, weight, bias, "leaky_relu")
    close(y, wanted_y, torch.float32)
    close(dz, wanted_dz, torch.float32)


def test_a_large_mean_costs_no_digits(kernels, device):
    """A difference of sums of squares would leave nothing of this variance in float32."""
    z, _, weight, bias = case((4, 8, 8, 8), "nhwc", torch.float32, device)
    z += 3000
    statistics = torch.empty(2, 8, device=device)
    tickets = torch.zeros(8, dtype=torch.int32, device=device)
    kernels.batch_norm_act.batch_norm_act(z, weight, bias, None, statistics, tickets, activation="none")
    variance = torch.var(z.cpu().double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(statistics[1].cpu().double(), (variance + 1e-5).rsqrt(), rtol=1e-5, atol=0)


KERNELS = ["batch_norm_act_kernel", "batch_norm_act_apply_kernel", "batch_norm_act_sums_kernel",
           "batch_norm_act_backward_kernel"]  # fmt: skip


def launches(compiled, shape, layout, dtype, kernel, head=False):
    z = laid_out(torch.zeros(shape, dtype=dtype), layout)
    vector, tickets = torch.zeros(shape[1]), torch.zeros(shape[1], dtype=torch.int32)
    statistics, arguments = torch.zeros(2, shape[1]), dict(activation="leaky_relu", slope=0.2, kernel=kernel)
    module = compiled.batch_norm_act
    if kernel in KERNELS[:2]:
        return record(module, "batch_norm_act", z, vector, vector, z, statistics, tickets, **arguments)
    top = torch.zeros(z[0].numel()) if head else None
    grad = None if head else z
    back = (grad, z, statistics, vector, vector, top, z, tickets)
    return record(module, "batch_norm_act_backward", *back, **arguments)


# Each kernel as published nets use it, in channels-last float16; the other types and layouts take turns.
OTHERS = [("nhwc", torch.bfloat16), ("nhwc", torch.float32), ("nchw", torch.float16), ("nhwc", torch.float32)]


@pytest.mark.parametrize(
    ("kernel", "layout", "dtype"),
    [(kernel, "nhwc", torch.float16) for kernel in KERNELS]
    + [(kernel, *other) for kernel, other in zip(KERNELS, OTHERS, strict=True)],
)
def test_whole_vectors_and_no_spills(compiled, kernel, layout, dtype):
    built = build(launches(compiled, (8, 64, 16, 16), layout, dtype, kernel), 90)
    check_unspilled(built)
    assert built.registers <= 128
    found = accesses(built.ptx)
    # What is read or written a channel may be narrow; a map never is.
    narrow = {"ld.global.b16", "st.global.b16"} | ({"ld.global.b32"} if kernel == KERNELS[0] else set())
    assert found["ld.global.v4.b32"] >= 1 and not narrow & set(found)
    assert "st.global.v4.b32" in found or kernel in (KERNELS[0], KERNELS[2])


@pytest.mark.parametrize("kernel", KERNELS[::2])
def test_few_rows_take_one_launch(compiled, kernel):
    """Statistics, or sums, and what is made of them: no other kernel, whole vectors, no spills."""
    launched = launches(compiled, (128, 64, 2, 2), "nhwc", torch.float16, kernel)
    assert launched.arguments["APPLY"] is True
    built = build(launched, 90)
    check_unspilled(built)
    found = accesses(built.ptx)
    assert {"ld.global.v4.b32", "st.global.v4.b32"} <= set(found) and "st.global.b16" not in found


@pytest.mark.parametrize("kernel", KERNELS[2:])
def test_the_last_layers_way_back(compiled, kernel):
    built = build(launches(compiled, (8, 64, 16, 16), "nhwc", torch.float16, kernel, head=True), 90)
    check_unspilled(built)
    assert not {"ld.global.b16", "st.global.b16"} & set(accesses(built.ptx))


@pytest.mark.parametrize("kernel", KERNELS)
def test_batches_share_one_kernel(compiled, kernel):
    first, other = (specialisation(launches(compiled, (n, 64, 8, 8), "nhwc", torch.float16, kernel)) for n in (17, 48))
    assert first == other
