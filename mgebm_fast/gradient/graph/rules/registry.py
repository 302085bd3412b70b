"""What each op of torch is as layers: one rule an op, by its name in torch's dispatcher (aten)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...builder import Unreadable
from ..values import ChannelsLast, GraphBuilder, Value

# Entries of the matrix of a dense layer on each of several rows: most are zeros, which cost as much. Beyond, the rows
# become pixels.
MAX_ROWS = 1 << 13

Rule = Callable[..., Any]  # (builder, result of the op, *its arguments with values in place of tensors) -> Value
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def put(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return put


def shape_of(out: Tensor) -> tuple[int, ...]:
    return tuple(out.shape[1:])


def value(b: GraphBuilder, x: Any) -> Value:
    if not isinstance(x, Value):
        raise Unreadable(f"{b.name} has x in another place than its first argument")
    return x


def constant(b: GraphBuilder, x: Any) -> Any:
    if isinstance(x, (Value, ChannelsLast)):
        raise Unreadable(f"{b.name} has an argument that depends on x where the engine takes a constant")
    return x
