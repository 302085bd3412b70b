"""The negative of a score as an energy, in a form that the engine reads."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Negative(nn.Module):
    """E(x) = −f(x). Where f is a module it is a submodule of this one, so that its weights train and move with it."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(f):
            raise TypeError(f"negative: f must be a module or a callable x -> (N,), got {type(f).__name__}")
        self.f = f

    def forward(self, x: Tensor) -> Tensor:  # (N, ...) -> (N,)
        return -self.f(x)


def negative(f: Callable[[Tensor], Tensor]) -> Negative:
    """The energy −f of a score f (N, ...) -> (N,) that is high where data are likely.

    The same function as `lambda x: -f(x)`, but one that the engine reads: where f is a net that runs natively, so does
    its negative.
    """
    return Negative(f)
