"""bias_act and its backward against torch: bias, leaky ReLU and its backward. Bytes: each map once, and the bits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mgebm_fast import ops

SHAPES = [(1056, 64, 32, 32), (1056, 256, 8, 8), (128, 64, 32, 32)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_bias_act(report, device, shape, backward):
    if device == "cpu":
        pytest.skip("a kernel of GPUs")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator).to(device, torch.float16).to(memory_format=torch.channels_last)
    bias = torch.randn(shape[1], generator=generator).to(device)
    arguments = dict(activation="leaky_relu", slope=0.2)
    few = z[:8].contiguous(memory_format=torch.channels_last)
    expected, bits = ops.bias_act(few, bias, backend="reference", **arguments)
    got, mask = ops.bias_act(few, bias, **arguments)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(mask, bits)

    out, mask = ops.bias_act(z, bias, **arguments)
    low, per_channel = z.clone(), bias.half().reshape(-1, 1, 1)
    case = f"{'x'.join(map(str, shape))} fp16 nhwc {'backward' if backward else 'forward'}"
    moved = 2 * 2 * z.numel() + mask.numel()
    if backward:
        report(
            "bias_act",
            case,
            moved,
            lambda: ops.bias_act_backward(z, mask, out=out, **arguments),
            torch_fp16=lambda: torch.ops.aten.leaky_relu_backward(z, low, 0.2, True),
        )
    else:
        report(
            "bias_act",
            case,
            moved,
            lambda: ops.bias_act(z, bias, out=out, mask=mask, **arguments),
            torch_fp16=lambda: functional.leaky_relu(z + per_channel, 0.2),
        )
