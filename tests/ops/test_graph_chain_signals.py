"""A signal ends a chain of graph_chain at once, and x is as it was."""

from __future__ import annotations

import signal
import time

import pytest
import torch
from helpers.stacks import place

from mgebm_fast import native
from mgebm_fast.ops.graph_chain import GraphChain, layers
from mgebm_fast.ops.graph_chain.graph import Graph
from mgebm_fast.ops.graph_chain.layers import Map
from mgebm_fast.ops.update import update

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")


def net(channels: int, size: tuple[int, int]) -> Graph:
    """Two convolutions with SiLU between, and the sum."""
    ones = (1, 1)
    return Graph(Map(3, size), (
        layers.Convolution((0,), Map(channels, size), "a", torch.randn(channels, 3, 3, 3) / 5, None, ones, ones, ones),
        layers.Pointwise((1,), Map(channels, size), "f", "silu"),
        layers.Convolution(
            (2,), Map(channels, size), "b", torch.randn(channels, channels, 3, 3) / 20, None, ones, ones, ones
        ),
        layers.Pointwise((3,), Map(channels, size), "g", "silu"),
        layers.Convolution((4,), Map(1, ()), "c", torch.randn(1, channels, *size), None, ones, (0, 0), ones),
    ))  # fmt: skip


# Chains of a thread's own; more samples than one group holds; all threads on every step of a large map.
@pytest.mark.parametrize("samples, threads, size", [(4, 1, (8, 8)), (70, 2, (8, 8)), (2, 3, (64, 64))])
def test_a_signal_ends_a_chain_and_x_is_as_it_was(samples: int, threads: int, size: tuple[int, int]) -> None:
    chain = GraphChain(net(16, size))
    x = torch.randn(samples, 3, *size)
    before, asked = x.clone(), []

    def handler(*_: object) -> None:
        asked.append(1)
        raise KeyboardInterrupt

    own, count = signal.signal(signal.SIGINT, handler), torch.get_num_threads()
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        torch.set_num_threads(threads)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        started = time.process_time()  # of all threads, so that other processes do not count
        with pytest.raises(KeyboardInterrupt):
            chain.advance_(x, 10**6, update(step_size=0.01, clamp=(-3.0, 3.0)), place())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        torch.set_num_threads(count)
        signal.signal(signal.SIGINT, own)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert torch.equal(x, before)
    assert len(asked) == 1
    assert time.process_time() - started < 2 * threads  # 0.1 s a thread; the chain would take minutes
