"""What a model's features are worth where few labels are known."""

from .few_labels import few_labels
from .net_features import energy_features

__all__ = ["energy_features", "few_labels"]
