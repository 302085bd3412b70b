"""What ops of torch are as layers of a graph, by subject."""

from . import choices, elementwise, extremes, norms, pooling, products, shapes  # noqa: F401  (their rules)
from .channels_last import read
from .registry import RULES

__all__ = ["RULES", "read"]
