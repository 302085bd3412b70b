"""One case of the table of chains: everybody's gradient is checked, then whole chains are timed in turn."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from ..models import MultiGrid
from ..nets import EnergyNet, ScoreNet, multigrid_net
from ..sampling import Langevin
from .cases import Case
from .contenders import SEED, Contender, described, explain, precision_of
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
        nets = [
            multigrid_net(size, width=case.width, norm=case.norm, variant=case.variant, seed=size)
            for size in ladder[1:]
        ]
        self.model = MultiGrid(ladder, nets=nets, batch_size=case.batch).to(device)
        self.nets: list[nn.Module] = list(self.model.nets)
        self.sizes = ladder[1:]
        first = self.model.langevin[0]
        self.dynamics = type(first)(steps=case.steps, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))
        generator = torch.Generator().manual_seed(SEED)
        shapes = [(case.batch, 3, size, size) for size in ladder]
        self.start, *self.inputs = (torch.rand(shape, generator=generator).mul(255).to(device) for shape in shapes)
        self.plain: list[nn.Module] = [plain_net(net) if isinstance(net, EnergyNet) else net for net in self.nets]
        self._expect()

    def _expect(self) -> None:
        doubles = [copy.deepcopy(net).double() for net in self.plain]
        self.expected = [gradient64(net, x) for net, x in zip(doubles, self.inputs, strict=True)]

    @property
    def flops(self) -> float:
        """Of one Langevin step a grid: a forward and a data gradient, each as much as a forward."""
        return self.case.batch * sum(4.0 * macs_inside(net) for net in self.nets if isinstance(net, ScoreNet))

    @property
    def units(self) -> int:
        """Langevin steps in one timing."""
        return self.case.steps

    def prepare(self, contender: Contender) -> tuple[Run, str, float, str]:
        """(what is timed, precision, relative error of the gradient, explanation); raises where it is wrong."""
        loops = [contender.loop(net, copy.deepcopy(plain)) for net, plain in zip(self.nets, self.plain, strict=True)]
        explained = explain(contender, self.nets[-1], self.inputs[-1], self.dynamics)
        precision = precision_of(contender, explained, self.device)
        errors = [
            relative_error([gradient_of(loop, x)], [expected])
            for loop, x, expected in zip(loops, self.inputs, self.expected, strict=True)
        ]
        error = max(errors)
        check(error, precision)
        return self._whole(contender, loops), precision, error, described(contender, explained)

    def _whole(self, contender: Contender, loops: list[BoundLoop]) -> Run:
        if len(self.nets) == 1:
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


class PeerBench(ChainBench):
    """One energy that every package takes, in its own code: a residual net on images, or an MLP on points of the plane.

    No reference and no bound on gradients, which not all of them have.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        if case.sizes:
            net: nn.Module = multigrid_net(case.sizes[-1], width=case.width, variant="residual", seed=SEED)
            shape: tuple[int, ...] = (case.batch, 3, case.sizes[-1], case.sizes[-1])
        else:
            hidden, shape = max(1, int(128 * case.width)), (case.batch, 2)
            layers = [nn.Linear(2, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)]
            net = nn.Sequential(*layers, nn.Flatten(0))
            for parameter in net.parameters():
                nn.init.normal_(parameter, 0.0, 0.2, generator=torch.Generator().manual_seed(SEED))
        self.nets, self.plain = [net.to(device)], [net]
        self.inputs = [torch.rand(shape, generator=torch.Generator().manual_seed(SEED)).mul(2).sub(1).to(device)]
        self.dynamics = Langevin(steps=case.steps, step_size=0.05, clamp=(-1.0, 1.0))
        self._expect()

    @property
    def flops(self) -> float:
        """Of one step: a forward and a data gradient, each as much as a forward."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.plain[0](self.inputs[0])
        return 2.0 * counter.get_total_flops()
