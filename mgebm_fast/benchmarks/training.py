"""One case of the table of training: a whole iteration, chains and learning step, against the plain PyTorch one."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from ..data import ImageData
from ..learning import MultiGridTrainer, TrainConfig
from ..learning.config.values import merge
from ..nets import EnergyNet
from .cases import Case
from .contenders import SEED, Contender, explain, precision_of
from .gate import LEARNING_LIMITS, check, gradient64, gradient_of, relative_error
from .loops import PlainTrainer, plain_net
from .timing import Run
from .work import macs_inside

_IMAGES = 512
# One noise-free step a grid, and an update that shows the gradient: Δw = −rate·∂loss/∂w.
_RATE = 2.0**10
_PROBE = {
    "langevin": {
        "steps": 1, "noise_std": None, "drift": None, "step_size": 0.3, "noise_scale": 0.0, "grad_clamp": None,
    },
    "optimiser": {"name": "sgd", "lr": _RATE, "momentum": 0.0, "schedule": "constant"},
    "stabilise": {"data_noise": 0.0, "ema": 0.0, "noise_anneal": 1.0},
}  # fmt: skip


class TrainingBench:
    """The configuration, the images and the float64 gradients of a case."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device, self.config = case, device, case.config()
        self.images = _images(self.config)
        self.batch = self.images.batch(slice(0, case.batch))
        self.probe = merge(self.config, _PROBE)
        self.learning = self._change(PlainTrainer(self.probe, device=device, dtype=torch.float64))
        trainer = self._ours(self.config, "fp32")
        self.nets = [net for net in trainer.model.nets if isinstance(net, EnergyNet)]
        self.dynamics = self.config.dynamics()
        generator = torch.Generator().manual_seed(SEED)
        low, high = self.config.value_range
        shapes = [(case.batch, self.config.channels, size, size) for size in self.config.sizes[1:]]
        self.inputs = [(torch.rand(s, generator=generator) * (high - low) + low).to(device) for s in shapes]
        self.expected = [gradient64(plain_net(n).double(), x) for n, x in zip(self.nets, self.inputs, strict=True)]

    @property
    def flops(self) -> float:
        """Of one update: K steps of a forward and a data gradient, and the learning step on two batches."""
        grids = zip(self.nets, self.dynamics, strict=True)
        return self.case.batch * sum((4.0 * chain.steps + 12.0) * macs_inside(net) for net, chain in grids)

    @property
    def units(self) -> int:
        """Parameter updates in one timing."""
        return self.case.updates

    def prepare(self, contender: Contender) -> tuple[Run, str, float, str]:
        """(what is timed, precision, the worst relative error, explanation); raises where it is wrong."""
        explained = explain(contender, self.nets[-1], self.inputs[-1], self.dynamics[-1])
        precision = precision_of(contender, explained, self.device)
        loops = [contender.loop(net, plain_net(net)) for net in self.nets]
        errors = [
            relative_error([gradient_of(loop, x)], [expected])
            for loop, x, expected in zip(loops, self.inputs, self.expected, strict=True)
        ]
        check(max(errors), precision)
        learning = relative_error(self._learn(contender), self.learning)
        check(learning, precision, "weight gradient", LEARNING_LIMITS)
        return self._whole(contender), precision, max(*errors, learning), str(explained or contender.what)

    def _whole(self, contender: Contender) -> Run:
        if contender.ours:
            trainer = self._ours(self.config, contender.ours)
            return lambda: trainer.fit(trainer.iteration + self.case.updates)
        assert contender.plain is not None
        plain = PlainTrainer(self.config, contender.plain(), device=self.device)
        starts = itertools.cycle(range(0, _IMAGES - self.case.batch + 1, self.case.batch))

        def updates() -> None:
            for _ in range(self.case.updates):
                start = next(starts)
                plain.step(self.images.batch(slice(start, start + self.case.batch)))

        return updates

    def _learn(self, contender: Contender) -> list[Tensor]:
        if contender.ours:
            return self._change(self._ours(self.probe, contender.ours))
        assert contender.plain is not None
        return self._change(PlainTrainer(self.probe, contender.plain(), device=self.device))

    def _ours(self, config: TrainConfig, precision: str) -> MultiGridTrainer:
        config = merge(config, {"precision": precision})
        return MultiGridTrainer(None, self.images, config, device=self.device, quiet=True)

    def _change(self, trainer: MultiGridTrainer | PlainTrainer) -> list[Tensor]:
        """∂loss/∂w of every weight, in one order, read off an update: −Δw/rate."""
        ours = isinstance(trainer, MultiGridTrainer)
        nets = list(trainer.model.nets if isinstance(trainer, MultiGridTrainer) else trainer.nets)
        before = [[p.detach().double().clone() for p in net.parameters()] for net in nets]
        trainer.step(self.batch)
        gradients = []
        for net, old in zip(nets, before, strict=True):
            by_update = [(b - p.detach().double()) / _RATE for b, p in zip(old, net.parameters(), strict=True)]
            # Our head holds a score's weights, a plain net's an energy's.
            gradients += [*by_update[:-2], *(-g if ours else g for g in by_update[-2:])]
        return gradients


def _images(config: TrainConfig) -> ImageData:
    """Blotches of colour with noise on them: the content of pictures does not change how long an update takes."""
    random = np.random.default_rng(SEED)
    size = config.sizes[-1]
    coarse = random.integers(0, 256, (_IMAGES, config.channels, config.sizes[1], config.sizes[1]))
    blotches = coarse.repeat(size // config.sizes[1], 2).repeat(size // config.sizes[1], 3)
    noisy = blotches + random.normal(0, 16, blotches.shape)
    return ImageData(noisy.clip(0, 255).astype(np.uint8), name="synthetic")
