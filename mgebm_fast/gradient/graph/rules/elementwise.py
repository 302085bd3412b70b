"""Rules of functions of each number, of sums and products, and of what leaves numbers as they are."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ....ops.graph_chain import layers
from ...builder import Unreadable
from ..values import GraphBuilder, Value
from .registry import rule, shape_of, value

# ---- functions of each number ----


def _function(name: str, function: str, *defaults: float) -> None:
    def apply(b: GraphBuilder, out: Tensor, x: Any, *arguments: Any) -> Value:
        numbers = [*arguments, *defaults[len(arguments) :]]
        return b.pointwise(value(b, x), function, *numbers)

    rule(name)(apply)


for _name, _as, *_defaults in (
    ("relu", "leaky_relu", 0.0), ("leaky_relu", "leaky_relu", 0.01), ("silu", "silu"), ("tanh", "tanh"),
    ("sigmoid", "sigmoid"), ("mish", "mish"), ("abs", "abs"), ("softplus", "softplus", 1.0, 20.0),
    ("hardtanh", "hardtanh", -1.0, 1.0), ("exp", "exp"), ("log", "log"), ("sin", "sin"), ("cos", "cos"),
    ("sqrt", "sqrt"), ("erf", "erf"), ("atan", "arctan"),
):  # fmt: skip
    _function(_name, _as, *_defaults)


@rule("square")
def _square(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.pointwise(value(b, x), "power", 2)


@rule("relu6")
def _relu6(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.pointwise(value(b, x), "hardtanh", 0, 6)


@rule("reciprocal")
def _reciprocal(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.pointwise(value(b, x), "power", -1)


@rule("log1p")
def _log1p(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.pointwise(b.affine(value(b, x), None, 1.0), "log")


@rule("expm1")
def _expm1(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.affine(b.pointwise(value(b, x), "exp"), None, -1.0)


@rule("rsqrt")
def _rsqrt(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.pointwise(b.pointwise(value(b, x), "sqrt"), "power", -1)


@rule("hardsigmoid")
def _hardsigmoid(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.pointwise(b.affine(value(b, x), 1 / 6, 0.5), "hardtanh", 0.0, 1.0)


@rule("hardswish")
def _hardswish(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.combined(layers.Multiply, value(b, x), _hardsigmoid(b, out, x))


@rule("elu")
def _elu(b: GraphBuilder, out: Tensor, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    x = value(b, x)
    if input_scale != 1:  # scale α (e^(s x) − 1) = scale (α s) (e^(s x) − 1) / s with s x for x
        x = b.affine(x, input_scale)
        scale, alpha = scale / input_scale, alpha * input_scale
    return b.pointwise(x, "elu", alpha, scale)


@rule("celu")
def _celu(b: GraphBuilder, out: Tensor, x: Any, alpha: float = 1) -> Value:
    return _elu(b, out, x, alpha, 1, 1 / alpha)


@rule("selu")
def _selu(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return _elu(b, out, x, 1.6732632423543772, 1.0507009873554805)


@rule("gelu")
def _gelu(b: GraphBuilder, out: Tensor, x: Any, *, approximate: str = "none") -> Value:
    return b.pointwise(value(b, x), "gelu" if approximate == "none" else "gelu_tanh")


@rule("log_sigmoid_forward")
def _log_sigmoid(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.affine(b.pointwise(b.affine(value(b, x), -1.0), "softplus", 1, 80), -1.0)


@rule("clamp", "clamp_min", "clamp_max")
def _clamp(b: GraphBuilder, out: Tensor, x: Any, low: Any = None, high: Any = None, **named: Any) -> Value:
    low, high = named.get("min", low), named.get("max", high)
    if b.name.startswith("clamp_max"):
        low, high = None, low
    if any(isinstance(bound, (Tensor, Value)) for bound in (low, high)):
        raise Unreadable(f"{b.name} has a tensor as its bound")
    return b.pointwise(value(b, x), "clamp", -math.inf if low is None else low, math.inf if high is None else high)


@rule("pow")
def _pow(b: GraphBuilder, out: Tensor, x: Any, exponent: Any) -> Value:
    if isinstance(exponent, (Tensor, Value)) or not isinstance(x, Value):
        raise Unreadable(f"{b.name} has a tensor as its exponent")
    if exponent == 0.5:
        return b.pointwise(x, "sqrt")
    if exponent != int(exponent) or abs(exponent) > 64:
        return b.pointwise(x, "real_power", exponent)
    return b.pointwise(x, "power", int(exponent))


@rule("cosh", "sinh")
def _cosh(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    up, down = (b.pointwise(v, "exp") for v in (value(b, x), b.affine(x, -1.0)))
    return b.affine(b.combined(layers.Add, up, down, 1.0 if b.name.startswith("cosh") else -1.0), 0.5)


@rule("softshrink")
def _softshrink(b: GraphBuilder, out: Tensor, x: Any, by: float = 0.5) -> Value:
    return b.combined(layers.Add, value(b, x), b.pointwise(x, "clamp", -by, by), -1.0)


# ---- sums, differences, products ----


@rule("add")
def _add(b: GraphBuilder, out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        return b.combined(layers.Add, x, y, float(alpha))
    if isinstance(x, Value):
        return _shifted(b, out, x, y * alpha)
    return _shifted(b, out, y if alpha == 1 else b.affine(y, alpha), x)


def _shifted(b: GraphBuilder, out: Tensor, x: Value, by: Any) -> Value:
    return b.affine(b.expanded(x, shape_of(out)), None, by)


@rule("sub")
def _sub(b: GraphBuilder, out: Tensor, x: Any, y: Any, *, alpha: float = 1) -> Value:
    if isinstance(x, Value):
        return _add(b, out, x, y, alpha=-alpha)
    return _shifted(b, out, b.affine(y, -float(alpha)), x)


@rule("rsub")
def _rsub(b: GraphBuilder, out: Tensor, x: Any, y: Any, alpha: float = 1) -> Value:
    return _sub(b, out, y, x, alpha=alpha)


@rule("neg")
def _neg(b: GraphBuilder, out: Tensor, x: Any) -> Value:
    return b.affine(value(b, x), -1.0)


@rule("mul")
def _mul(b: GraphBuilder, out: Tensor, x: Any, y: Any) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        return b.pointwise(x, "power", 2) if x == y else b.combined(layers.Multiply, x, y)
    if not isinstance(x, Value):
        x, y = y, x
    return b.affine(b.expanded(x, shape_of(out)), y)


@rule("div")
def _div(b: GraphBuilder, out: Tensor, x: Any, y: Any, *, rounding_mode: Any = None) -> Value:
    if rounding_mode is not None:
        raise Unreadable(f"{b.name} rounds")
    if isinstance(y, Value):
        y = b.pointwise(y, "power", -1)
        return _mul(b, out, x, y)
    return b.affine(b.expanded(x, shape_of(out)), 1.0 / y)


@rule("logaddexp")
def _logaddexp(b: GraphBuilder, out: Tensor, x: Any, y: Any) -> Value:
    return _add(b, out, b.pointwise(_sub(b, out, x, y), "softplus", 1, 80), y)


@rule("lerp")
def _lerp(b: GraphBuilder, out: Tensor, x: Any, y: Any, weight: Any) -> Value:
    return _add(b, out, x, _mul(b, out, _sub(b, out, y, x), weight))


@rule("addcmul", "addcdiv")
def _addcmul(b: GraphBuilder, out: Tensor, x: Any, y: Any, z: Any, *, value: float = 1) -> Value:
    combine = _mul if b.name.startswith("addcmul") else _div
    if isinstance(y, Value) or isinstance(z, Value):
        return _add(b, out, x, combine(b, out, y, z), alpha=value)
    return _add(b, out, x, value * (y * z if combine is _mul else y / z))


# ---- what leaves the numbers as they are ----


@rule("clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy", "positive", "_to_copy", "dropout",
      "feature_dropout")  # fmt: skip
def _same(b: GraphBuilder, out: Tensor, x: Any, *rest: Any, **more: Any) -> Value:
    return value(b, x)
