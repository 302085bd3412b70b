"""Replays of CUDA graphs against the same chains without one; on a GPU."""

import pytest
import torch
from helpers.graph_cases import DYNAMICS, Own, cascades, change_, colours, images, model, net_of, slots

from mgebm_fast.sampling import Langevin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("size", [4, 8])
def test_replay_equals_eager_bit_for_bit(norm, precision, size):
    net = net_of(norm, size).cuda()
    for call in range(4):
        x = images(9, size, seed=call).cuda()
        counters = dict(seed=2**64 - 1 - call, first_sample=9 * call, first_step=5 * call)
        expected = DYNAMICS(net, x, graph=False, precision=precision, **counters)
        assert torch.equal(DYNAMICS(net, x, precision=precision, **counters), expected)
        change_(net)
    (slot,) = slots(net)
    assert slot.static is not None and not slot.refusal


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_cascade_s_replay_equals_eager_bit_for_bit(norm):
    m = model(norm).cuda()
    for call in range(4):
        got, expected = cascades(m, colours(seed=call).cuda(), first_step=3 * call)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        change_(m)
    assert slots(m.nets[0])[0].static is not None


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_pipeline_on_streams_draws_the_same_samples(norm):
    m = model(norm).cuda()
    m.set_colours(colours(40).cuda())
    expected = m.sample(40, seed=1, graph=False)
    for _ in range(3):
        assert torch.equal(m.sample(40, seed=1, pipeline=True), expected)


def test_any_module_is_captured_on_request_and_streams_take_turns():
    energy, x = Own().cuda(), images().cuda()
    expected = [DYNAMICS(energy, x, seed=seed, graph=False) for seed in range(6)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    got = []
    for seed in range(6):
        streams[seed % 2].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[seed % 2]):
            got.append(DYNAMICS(energy, x, seed=seed, graph=True))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_memory_of_a_chain_does_not_grow_with_its_steps():
    net, x = net_of("batch").cuda(), images(64).cuda()
    peaks = []
    for steps in (2, 20):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Langevin(steps, step_size=0.3)(net, x, graph=False)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= peaks[0] + 4096
