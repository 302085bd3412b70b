"""pyramid against chained and direct torch pooling (fp32, with the conversion from uint8). Bytes: input, outputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import avg_pool2d

from mgebm_fast import ops

SIZES = (16, 4, 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def bench_pyramid(report, device, dtype):
    n = 256 if device == "cpu" else 21_900 if dtype == torch.uint8 else 5500
    x = torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, device=device).to(dtype)
    for got, size in zip(ops.pyramid(x[:64], SIZES), SIZES):
        expected = x[:64].double().reshape(64, 3, size, 64 // size, size, 64 // size).mean((3, 5)).float()
        torch.testing.assert_close(got, expected, rtol=1.2e-7, atol=0)

    def chained():
        levels = [avg_pool2d(x.float(), 4)]
        for _ in range(2):
            levels.append(avg_pool2d(levels[-1], 4))
        return levels

    def direct():
        image = x.float()
        return [avg_pool2d(image, 64 // size) for size in SIZES]

    moved = x.numel() * x.element_size() + 4 * 3 * n * sum(size * size for size in SIZES)
    case = f"{n}x3x64x64 {str(dtype).removeprefix('torch.')} to 16, 4, 1"
    report(
        "pyramid", case, moved, lambda: ops.pyramid(x, SIZES), chained_pooling_fp32=chained, direct_pooling_fp32=direct
    )
