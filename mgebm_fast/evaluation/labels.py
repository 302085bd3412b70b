"""The classes of images, by their names and as the numbers of a class-conditional model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..data import ImageData
from ..models import Model


def names_of(data: ImageData, chosen: np.ndarray | slice) -> list[str]:
    """The classes of some images by name; none where the data have no labels."""
    return [] if data.labels is None else [data.class_names[k] for k in data.labels[chosen]]


def known(model: Model, names: Sequence[str]) -> bool:
    """Whether these are names of classes of the model; not where there are none."""
    return bool(names) and set(names) <= set(getattr(model, "classes", ()))


def labels_of(model: Model, data: ImageData, chosen: np.ndarray | slice) -> Tensor | None:
    """The classes of some images as numbers in the model's `classes`, (n,) int64 on its device; None where the model
    has no classes, or an image is of none of them."""
    names = names_of(data, chosen)
    if not known(model, names):
        return None
    numbers = {name: k for k, name in enumerate(getattr(model, "classes", ()))}
    return torch.tensor([numbers[name] for name in names], device=model.colours.device)
