"""What an update costs in forward passes of its nets: the units of `work`, by which methods are compared, and how many
threads it pays for."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...nets import ScoreNet
from ..config.method import METHODS

if TYPE_CHECKING:
    from ...models import EnergyModel
    from ...sampling import Langevin
    from ..config.train_config import TrainConfig

# In forward passes of the net at hand. A backward pass costs a forward pass for the gradient with respect to the input
# and one for that with respect to the weights.
CHAIN_STEP = 2  # forward, and backward to the input
LEARNING = 3  # forward, and backward to both

# Multiply-accumulates of a forward pass that a thread of its own pays for: one to two milliseconds of a core's work.
WORK_PER_THREAD = 100e6


def passes(chain: Langevin) -> int:
    """2 K + 6: what a chain and learning from its image and an observed one cost."""
    return CHAIN_STEP * chain.steps + 2 * LEARNING


def work_of_chains(model: Any, config: TrainConfig) -> float:
    """W of a model whose every net has a chain and learns: Σ (2 K + 6) macs(net), times the share of the updates that
    the net makes."""
    firsts = config.first_updates() if len(model.nets) > 1 else (0,)  # one net alone begins at once
    return sum(
        passes(chain) * net.macs() * (1 - first / max(1, config.steps))
        for chain, net, first in zip(model.langevin, model.nets, firsts, strict=True)
    )


def costs(model: EnergyModel) -> list[float]:
    """What an update of each net costs, in proportion: its work, or its pixels where a net is a module of one's own."""
    nets, sizes = model.active_nets, model.sizes[1:]
    own = [net for net in nets if isinstance(net, ScoreNet)]
    if len(own) == len(nets):
        return [float(passes(chain) * net.macs()) for chain, net in zip(model.langevin, own)]
    return [float(passes(chain) * size**2) for chain, size in zip(model.langevin, sizes)]


def work(config: TrainConfig) -> int:
    """Multiply-accumulates of all updates of a run, over the whole batch:

        steps · batch_size · W,   W = what `Method.work` counts of one update and one image of the batch

    and of a method of energy nets W = Σ over nets of (2 K + 2 · 3) macs(net), of a net that begins later times the
    share of updates that it makes: two forward passes a step of a chain, and three for learning from an observed image
    and from a synthesised one. A generator counts one forward pass where it proposes an image, three where it learns,
    and two a step of inference of z. Left out: what is no convolution or
    matrix product, data, pictures and checkpoints, and that the lowest layer needs no gradient for its input when it
    learns. Label planes are counted where `config.classes` names the classes: training takes them from the data.
    """
    method = METHODS[config.method]
    per_image = method.work(method.build_model(config), config)
    return round(config.steps * config.batch_size * per_image)


def with_work_of(first: TrainConfig, config: TrainConfig) -> TrainConfig:
    """`config` with as many updates as make the `work` of `first`, to the nearest; one at least where that has any."""
    steps = max(1, config.steps)
    of_one = work(dataclasses.replace(config, steps=steps)) / steps
    return dataclasses.replace(config, steps=max(min(1, first.steps), round(work(first) / of_one)))


def threads_for(model: nn.Module, batch_size: int) -> int:
    """torch's threads, or fewer for nets that are too small for them: one for each 10⁸ multiply-accumulates that the
    largest net's forward pass takes on a batch.

    torch's threads wait for each other by spinning after every operator. A small net gains little by a second one
    (digits, two idle cores: 26 ms an update for 30), and loses all where another process takes a core: 300 ms and more,
    where one thread takes 50 to 66. OMP_NUM_THREADS, if set, stands. The number depends on the model, the batch and
    the machine alone, so that a resumed run gets the same one.
    """
    present = torch.get_num_threads()
    work = [net.macs() * batch_size for net in model.modules() if isinstance(net, ScoreNet)]
    if not work or "OMP_NUM_THREADS" in os.environ:
        return present
    return min(present, max(1, math.ceil(max(work) / WORK_PER_THREAD)))
