"""bias_act's kernels against numpy in float64, interpreted or on a GPU; and what the compiler makes of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.cases import covering
from helpers.compiling import accesses, build, check_clean, check_unspilled, record, specialisation

ACTIVATIONS = ["none", "relu", "leaky_relu", "silu", "elu"]
SLOPE = 0.2
# C and S that eights divide, and that they do not; a last byte that is not full; several programs.
SHAPES = [(2, 8, 3, 5), (2, 5, 4, 4), (3, 3, 5, 7), (1, 1, 1, 1), (2, 16), (3, 24, 8, 9), (2, 3, 5), (1, 2, 2, 3, 8)]


def value(v, activation):
    if activation == "relu":
        return np.maximum(v, 0)
    if activation == "leaky_relu":
        return np.where(v > 0, v, SLOPE * v)
    if activation == "silu":
        return v / (1 + np.exp(-v))
    return np.where(v > 0, v, np.expm1(np.minimum(v, 0))) if activation == "elu" else v


def slope(v, activation):
    if activation in ("relu", "leaky_relu"):
        return np.where(v > 0, 1.0, SLOPE if activation == "leaky_relu" else 0.0)
    if activation == "silu":
        s = 1 / (1 + np.exp(-v))
        return s * (1 + v * (1 - s))
    return np.where(v > 0, 1.0, np.exp(np.minimum(v, 0))) if activation == "elu" else np.ones_like(v)


def laid_out(array, layout, device, dtype):
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=dtype)
    return tensor if layout == "nchw" else tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def flat(tensor):
    """numpy, in the order of memory."""
    tensor = tensor if tensor.is_contiguous() else tensor.movedim(1, -1)
    return tensor.reshape(-1).cpu()


# Every activation in every type and layout; shapes take turns.
CASES = [
    (SHAPES[i % len(SHAPES)], *case)
    for i, case in enumerate(itertools.product(["nchw", "nhwc"], [torch.float32, torch.float16], ACTIVATIONS))
]


@pytest.mark.parametrize(("shape", "layout", "dtype", "activation"), CASES)
def test_there_and_back(kernels, device, shape, layout, dtype, activation):
    rng = np.random.default_rng(sum(shape))
    z = laid_out(2 * rng.normal(size=shape), layout, device, dtype)
    grad = laid_out(rng.normal(size=shape), layout, device, dtype)
    bias = torch.tensor(rng.normal(size=shape[1]), dtype=torch.float32, device=device)
    v = z.cpu().double().numpy() + bias.cpu().double().numpy().reshape(-1, *[1] * (len(shape) - 2))
    masked = activation in ("relu", "leaky_relu")
    smooth = activation in ("silu", "elu")
    count = z.numel()
    mask = torch.full((-(-count // 8),), 0xAA, dtype=torch.uint8, device=device) if masked else None
    out = torch.full_like(z, torch.nan) if smooth else z.clone()
    before = z.clone()
    source = z if smooth else out  # in place where the way back does not read z
    kernels.bias_act.bias_act(source, bias, None, out, mask, activation=activation, slope=SLOPE)
    tight = dict(rtol=2e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(out.double().cpu().numpy(), value(v, activation), **tight)
    if masked:
        bits = np.unpackbits(mask.cpu().numpy(), bitorder="little")
        expected = (v > 0 if layout == "nchw" else np.moveaxis(v > 0, 1, -1)).reshape(-1)
        np.testing.assert_array_equal(bits[:count].astype(bool), expected)
        assert not bits[count:].any()
    kept = mask if masked else before
    expected = grad.double().cpu().numpy() * slope(v, activation)
    kernels.bias_act.bias_act_backward(grad, kept, bias if smooth else None, grad, activation=activation, slope=SLOPE)
    np.testing.assert_allclose(grad.double().cpu().numpy(), expected, **tight)


@pytest.mark.parametrize(("shape", "layout", "activation"), [(s, layout, a) for s, layout, _, a in CASES[::2]])
def test_a_head_gives_the_first_operand_of_the_way_back(kernels, device, shape, layout, activation):
    rng = np.random.default_rng(sum(shape) + 1)
    z = laid_out(2 * rng.normal(size=shape), layout, device, torch.float16)
    head = rng.normal(size=shape[1:])
    placed = flat(laid_out(head[None], layout, device, torch.float32)).to(device)
    out = torch.full_like(z, torch.nan, dtype=torch.float32)
    kernels.bias_act.bias_act(z, None, placed, out, None, activation=activation, slope=SLOPE)
    expected = head * slope(z.double().cpu().numpy(), activation)
    np.testing.assert_allclose(out.double().cpu().numpy(), expected, rtol=2e-6, atol=1e-6)


def test_relu_of_what_is_not_finite(kernels, device):
    """As torch has it: NaN passes forward, and nothing passes back below 0, not even of an infinite gradient."""
    z = torch.tensor([[torch.nan, -torch.inf, torch.inf, -1.0]], device=device)
    out, mask = torch.empty_like(z), torch.empty(1, dtype=torch.uint8, device=device)
    kernels.bias_act.bias_act(z, None, None, out, mask, activation="relu")
    np.testing.assert_array_equal(out.cpu().numpy(), np.float32([[np.nan, 0, np.inf, 0]]))
    assert mask.item() == 0b0100
    grad = torch.full((1, 4), torch.inf, device=device)
    for activation in ("relu", "leaky_relu"):  # slope 0: the same
        kernels.bias_act.bias_act_backward(grad, mask, None, out, activation=activation)
        np.testing.assert_array_equal(out.cpu().numpy(), np.float32([[0, 0, np.inf, 0]]))


def maps(shape, dtype, layout="nhwc"):
    return laid_out(np.zeros(shape), layout, "cpu", dtype)


@pytest.mark.parametrize(
    ("dtype", "layout", "architecture"),
    covering([torch.float16, torch.bfloat16, torch.float32], ["nchw", "nhwc"], [80, 90]),
)
def test_whole_vectors_and_bits_packed_in_registers(compiled, dtype, layout, architecture):
    z = maps((4, 64, 8, 8), dtype, layout)
    bias, mask = torch.zeros(64), torch.zeros(z.numel() // 8, dtype=torch.uint8)
    launch = record(compiled.bias_act, "bias_act", z, bias, None, z, mask, activation="leaky_relu", slope=0.2)
    kernel = build(launch, architecture)
    check_clean(kernel)
    found = accesses(kernel.ptx)
    # An eight a thread: at 16 bits one vector, at float32 two.
    vectors = 2 if dtype == torch.float32 else 1
    assert found["st.global.v4.b32"] == vectors and found["ld.global.v4.b32"] >= vectors
    assert set(found) <= {"st.global.v4.b32", "ld.global.v4.b32", "ld.global.b32", "st.global.b8"}
    if dtype != torch.float32:
        assert kernel.shared == 0
    back = record(compiled.bias_act, "bias_act_backward", z, mask, None, z, activation="leaky_relu", slope=0.2)
    kernel = build(back, architecture)
    check_clean(kernel)
    found = accesses(kernel.ptx)
    assert found["st.global.v4.b32"] == vectors and found["ld.global.v4.b32"] == vectors
    assert set(found) <= {"st.global.v4.b32", "ld.global.v4.b32", "ld.global.b8"}


@pytest.mark.parametrize("activation", ["none", "silu", "elu"])
def test_the_others_move_whole_vectors_too(compiled, activation):
    z, bias = maps((4, 64, 8, 8), torch.float16), torch.zeros(64)
    out = torch.empty_like(z)
    forward = build(record(compiled.bias_act, "bias_act", z, bias, None, out, None, activation=activation), 90)
    back = build(record(compiled.bias_act, "bias_act_backward", out, z, bias, out, activation=activation), 90)
    head = torch.zeros(z[0].numel())
    top = build(record(compiled.bias_act, "bias_act", z, bias, head, out, None, activation=activation), 90)
    for kernel in (forward, back, top):
        check_unspilled(kernel)
        assert set(accesses(kernel.ptx)) <= {"st.global.v4.b32", "ld.global.v4.b32"}


def test_batches_share_one_kernel(compiled):
    def launch(n):
        z = maps((n, 64, 8, 8), torch.float16)
        mask = torch.zeros(z.numel() // 8, dtype=torch.uint8)
        return record(compiled.bias_act, "bias_act", z, torch.zeros(64), None, z, mask, activation="relu")

    assert specialisation(launch(1)) == specialisation(launch(16)) == specialisation(launch(3))
