from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mgebm_fast import native, ops
from mgebm_fast import noise as streams
from mgebm_fast.errors import BackendError

OP = "noise"

ONES = 0xFFFFFFFF
# Random123's published known answers: (counter, key, words).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_numpy(counter, key):
    """Philox4x32-10 in numpy's uint64, whose products do not overflow: independent of the library's arithmetic."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = list(key)
    low, half = np.uint64(ONES), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> half) ^ c[1] ^ np.uint64(k[0]), p1 & low, (p0 >> half) ^ c[3] ^ np.uint64(k[1]), p0 & low]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return tuple(c)


def normals_numpy(words: np.ndarray) -> np.ndarray:
    """Box–Muller in float64 from the float32 uniforms of (..., 4) words."""
    u = (words.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
    u = u.astype(np.float64)
    radius = np.sqrt(-2 * np.log(u[..., 0::2]))
    angle = 2 * np.pi * u[..., 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(words.shape)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_reference_gives_the_published_words(counter, key, words):
    assert tuple(int(w) for w in streams.philox(counter, key)) == words
    assert philox_numpy(counter, key) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
@pytest.mark.parametrize("lanes", [1, 5, 40])
def test_cpp_gives_the_published_words(isa, counter, key, words, lanes):
    # The vector's quad is placed at every position of a SIMD block in turn.
    quad, sample, step, stream = counter
    out = torch.empty(4 * lanes, dtype=torch.int64)
    first = (quad - lanes + 1) & ONES
    counters = (key[1] << 32 | key[0], sample, step, stream, 0, 0, 0, False)
    native.module().noise_cpu(out.data_ptr(), 1, 4 * lanes, first, 2, counters, 1)
    assert tuple(out[-4:].tolist()) == words


@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (1,), (5, 1), (3, 3, 7, 5), (2, 1, 1025), (1, 255), (1, 256), (1, 257), (2, 4096)]
)
@pytest.mark.parametrize("distribution", ["normal", "uniform", "bits"])
def test_draws_follow_the_counter_layout(backend, shape, distribution):
    name, device = backend
    seed, step, first, stream = 0xFEDCBA9876543210, 77, 2**32 - 9, streams.stream(streams.Purpose.SAMPLING, 3)
    place = dict(seed=seed, step=step, first_sample=first, stream=stream)
    got = ops.noise(shape, distribution=distribution, device=device, backend=name, **place)
    elements = math.prod(shape[1:])
    quad = np.arange(-(-elements // 4))[None, :]
    counter = np.broadcast_arrays(quad, first + np.arange(shape[0])[:, None], step, stream)
    words = np.stack(philox_numpy(counter, (seed & ONES, seed >> 32)), axis=-1)
    u = (words.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
    draws = {"normal": normals_numpy, "uniform": lambda _: u, "bits": lambda w: w.astype(np.int64)}[distribution](words)
    expected = torch.tensor(draws.reshape(shape[0], 4 * quad.size)[:, :elements].reshape(shape))
    assert got.dtype == (torch.int64 if distribution == "bits" else torch.float32) and got.is_contiguous()
    assert got.shape == torch.Size(shape)
    tolerance = 1e-6 if distribution == "normal" else 0
    torch.testing.assert_close(got.cpu().to(expected.dtype), expected, rtol=0, atol=tolerance)


def extreme_words() -> np.ndarray:
    """Words where a polynomial, a reduction or a rounding could fail: ends, powers of two, quadrant borders."""
    near = {0, 1, 2, 3, ONES, ONES - 1}
    for k in range(2, 33):
        near |= {(2**k + d) & ONES for d in range(-3, 4)}
    for eighth in range(9):
        near |= {(eighth * 2**29 + d) & ONES for d in range(-600, 601, 25)}
    # The split of u into 2^e (1 + f) changes e at sqrt(1/2) 2^-j.
    near |= {int(math.sqrt(0.5) * 2 ** (32 - j)) + d & ONES for j in range(30) for d in range(-2, 3)}
    ends = np.array(sorted(near), dtype=np.uint32)
    rng = np.random.default_rng(0)
    pairs = np.stack(np.meshgrid(ends, rng.choice(ends, 100)), -1).reshape(-1, 2)
    return np.concatenate([pairs, pairs[:, ::-1]], axis=1)


def test_cpp_normals_are_within_1e_6_of_float64():
    native.module()
    rng = np.random.default_rng(1)
    bulk = rng.integers(0, 2**32, (500_000, 4), dtype=np.uint32)
    small = rng.integers(0, 2**12, (20_000, 4), dtype=np.uint32)
    large = ONES - small
    for words in (extreme_words(), bulk, small, large):
        words = np.ascontiguousarray(words, dtype=np.uint32)
        out = np.empty(words.shape, np.float32)
        native.module().normals_of_words(words.ctypes.data, out.ctypes.data, len(words))
        assert np.isfinite(out).all()
        assert np.abs(out - normals_numpy(words)).max() < 1e-6


def test_instruction_sets_agree_bit_for_bit(isa):
    arguments = dict(seed=2**63 + 1, step=2**32 - 1, first_sample=2**32 - 3, stream=ONES)
    for distribution in ("normal", "uniform", "bits"):
        got = ops.noise((3, 3, 77, 9), distribution=distribution, backend="native", **arguments)
        native.module().set_isa("portable")
        expected = ops.noise((3, 3, 77, 9), distribution=distribution, backend="native", **arguments)
        native.module().set_isa(isa)
        assert torch.equal(got, expected)


def test_moments_and_independence():
    # 1.5 million draws: each bound is 5 standard errors, false alarm below 1e-5 for the whole test.
    z = ops.noise((8, 3, 256, 256), seed=4, step=0).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    flat = z.flatten(1)
    other_step = ops.noise((8, 3, 256, 256), seed=4, step=1).double().flatten(1)
    for product in (flat[:, :-1] * flat[:, 1:], flat[:-1] * flat[1:], flat * other_step):
        assert abs(product.mean()) < 5 / math.sqrt(product.numel())


def test_batch_split_threads_and_ids_do_not_matter(threads):
    whole = ops.noise((8, 3, 64, 64), seed=3, step=7, first_sample=40)
    parts = [ops.noise((4, 3, 64, 64), seed=3, step=7, first_sample=40 + 4 * i) for i in range(2)]
    assert torch.equal(whole, torch.cat(parts))
    ids = torch.tensor([47, 40, 42])
    assert torch.equal(ops.noise((3, 3, 64, 64), seed=3, step=7, first_sample=ids), whole[[7, 0, 2]])
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(ops.noise((8, 3, 64, 64), seed=3, step=7, first_sample=40), whole)


def test_tensor_counters(backend):
    name, device = backend
    numbers = ops.noise((2, 9), seed=6, step=8, first_sample=3, device=device, backend=name)
    tensors = ops.noise(
        (2, 9),
        seed=torch.tensor(6, device=device),
        step=torch.tensor(8, device=device),
        first_sample=torch.tensor(3, device=device),
        device=device,
        backend=name,
    )
    assert torch.equal(numbers, tensors)


def test_every_purpose_is_a_stream_of_its_own():
    found = {streams.stream(purpose, grid) for purpose in streams.Purpose for grid in (0, 1, 65535)}
    assert len(found) == 3 * len(streams.Purpose)


def test_integers_are_uniform_and_permutation_permutes():
    draws = streams.integers(10, 20_000, seed=1, step=0)
    counts = torch.bincount(draws, minlength=10).double()
    # chi-square with 9 degrees of freedom exceeds 33.7 once in 10,000 (the seed is fixed).
    assert ((counts - 2000) ** 2 / 2000).sum() < 33.7
    order = streams.permutation(1000, seed=5, step=2)
    assert order.sort().values.equal(torch.arange(1000)) and not order.equal(torch.arange(1000))
    assert not order.equal(streams.permutation(1000, seed=5, step=3))
    assert order.equal(streams.permutation(1000, seed=5, step=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(seed=-1), r"seed must be in \[0, 2\*\*64\), got -1"),
        (dict(seed=2**64), "seed must be"),
        (dict(seed=0.5), "seed must be an int"),
        (dict(step=2**32), r"step must stay in \[0, 2\*\*32\), got 4294967296"),
        (dict(step=-1), "step must stay"),
        (dict(first_sample=2**32 - 1), r"first_sample must stay .*4294967295 … 4294967296"),
        (dict(first_sample=torch.tensor([1, 2, 3])), r"first_sample must be .* got shape \(3,\)"),
        (dict(first_sample=torch.tensor([1, 2**32])), "first_sample must stay"),
        (dict(first_sample=torch.tensor([1.0, 2.0])), "first_sample must be an int or an int64 tensor"),
        (dict(stream=2**32), "stream must stay"),
        (dict(distribution="norm"), "did you mean 'normal'"),
        (dict(backend="nativ"), "did you mean 'native'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ops.noise((2, 3), **{"seed": 0, "step": 0, **arguments})


def test_named_backend_never_falls_back():
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(BackendError, match="triton"):
        ops.noise((2, 3), seed=0, step=0, backend="triton")


def test_opcheck():
    arguments = (
        [2, 3, 5],
        "normal",
        1,
        None,
        0,
        torch.tensor([4, 5]),
        0,
        torch.tensor(3),
        7,
        torch.device("cpu"),
        "reference",
    )
    torch.library.opcheck(torch.ops.mgebm_fast.noise.default, arguments)


def test_the_environment_names_the_instruction_set(monkeypatch):
    before = native.isa()
    try:
        monkeypatch.setenv("MGEBM_SIMD", "portable")
        assert native._load() is native.module()
        native._choose_instructions(native.module())
        assert native.isa() == "portable"
        monkeypatch.setenv("MGEBM_SIMD", "sse9")
        with pytest.raises(ValueError, match="MGEBM_SIMD must be auto or a set that this CPU has, .* got 'sse9'"):
            native._choose_instructions(native.module())
    finally:
        native.module().set_isa(before)
