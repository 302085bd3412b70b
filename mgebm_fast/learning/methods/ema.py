"""An exponential moving average of a model's parameters, and a context in which the model holds it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Average:
    """w̄ ← w̄ + (1 − d)(w − w̄) after update t (from 0), d = min(decay, (1 + t)/(10 + t)): the first weights fade fast.

    Buffers (running statistics, power iterations) are not averaged: they follow the model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = dict(model.named_parameters())
        self._names = list(self._live)
        self._mean = [parameter.detach().clone() for parameter in self._live.values()]

    def share(self, iteration: int) -> float:
        """1 − d: what the weights after update `iteration` count for."""
        return 1 - min(self.decay, (1 + iteration) / (10 + iteration))

    def update(self, iteration: int) -> None:
        """Take in the weights after update `iteration`."""
        self.take(self.share(iteration))

    @torch.no_grad()
    def take(self, share: float | Tensor) -> None:
        """Take in the present weights; a 0-dim float32 `share` on their device is not read by the host."""
        live: list[Tensor] = list(self._live.values())
        if isinstance(share, Tensor):
            torch._foreach_lerp_(self._mean, live, [share.expand_as(mean) for mean in self._mean])
        else:
            torch._foreach_lerp_(self._mean, live, share)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name; views, not copies."""
        return dict(zip(self._names, self._mean, strict=True))

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over stored averages; a parameter without one starts from its weight."""
        for name, mean in self.state().items():
            mean.copy_(tensors.get(name, self._live[name].detach()))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's parameters hold the averages; after it, their own values again, bit for bit."""
        live = [parameter.detach() for parameter in self._live.values()]
        kept = [tensor.clone() for tensor in live]
        try:
            torch._foreach_copy_(live, self._mean)
            yield
        finally:
            torch._foreach_copy_(live, kept)
