"""dense_chain's kernel against the chain written out in float64, interpreted or on a GPU; and its code."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from helpers.compiling import build, check_unspilled, record, specialisation
from helpers.cooperative import cooperative

from mgebm_fast import ops

SEED, STREAM = 0x9ABCDEF012345678, 3 << 16 | 2
UPDATE = {"drift": 0.3, "noise_std": 0.4, "inv_variance": 0.5, "reference_mean": 0.25}
SLOPE = {"none": 1.0, "relu": 0.0, "leaky_relu": 0.2, "silu": 0.0, "elu": 0.0}
ACTIVATION = {
    "none": lambda v: v,
    "relu": torch.relu,
    "leaky_relu": lambda v: torch.nn.functional.leaky_relu(v, 0.2),
    "silu": torch.nn.functional.silu,
    "elu": torch.nn.functional.elu,
}


def made(sizes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(b, a, generator=generator) / a**0.5 for a, b in zip(sizes, sizes[1:])]
    biases = [torch.randn(b, generator=generator) for b in sizes[1:]]
    return [w.to(dtype) for w in weights], biases, torch.randn(sizes[-1], generator=generator)


def normed(sizes, sites, seed=7):
    """The gain and eps of each layer that has outputs a channel."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (0.5 + torch.rand(size // n, generator=generator), 1e-3) if n else None for size, n in zip(sizes[1:], sites)
    ]


def energy(x, weights, biases, head, activations, norms=None):
    h = x.flatten(1)
    for weight, bias, activation, norm in zip(weights, biases, activations, norms or [None] * len(weights)):
        v = h @ weight.double().T
        if norm is not None:
            gain, eps = norm
            channels = v.unflatten(1, (len(gain), -1))
            v = torch.nn.functional.batch_norm(channels, None, None, gain.double(), training=True, eps=eps).flatten(1)
        h = ACTIVATION[activation](v + bias.double())
    return h @ head.double()


def expected(
    x, parts, activations, steps, *, clip=None, lo=None, hi=None, keep=None, first_step=0, norms=None, **place
):
    """The chain in float64 by autograd."""
    for k in range(steps):
        leaf = x.double().requires_grad_()
        (grad,) = torch.autograd.grad(energy(leaf, *parts, activations, norms).sum(), leaf)
        grad = grad if clip is None else grad.clamp(-clip, clip)
        place = {"seed": SEED, "stream": STREAM, **place, "step": first_step + k}
        eps = ops.noise(tuple(x.shape), backend="reference", **place).double()
        pull = (x.double() - UPDATE["reference_mean"]) * UPDATE["inv_variance"]
        new = x.double() - UPDATE["drift"] * (grad + pull) + UPDATE["noise_std"] * eps
        if lo is not None or hi is not None:
            new = new.clamp(lo, hi)
        x = new if keep is None else torch.where(keep, new, x.double())
    return x


def norm_arguments(norms):
    return {
        "gains": [norm and norm.gain for norm in norms],
        "sites": [norm.sites if norm else 0 for norm in norms],
        "eps": [norm.eps if norm else 0.0 for norm in norms],
    }


def together(device, seed=0):
    """Programs beside each other: a GPU's are."""
    return cooperative(seed) if device == "cpu" else contextlib.nullcontext()


def run(kernels, device, x, parts, activations, steps, norms=None, **options):
    net = ops.dense_net(*parts, activations=activations, slopes=[SLOPE[a] for a in activations], norms=norms)
    state = x.clone().to(device)
    settings = {"seed": SEED, "stream": STREAM, **UPDATE, **options}
    kernels.dense_chain.dense_chain_(
        state, [w.to(device) for w in net.weights], [b.to(device) for b in net.biases], net.head.to(device),
        **norm_arguments([norm and dataclasses.replace(norm, gain=norm.gain.to(device)) for norm in net.norms]),
        activations=net.activations, slopes=net.slopes, steps=steps, **settings,
    )  # fmt: skip
    return state.cpu()


