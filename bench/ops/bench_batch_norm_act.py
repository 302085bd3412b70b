"""batch_norm_act there and back against torch's batch norm and leaky ReLU. Bytes: z read 4 times, 3 maps more."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mgebm_fast import ops
from mgebm_fast.ops.batch_norm_act import workspace

SHAPES = [(128, 64, 32, 32), (128, 512, 4, 4), (1056, 128, 16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def bench_batch_norm_act(report, device, shape):
    if device == "cpu":
        pytest.skip("a kernel of GPUs")
    generator = torch.Generator().manual_seed(0)
    z, grad = (
        torch.randn(shape, generator=generator).to(device, torch.float16).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight, bias = torch.rand(shape[1], generator=generator).to(device), torch.zeros(shape[1], device=device)
    shared = dict(activation="leaky_relu", slope=0.2)
    wanted, exact = ops.batch_norm_act(z, weight, bias, backend="reference", **shared)
    back = ops.batch_norm_act_backward(grad, z, exact, weight, bias, backend="reference", **shared)
    shared["workspace"] = workspace(shape[1], device)
    out, dz = torch.empty_like(z), torch.empty_like(z)

    def ours():
        _, statistics = ops.batch_norm_act(z, weight, bias, out=out, **shared)
        return ops.batch_norm_act_backward(grad, z, statistics, weight, bias, out=dz, **shared)

    ours()
    torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(dz, back, rtol=2e-3, atol=2e-3)

    def torchs():
        leaf = z.detach().requires_grad_()
        y = functional.leaky_relu(functional.batch_norm(leaf, None, None, weight, bias, True), 0.2)
        return torch.autograd.grad(y, leaf, grad)[0]

    # z: statistics, apply, sums, apply; grad: sums, apply; written: y, dz.
    case = f"{'x'.join(map(str, shape))} fp16 nhwc"
    report("batch_norm_act", case, (4 + 2 + 2) * 2 * z.numel(), ours, torch_fp16=torchs)
