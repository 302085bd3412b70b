from __future__ import annotations

import numpy as np
import pytest
import torch

from mgebm_fast import native, ops

OP = "upsample"
CASES = [
    ((5,), 4),
    ((1, 1), 4),
    ((4, 4), 4),
    ((3, 5), (2, 3)),
    ((6, 7), 1),
    ((2, 3, 4), (1, 2, 5)),
    ((16, 16), 4),
    ((3, 3), 8),
]


@pytest.mark.parametrize(("spatial", "factor"), CASES)
def test_replicates(backend, spatial, factor):
    name, device = backend
    x = torch.randn(3, 2, *spatial, generator=torch.Generator().manual_seed(0)).to(device)
    factors = (factor,) * len(spatial) if isinstance(factor, int) else factor
    expected = x.cpu().numpy()
    for axis, f in enumerate(factors, start=2):
        expected = np.repeat(expected, f, axis=axis)
    got = ops.upsample(x, factor, backend=name)
    assert got.is_contiguous() and got.data_ptr() != x.data_ptr()
    assert np.array_equal(got.cpu().numpy(), expected)


def test_instruction_sets_threads_and_layouts_agree(isa, threads):
    x = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    threads(2)
    got = ops.upsample(x.to(memory_format=torch.channels_last), 4, backend="native")
    threads(1)
    native.module().set_isa("portable")
    assert torch.equal(got, ops.upsample(x, 4, backend="native"))


def test_adjoint_is_the_block_sum(backend):
    name, device = backend
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    weight = torch.randn(2, 3, 12, 10, device=device)
    (grad,) = torch.autograd.grad((ops.upsample(x, (3, 2), backend=name) * weight).sum(), x)
    expected = weight.double().reshape(2, 3, 4, 3, 5, 2).sum((3, 5))
    torch.testing.assert_close(grad.double(), expected, rtol=1e-6, atol=1e-6)


def test_empty_batch(backend):
    name, device = backend
    assert ops.upsample(torch.empty(0, 3, 4, 4, device=device), 2, backend=name).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("x", "factor", "message"),
    [
        (torch.zeros(1, 1, 2, 2), 0, "factor must be a positive int or 2 of them, got 0"),
        (torch.zeros(1, 1, 2, 2), 1.5, "factor must be"),
        (torch.zeros(1, 1, 2, 2), (2, 2, 2), "factor must be"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.uint8), 2, "x must be float32, got torch.uint8"),
        (torch.zeros(4, 4), 2, r"x must have shape \(N, C, \*spatial\)"),
    ],
)
def test_bad_arguments_are_named(x, factor, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ops.upsample(x, factor)


def test_opcheck():
    x = torch.randn(2, 1, 3, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.mgebm_fast.upsample.default, (x, [2, 2], "reference"))
