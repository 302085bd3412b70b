"""An exponential moving average of a model's parameters, and a context in which the model holds it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn


class Average:
    """w̄ ← w̄ + (1 − d)(w − w̄) after update t (from 0), d = min(decay, (1 + t)/(10 + t)): the first weights fade fast.

    Buffers (running statistics, power iterations) are not averaged: they follow the model.

    Args:
        firsts: the update that parameters begin to learn at, from which their t counts; 0 where they are left out.
    """

    def __init__(self, model: nn.Module, decay: float, firsts: Mapping[nn.Parameter, int] | None = None) -> None:
        self.decay = decay
        self._live = dict(model.named_parameters())
        self._names = list(self._live)
        self._mean = [parameter.detach().clone() for parameter in self._live.values()]
        first_of = [(firsts or {}).get(parameter, 0) for parameter in self._live.values()]
        self.firsts = sorted(set(first_of))  # one a group of parameters that begin together
        self._groups = [[i for i, own in enumerate(first_of) if own == first] for first in self.firsts]

    def shares(self, iteration: int) -> list[float]:
        """1 − d of each group: what the weights after update `iteration` count for; 0 before it begins."""
        own = [iteration - first for first in self.firsts]
        return [0.0 if t < 0 else 1 - min(self.decay, (1 + t) / (10 + t)) for t in own]

    def update(self, iteration: int) -> None:
        """Take in the weights after update `iteration`."""
        self.take(self.shares(iteration))

    @torch.no_grad()
    def take(self, shares: Sequence[float | Tensor]) -> None:
        """Take in the present weights, of each group by its share; 0-dim float32 tensors on their device are not read
        by the host."""
        live: list[Tensor] = list(self._live.values())
        for own, share in zip(self._groups, shares, strict=True):
            means, weights = [self._mean[index] for index in own], [live[index] for index in own]
            if isinstance(share, Tensor):
                torch._foreach_lerp_(means, weights, [share.expand_as(mean) for mean in means])
            else:
                torch._foreach_lerp_(means, weights, share)

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
