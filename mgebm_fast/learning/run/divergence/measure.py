"""The measure of a state: how far its samples are from held-out images, cheaply, with no feature net."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from ....errors import DivergenceError
from ..distributed import Ranks
from ..rule import UpdateRule


def measured(rule: UpdateRule, reference: Tensor | None) -> float | None:
    """The measure of a state: the energy distance of as many samples to the images `reference`, in the model's units;
    inf where chains diverge, None where there are no samples to have cheaply."""
    if reference is None or len(reference) < 2:
        return None
    try:
        samples = rule.samples(len(reference))
    except DivergenceError:
        return math.inf
    if samples is None or len(samples) < 2:
        return None
    distance = energy_distance(samples, reference)
    return distance if math.isfinite(distance) else math.inf


def measured_together(rule: UpdateRule, reference: Tensor | None, ranks: Ranks) -> float | None:
    """`measured` by the first rank, for all."""
    measure = None
    with ranks.together():
        if ranks.first:
            measure = measured(rule, reference)
    found: float | None = json.loads(ranks.tell(json.dumps(measure)))
    return found


def energy_distance(samples: Tensor, images: Tensor) -> float:  # (N, C, S, S) float32 each, any lengths above 1
    """How far a set of images is from another, with no feature net: the unbiased energy distance

        2 mean |φ(x) − φ(y)| − mean |φ(x) − φ(x′)| − mean |φ(y) − φ(y′)|

    of φ = (pixels, their differences to the neighbours below and to the right). 0 in the mean for two sets of one law;
    its own noise can make it negative. Source: Székely and Rizzo, "Energy statistics" (2013).
    """
    x, y = (_features(images.float().cpu()) for images in (samples, images))
    return float(2 * torch.cdist(x, y).mean() - _within(x) - _within(y))


def error_of(reference: Tensor | None) -> float:
    """What the measure by so many images is off by, about: mean |φ(y) − φ(y′)| / N; 0 where there is none."""
    if reference is None or len(reference) < 2:
        return 0.0
    return float(_within(_features(reference.float().cpu()))) / len(reference)


def _features(images: Tensor) -> Tensor:  # (N, C, *size) -> (N, d)
    steps = [images.diff(dim=dim) for dim in range(2, images.dim())]
    return torch.cat([part.flatten(1) for part in (images, *steps)], 1)


def _within(x: Tensor) -> Tensor:
    return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))
