"""The functions of single numbers that a graph has, with their references."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _power(x: Tensor, a: float, b: float) -> Tensor:
    return x ** int(a)


# Name -> (its number in graph_chain.h, its reference of (x, a, b)).
FUNCTIONS: dict[str, tuple[int, Callable[[Tensor, float, float], Tensor]]] = {
    "leaky_relu": (1, lambda x, a, b: F.leaky_relu(x, a)),
    "silu": (2, lambda x, a, b: F.silu(x)),
    "elu": (3, lambda x, a, b: b * F.elu(x, a)),
    "gelu": (4, lambda x, a, b: F.gelu(x)),
    "gelu_tanh": (5, lambda x, a, b: F.gelu(x, approximate="tanh")),
    "softplus": (6, lambda x, a, b: F.softplus(x, a, b)),
    "tanh": (7, lambda x, a, b: torch.tanh(x)),
    "sigmoid": (8, lambda x, a, b: torch.sigmoid(x)),
    "mish": (9, lambda x, a, b: F.mish(x)),
    "abs": (10, lambda x, a, b: x.abs()),
    "power": (11, _power),
    "clamp": (12, lambda x, a, b: x.clamp(a, b)),
    "hardtanh": (13, lambda x, a, b: F.hardtanh(x, a, b)),
    "exp": (14, lambda x, a, b: x.exp()),
    "log": (15, lambda x, a, b: x.log()),
    "sin": (16, lambda x, a, b: x.sin()),
    "cos": (17, lambda x, a, b: x.cos()),
    "sqrt": (18, lambda x, a, b: x.sqrt()),
    "any_leaky_relu": (19, lambda x, a, b: F.leaky_relu(x, a)),  # also with a < 0
    "root": (20, lambda x, a, b: x.masked_fill(x == 0, 1).sqrt().masked_fill(x == 0, 0)),  # slope 0 at 0
    "step": (21, lambda x, a, b: ((x - a).sign() + (b != 0)).clamp(0, 1)),  # x > a, with b x >= a
    "erf": (22, lambda x, a, b: x.erf()),
    "arctan": (23, lambda x, a, b: x.atan()),
    "real_power": (24, lambda x, a, b: x**a),
}
