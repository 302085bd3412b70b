from __future__ import annotations

import numpy as np
import pytest
import torch

from mgebm_fast import native, ops

OP = "pyramid"
CASES = [  # spatial, sizes
    ((64, 64), (64, 16, 4, 1)),
    ((64, 64), (1,)),
    ((64, 64), (4, 16, 1)),
    ((24, 24), (1, 3, 6, 12, 24)),
    ((12, 12), (4, 6, 2)),
    ((30,), (15, 5, 1)),
    ((8, 12, 20), ((4, 6, 10), (2, 2, 5), (1, 1, 1))),
    ((7, 7), (7, 1)),
    ((96, 160), ((48, 80), (3, 5))),
]


def means_numpy(x: torch.Tensor, extent) -> np.ndarray:
    """Block means one block at a time, in float64."""
    array = x.cpu().numpy().astype(np.float64)
    spatial = array.shape[2:]
    extent = (extent,) * len(spatial) if isinstance(extent, int) else extent
    out = np.empty((*array.shape[:2], *extent))
    for index in np.ndindex(*extent):
        block = tuple(slice(i * n // s, (i + 1) * n // s) for i, n, s in zip(index, spatial, extent))
        out[(slice(None), slice(None), *index)] = array[(slice(None), slice(None), *block)].mean(
            axis=tuple(range(2, array.ndim))
        )
    return out


def images(spatial, dtype, device="cpu", planes=(3, 2)):
    rng = np.random.default_rng(0)
    if dtype == torch.uint8:
        return torch.tensor(rng.integers(0, 256, (*planes, *spatial)), dtype=torch.uint8, device=device)
    return torch.tensor(rng.normal(100, 50, (*planes, *spatial)), dtype=torch.float32, device=device)


@pytest.mark.parametrize(("spatial", "sizes"), CASES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_means_are_rounded_once(backend, spatial, sizes, dtype):
    name, device = backend
    x = images(spatial, dtype, device)
    for got, size in zip(ops.pyramid(x, sizes, backend=name), sizes):
        expected = torch.tensor(means_numpy(x, size)).float()
        torch.testing.assert_close(got.cpu(), expected, rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_instruction_sets_and_threads_agree(isa, threads, dtype):
    x = images((64, 64), dtype, planes=(7, 3))
    threads(2)
    got = ops.pyramid(x, (64, 32, 8, 1), backend="native")
    threads(1)
    native.module().set_isa("portable")
    expected = ops.pyramid(x, (64, 32, 8, 1), backend="native")
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_down_of_up_is_the_identity_to_one_ulp(backend):
    name, device = backend
    y = images((5, 5), torch.float32, device)
    for factor in (2, 3, 7, 16):
        (down,) = ops.pyramid(ops.upsample(y, factor, backend="reference"), [5], backend=name)
        ulp = torch.nextafter(y.abs(), torch.tensor(float("inf"), device=device)) - y.abs()
        assert ((down - y).abs() <= ulp).all()


def test_large_blocks_keep_their_precision(backend):
    # A float32 running sum of 2^20 values near 200 would be off by far more than one rounding.
    name, device = backend
    x = images((1024, 1024), torch.float32, device, planes=(1, 1))
    (mean,) = ops.pyramid(x, [1], backend=name)
    assert abs(mean.item() - x.cpu().double().mean().item()) < 1e-5


def test_layouts_and_empty_batches(backend):
    name, device = backend
    x = images((8, 8), torch.uint8, device)
    strided = x.to(memory_format=torch.channels_last)
    assert torch.equal(ops.pyramid(strided, [2], backend=name)[0], ops.pyramid(x, [2], backend=name)[0])
    assert ops.pyramid(x[:0], (4, 1), backend=name)[1].shape == (0, 2, 1, 1)
    assert ops.pyramid(x, [], backend=name) == []


def test_adjoint(backend):
    # <pyramid(x), y> = <x, pyramid'(y)> for every level at once.
    name, device = backend
    x = images((12, 8), torch.float32, device).requires_grad_()
    sizes = ((12, 8), (6, 4), (3, 1))
    levels = ops.pyramid(x, sizes, backend=name)
    weights = [
        torch.randn(level.shape, generator=torch.Generator().manual_seed(i)).to(device)
        for i, level in enumerate(levels)
    ]
    total = sum((level * weight).sum() for level, weight in zip(levels, weights))
    (grad,) = torch.autograd.grad(total, x)
    expected = sum(
        np.kron(w.cpu().double().numpy(), np.ones((12 // s[0], 8 // s[1]))) / (96 / (s[0] * s[1]))
        for w, s in zip(weights, sizes)
    )
    torch.testing.assert_close(grad.cpu().double(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "sizes", "message"),
    [
        (torch.zeros(1, 1, 8, 8), [3], r"sizes must divide x's spatial size \(8, 8\), got 3"),
        (torch.zeros(1, 1, 8, 8), [0], "sizes must divide"),
        (torch.zeros(1, 1, 8, 8), [16], "sizes must divide"),
        (torch.zeros(1, 1, 8, 8), [(2, 2, 2)], "sizes must hold ints or tuples of 2 ints"),
        (torch.zeros(1, 1, 8, 8).double(), [2], "x must be uint8 or float32, got torch.float64"),
        (torch.zeros(1, 8), [2], r"x must have shape \(N, C, \*spatial\)"),
    ],
)
def test_bad_arguments_are_named(x, sizes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ops.pyramid(x, sizes)


def test_opcheck():
    x = images((4, 4), torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.mgebm_fast.pyramid.default, (x, [2, 2, 1, 1], "reference"))
    torch.library.opcheck(torch.ops.mgebm_fast.pyramid.default, (images((4, 4), torch.uint8), [2, 2], "reference"))


def test_memory_that_cannot_be_had_is_an_error():
    extent = (1, 2**25, 2**25)
    with pytest.raises(MemoryError):
        native.module().pyramid_cpu(0, False, 1, extent, [((1, 1, 1), 0)], 1)
