"""Figures of a model: its samples beside held-out real images, and what it fills in where pixels are hidden."""

from ..sampling.occlusions import occlusion
from .evaluate import Judges, evaluate, fit_judges
from .inpainting import Inpainted, inpaint
from .report import format_report

__all__ = ["Inpainted", "Judges", "evaluate", "fit_judges", "format_report", "inpaint", "occlusion"]
