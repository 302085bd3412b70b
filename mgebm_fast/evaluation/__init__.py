"""Figures of a model: its samples beside held-out real images, and what it fills in where pixels are hidden."""

from .evaluate import evaluate
from .inpainting import Inpainted, inpaint
from .occlusions import occlusion
from .report import format_report

__all__ = ["Inpainted", "evaluate", "format_report", "inpaint", "occlusion"]
