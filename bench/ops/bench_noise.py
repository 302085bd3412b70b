"""noise against torch.randn and torch.rand (fp32). Bytes: 4 an element, written."""

from __future__ import annotations

import pytest
import torch

from mgebm_fast import ops

SHAPES = {"cpu": [(100, 3, 64, 64), (100, 3, 4, 4)], "cuda": [(5600, 3, 64, 64), (128, 3, 64, 64), (128, 3, 4, 4)]}


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("index", range(3))
def bench_noise(report, device, distribution, index):
    if index >= len(SHAPES[device]):
        pytest.skip("no such shape on this device")
    shape = SHAPES[device][index]
    arguments = dict(seed=1, distribution=distribution, device=device)
    small = (min(shape[0], 64), *shape[1:])
    expected = ops.noise(small, step=2, backend="reference", **arguments)
    torch.testing.assert_close(ops.noise(small, step=2, **arguments), expected, rtol=0, atol=1e-6)
    draw = torch.randn if distribution == "normal" else torch.rand
    report(
        "noise",
        f"{distribution} {'x'.join(map(str, shape))}",
        4 * expected[0].numel() * shape[0],
        lambda: ops.noise(shape, step=2, **arguments),
        torch_fp32=lambda: draw(shape, device=device),
    )
