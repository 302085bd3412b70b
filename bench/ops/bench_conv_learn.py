"""The learning step of the published and the compact nets, 2N samples with opposite signs, against autograd in float32
on the same net. "bytes" are the net's weights, times are of one net's step."""

from __future__ import annotations

import pytest
import torch

import mgebm_fast as mg
from mgebm_fast.gradient.stack import read
from mgebm_fast.ops.conv_chain import prefers_bfloat
from mgebm_fast.ops.conv_learn import conv_learn, conv_learn_reference

# size, channels, variant, norm, N
CASES = [
    (4, 1, "compact", "none", 64), (8, 1, "compact", "none", 64), (8, 3, "compact", "none", 64),
    (16, 3, "compact", "none", 64), (16, 3, "compact", "batch", 64), (32, 3, "compact", "none", 64),
    (4, 3, "B", "batch", 32), (16, 3, "B", "batch", 32), (16, 3, "B", "none", 32), (64, 3, "A", "batch", 32),
    (64, 3, "B", "batch", 32),
]  # fmt: skip


@pytest.mark.parametrize("size, channels, variant, norm, samples", CASES)
def bench_conv_learn(report, device, size, channels, variant, norm, samples):
    if device != "cpu":
        pytest.skip("a CPU engine")
    net = mg.nets.multigrid_net(size, channels, variant=variant, norm=norm)
    x = torch.randn(2 * samples, channels, size, size)
    stack = read(net, x)
    share = torch.full((2 * samples,), 1 / samples)
    share[samples:] *= -1
    arguments = stack.stages, stack.head, x, share, 0.01 * share.abs()
    split = samples if norm == "batch" else None
    few = [*range(8), *range(samples, samples + 8)]  # enough for tiles of bfloat16
    less = *arguments[:2], *(tensor[few] for tensor in arguments[2:])
    expected = conv_learn_reference(*less, 0.0, 8).stages
    for bfloat, bound in {False: 1e-4, prefers_bfloat(): 0.03}.items():
        for found, value in zip(conv_learn(*less, split=8, bfloat=bfloat).stages, expected, strict=True):
            assert (found.weight - value.weight).norm() < bound * value.weight.norm()

    def autograd():
        parts = [net(part) for part in (x.split(samples) if norm == "batch" else (x,))]
        energies = torch.cat(parts)
        loss = (arguments[3] * energies + arguments[4] * energies.square()).sum()
        torch.autograd.grad(loss, list(net.parameters()))

    moved = 4 * sum(parameter.numel() for parameter in net.parameters())
    case = f"{variant} {size}, {channels} channels, norm {norm}, 2 x {samples}"
    others = {"autograd": autograd}
    if prefers_bfloat():
        others["bf16"] = lambda: conv_learn(*arguments, split=split, bfloat=True)
    report("conv_learn", case, moved, lambda: conv_learn(*arguments, split=split), **others)
