"""edge_step's kernel against a float64 data gradient and update, interpreted or on a GPU; and its code."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.cases import each
from helpers.compiling import accesses, build, check_unspilled, record, specialisation
from torch.nn.grad import conv2d_input

from mgebm_fast import ops

SEED, STREAM = 0x9ABCDEF012345678, 3 << 16 | 2
UPDATE = {"drift": 0.3, "noise_std": 0.4, "inv_variance": 0.5, "reference_mean": 0.25}
# x, kernel, stride, padding, K: even and odd sizes, several samples a program and several programs a sample, quads that
# pass a row's end, channels that pad, pixels that no output sees, K that 16 does not divide.
CASES = [
    ((3, 3, 8, 8), 5, 2, 2, 16),
    ((2, 3, 16, 24), 3, 1, 1, 8),
    ((5, 3, 4, 4), 5, 2, 2, 24),
    ((2, 1, 7, 9), 4, 2, 1, 16),
    ((1, 3, 6, 5), 3, 2, 0, 16),
    ((2, 4, 12, 20), 2, 1, 0, 16),
    ((3, 2, 1, 1), 1, 1, 0, 16),
    ((1, 3, 20, 36), 5, 2, 2, 32),
]


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def case(shape, kernel, stride, padding, out_channels, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(out_channels, shape[1], kernel, kernel, generator=generator) / (kernel * out_channels**0.5)
    sizes = torch.nn.functional.conv2d(x, weight, None, stride, padding).shape
    return x, torch.randn(sizes, generator=generator).to(dtype), weight.to(dtype)


def gradient(x, upstream, weight, stride, padding):
    return conv2d_input(list(x.shape), weight.double(), upstream.double(), stride, padding)


def updated(x, grad, *, clip=None, lo=None, hi=None, keep=None, **place):
    """The update in float64, with the reference's normals."""
    if clip is not None:
        grad = grad.clamp(-clip, clip)
    eps = ops.noise(tuple(x.shape), backend="reference", **{"seed": SEED, "stream": STREAM, "step": 0, **place})
    old = x.double()
    pull = (old - UPDATE["reference_mean"]) * UPDATE["inv_variance"]
    result = old - UPDATE["drift"] * (grad + pull) + UPDATE["noise_std"] * eps.double()
    if lo is not None or hi is not None:
        result = result.clamp(lo, hi)
    return result if keep is None else torch.where(keep, result, old)


def step(kernels, device, x, upstream, weight, stride, padding, **options):
    weights = ops.edge_weights(weight, stride=stride, padding=padding)
    state = x.clone().to(device)
    settings = {"seed": SEED, "stream": STREAM, **UPDATE, **options}
    kernels.edge_step.edge_step_(
        state, upstream.to(device), weights.packed.to(device), stride=weights.stride, first=weights.first,
        taps=weights.taps, **settings,
    )  # fmt: skip
    return state.cpu()


@pytest.mark.parametrize(
    ("conv", "layouts", "dtype"), each(CASES, ["both", "upstream", "x"], [torch.float32, torch.float16])
)
def test_step(kernels, device, conv, layouts, dtype):
    shape, kernel, stride, padding, out_channels = conv
    x, upstream, weight = case(shape, kernel, stride, padding, out_channels, dtype)
    want = updated(x, gradient(x, upstream, weight, stride, padding) * 0.5, clip=0.8, lo=-0.9, hi=1.1, first_sample=17)
    x = channels_last(x) if layouts in ("both", "x") else x
    upstream = channels_last(upstream) if layouts in ("both", "upstream") else upstream
    limits = {"grad_clamp": 0.8, "clamp_lo": -0.9, "clamp_hi": 1.1}
    got = step(kernels, device, x, upstream, weight, stride, padding, unscale=0.5, first_sample=17, **limits)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)


