"""edge_step_ against torch's data gradient and langevin_step_. Bytes: upstream read, x read and written."""

from __future__ import annotations

import pytest
import torch

from mgebm_fast import ops

CASES = [((1056, 3, 64, 64), 64), ((128, 3, 64, 64), 64), ((128, 3, 16, 16), 96), ((128, 3, 4, 4), 96)]


@pytest.mark.parametrize("shape, out_channels", CASES)
def bench_edge_step(report, device, shape, out_channels):
    if device == "cpu":
        pytest.skip("a kernel of GPUs")
    generator = torch.Generator().manual_seed(0)
    x = 255 * torch.rand(shape, generator=generator).to(device)
    weight = torch.randn(out_channels, shape[1], 5, 5, generator=generator).to(device, torch.float16) / 50
    upstream = torch.randn(shape[0], out_channels, shape[2] // 2, shape[3] // 2, generator=generator)
    upstream = upstream.to(device, torch.float16).to(memory_format=torch.channels_last)
    weights = ops.edge_weights(weight, stride=2, padding=2)
    arguments = dict(step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0), seed=1, step=3)
    few = upstream[:8].contiguous(memory_format=torch.channels_last)
    expected = ops.edge_step_(x[:8].clone(), few, weights, backend="reference", **arguments)
    torch.testing.assert_close(ops.edge_step_(x[:8].clone(), few, weights, **arguments), expected, rtol=0, atol=6e-5)

    source = x.to(torch.float16).to(memory_format=torch.channels_last)
    last = weight.to(memory_format=torch.channels_last)

    def torchs():
        grad = torch.ops.aten.convolution_backward(
            upstream, source, last, None, [2, 2], [2, 2], [1, 1], False, [0, 0], 1, [True, False, False]
        )[0]
        return ops.langevin_step_(x, grad, **arguments)

    moved = upstream.numel() * 2 + x.numel() * 8
    case = f"{'x'.join(map(str, shape))} from {out_channels} fp16 nhwc"
    report("edge_step", case, moved, lambda: ops.edge_step_(x, upstream, weights, **arguments), torch_fp16=torchs)
