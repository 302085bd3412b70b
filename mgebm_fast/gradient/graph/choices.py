"""Rules of what is chosen by constants: an element a sample (a label's score), masks; and softmax, whose logarithm a
cross-entropy takes an element of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.graph_chain import layers
from ..stages import Unreadable
from .rules import constant, rule, shape_of, value
from .shapes import _dims, _logsumexp, _reduced
from .values import GraphBuilder, Value


def _picked(b: GraphBuilder, out: Tensor, x: Value, which: Tensor) -> Value:
    """x[n, which[n]] of every sample n."""
    if not bool((which < x.shape[0]).all() & (which >= 0).all()):
        raise Unreadable(f"{b.name} takes elements counted from the end")
    chosen = F.one_hot(which, x.shape[0]).to(torch.float32)
    scaled = b.affine(x, chosen.reshape(-1, x.shape[0], *[1] * (len(x.shape) - 1)))
    return b.viewed(_reduced(b, out, scaled, 1, mean=False), shape_of(out))


@rule("index")
def _index(b: GraphBuilder, out: Tensor, x: Any, indices: Any) -> Value:
    x = value(b, x)
    indices = [constant(b, i) for i in indices]
    if indices[0] is None:
        return b.linear(x, lambda basis: basis[tuple(slice(None) if i is None else i for i in indices)], shape_of(out))
    every = torch.arange(b.samples)
    if len(indices) == 2 and indices[1] is not None and torch.equal(indices[0], every) and indices[1].dim() == 1:
        return _picked(b, out, x, indices[1].expand(b.samples))
    raise Unreadable(f"{b.name} takes some samples of the batch")


@rule("gather")
def _gather(b: GraphBuilder, out: Tensor, x: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Value:
    x, index = value(b, x), constant(b, index)
    if dim % out.dim() != 1 or tuple(index.shape) != (b.samples, 1, *x.shape[1:]) or len(x.shape) != 1:
        raise Unreadable(f"{b.name} takes other than one feature a sample")
    return _picked(b, out, x, index[:, 0])


@rule("nll_loss_forward")
def _nll_loss(
    b: GraphBuilder, out: Any, x: Any, target: Any, weight: Any, reduction: int, ignore: int
) -> Value:  # log softmax -> (N,)
    if reduction != 0 or weight is not None:
        raise Unreadable(f"{b.name} is a sum over the batch, or has weights")
    target = constant(b, target)
    if target.dim() != 1 or bool((target == ignore).any()):
        raise Unreadable(f"{b.name} leaves samples out")
    return b.affine(_picked(b, out[0], value(b, x), target), -1.0)


@rule("_log_softmax")
def _log_softmax(b: GraphBuilder, out: Tensor, x: Any, dim: int, half_to_float: bool = False) -> Value:
    x = value(b, x)
    if len(x.shape) != 1 or _dims(dim, x) != [0]:
        raise Unreadable(f"{b.name} is over one dimension of a tensor of shape {x.shape}")
    x = b.features(x)
    most = _logsumexp(b, out[:, :1], x, 1, True)
    return b.combined(layers.Add, x, most, -1.0)


@rule("_softmax")
def _softmax(b: GraphBuilder, out: Tensor, x: Any, dim: int, half_to_float: bool = False) -> Value:
    return b.pointwise(_log_softmax(b, out, x, dim), "exp")


@rule("where")
def _where(b: GraphBuilder, out: Tensor, mask: Any, x: Any, y: Any) -> Value:
    mask = constant(b, mask)
    parts: list[Any] = []
    for chosen, part in ((mask, x), (~mask, y)):
        if isinstance(part, Value):
            parts.append(b.affine(b.expanded(part, shape_of(out)), chosen))
        else:
            parts.append(torch.where(chosen, part, 0.0))
            if not bool(torch.isfinite(parts[-1]).all()):
                raise Unreadable(f"{b.name} puts values in that are not finite")
    first, second = parts
    if isinstance(first, Value) and isinstance(second, Value):
        return b.combined(layers.Add, first, second, 1.0)
    return b.affine(first, None, second) if isinstance(first, Value) else b.affine(second, None, first)


@rule("masked_fill")
def _masked_fill(b: GraphBuilder, out: Tensor, x: Any, mask: Any, fill: Any) -> Value:
    fill = constant(b, fill)
    return _where(b, out, mask, fill if isinstance(fill, Tensor) else torch.full((), float(fill)), x)
