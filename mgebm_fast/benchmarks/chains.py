"""One case of the table of chains: everybody's gradient is checked, then whole chains are timed in turn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..models import MultiGrid
from ..nets import EnergyNet, multigrid_net
from .cases import Case
from .contenders import SEED, Contender, explain, precision_of
from .gate import check, gradient64, gradient_of, relative_error
from .loops import plain_net
from .peers import BoundLoop
from .timing import Run
from .work import macs_inside


class ChainBench:
    """The nets, the inputs and the float64 gradients of a case."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        ladder = case.sizes if len(case.sizes) > 1 else (1, *case.sizes)
        nets = [multigrid_net(size, width=case.width, norm=case.norm, seed=size) for size in ladder[1:]]
        self.model = MultiGrid(ladder, nets=nets, batch_size=case.batch).to(device)
        self.nets: list[EnergyNet] = [net for net in self.model.nets if isinstance(net, EnergyNet)]
        self.sizes = ladder[1:]
        first = self.model.langevin[0]
        self.dynamics = type(first)(steps=case.steps, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))
        generator = torch.Generator().manual_seed(SEED)
        shapes = [(case.batch, 3, size, size) for size in ladder]
        self.start, *self.inputs = (torch.rand(shape, generator=generator).mul(255).to(device) for shape in shapes)
        self.expected = [gradient64(plain_net(n).double(), x) for n, x in zip(self.nets, self.inputs, strict=True)]

    @property
    def flops(self) -> float:
        """Of one Langevin step a grid: a forward and a data gradient, each as much as a forward."""
        return self.case.batch * sum(4.0 * macs_inside(net) for net in self.nets)

    @property
    def units(self) -> int:
        """Langevin steps in one timing."""
        return self.case.steps

    def prepare(self, contender: Contender) -> tuple[Run, str, float, str]:
        """(what is timed, precision, relative error of the gradient, explanation); raises where it is wrong."""
        loops = [contender.loop(net, plain_net(net)) for net in self.nets]
        explained = explain(contender, self.nets[-1], self.inputs[-1], self.dynamics)
        precision = precision_of(contender, explained, self.device)
        errors = [
            relative_error([gradient_of(loop, x)], [expected])
            for loop, x, expected in zip(loops, self.inputs, self.expected, strict=True)
        ]
        error = max(errors)
        check(error, precision)
        return self._whole(contender, loops), precision, error, str(explained or contender.what)

    def _whole(self, contender: Contender, loops: list[BoundLoop]) -> Run:
        if len(self.case.sizes) == 1:
            return lambda: loops[0](self.inputs[0], self.dynamics)
        if contender.ours:
            return lambda: self.model.cascade(
                self.start, seed=SEED, langevin=self.dynamics, precision=contender.ours
            )  # fmt: skip

        def cascade() -> Tensor:
            x = self.start
            for loop, size in zip(loops, self.sizes, strict=True):
                x = loop(interpolate(x, size=(size, size), mode="nearest"), self.dynamics)
            return x

        return cascade
