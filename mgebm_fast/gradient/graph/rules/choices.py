"""Rules of what is chosen: an element a sample (a label's score), masks, comparisons; and of losses of each element."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....ops.graph_chain import layers
from ...builder import Unreadable
from ..values import GraphBuilder, Value
from .elementwise import _add, _mul, _sub
from .registry import constant, rule, shape_of, value
from .shapes import _dims, _log_of_sums, _reduced


def _picked(b: GraphBuilder, out: Tensor, x: Value, which: Tensor) -> Value:
    """x[n, which[n]] of every sample n."""
    if not bool((which < x.shape[0]).all() & (which >= 0).all()):
        raise Unreadable(f"{b.name} takes elements counted from the end")
    chosen = F.one_hot(which, x.shape[0]).to(torch.float32)
    scaled = b.affine(x, chosen.reshape(-1, x.shape[0], *[1] * (len(x.shape) - 1)))
    return b.viewed(_reduced(b, out, scaled, 1, mean=False), shape_of(out))


def _by_rows(b: GraphBuilder, index: Tensor) -> None:
    """Notes an index of other samples than are read: torch takes one of fewer."""
    b.by_sample = b.by_sample or index.dim() > 0 and len(index) != b.samples


@rule("index")
def _index(b: GraphBuilder, out: Tensor, x: Any, indices: Any) -> Value:
    x = value(b, x)
    indices = [constant(b, i) for i in indices]
    if indices[0] is None:
        return b.moved(x, lambda basis: basis[tuple(slice(None) if i is None else i for i in indices)], shape_of(out))
    _by_rows(b, indices[0])
    every = torch.arange(b.samples)
    if len(indices) == 2 and indices[1] is not None and torch.equal(indices[0], every) and indices[1].dim() == 1:
        return _picked(b, out, x, indices[1].expand(b.samples))
    raise Unreadable(f"{b.name} takes some samples of the batch")


@rule("gather")
def _gather(b: GraphBuilder, out: Tensor, x: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Value:
    x, index = value(b, x), constant(b, index)
    _by_rows(b, index)
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
    if _dims(dim, x) != [len(x.shape) - 1]:
        raise Unreadable(f"{b.name} is over one dimension of a tensor of shape {x.shape}")
    x = b.features(x)
    most = _log_of_sums(b, x, -1, (*x.shape[:-1], 1))
    return b.combined(layers.Add, x, most, -1.0)


@rule("_softmax", "_safe_softmax")
def _softmax(b: GraphBuilder, out: Tensor, x: Any, dim: int, *rest: Any) -> Value:
    return b.pointwise(_log_softmax(b, out, x, dim), "exp")


# Ops that give true or false: 1 or 0.
TRUTHS = frozenset("gt ge lt le logical_not bitwise_not logical_and bitwise_and logical_or bitwise_or".split())


@rule("gt", "ge", "lt", "le")
def _compared(b: GraphBuilder, out: Tensor, x: Any, y: Any) -> Value:
    kind = b.name.split()[0]
    if isinstance(x, Value) and not isinstance(y, (Value, Tensor)):
        above, bound = b.expanded(x, shape_of(out)), float(y)
    else:
        above, bound = _sub(b, out, x, y), 0.0
    step = b.pointwise(above, "step", bound, kind in ("ge", "lt"))
    return step if kind in ("gt", "ge") else _not(b, out, step)


@rule("logical_not", "bitwise_not")
def _not(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.affine(b.affine(value(b, x), -1.0), None, 1.0)


@rule("logical_and", "bitwise_and")
def _and(b: GraphBuilder, out: Tensor, x: Any, y: Any) -> Value:
    return _mul(b, out, x, y)


@rule("logical_or", "bitwise_or")
def _or(b: GraphBuilder, out: Tensor, x: Any, y: Any) -> Value:
    neither = _mul(b, out, *(_not(b, out, v) if isinstance(v, Value) else ~v for v in (x, y)))
    return _not(b, out, neither)


@rule("sign")
def _sign(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    up, down = (b.pointwise(v, "step") for v in (value(b, x), b.affine(x, -1.0)))
    return b.combined(layers.Add, up, down, -1.0)


@rule("where")
def _where(b: GraphBuilder, out: Tensor, mask: Any, x: Any, y: Any) -> Value:
    total: Value | None = None
    for chosen, part in ((mask, x), (_not(b, out, mask) if isinstance(mask, Value) else ~mask, y)):
        if not isinstance(part, Value) and not isinstance(chosen, Value):
            part = torch.where(chosen, part, 0.0)
            chosen = None
        if not isinstance(part, Value) and not bool(torch.isfinite(part).all()):
            raise Unreadable(f"{b.name} puts values in that are not finite")
        if chosen is not None:
            part = _mul(b, out, part, chosen)
        total = part if total is None else _add(b, out, total, part)
    return value(b, total)


@rule("masked_fill")
def _masked_fill(b: GraphBuilder, out: Tensor, x: Any, mask: Any, fill: Any) -> Value:
    fill = constant(b, fill)
    return _where(b, out, mask, fill if isinstance(fill, Tensor) else torch.full((), float(fill)), x)


@rule("_prelu_kernel")
def _prelu(b: GraphBuilder, out: Tensor, x: Any, weight: Any) -> Value:
    x = value(b, x)
    above = b.pointwise(x, "leaky_relu", 0.0)
    return _add(b, out, above, b.affine(_sub(b, out, x, above), constant(b, weight)))


# ---- losses of each element ----


def _difference(b: GraphBuilder, out: Tensor, x: Any, target: Any, reduction: int) -> Value:
    if reduction != 0:
        raise Unreadable(f"{b.name} is a sum over the batch")
    return _sub(b, out, x, target)


@rule("mse_loss")
def _mse_loss(b: GraphBuilder, out: Tensor, x: Any, target: Any, reduction: int = 1) -> Value:
    return b.pointwise(_difference(b, out, x, target, reduction), "power", 2)


@rule("huber_loss", "smooth_l1_loss")
def _huber_loss(b: GraphBuilder, out: Tensor, x: Any, target: Any, reduction: int = 1, delta: float = 1.0) -> Value:
    apart = _difference(b, out, x, target, reduction)
    if delta <= 0:
        return b.pointwise(apart, "abs")
    inside = b.pointwise(apart, "clamp", -delta, delta)  # c: the loss is c (d - c / 2)
    loss = b.combined(layers.Multiply, inside, b.combined(layers.Add, apart, inside, -0.5))
    return b.affine(loss, 1 / delta) if b.name.startswith("smooth") else loss


@rule("binary_cross_entropy_with_logits")
def _logistic_loss(
    b: GraphBuilder, out: Tensor, x: Any, target: Any, weight: Any = None, positive: Any = None, reduction: int = 1
) -> Value:
    if reduction != 0 or weight is not None or positive is not None or isinstance(target, Value):
        raise Unreadable(f"{b.name} is a sum over the batch, has weights, or a target that depends on x")
    return _sub(b, out, b.pointwise(value(b, x), "softplus", 1, 80), b.affine(x, target))


@rule("_cdist_forward")
def _distances(b: GraphBuilder, out: Tensor, x: Any, y: Any, power: float, mode: Any) -> Value:
    x, y = (x, y) if isinstance(x, Value) else (y, x)
    if power != 2 or not isinstance(y, Tensor) or len(x.shape) != 1 or y.dim() != 2 or out.shape[0] != b.samples:
        raise Unreadable(f"{b.name} is no Euclidean distance between samples and constants")
    apart = b.affine(b.moved(x, lambda basis: basis[:, None].expand(-1, *y.shape), tuple(y.shape)), None, -y)
    return b.pointwise(_reduced(b, out, b.pointwise(apart, "power", 2), 2, mean=False), "root")
