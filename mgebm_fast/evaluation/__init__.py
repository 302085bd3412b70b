"""Figures of a model's samples beside those of held-out real images, and their table."""

from .evaluate import evaluate
from .report import format_report

__all__ = ["evaluate", "format_report"]
