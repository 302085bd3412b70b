"""weights_stay: what is made of weights while they stay as they are is made once, and never outlives that time."""

from __future__ import annotations

import torch
from helpers.stacks import images

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient.stack import read
from mgebm_fast.learning.methods.contrast import contrast
from mgebm_fast.ops.conv_chain import packed
from mgebm_fast.ops.conv_chain.sharing import once, weights_stay
from mgebm_fast.sampling import Langevin


def test_it_is_made_once_inside_and_each_time_outside():
    made = []
    for expected in (1, 2):
        once("key", None, lambda: made.append(0))
        assert len(made) == expected
    with weights_stay():
        for _ in range(2):
            once("key", None, lambda: made.append(0))
        once("other", None, lambda: made.append(0))
    assert len(made) == 4
    once("key", None, lambda: made.append(0))
    assert len(made) == 5


def test_chain_and_learning_step_give_the_same_bits_and_pack_fewer_weights(monkeypatch):
    net, observed = mg.nets.multigrid_net(8, 3, variant="compact", norm="none"), images(16, 3, (8, 8))
    packs, module = [], native.module()

    class Counting:
        def __getattr__(self, name):
            return getattr(module, name)

        def conv_chain_pack(self, jobs, threads):
            packs.extend(jobs)
            module.conv_chain_pack(jobs, threads)

    monkeypatch.setattr(packed.native, "module", Counting)

    def update():
        packs.clear()
        chain = Langevin(2, step_size=0.1)(net, observed, seed=0, precision="auto")
        return [*contrast(net, list(net.parameters()), observed, chain, 0.01, "auto")[0], chain], len(packs)

    alone, all_packs = update()
    with weights_stay():
        shared, fewer = update()
    assert fewer < all_packs
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    with torch.no_grad():
        net.layers[1].weight.mul_(1.1)
    assert not torch.equal(update()[0][0], alone[0])


def test_a_net_is_read_once_and_again_outside():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(128, 1), torch.nn.Flatten(0)
    )
    x = images(3, 2, (4, 4))
    with weights_stay():
        assert read(net, x) is read(net, x)
        assert read(net, x[:, :, :2]) is not read(net, x)
    assert read(net, x) is not read(net, x)
