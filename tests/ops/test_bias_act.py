from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from mgebm_fast import ops

OP = "bias_act"
ACTIVATIONS = {
    "none": lambda v: v,
    "relu": functional.relu,
    "leaky_relu": lambda v: functional.leaky_relu(v, 0.2),
    "silu": functional.silu,
    "elu": functional.elu,
}
SHAPES = [(2, 8, 4, 6), (3, 5, 3, 3), (2, 7), (2, 3, 5), (1, 4, 2, 3, 5)]


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def inputs(shape, dtype=torch.float32, device="cpu", layout="nchw"):
    generator = torch.Generator().manual_seed(0)
    z, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    bias = torch.randn(shape[1], generator=generator)
    if layout == "nhwc":
        z, grad = channels_last(z), channels_last(grad)
    return z.to(device), grad.to(device), bias.to(device)


def torchs(z, grad, bias, activation):
    """(y, dE/dz) by autograd in float64 on the CPU."""
    z = z.cpu().double().requires_grad_()
    y = ACTIVATIONS[activation](z if bias is None else z + bias.cpu().double().reshape(-1, *[1] * (z.dim() - 2)))
    return y.detach(), torch.autograd.grad(y, z, grad.cpu().double())[0]


def close(got, wanted):
    tight = dict(rtol=2e-6, atol=1e-6) if got.dtype == torch.float32 else dict(rtol=8e-3, atol=1e-6)
    torch.testing.assert_close(got.cpu().double(), wanted, **tight)


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
    z, grad, bias = inputs(shape, dtype, device, layout)
    wanted_y, wanted_dz = torchs(z, grad, bias, activation)
    y, kept = ops.bias_act(z, bias, activation=activation, slope=0.2, backend=name)
    assert y.stride() == z.stride() and y.dtype == dtype
    close(y, wanted_y)
    dz = ops.bias_act_backward(grad, kept, bias, activation=activation, slope=0.2, backend=name)
    close(dz, wanted_dz)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_head_is_the_backward_of_a_constant_gradient(backend, activation):
    name, device = backend
    for layout in ("nchw", "nhwc"):
        z, grad, bias = inputs((3, 8, 2, 5), device=device, layout=layout)
        head = grad[0].contiguous()
        y, kept = ops.bias_act(z, bias, activation=activation, slope=0.2, head=head, backend=name)
        assert kept is None
        close(y, torchs(z, head.expand_as(z), bias, activation)[1])


def test_in_place_and_into_other_tensors(backend):
    name, device = backend
    z, grad, bias = inputs((2, 8, 4, 4), torch.float16, device)
    wanted_y, wanted_dz = torchs(z, grad, bias, "relu")
    wide, mask = torch.empty_like(z, dtype=torch.float32), torch.empty(32, dtype=torch.uint8, device=device)
    y, kept = ops.bias_act(z, bias, activation="relu", out=wide, mask=mask, backend=name)
    assert y is wide and kept is mask
    close(y, wanted_y)
    y, again = ops.bias_act(z, bias, activation="relu", out=z, backend=name)
    assert y is z and torch.equal(again, mask)
    assert ops.bias_act_backward(grad, mask, activation="relu", out=grad, backend=name) is grad
    close(grad, wanted_dz)


def test_bits_follow_memory(backend):
    name, device = backend
    z = torch.tensor([1.0, -1.0, 0.0, 2.0, torch.nan, 3.0, -4.0, 5.0, 6.0], device=device).reshape(1, 9)
    _, mask = ops.bias_act(z, activation="relu", backend=name)
    assert mask.tolist() == [0b10101001, 0b1]
    z = channels_last(torch.tensor([[1.0, -1.0], [1.0, 1.0]], device=device).reshape(1, 2, 1, 2))
    assert ops.bias_act(z, activation="relu", backend=name)[1].tolist() == [0b1011]


def test_empty_batch(backend):
    name, device = backend
    z, grad, bias = inputs((0, 3, 4, 4), device=device)
    y, kept = ops.bias_act(z, bias, activation="relu", backend=name)
    assert y.shape == z.shape and kept.shape == (0,)
    assert ops.bias_act_backward(grad, kept, activation="relu", backend=name).shape == z.shape


Z = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("z", "arguments", "message"),
    [
        (Z, dict(activation="leaky"), "activation must be one of .*did you mean 'leaky_relu'"),
        (Z, dict(activation="relu", slope="0.2"), "slope must be a number, got str"),
        (Z.double(), {}, "z must be float32, float16 or bfloat16, got torch.float64"),
        (Z[:, :, ::2], {}, "z must have shape .* contiguous or channels-last"),
        (torch.zeros(3), {}, r"z must have shape \(N, C, \*spatial\)"),
        (Z.clone().requires_grad_(), {}, "z must not require grad"),
        (Z, dict(bias=torch.zeros(4)), r"bias must be \(3,\) on cpu"),
        (Z, dict(bias=torch.zeros(3).half()), "bias must be a float32 tensor"),
        (Z, dict(head=torch.zeros(3)), r"head must be \(3, 4, 4\) on cpu"),
        (Z, dict(out=torch.zeros(2, 3, 4, 5)), r"out must be \(2, 3, 4, 4\)"),
        (Z, dict(out=channels_last(Z)), "out must have the layout of z"),
        (Z, dict(out=Z, activation="silu"), "out must not be z for activation 'silu'"),
        (Z, dict(mask=torch.zeros(11, dtype=torch.uint8)), r"mask must be \(12,\) uint8"),
        (Z, dict(mask=torch.zeros(12, dtype=torch.uint8), activation="none"), "mask must be None"),
        (Z, dict(backend="native"), "bias_act has no native kernel"),
    ],
)
def test_bad_arguments_are_named(z, arguments, message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        ops.bias_act(z, **{"activation": "relu", **arguments})


def test_opcheck():
    z, grad, bias = inputs((2, 3, 4, 4))
    mask = torch.zeros(12, dtype=torch.uint8)
    op, back = torch.ops.mgebm_fast.bias_act.default, torch.ops.mgebm_fast.bias_act_backward.default
    torch.library.opcheck(op, (z, bias, None, torch.empty_like(z), mask, "leaky_relu", 0.2, "reference"))
    head = torch.zeros(48)
    torch.library.opcheck(op, (z, None, head, torch.empty_like(z), None, "silu", 0.0, "reference"))
    torch.library.opcheck(back, (grad, mask, None, torch.empty_like(z), "relu", 0.0, "reference"))
