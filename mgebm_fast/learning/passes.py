"""What an update costs in forward passes of its nets: the units of `work`, by which methods are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig

# In forward passes of the net at hand. A backward pass costs a forward pass for the gradient with respect to the input
# and one for that with respect to the weights.
CHAIN_STEP = 2  # forward, and backward to the input
LEARNING = 3  # forward, and backward to both


def work_of_chains(model: Any, config: TrainConfig) -> float:
    """W of a model whose every net has a chain and learns: Σ (2 K + 6) macs(net)."""
    return sum(
        (CHAIN_STEP * chain.steps + 2 * LEARNING) * net.macs()
        for chain, net in zip(model.langevin, model.nets, strict=True)
    )
