"""What an update costs in forward passes of its nets: the units of `work`, by which methods are compared."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

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
    learns.
    """
    method = METHODS[config.method]
    per_image = method.work(method.build_model(config), config)
    return round(config.steps * config.batch_size * per_image)


def with_work_of(first: TrainConfig, config: TrainConfig) -> TrainConfig:
    """`config` with as many updates as make the `work` of `first`, to the nearest; one at least where that has any."""
    steps = max(1, config.steps)
    of_one = work(dataclasses.replace(config, steps=steps)) / steps
    return dataclasses.replace(config, steps=max(min(1, first.steps), round(work(first) / of_one)))
