"""The share of pictures that a support-vector classifier of the training pixels recognises with confidence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..data import ImageData
from .platt import PlattSVC

CONFIDENT = 0.9
MAX_IMAGES = 3000
MAX_SIZE = 16


@dataclass(frozen=True)
class Recogniser:
    """A fitted classifier, the classes it tells apart, and the words for what it is."""

    name: str
    labels: tuple[str, ...]  # of each column of the probabilities
    classifier: PlattSVC

    def shares(
        self,
        images: np.ndarray,  # (N, C, S, S) uint8
    ) -> dict[str, float]:
        """label → share of the images whose probability of that class is at least 0.9; they add up to at most 1."""
        probability = self.classifier.predict_proba(_pixels(images))
        confident = probability.max(axis=1) >= CONFIDENT
        best = probability.argmax(axis=1)
        return {label: float((confident & (best == k)).mean()) for k, label in enumerate(self.labels)}

    def guesses(self, images: np.ndarray) -> list[str]:  # (N, C, S, S) uint8
        """The likeliest label of every image, however sure."""
        return [self.labels[k] for k in self.classifier.predict_proba(_pixels(images)).argmax(axis=1)]


def fit_recogniser(train: ImageData, *, seed: int = 0) -> Recogniser:
    """`PlattSVC(C=10, random_state=0)` on the flattened training pixels.

    Its probabilities are Platt's sigmoids of the pairwise decision values, coupled over all pairs of classes; they
    stay undecided on what resembles no class, which calibrated one-against-rest scores do not. Larger sets are cut
    to a stratified 3,000 images and larger images averaged to 16×16, since its time grows with the square of the
    one and with the other. ValueError unless the labels have at least two classes.
    """
    if train.labels is None or len(np.unique(train.labels)) < 2:
        raise ValueError("fit_recogniser: train must have labels of at least two classes, got fewer")
    chosen = _stratified(train.labels, MAX_IMAGES, seed)
    labels = train.labels[chosen]
    classifier = PlattSVC(C=10, random_state=0).fit(_pixels(train.images[chosen]), labels)
    averaged = f" (averaged to {MAX_SIZE}×{MAX_SIZE})" if train.size > MAX_SIZE else ""
    of_all = f" of {len(train)}" if len(chosen) < len(train) else ""
    return Recogniser(
        f"support-vector classifier (C=10, gamma='scale', pairwise Platt probabilities) on the pixels{averaged} of "
        f"{len(chosen)}{of_all} training images; recognised where some class has probability >= {CONFIDENT}",
        tuple(train.class_names[k] if k < len(train.class_names) else str(k) for k in classifier.classes_),
        classifier,
    )


def _stratified(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """At most `limit` indices, in rising order, with each class's share kept and no class lost."""
    if len(labels) <= limit:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    # position of each image within its class, as a fraction of the class: taking the lowest keeps the shares
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members)) / len(members)
    return np.sort(np.argsort(rank, kind="stable")[:limit])


def _pixels(images: np.ndarray) -> np.ndarray:
    """(N, C, S, S) uint8 -> (N, C·s·s) float64 with s at most 16."""
    if images.shape[-1] <= MAX_SIZE:
        return images.reshape(len(images), -1).astype(np.float64)
    chunks = [
        F.adaptive_avg_pool2d(torch.from_numpy(images[i : i + 512].astype(np.float64)), MAX_SIZE).flatten(1).numpy()
        for i in range(0, len(images), 512)
    ]
    return np.concatenate(chunks)