@pytest.mark.parametrize(
    "sizes, activations",
    [
        ((48, 100), ["leaky_relu"]),
        ((12, 64, 40), ["relu", "elu"]),
        ((48, 130, 64, 70), ["leaky_relu", "silu", "leaky_relu"]),
        ((5, 30, 20, 70, 9), ["elu", "none", "relu", "silu"]),
        ((160, 64, 64), ["leaky_relu", "leaky_relu"]),
    ],
)
def test_chain(kernels, device, sizes, activations):
    parts = made(sizes)
    x = torch.randn(19, sizes[0], generator=torch.Generator().manual_seed(1))
    limits = {"grad_clamp": 0.8, "clamp_lo": -0.9, "clamp_hi": 1.1}
    got = run(kernels, device, x, parts, activations, 3, scale=4.0, first_sample=17, first_step=5, **limits)
    want = expected(x, parts, activations, 3, clip=0.8, lo=-0.9, hi=1.1, first_sample=17, first_step=5)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


def test_half_precision_keeps_the_digits_of_pixels(kernels, device):
    """Pixels of 0-255 in fp16 alone would be off by up to 1/16."""
    activations = ["leaky_relu", "leaky_relu"]
    parts = made((48, 64, 64), torch.float16)
    x = 255 * torch.rand(16, 48, generator=torch.Generator().manual_seed(2))
    settings = {"inv_variance": 0.0, "noise_std": 0.0, "drift": 1.0}
    got = run(kernels, device, x, parts, activations, 1, scale=8.0, **settings) - x
    leaf = x.double().requires_grad_()
    (grad,) = torch.autograd.grad(energy(leaf, *parts, activations).sum(), leaf)
    assert (got.double() + grad).norm() < 2e-3 * grad.norm()


def test_held_pixels_and_counters_in_device_memory(kernels, device):
    activations, parts = ["leaky_relu", "relu"], made((12, 64, 64))
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    ids = torch.tensor([7, 1, 2**32 - 1, 0, 3])
    place = {"seed": torch.tensor(SEED - 2**64, device=device), "first_step": torch.tensor(9, device=device)}
    got = run(kernels, device, x, parts, activations, 2, mask=keep.to(device), first_sample=ids.to(device), **place)
    want = expected(x, parts, activations, 2, keep=keep, first_step=9, first_sample=ids)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)
    assert torch.equal(got[~keep].view(torch.int32), x[~keep].view(torch.int32))
    place["first_step"] = torch.tensor(2**32 - 1, device=device)  # the second step does not fit
    assert run(kernels, device, x, parts, activations, 1, **place).isfinite().all()
    assert run(kernels, device, x, parts, activations, 2, **place).isnan().all()


def test_steps_in_one_call_are_single_steps(kernels, device):
    activations, parts = ["leaky_relu", "leaky_relu"], made((48, 64, 64))
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(5))
    whole = run(kernels, device, x, parts, activations, 3, first_step=2)
    for k in range(3):
        x = run(kernels, device, x, parts, activations, 1, first_step=2 + k)
    assert torch.equal(whole, x)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_the_first_bad_step_is_kept(kernels, device):
    activations, parts = ["relu"], made((12, 64))
    bad = torch.tensor(ops.NO_BAD_STEP, device=device)
    x = torch.zeros(2, 12)
    run(kernels, device, x, parts, activations, 2, bad_step=bad, clamp_lo=-1.0, clamp_hi=1.0)
    assert bad.item() == ops.NO_BAD_STEP
    parts[0][0][0, 0] = torch.inf
    run(kernels, device, x, parts, activations, 2, bad_step=bad, first_step=6, clamp_lo=-1.0, clamp_hi=1.0)
    assert bad.item() == 6


@pytest.mark.parametrize("sites", [(0, 0, 0), (4, 4, 4), (1, 0, 8)])
@pytest.mark.parametrize(("samples", "split"), [(7, 3), (37, 2)])
def test_programs_that_wait_for_each_other(kernels, device, sites, samples, split):
    sizes, activations = (12, 128, 32, 72), ["leaky_relu", "silu", "relu"]
    norms, parts = normed(sizes, sites), made(sizes)
    x = torch.randn(samples, 12, generator=torch.Generator().manual_seed(6))
    want = expected(x, parts, activations, 2, norms=norms)
    with together(device, seed=samples):
        got = run(kernels, device, x, parts, activations, 2, norms=norms, split=split)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-5)


