"""Chains that diverge or overflow 16 bits, with a graph and without."""

import warnings

import pytest
import torch
from helpers.graph_cases import images, net_of, same
from torch import nn

from mgebm_fast.errors import DivergenceError
from mgebm_fast.sampling import Langevin, graphs


def test_a_chain_that_diverges_in_a_graph_names_its_step(traced):
    class Wild(nn.Module):
        def forward(self, x):
            return -((x - 100.0) / 10.0).pow(6).flatten(1).sum(1)

    wild, dynamics = Wild(), Langevin(8, step_size=0.05, noise_scale=0.1)
    calm = torch.full((2, 3, 4, 4), 100.0)
    for _ in range(3):
        dynamics(wild, calm, graph=True)
    with pytest.raises(DivergenceError, match=r"non-finite at step \d+") as caught:
        dynamics(wild, calm + 60.0, graph=True)
    with pytest.raises(DivergenceError) as expected:
        dynamics(wild, calm + 60.0, graph=False)
    assert str(caught.value) == str(expected.value)
    assert torch.isfinite(dynamics(wild, calm, graph=True)).all()


def huge(net, factor):
    """float16 ends at 65504: the first map of pixels of 255 passes it."""
    with torch.no_grad():
        net.layers[0].weight.mul_(factor)


@pytest.mark.parametrize("clamp", [None, (0.0, 255.0)])
def test_an_overflow_in_sixteen_bits_is_seen_and_made_again_in_fp32(clamp):
    net, x = net_of(), images()
    dynamics = Langevin(3, step_size=0.01, noise_scale=1.0, clamp=clamp, grad_clamp=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dynamics(net, x, precision="fp16")
    huge(net, 3e4)
    expected = dynamics(net, x, precision="fp32", seed=4)
    with pytest.warns(UserWarning, match="the fp16 gradient overflowed at step 6; the chain is run again in fp32"):
        got = dynamics(net, x, precision="fp16", seed=4, first_step=6)
    assert torch.equal(got, dynamics(net, x, precision="fp32", seed=4, first_step=6))
    steps = []
    with pytest.warns(UserWarning, match="overflowed at step 0"):
        got = dynamics(net, x, precision="fp16", seed=4, callback=lambda step, state: steps.append(step))
    assert torch.equal(got, expected) and steps == [0, 1, 2]
    with pytest.warns(UserWarning, match="trajectory: .*overflowed"):
        *_, (_, end) = dynamics.trajectory(net, x, precision="fp16", seed=4, every=2)
    assert torch.equal(end, expected)


def test_an_overflow_in_a_graph_is_made_again_too(traced):
    net, x = net_of(), images()
    dynamics = Langevin(3, step_size=0.01, clamp=(0.0, 255.0), grad_clamp=1.0)
    for _ in range(2):
        assert same(net, x, dynamics, precision="fp16")
    huge(net, 3e4)
    with pytest.warns(UserWarning, match="overflowed at step 0"):
        got = dynamics(net, x, seed=0, precision="fp16")
    assert torch.equal(got, dynamics(net, x, seed=0, precision="fp32", graph=False))
    huge(net, 1 / 3e4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(net, x, dynamics, precision="fp16")
    assert len(traced) == 1


def test_the_look_at_a_graph_s_run_can_be_left_to_the_caller(traced):
    net, x = net_of(), images()
    dynamics = Langevin(3, step_size=0.01, clamp=(0.0, 255.0), grad_clamp=1.0)
    expected = dynamics(net, x, seed=0, precision="fp16", graph=False)
    healthy = []
    session = graphs.Session(unread=healthy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for runs in range(3):
            assert torch.equal(dynamics(net, x, seed=0, precision="fp16", graph=session), expected)
            assert [bool(verdict) for verdict in healthy] == [True] * runs  # the first run looks at itself
        huge(net, 3e4)
        dynamics(net, x, seed=0, precision="fp16", graph=session)
    assert [bool(verdict) for verdict in healthy] == [True, True, False]
    with pytest.warns(UserWarning, match="overflowed"):
        dynamics(net, x, seed=0, precision="fp16")