def test_dilation_and_two_strides():
    """Packing alone: the product that the kernel makes, written out."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 3, 3, 2, generator=generator)
    stride, padding, dilation = (2, 1), (2, 1), (2, 3)
    x = torch.zeros(2, 3, 9, 8)
    upstream = torch.randn(torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation).shape)
    want = conv2d_input(list(x.shape), weight.double(), upstream.double(), stride, padding, dilation)
    weights = ops.edge_weights(weight, stride=stride, padding=padding, dilation=dilation)
    packed = weights.packed.double().reshape(*weights.taps, 4, -1)[..., : 2 * 1 * 4]
    got = torch.zeros(2, 5, 8, 8, dtype=torch.float64)
    for d in range(weights.taps[0]):
        for e in range(weights.taps[1]):
            for i in range(5):
                for j in range(8):
                    oi, oj = i + d + weights.first[0], j + e + weights.first[1]
                    if 0 <= oi < upstream.shape[2] and 0 <= oj < upstream.shape[3]:
                        got[:, i, j] += upstream[:, :, oi, oj].double() @ packed[d, e]
    got = got.reshape(2, 5, 8, 2, 1, 4)[..., :3].permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 10, 8)[:, :, :9]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("masked", ["whole", "pixels", "channels"])
def test_held_pixels_keep_their_bits(kernels, device, masked):
    x, upstream, weight = case((3, 3, 8, 8), 5, 2, 2, 16, torch.float16)
    shape = {"whole": (3, 3, 8, 8), "pixels": (1, 1, 8, 8), "channels": (3, 1, 8, 8)}[masked]
    strides = {"whole": (192, 64, 1), "pixels": (0, 0, 1), "channels": (64, 0, 1)}[masked]
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    got = step(kernels, device, x, upstream, weight, 2, 2, mask=keep.to(device), mask_strides=strides, clamp_lo=-0.1)
    want = updated(x, gradient(x, upstream, weight, 2, 2), lo=-0.1, keep=keep)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)
    held = ~keep.expand_as(x)
    assert torch.equal(got[held].view(torch.int32), x[held].view(torch.int32))


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (3, 3, 8, 6)])
def test_counters_and_scale_in_device_memory(kernels, device, shape):
    x, upstream, weight = case(shape, 5, 2, 2, 16, torch.float16)
    ids = torch.tensor([7, 1, 2**32 - 1, 0, 3])[: shape[0]]
    memory = {"seed": torch.tensor(SEED - 2**64), "step": torch.tensor(9), "unscale": torch.tensor(0.25)}
    plain = step(kernels, device, x, upstream, weight, 2, 2, unscale=0.25, step=9, first_sample=2**32 - 5)
    held = {name: tensor.to(device) for name, tensor in memory.items()}
    base = torch.tensor(2**32 - 5, device=device)
    assert torch.equal(step(kernels, device, x, upstream, weight, 2, 2, first_sample=base, **held), plain)
    got = step(kernels, device, x, upstream, weight, 2, 2, first_sample=ids.to(device), **held)
    want = updated(x, gradient(x, upstream, weight, 2, 2) * 0.25, step=9, first_sample=ids)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-6)
    wrong = torch.cat([ids[:-1], torch.tensor([2**32])]).to(device)
    got = step(kernels, device, x, upstream, weight, 2, 2, first_sample=wrong)
    assert got[-1].isnan().all() and got[:-1].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_the_first_bad_step_is_kept(kernels, device):
    x, upstream, weight = case((5, 3, 4, 4), 5, 2, 2, 16, torch.float16)
    bad = torch.tensor(ops.NO_BAD_STEP, device=device)
    clips = {"grad_clamp": 1.0, "clamp_lo": -1.0, "clamp_hi": 1.0, "bad_step": bad}
    step(kernels, device, x, upstream, weight, 2, 2, step=3, **clips)
    assert bad.item() == ops.NO_BAD_STEP
    for wrong, number, kept in [(torch.inf, 8, 8), (torch.nan, 2**32 - 1, 8), (-torch.inf, 5, 5)]:
        broken = upstream.clone()
        broken[4, 3, 1, 1] = wrong
        step(kernels, device, x, broken, weight, 2, 2, step=number, **clips)
        assert bad.item() == kept
    step(kernels, device, x, broken, weight, 2, 2, step=torch.tensor(4, device=device), **clips)
    assert bad.item() == 4


def launch(compiled, shape, kernel, stride, padding, out_channels, dtype, **options):
    x, upstream, weight = case(shape, kernel, stride, padding, out_channels, dtype)
    weights = ops.edge_weights(weight, stride=stride, padding=padding)
    settings = {**UPDATE, "clamp_lo": 0.0, "clamp_hi": 1.0, "bad_step": torch.tensor(0), **options}
    return record(
        compiled.edge_step, "edge_step_", x, channels_last(upstream), weights.packed, stride=weights.stride,
        first=weights.first, taps=weights.taps, **settings,
    )  # fmt: skip


NETS = [((8, 3, 64, 64), 5, 2, 2, 64), ((8, 3, 16, 16), 5, 2, 2, 96), ((8, 3, 4, 4), 5, 2, 2, 96),
        ((8, 3, 32, 32), 3, 1, 1, 32)]  # fmt: skip


@pytest.mark.parametrize(
    "net, dtype, architecture",
    [
        (NETS[0], torch.float16, 90),
        (NETS[1], torch.float16, 80),
        (NETS[2], torch.float16, 90),
        (NETS[3], torch.bfloat16, 90),
    ],
)
def test_matrix_instructions_and_whole_vectors(compiled, net, dtype, architecture):
    built = build(launch(compiled, *net, dtype), architecture)
    check_unspilled(built)
    assert any(line.startswith(("HGMMA", "HMMA")) for line in built.sass)
    found = accesses(built.ptx)
    assert found["st.global.v4.b32"] >= 1 and "st.global.b32" not in found  # x, four neighbours at a time
    assert "ld.global.b16" not in found
    # Upstream, 64 rows a program at least, goes through L1: 8 bytes a copy, which no Triton sends past it.
    assert len(re.findall(r"cp\.async\.ca\.shared\.global [^;]*, 0x8,", built.ptx)) >= 12
    assert len(re.findall(r"cp\.async\.cg", built.ptx)) <= 3  # packed weights, each read once a program


def test_float32_is_not_rounded(compiled):
    built = build(launch(compiled, *NETS[0], torch.float32), 90)
    check_unspilled(built)
    assert not [line for line in built.sass if line.startswith(("HMMA", "HGMMA"))]


def test_steps_and_batches_share_one_kernel(compiled):
    first, other = (
        specialisation(launch(compiled, (n, *NETS[0][0][1:]), *NETS[0][1:], torch.float16, step=k, seed=k))
        for n, k in ((1, 0), (16, 2**32 - 1))
    )
    assert first == other
