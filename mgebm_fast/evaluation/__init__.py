"""Figures of a model: its samples beside held-out real images, what it fills in, and what its features tell."""

from ..sampling.occlusions import occlusion
from .evaluate import Judges, evaluate, fit_judges
from .few_labels import few_labels
from .inpainting import Inpainted, inpaint
from .net_features import energy_features
from .report import format_report

__all__ = [
    "Inpainted",
    "Judges",
    "energy_features",
    "evaluate",
    "few_labels",
    "fit_judges",
    "format_report",
    "inpaint",
    "occlusion",
]
