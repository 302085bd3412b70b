from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from mgebm_fast import ops
from mgebm_fast.ops.batch_norm_act import workspace

OP = "batch_norm_act"
ACTIVATIONS = {
    "none": lambda v: v,
    "relu": functional.relu,
    "leaky_relu": lambda v: functional.leaky_relu(v, 0.2),
    "silu": functional.silu,
    "elu": functional.elu,
}


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def inputs(shape=(4, 6, 3, 5), dtype=torch.float32, device="cpu", layout="nchw"):
    generator = torch.Generator().manual_seed(0)
    z, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    z, grad = (3 * z + 1).to(dtype), grad.to(dtype)
    if layout == "nhwc":
        z, grad = channels_last(z), channels_last(grad)
    weight, bias = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator)
    return z.to(device), grad.to(device), weight.to(device), bias.to(device)


def torchs(z, grad, weight, bias, activation):
    """(y, dE/dz) by autograd in float64 on the CPU."""
    z = z.cpu().double().requires_grad_()
    v = functional.batch_norm(z, None, None, weight.cpu().double(), bias.cpu().double(), True, 0.0, 1e-5)
    y = ACTIVATIONS[activation](v)
    return y.detach(), torch.autograd.grad(y, z, grad.cpu().double().expand_as(z))[0]


def close(got, wanted):
    tight = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[got.dtype]
    torch.testing.assert_close(got.cpu().double(), wanted, rtol=tight, atol=tight)


SHAPES = [(4, 6, 3, 5), (2, 8, 4, 4), (5, 3, 7), (9, 4)]


# Every activation in every dtype; shapes and layouts take turns, so that each meets every dtype.
CASES = [
    (SHAPES[i % len(SHAPES)], ("nchw", "nhwc")[i // 2 % 2], dtype, activation)
    for i, (activation, dtype) in enumerate(
        itertools.product(ACTIVATIONS, [torch.float32, torch.float16, torch.bfloat16])
    )
]


@pytest.mark.parametrize(("shape", "layout", "dtype", "activation"), CASES)
def test_matches_autograd_in_float64(backend, shape, layout, dtype, activation):
    name, device = backend
    z, grad, weight, bias = inputs(shape, dtype, device, layout)
    arguments = dict(activation=activation, slope=0.2, backend=name)
    y, statistics = ops.batch_norm_act(z, weight, bias, **arguments)
    assert y.stride() == z.stride() and statistics.shape == (2, shape[1])
    dz = ops.batch_norm_act_backward(grad, z, statistics, weight, bias, **arguments)
    wanted_y, wanted_dz = torchs(z, grad, weight, bias, activation)
    close(y, wanted_y)
    close(dz, wanted_dz)


def test_the_last_layer_needs_statistics_and_a_head(backend):
    name, device = backend
    arguments = dict(activation="leaky_relu", slope=0.2, backend=name)
    for layout in ("nchw", "nhwc"):
        z, grad, weight, bias = inputs(device=device, layout=layout)
        nothing, statistics = ops.batch_norm_act(z, weight, bias, apply=False, **arguments)
        assert nothing is None
        head = grad[0].contiguous()
        dz = ops.batch_norm_act_backward(None, z, statistics, weight, bias, head=head, **arguments)
        close(dz, torchs(z, head, weight, bias, "leaky_relu")[1])


def test_given_tensors_are_used_and_repeats_are_equal(backend):
    name, device = backend
    z, grad, weight, bias = inputs(device=device)
    out, statistics, shared = torch.empty_like(z), torch.empty(2, 6, device=device), workspace(6, device)
    arguments = dict(activation="relu", workspace=shared, backend=name)
    first = ops.batch_norm_act(z, weight, bias, **arguments)
    got = ops.batch_norm_act(z, weight, bias, out=out, statistics=statistics, **arguments)
    assert got[0] is out and got[1] is statistics and not shared.any()
    assert torch.equal(first[0], out) and torch.equal(first[1], statistics)
    back = (z, statistics, weight, bias)
    dz = ops.batch_norm_act_backward(grad, *back, **arguments)
    assert ops.batch_norm_act_backward(grad, *back, out=grad, **arguments) is grad and not shared.any()
    assert torch.equal(dz, grad)


def test_a_constant_channel_has_no_gradient(backend):
    name, device = backend
    z, grad, weight, bias = inputs(device=device)
    z[:, 1] = 7.0
    y, statistics = ops.batch_norm_act(z, weight, bias, activation="none", backend=name)
    assert (y[:, 1] == bias[1]).all() and statistics[1, 1].item() == pytest.approx(1e-5**-0.5)
    dz = ops.batch_norm_act_backward(grad, z, statistics, weight, bias, activation="none", backend=name)
    assert abs(dz[:, 1].sum().item()) < 1e-3 * dz[:, 1].abs().sum().item()


Z, V = torch.zeros(2, 3, 4, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(activation="gelu"), "activation must be one of"),
        (dict(z=Z.double()), "z must be float32, float16 or bfloat16"),
        (dict(z=Z[:0]), r"z must hold at least one value a channel, got shape \(0, 3, 4, 4\)"),
        (dict(weight=torch.ones(4)), r"weight must be \(3,\) on cpu"),
        (dict(bias=None), "bias must be a float32 tensor, got None"),
        (dict(eps=0.0), "eps must be > 0, got 0.0"),
        (dict(out=Z), "out must not be z"),
        (dict(out=torch.empty(1), apply=False), "out must be None without apply"),
        (dict(statistics=torch.empty(3, 2)), r"statistics must be \(2, 3\) float32"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    given = {"z": Z, "weight": V, "bias": V, "activation": "relu", **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        ops.batch_norm_act(**given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(grad=None), "give grad or head, got neither"),
        (dict(head=torch.zeros(3, 4, 4)), "give grad or head, got both"),
        (dict(grad=channels_last(torch.zeros(2, 3, 4, 4))), "grad must have the layout of z"),
        (dict(out=Z), "out must not be z"),
    ],
)
def test_bad_arguments_of_the_way_back_are_named(arguments, message):
    given = {"grad": torch.ones_like(Z), "z": Z, "statistics": torch.ones(2, 3), "weight": V, "bias": V, **arguments}
    with pytest.raises(ValueError, match=message):
        ops.batch_norm_act_backward(activation="relu", **given)


def test_opcheck():
    z, grad, weight, bias = inputs()
    statistics = torch.stack((torch.zeros(6), torch.ones(6)))
    op, back = torch.ops.mgebm_fast.batch_norm_act.default, torch.ops.mgebm_fast.batch_norm_act_backward.default
    out = torch.empty_like(z)
    torch.library.opcheck(op, (z, weight, bias, out, torch.empty(2, 6), None, "relu", 0.0, 1e-5, "reference"))
    torch.library.opcheck(op, (z, weight, bias, None, torch.empty(2, 6), None, "relu", 0.0, 1e-5, "reference"))
    arguments = (statistics, weight, bias, None, torch.empty_like(z), None, "silu", 0.0, "reference")
    torch.library.opcheck(back, (grad, z, *arguments))
