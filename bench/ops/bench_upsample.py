"""upsample against torch's nearest interpolation (fp32). Bytes: input and output."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from mgebm_fast import ops


@pytest.mark.parametrize("size", [16, 4, 1])
def bench_upsample(report, device, size):
    factor = 4
    n = 256 if device == "cpu" else 5500 * (16 // size) ** 2
    x = torch.randn(n, 3, size, size, device=device)
    assert torch.equal(ops.upsample(x[:64], factor), ops.upsample(x[:64], factor, backend="reference"))
    report(
        "upsample",
        f"{n}x3x{size}x{size} by {factor}",
        x.numel() * 4 * (1 + factor**2),
        lambda: ops.upsample(x, factor),
        interpolate_fp32=lambda: interpolate(x, scale_factor=factor, mode="nearest"),
    )
