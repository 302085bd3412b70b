"""conv_chain on a GPU: the kernel's own source, run on the host with its shared memory checked, against float64.

Random nets are compared with float64 in which weights and maps are rounded as the kernel rounds them, since in a net of
a few units one sign that a rounding turns changes much; nets that are used, with float64 itself.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from helpers.cases import thorough
from helpers.resident_host import advanced, gradient, launch, loaded, place_of, random_stack, rounded_gradient

from mgebm_fast import noise
from mgebm_fast.gradient.stack import read
from mgebm_fast.nets import ResidualNet, multigrid_net
from mgebm_fast.ops import upsample
from mgebm_fast.ops.conv_chain import conv_chain_reference, gradient_reference, resident
from mgebm_fast.ops.conv_chain.resident_layout import Layout
from mgebm_fast.ops.edge_step import NO_BAD_STEP
from mgebm_fast.ops.update import Update

LAW = Update(0.01, 0.05, 0.5, 0.1, 0.8, -1.0, 1.0)


def compact(size: int, channels: int = 3):
    net = multigrid_net(size, channels, norm="none", variant="compact", seed=size)
    return read(net, torch.zeros(2, channels, size, size))


@pytest.mark.parametrize("part", range(5))
def test_random_stacks(part):
    """Gradient, and three masked steps; the same bits for other groupings of samples, and step by step."""
    for seed in range(60 * part, 60 * part + thorough(10, 60)):
        stages, head, shape = random_stack(seed)
        numbers = torch.Generator().manual_seed(seed)
        x = torch.rand(1 + seed % 7, *shape, generator=numbers) * 2 - 1
        samples = 1 + seed % 3
        expected = rounded_gradient(stages, head, x)
        error = float((gradient(stages, head, x, samples=samples, seed=seed) - expected).norm())
        assert error <= 2e-3 * (float(expected.norm()) + math.sqrt(len(x))), (seed, error)

        mask = torch.rand(x.shape, generator=numbers) < 0.7 if seed % 2 else None
        ended = advanced(stages, head, x, LAW, samples=samples, steps=3, mask=mask, seed=seed)
        reference = x.clone()
        conv_chain_reference(stages, head, reference, steps=3, numbers=LAW, place=place_of(x), mask=mask)
        assert float((ended - reference).abs().max()) < 0.05, seed
        again = x
        for step in range(3):
            again = advanced(
                stages,
                head,
                again,
                LAW,
                samples=1 + samples % 3,
                steps=1,
                step=step,
                mask=mask,
                seed=seed + 1,
                blocks=2,
            )
        assert torch.equal(again, ended), seed


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_compact_nets_fit_a_block(size):
    stack = compact(size)
    assert resident.why_not(stack.stages) == ""
    x = torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = gradient_reference(stack.stages, stack.head, x)
    for samples in (1, 2):
        error = (gradient(stack.stages, stack.head, x, samples=samples) - expected).norm() / expected.norm()
        assert error < 0.08  # signs of units near 0 flip


RESIDUAL = [
    # size, channels, stages, options
    (8, 3, (32, 64), {}),  # as `multigrid_net` makes it
    (4, 3, (32, 64), {"activation": "leaky_relu"}),
    (5, 1, (12, 20, 8), {"activation": "elu", "head": "mean"}),
    ((7, 6), 2, (10, 10), {"depth": 2, "activation": "leaky_relu", "head": "sum"}),
    (9, 3, (8, 24, 24), {"ndim": 1, "spectral_norm": True}),
    ((4, 3, 5), 1, (9, 9), {"ndim": 3, "activation": "relu"}),
]


@pytest.mark.parametrize("size, channels, widths, options", RESIDUAL)
def test_residual_blocks_and_average_pooling(size, channels, widths, options):
    """The gradient against autograd's of the net's own code, in float64; steps whatever the samples of a block are."""
    net = ResidualNet(size, channels, widths, seed=1, **options)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(len(name)))
    x = torch.rand(5, channels, *net.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    stack = read(net, x, blocks=True)
    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(copy.deepcopy(net).double()(leaf).sum(), leaf)
    assert float((gradient_reference(stack.stages, stack.head, x) - expected).norm() / expected.norm()) < 1e-6
    got = gradient(stack.stages, stack.head, x, samples=2)
    smooth = net.activation in ("silu", "elu")
    assert float((got - expected).norm() / expected.norm()) < (5e-3 if smooth else 0.08)  # signs of units near 0 flip
    ended = advanced(stack.stages, stack.head, x, LAW, samples=2, steps=2)
    again = x
    for step in range(2):
        again = advanced(stack.stages, stack.head, again, LAW, samples=1 + step, steps=1, step=step, seed=5, blocks=2)
    assert torch.equal(again, ended)


def test_a_residual_net_whose_layers_were_changed_is_not_read():
    def changed(change):
        net = ResidualNet(4, 1, (4, 4))
        change(net)
        return read(net, torch.zeros(2, 1, 4, 4), blocks=True)

    assert "layer layers.1.second is not" in changed(lambda net: setattr(net.layers[1].second, "activation", "relu"))
    assert "layer layers.1.first is not" in changed(lambda net: setattr(net.layers[1].first, "stride", 2))
    assert "layer layers.3 is not" in changed(lambda net: net.layers.__setitem__(3, torch.nn.SiLU()))
    assert "takes labels" in read(ResidualNet(4, 1, (4,), labels=2), torch.zeros(2, 1, 4, 4), blocks=True)
    assert "is not an EnergyNet" in read(ResidualNet(4, 1, (4,)), torch.zeros(2, 1, 4, 4))


def test_what_does_not_fit_is_named():
    assert "KiB of shared memory" in resident.why_not(compact(32).stages)
    batch = read(multigrid_net(4, 3, norm="batch"), torch.zeros(2, 3, 4, 4))
    assert "layer layers.0 normalises by batch statistics" in resident.why_not(batch.stages)
    for size, needed in ((8, ""), (4, ""), (2, ""), (16, "KiB of shared memory, of 227")):
        net = multigrid_net(size, 3, variant="residual")
        reason = resident.why_not(read(net, torch.zeros(2, 3, size, size), blocks=True).stages)
        assert needed in reason and bool(reason) == bool(needed), (size, reason)
    stack = compact(4)
    assert "up to 16 layers" in resident.why_not(stack.stages * 6)
    negative = [dataclasses.replace(stage, slope=-0.5) for stage in stack.stages]
    assert "slope -0.5" in resident.why_not(negative)


def test_a_cascade_is_one_launch():
    """1 → 2 → 4 → 8 → 16: each net from the replicated result of the one before, as four launches make them, whatever
    the samples that a block has at a time; with the noise of each grid's own stream and first step."""
    sizes, at_a_time = (2, 4, 8, 16), (3, 2, 2, 1)
    stacks = [compact(size) for size in sizes]
    start = torch.rand(5, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    chains = [loaded(s.stages, s.head, samples) for s, samples in zip(stacks, at_a_time, strict=True)]
    steps = (3, 2, 2, 1)
    outs, nets, before = [], [], start
    for grid, (size, chain, count) in enumerate(zip(sizes, chains, steps, strict=True), start=1):
        out = torch.full((5, 3, size, size), math.nan)
        place = place_of(out, step=7 * count, stream=noise.stream(noise.Purpose.SAMPLING, grid))
        nets.append(chain.arguments(before, out, steps=count, numbers=LAW, place=place))
        outs.append(out)
        before = out
    assert launch(chains, nets, 5, blocks=2) == NO_BAD_STEP
    x = start
    for grid, (size, stack, count, out) in enumerate(zip(sizes, stacks, steps, outs, strict=True), start=1):
        x = advanced(stack.stages, stack.head, upsample(x, size // x.shape[-1]), LAW, samples=1, steps=count,
                     step=7 * count, stream=noise.stream(noise.Purpose.SAMPLING, grid))  # fmt: skip
        assert torch.equal(out, x)


def test_numbers_from_memory_vary_by_step():
    stack = compact(4)
    x = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    laws = [dataclasses.replace(LAW, noise_std=0.05 / (1 + k), drift=0.01 * k) for k in range(3)]
    table = torch.tensor([[law.arguments[:3]] for law in laws])
    chain, out = loaded(stack.stages, stack.head, 2), torch.empty_like(x)
    varying = dataclasses.replace(LAW, drift=math.nan, noise_std=math.nan, inverse_variance=math.nan, table=table)
    net = chain.arguments(x, out, steps=3, numbers=varying, place=place_of(x))
    assert launch([chain], [net], 3) == NO_BAD_STEP
    for step, law in enumerate(laws):
        x = advanced(stack.stages, stack.head, x, law, samples=2, steps=1, step=step)
    assert torch.equal(out, x)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_overflow_is_noted_at_its_first_step(layer):
    """Of any layer, on the way up: slopes alone would not tell."""
    stack = compact(4)
    stages = list(stack.stages)
    stages[layer] = dataclasses.replace(stages[layer], bias=torch.full_like(stages[layer].bias, 1e38))
    x = torch.rand(3, 3, 4, 4)
    chain, out = loaded(stages, stack.head, 1), torch.empty_like(x)
    net = chain.arguments(x, out, steps=4, numbers=LAW, place=place_of(x, step=7))
    assert launch([chain], [net], 3) == (NO_BAD_STEP if layer == 2 else 7)  # the top is float32


def test_samples_a_block_follow_the_batch():
    stages = compact(8).stages
    few, many = (resident.best_samples(stages, batch) for batch in (132, 4096))
    assert few == 1 and many > 2
    assert Layout(stages, many).shared_bytes <= resident.H100.shared_bytes
