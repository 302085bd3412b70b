"""Figures of a model: its samples beside held-out real images, what it fills in, and what its features tell."""

from ..models.occlusions import occlusion
from .by_size import evaluate_by_size, format_by_size
from .evaluate import Judges, evaluate, fit_judges
from .few_labels import energy_features, few_labels
from .inpainting import Inpainted, PickedLength, inpaint, length_images, pick_length
from .report import format_report

__all__ = [
    "Inpainted",
    "Judges",
    "PickedLength",
    "energy_features",
    "evaluate",
    "evaluate_by_size",
    "few_labels",
    "fit_judges",
    "format_by_size",
    "format_report",
    "inpaint",
    "length_images",
    "occlusion",
    "pick_length",
]
