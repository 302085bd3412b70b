"""langevin_step_ against the obvious torch expression (fp32). Bytes: x read and written, grad read."""

from __future__ import annotations

import pytest
import torch

from mgebm_fast import ops

CASES = {
    "cpu": [((100, 3, 64, 64), torch.float32), ((100, 3, 64, 64), torch.bfloat16), ((100, 3, 4, 4), torch.float32)],
    "cuda": [
        ((7200, 3, 64, 64), torch.float32),
        ((7200, 3, 64, 64), torch.float16),
        ((128, 3, 64, 64), torch.float32),
        ((128, 3, 4, 4), torch.float32),
    ],
}
STEP, SIGMA = 0.3, 50.0


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("index", range(4))
def bench_langevin_step(report, device, layout, index):
    if index >= len(CASES[device]):
        pytest.skip("no such case on this device")
    shape, dtype = CASES[device][index]
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    x = torch.rand(shape, generator=generator).mul_(255).to(device).contiguous(memory_format=memory_format)
    grad = torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=memory_format)
    arguments = dict(step_size=STEP, reference_std=SIGMA, clamp=(0.0, 255.0), seed=1, step=3)
    few, few_grad = x[:32].clone(memory_format=memory_format), grad[:32].contiguous(memory_format=memory_format)
    expected = ops.langevin_step_(few.clone(), few_grad, backend="reference", **arguments)
    torch.testing.assert_close(ops.langevin_step_(few, few_grad, **arguments), expected, rtol=0, atol=3e-5)

    a, b, s = STEP**2 / 2, STEP**2 / 2 / SIGMA**2, STEP
    moved = x.numel() * (8 + grad.element_size())
    case = f"{'x'.join(map(str, shape))} {layout} grad {str(dtype).removeprefix('torch.')}"
    report(
        "langevin_step",
        case,
        moved,
        lambda: ops.langevin_step_(x, grad, **arguments),
        torch_fp32=lambda: (x - a * grad - b * x + s * torch.randn_like(x)).clamp(0.0, 255.0),
    )
