"""The Triton launchers against float64 numpy written here: interpreted everywhere, compiled where there is a GPU."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.cases import covering

SEED = 0x9ABCDEF012345678
STREAM = 3 << 16 | 2


def philox(c0, c1, c2, c3, seed):
    """Philox4x32-10 in uint64: four arrays of words."""
    low32 = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, np.uint64) for word in np.broadcast_arrays(c0, c1, c2, c3)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> np.uint64(32) ^ c[1] ^ np.uint64(k0), b & low32, a >> np.uint64(32) ^ c[3] ^ np.uint64(k1), a & low32]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def uniforms(words):
    """float32 fma(float32(w), 2**-32, 2**-33): exact in float64, then rounded once."""
    return np.float32(np.float32(words).astype(np.float64) * 2.0**-32 + 2.0**-33)


def normals(word0, word1):
    u0, u1 = uniforms(word0).astype(np.float64), uniforms(word1).astype(np.float64)
    radius = np.sqrt(-2 * np.log(u0))
    return radius * np.cos(2 * np.pi * u1), radius * np.sin(2 * np.pi * u1)


def draws(shape, distribution, *, seed=SEED, ids=None, step=0, stream=STREAM):
    """(N, ...) float64 (int64 for bits): what kernels/noise.py must write."""
    ids = np.arange(shape[0]) if ids is None else np.asarray(ids)
    elements = int(np.prod(shape[1:]))
    quads = np.arange(-(-elements // 4))
    words = philox(quads[None, :], ids[:, None], step, stream, seed)
    if distribution == "normal":
        values = normals(words[0], words[1]) + normals(words[2], words[3])
    else:
        values = [uniforms(w).astype(np.float64) if distribution == "uniform" else w.astype(np.int64) for w in words]
    return np.stack(values, -1).reshape(len(ids), -1)[:, :elements].reshape(shape)


def as_int32(values):
    """int64 numbers in [0, 2**32) as a tensor of the int32 with the same bits."""
    return torch.from_numpy(np.ascontiguousarray(values, np.int64).astype(np.uint32).view(np.int32))


# --- device functions -------------------------------------------------------------------------------------------------


def words_of(interpreted, counters):
    count = counters.shape[1]
    out = torch.empty(4, count, dtype=torch.int64)
    interpreted.probe.words_kernel[(1,)](as_int32(counters), out, COUNT=count)
    return out.numpy()


def test_published_words(interpreted):
    zero, ones = [0] * 6, [0xFFFFFFFF] * 6
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]
    words = words_of(interpreted, np.array([zero, ones, pi, zero]).T)
    assert [f"{w:08x}" for w in words[:, 0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{w:08x}" for w in words[:, 1]] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    assert [f"{w:08x}" for w in words[:, 2]] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_words_of_many_counters(interpreted):
    counters = np.random.default_rng(0).integers(0, 2**32, (6, 4096))
    counters[4:] = counters[4:, :1]
    expected = np.stack(philox(*counters[:4], int(counters[4, 0]) | int(counters[5, 0]) << 32))
    np.testing.assert_array_equal(words_of(interpreted, counters), expected.astype(np.int64))


def normals_of(interpreted, word0, word1):
    count = word0.size
    out = torch.full((4, count), torch.nan)
    interpreted.probe.normal_kernel[(1,)](as_int32(np.stack([word0, word1])), out, COUNT=count)
    return out.numpy()


def near(centres, reach):
    """Words within `reach` of each centre, kept in range."""
    around = np.asarray(centres)[:, None] + np.arange(-reach, reach + 1)
    return np.unique(np.clip(around, 0, 2**32 - 1))


def test_normals_at_the_extremes(interpreted):
    powers = 2 ** np.arange(32)
    radii = near(np.concatenate([powers, 2**32 - powers, [round(2**31.5), round(2**30.5)]]), 2)
    # The ends of the circle, the quadrants' corners and the edges between them, where the reduction changes over.
    angles = near(np.arange(17) << 28, 40)
    word0, word1 = (grid.ravel() for grid in np.meshgrid(radii, angles))
    size = 1 << int(np.ceil(np.log2(word0.size)))
    word0, word1 = np.resize(word0, size), np.resize(word1, size)
    u, log, *values = normals_of(interpreted, word0, word1)
    np.testing.assert_array_equal(u, uniforms(word0))
    assert u.min() > 0 and u.max() == 1
    for value, expected in zip(values, normals(word0, word1), strict=True):
        assert np.abs(value - expected).max() < 1e-6


def test_normals_of_many_words(interpreted):
    """A million words: uniform ones, and radii spread evenly over the exponents of u and of 1 - u."""
    rng = np.random.default_rng(1)
    for chunk in range(4):
        word1 = rng.integers(0, 2**32, 2**18)
        word0 = rng.integers(0, 2**32, 2**18)
        if chunk % 2:
            word0 = np.floor(2 ** rng.uniform(0, 32, 2**18)).astype(np.int64)
            word0[::2] = 2**32 - word0[::2]
        u, log, *values = normals_of(interpreted, word0, word1)
        for value, expected in zip(values, normals(word0, word1), strict=True):
            assert np.abs(value - expected).max() < 1e-6
        # Relative, so that small radii (u next to 1) keep their digits.
        exact = np.log(u.astype(np.float64))
        assert (np.abs(log - exact) <= 1.5e-7 * np.abs(exact)).all()


# --- noise ------------------------------------------------------------------------------------------------------------


def run_noise(kernels, device, shape, distribution="normal", **options):
    """The launcher on an output of NaN (or -7), so that an element that nobody wrote shows."""
    bits = distribution == "bits"
    out = torch.full(shape, -7 if bits else torch.nan, dtype=torch.int64 if bits else torch.float32, device=device)
    kernels.noise.noise(out, **{"seed": SEED, "step": 0, "stream": STREAM, "distribution": distribution, **options})
    return out.cpu().numpy()


SHAPES = [(3, 3, 8, 8), (2, 3, 5, 7), (1, 1, 1, 1), (3, 1, 1), (2, 3, 15, 15), (2, 3, 16, 16), (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("distribution", ["normal", "uniform", "bits"])
@pytest.mark.parametrize("shape", SHAPES)
def test_noise(kernels, device, shape, distribution):
    first, step = 2**32 - shape[0], 2**32 - 1  # the last numbers that fit
    out = run_noise(kernels, device, shape, distribution, first_sample=first, step=step)
    expected = draws(shape, distribution, ids=first + np.arange(shape[0]), step=step)
    if distribution == "normal":
        assert np.abs(out - expected).max() < 1e-6
    else:
        np.testing.assert_array_equal(out, expected)


def test_noise_of_no_samples(kernels, device):
    assert run_noise(kernels, device, (0, 3, 4, 4)).size == 0


def test_counters_in_device_memory(kernels, device):
    """Numbers and tensors give the same bits, also for a seed above 2**63 and ids in any order."""
    shape, ids = (3, 3, 6, 6), [11, 2, 2**32 - 1]
    seed = torch.tensor(SEED - 2**64, device=device)
    plain = run_noise(kernels, device, shape, first_sample=40, step=9)
    memory = run_noise(
        kernels,
        device,
        shape,
        seed=seed,
        first_sample=torch.tensor(40, device=device),
        step=torch.tensor(9, device=device),
    )
    np.testing.assert_array_equal(plain, memory)
    each = run_noise(kernels, device, shape, first_sample=torch.tensor(ids, device=device), step=9)
    assert np.abs(each - draws(shape, "normal", ids=ids, step=9)).max() < 1e-6


@pytest.mark.parametrize("wrong", [-1, 2**32, 2**40, -(2**63)])
def test_counters_that_do_not_fit_give_nan(kernels, device, wrong):
    shape = (3, 1, 4, 4)
    bad_step = {"step": torch.tensor(wrong, device=device)}
    assert np.isnan(run_noise(kernels, device, shape, **bad_step)).all()
    assert (run_noise(kernels, device, shape, "bits", **bad_step) == -1).all()
    out = run_noise(kernels, device, shape, first_sample=torch.tensor([5, wrong, 6], device=device))
    assert np.isnan(out[1]).all() and np.isfinite(out[[0, 2]]).all()
    ids = torch.tensor([wrong, 7, 8], device=device)
    out = run_noise(kernels, device, shape, first_sample=ids, step=torch.tensor(4, device=device))
    assert np.isnan(out[0]).all() and np.isfinite(out[1:]).all()
    # The second of three ids from this base is the first that does not fit.
    out = run_noise(kernels, device, shape, first_sample=torch.tensor(2**32 - 1, device=device))
    assert np.isfinite(out[0]).all() and np.isnan(out[1:]).all()


def test_samples_beyond_one_grid_row(kernels, device, monkeypatch):
    for module in (kernels.philox, kernels.noise):
        monkeypatch.setattr(module, "SAMPLE_ROWS", 2)
    shape = (5, 1, 2, 2)
    assert np.abs(run_noise(kernels, device, shape) - draws(shape, "normal")).max() < 1e-6


# --- langevin_step ----------------------------------------------------------------------------------------------------


def laid_out(array, layout, device, dtype=torch.float32):
    tensor = torch.from_numpy(array.copy()).to(device=device, dtype=dtype)
    if layout == "contiguous":
        return tensor
    order = (0, *range(2, tensor.dim()), 1)
    back = (0, tensor.dim() - 1, *range(1, tensor.dim() - 1))
    return tensor.permute(order).contiguous().permute(back)


def expected_step(x, grad, eps, *, drift, noise_std, inv_variance, mean, grad_clamp, lo, hi):
    """float64, in the shape of the formula."""
    x, grad = x.astype(np.float64), grad.astype(np.float64)
    if grad_clamp is not None:
        grad = np.clip(grad, -grad_clamp, grad_clamp)
    value = x - drift * (grad + (x - mean) * inv_variance) + noise_std * eps
    return np.clip(value, lo, hi) if lo is not None or hi is not None else value


CHAIN_SHAPES = [(3, 3, 8, 8), (1, 1, 1, 1), (2, 3, 5, 7), (3, 4, 3, 3), (2, 3, 6), (2, 2, 3, 4, 5), (2, 3, 16, 16)]


LAYOUTS = ["contiguous", "channels_last", "mixed", "mixed_back"]
MASKS = [None, "full", "channels", "samples", "pixels", "layout"]


@pytest.mark.parametrize(
    ("layouts", "masked", "shape"),
    [(*row, shape) for row, shape in zip(covering(LAYOUTS, MASKS), itertools.cycle(CHAIN_SHAPES))],
)
def test_langevin_step(kernels, device, shape, layouts, masked):
    rng = np.random.default_rng(sum(shape))
    x, grad = rng.normal(size=(2, *shape)).astype(np.float32)
    grad_type = torch.float16 if layouts.startswith("mixed") else torch.float32
    limits = (
        dict.fromkeys(("grad_clamp", "lo", "hi")) if masked == "full" else {"grad_clamp": 0.7, "lo": -0.9, "hi": 1.1}
    )
    x_layout = "channels_last" if layouts in ("channels_last", "mixed_back") else "contiguous"
    grad_layout = "channels_last" if layouts in ("channels_last", "mixed") else "contiguous"
    state = laid_out(x, x_layout, device)
    gradient = laid_out(grad, grad_layout, device, grad_type)

    n, s = shape[0], int(np.prod(shape[2:]))
    mask_shape, strides = {
        "channels": ((n, 1, *shape[2:]), (s, 0, 1)),
        "samples": ((1, *shape[1:]), (0, s, 1)),
        "pixels": ((1, 1, *shape[2:]), (0, 0, 1)),
        "layout": ((n, s, shape[1]), (s * shape[1], 1, shape[1])),
    }.get(masked, (shape, None))
    keep = rng.random(mask_shape) < 0.6
    settings = {"drift": 0.3, "noise_std": 0.4, "inv_variance": 0.5}
    kernels.langevin_step.langevin_step_(
        state,
        gradient,
        **settings,
        reference_mean=0.25,
        grad_clamp=limits["grad_clamp"],
        clamp_lo=limits["lo"],
        clamp_hi=limits["hi"],
        mask=None if masked is None else torch.from_numpy(keep).to(device),
        mask_strides=strides,
        seed=SEED,
        first_sample=17,
        step=5,
        stream=STREAM,
    )
    eps = draws(shape, "normal", ids=17 + np.arange(n), step=5)
    expected = expected_step(x, gradient.float().cpu().numpy(), eps, **settings, mean=0.25, **limits)
    result = state.cpu().numpy()
    if masked is not None:
        held = ~np.broadcast_to(keep.swapaxes(1, 2).reshape(shape) if masked == "layout" else keep, shape)
        np.testing.assert_array_equal(result.view(np.int32)[held], x.view(np.int32)[held])
        expected = np.where(held, x, expected)
    assert np.abs(result - expected).max() < 2e-6


def step(kernels, device, x, grad, **options):
    state = torch.from_numpy(x.copy()).to(device)
    settings = {"drift": 0.2, "noise_std": 0.3, "seed": SEED, "stream": STREAM, **options}
    kernels.langevin_step.langevin_step_(state, torch.from_numpy(grad).to(device), **settings)
    return state.cpu().numpy()


def test_no_samples_and_no_change(kernels, device):
    empty = np.zeros((0, 3, 4, 4), np.float32)
    assert step(kernels, device, empty, empty).shape == (0, 3, 4, 4)
    x = np.random.default_rng(2).normal(size=(3, 3, 4, 4)).astype(np.float32)
    same = step(kernels, device, x, np.ones_like(x), drift=0.0, noise_std=0.0, inv_variance=2.0)
    np.testing.assert_array_equal(same.view(np.int32), x.view(np.int32))


def test_noise_is_left_out_at_zero_scale(kernels, device):
    """With no noise even counters that do not fit are not looked at."""
    x, grad = np.random.default_rng(3).normal(size=(2, 3, 2, 4, 4)).astype(np.float32)
    out = step(kernels, device, x, grad, noise_std=0.0, step=torch.tensor(-1, device=device))
    assert np.abs(out - (x.astype(np.float64) - 0.2 * grad)).max() < 1e-6


def test_a_split_batch_takes_the_same_step(kernels, device):
    """Bit for bit: by two parts, by ids in another order, and by counters in device memory."""
    x, grad = np.random.default_rng(4).normal(size=(2, 5, 3, 6, 6)).astype(np.float32)
    whole = step(kernels, device, x, grad, first_sample=10, step=7)
    cuts = slice(0, 2), slice(2, 5)
    parts = [step(kernels, device, x[cut], grad[cut], first_sample=10 + cut.start, step=7) for cut in cuts]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    order = np.array([3, 0, 4, 1, 2])
    ids = torch.from_numpy(10 + order).to(device)
    counters = {"seed": torch.tensor(SEED - 2**64, device=device), "step": torch.tensor(7, device=device)}
    shuffled = step(kernels, device, x[order], grad[order], first_sample=ids, **counters)
    np.testing.assert_array_equal(whole[order], shuffled)


def test_wrong_counters_reach_updated_pixels_only(kernels, device):
    x, grad = np.random.default_rng(5).normal(size=(2, 3, 1, 4, 4)).astype(np.float32)
    keep = torch.arange(48, device=device).reshape(3, 1, 4, 4) % 2 == 0
    ids = torch.tensor([1, 2**32, 2], device=device)
    out = step(kernels, device, x, grad, first_sample=ids, mask=keep, clamp_lo=-1.0, clamp_hi=1.0)
    lost = np.isnan(out)
    assert lost[1][keep[1].cpu().numpy()].all() and lost.sum() == 8
    held = ~keep.cpu().numpy()
    np.testing.assert_array_equal(out[held], x[held])


def test_a_broadcast_mask_needs_strides(kernels, device):
    """Read as if it were whole, it would be read past its end."""
    x = np.zeros((2, 3, 4, 4), np.float32)
    with pytest.raises(ValueError, match="mask_strides must be given"):
        step(kernels, device, x, x, mask=torch.ones((1, 1, 4, 4), dtype=torch.bool, device=device))


def test_vectors_and_scalars(kernels, device):
    """(N, C) and (N,): a sample may have no spatial dimensions, or be one number."""
    for shape in [(3, 6), (5,)]:
        x, grad = np.random.default_rng(7).normal(size=(2, *shape)).astype(np.float32)
        expected = x.astype(np.float64) - 0.2 * grad + 0.3 * draws(shape, "normal")
        assert np.abs(step(kernels, device, x, grad) - expected).max() < 2e-6


def test_nan_passes_clip_and_clamp(kernels, device):
    x, grad = np.zeros((2, 1, 1, 2, 4), np.float32)
    grad[0, 0, 0] = [np.nan, np.inf, -np.inf, 0]
    x[0, 0, 1, 0] = np.nan
    options = {"noise_std": 0.0, "drift": 1.0, "grad_clamp": 0.5}
    out = step(kernels, device, x, grad, **options, clamp_lo=-0.25)[0, 0]
    np.testing.assert_array_equal(out[0], np.float32([np.nan, -0.25, 0.5, 0]))
    assert np.isnan(out[1, 0]) and (out[1, 1:] == 0).all()
    out = step(kernels, device, x, grad, **options, clamp_hi=0.25)[0, 0]
    np.testing.assert_array_equal(out[0], np.float32([np.nan, -0.5, 0.25, 0]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_held_pixels_keep_the_bits_of_a_nan(kernels, device):
    x = np.zeros((1, 1, 2, 4), np.float32)
    x.view(np.int32)[0, 0, 0] = [0x7FC12345, 0x7F812345, -0x80000000, 1]
    out = step(kernels, device, x, x, mask=torch.zeros(x.shape, dtype=torch.uint8, device=device))
    np.testing.assert_array_equal(out.view(np.int32), x.view(np.int32))


def test_bfloat16_gradient(kernels, device):
    if device == "cpu":
        pytest.skip("the interpreter's bfloat16 is wrong; the compiled kernel is checked where there is a GPU")
    x, grad = np.random.default_rng(6).normal(size=(2, 3, 3, 8, 8)).astype(np.float32)
    gradient = torch.from_numpy(grad).to(device).bfloat16()
    state = torch.from_numpy(x).to(device)
    kernels.langevin_step.langevin_step_(state, gradient, drift=0.3, noise_std=0.0)
    assert np.abs(state.cpu().numpy() - (x - 0.3 * gradient.double().cpu().numpy())).max() < 1e-6
