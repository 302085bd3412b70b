"""∇E of the published nets by the native engine against torch's autograd (fp32); "bytes" are the net's weights."""

from __future__ import annotations

import pytest
import torch

from mgebm_fast.gradient import stack
from mgebm_fast.nets import multigrid_net
from mgebm_fast.ops.conv_chain import ConvChain, gradient_reference, has_bfloat


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size, samples", [(4, 100), (16, 64), (64, 32)])
def bench_conv_chain(report, device, size, samples, precision):
    if device != "cpu":
        pytest.skip("a CPU engine")
    if precision == "bf16" and not has_bfloat():
        pytest.skip("no bfloat16 instructions")
    net = multigrid_net(size).requires_grad_(False)
    x = torch.rand(samples, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255
    read = stack.read(net, x)
    chain = ConvChain(read.stages, read.head, bfloat=precision == "bf16")
    few = x[:16]
    expected = gradient_reference(read.stages, read.head, few)
    bound = 0.15 if precision == "bf16" else 4e-3  # a sign turned by rounding moves fp32 by as much
    assert (chain.gradient(few) - expected).norm() < bound * expected.norm()

    def autograd():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(net(leaf).sum(), leaf)[0]

    weights = sum(p.numel() for p in net.parameters()) * 4
    case = f"{samples}x3x{size}x{size} {precision}"
    report("conv_chain", case, weights, lambda: chain.gradient(x), torch_fp32=autograd)