def test_more_tiles_than_are_combined_at_a_time(kernels, device):
    norms, parts = normed((4, 64), (4,)), made((4, 64))
    x = torch.randn(150, 4, generator=torch.Generator().manual_seed(9))
    want = expected(x, parts, ["silu"], 1, norms=norms)
    with together(device):
        got = run(kernels, device, x, parts, ["silu"], 1, norms=norms)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-5)


def test_statistics_of_values_far_from_zero(kernels, device):
    """The variance is of values about their mean: squares of values as they are would lose it."""
    sizes, activations = (4, 64), ["silu"]
    (weight,), (bias,), head = made(sizes)
    norms = normed(sizes, (2,))
    x = 500 + torch.randn(40, 4, generator=torch.Generator().manual_seed(8))
    with together(device):
        got = run(kernels, device, x, ([weight], [bias], head), activations, 1, norms=norms)
    want = expected(x, ([weight], [bias], head), activations, 1, norms=norms)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="full size: no CUDA device")
@pytest.mark.parametrize("sites", [0, 4])
@pytest.mark.parametrize("split", [2, 5, 8])
@pytest.mark.parametrize("samples", [16, 100])
def test_programs_that_share_a_tile_give_the_same_bits(kernels, sites, split, samples):
    sizes, activations = (48, 384, 512, 1024), ["leaky_relu"] * 3
    parts, norms = made(sizes, torch.float16), normed(sizes, [sites] * 3)
    x = torch.randn(samples, 48, generator=torch.Generator().manual_seed(6))
    alone = run(kernels, "cuda", x, parts, activations, 30, norms=norms)
    assert torch.equal(run(kernels, "cuda", x, parts, activations, 30, norms=norms, split=split), alone)


def launch(compiled, sizes, dtype, activations, samples=100, sites=(0, 0, 0, 0), **options):
    weights, biases, head = made(sizes, dtype)
    slopes, norms = [SLOPE[a] for a in activations], normed(sizes, sites)
    net = ops.dense_net(weights, biases, head, activations=activations, slopes=slopes, norms=norms)
    settings = {**UPDATE, "steps": 30, "clamp_lo": 0.0, "clamp_hi": 255.0, "bad_step": torch.tensor(0), **options}
    return record(
        compiled.dense_chain, "dense_chain_", torch.zeros(samples, sizes[0]), net.weights, net.biases, net.head,
        activations=net.activations, slopes=net.slopes, **norm_arguments(net.norms), **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "dtype", "split", "sites"),
    [
        ((48, 384, 512, 1024), torch.float16, 8, 0),
        ((48, 512), torch.bfloat16, 1, 0),
        ((48, 384, 512, 1024), torch.float16, 8, 4),
    ],
)
def test_matrix_instructions_and_no_spills(compiled, sizes, dtype, split, sites):
    activations = ["leaky_relu"] * (len(sizes) - 1)
    built = build(launch(compiled, sizes, dtype, activations, split=split, sites=[sites] * len(activations)), 90)
    check_unspilled(built)
    assert any(line.startswith("HMMA") for line in built.sass)
    assert "cp.async" in built.ptx and "ld.global.b16" not in built.ptx


def test_float32_is_not_rounded(compiled):
    built = build(launch(compiled, (48, 256), torch.float32, ["leaky_relu"]), 90)
    assert not [line for line in built.sass if line.startswith(("HMMA", "HGMMA"))]
    check_unspilled(built)


def test_steps_and_batches_share_one_kernel(compiled):
    first, other = (
        specialisation(
            launch(compiled, (48, 64), torch.float16, ["relu"], samples=n, steps=k, first_step=s, scale=2.0**k)
        )
        for n, k, s in ((1, 1, 0), (16, 48, 2**32 - 48))
    )
    assert first == other
