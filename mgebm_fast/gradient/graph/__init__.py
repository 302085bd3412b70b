"""An energy as a graph of layers: read from its own code, and run by the native engine."""

from .cost import fastest, has_large_dense, settled_batch
from .plan import MIN_STEPS, GraphPlan, plan_of, plan_of_stack
from .recorder import read_graph

__all__ = [
    "MIN_STEPS", "GraphPlan", "fastest", "has_large_dense", "plan_of", "plan_of_stack", "read_graph", "settled_batch",
]  # fmt: skip
