"""What the tests of graphs run: nets, starts, a module that is no stack, cascades."""

import torch
from torch import nn

from mgebm_fast.models import MultiGrid
from mgebm_fast.nets import multigrid_net
from mgebm_fast.sampling import Langevin, graphs

DYNAMICS = Langevin(3, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))


def net_of(norm="none", size=8, seed=0, **more):
    return multigrid_net(size, norm=norm, variant="compact", width=0.25, seed=seed, **more)


def images(n=5, size=8, seed=0):
    return 255 * torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def change_(module, factor=1.1):
    for parameter in module.parameters():
        parameter.mul_(factor)


def slots(module):
    return list(graphs._slots.get(module, {}).values())


def same(energy, x, dynamics=DYNAMICS, **arguments):
    """Whether a run is bit for bit that of the chain without a graph."""
    arguments = {"seed": 0, **arguments}
    expected = dynamics(energy, x, graph=False, **arguments)
    got = dynamics(energy, x, **arguments)
    return torch.equal(got, expected) and got.stride() == expected.stride()


class Own(nn.Module):
    """No stack of convolutions, and it may look at its numbers."""

    def __init__(self, looks=False):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))
        self.looks = looks

    def forward(self, x):
        if self.looks and float(x.detach().sum()) < 0:
            return x.flatten(1).sum(1)
        return ((x - 100.0) / self.scale).square().flatten(1).sum(1)


def model(norm="none", **more):
    return MultiGrid(
        (1, 2, 4, 8), channels=3, norm=norm, variant="compact", width=0.25, langevin=DYNAMICS, batch_size=5, **more
    )


def cascades(m, start, **arguments):
    """The cascade from its graph, and without one."""
    arguments = {"seed": 3, **arguments}
    return [m.cascade(start, graph=graph, **arguments) for graph in (None, False)]


def colours(n=5, seed=0):
    return 255 * torch.rand(n, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
