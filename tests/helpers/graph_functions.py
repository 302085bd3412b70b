"""The numbers of a graph's functions that tests take, and the error of torch's own float32 on a graph."""

from __future__ import annotations

import torch
from torch import Tensor

from mgebm_fast.ops.graph_chain.graph import Graph

NUMBERS = {
    "leaky_relu": (0.2, 0.0), "any_leaky_relu": (-0.3, 0.0), "elu": (1.3, 0.9), "softplus": (1.5, 20.0),
    "power": (3.0, 0.0), "clamp": (-0.7, 0.8), "hardtanh": (-0.7, 0.8), "step": (0.2, 0.0),
    "real_power": (1.5, 0.0),
}  # fmt: skip
DOMAIN = {"log", "sqrt", "root", "real_power"}  # of positive numbers: given a softplus first


def float32_error(graph: Graph, x: Tensor, exact: Tensor) -> float:
    """The error of torch's own float32 on the same layers."""
    leaf = x.clone().requires_grad_()
    own = torch.autograd.grad(graph.energies(leaf).sum(), leaf)[0]
    return float((own.double() - exact).norm())
