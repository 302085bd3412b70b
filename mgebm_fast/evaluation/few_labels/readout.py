"""Classifiers of few labelled images: on frozen features, and of whole nets trained end to end."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nets import ScoreNet
from .net_features import read_maps, top_map

FOLDS = 5
PENALTIES = (1.0, 10.0, 100.0)  # C
WIDTHS = (0.03, 0.1, 0.3, 1.0)  # gamma, features having a total variance of 1: from nearly linear to narrow
INVERSE_STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # C of the logistic regression, on the same scale

STEPS = 300
BATCH = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2


class Scale:
    """Features side by side: each block centred and divided by one number, and a total variance of 1.

    Within a block every coordinate has variance 1 on average over the reference images; none is divided by its own,
    which would raise the units that hardly ever respond to the rank of the others.
    """

    def __init__(
        self,
        reference: Sequence[Tensor],  # of images whose labels nobody looks at, one (N, D) a block
    ) -> None:
        self.centres = [block.mean(0) for block in reference]
        total = sum(block.shape[1] for block in reference)
        self.factors = [
            float((block.var(0, unbiased=False).mean() * total).clamp_min(1e-12).rsqrt()) for block in reference
        ]

    def __call__(self, blocks: Sequence[Tensor]) -> Tensor:  # (N, D)
        parts = zip(blocks, self.centres, self.factors, strict=True)
        return torch.cat([(block - centre.to(block)) * factor for block, centre, factor in parts], 1)


def folds(labels: np.ndarray) -> Any:
    """The stratified folds of the labelled images that settings are chosen by."""
    from sklearn.model_selection import StratifiedKFold

    fewest = int(np.unique(labels, return_counts=True)[1].min())
    return StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=0)


def kernel_predictions(
    labelled: np.ndarray,  # (n, D), of total variance near 1
    labels: np.ndarray,  # (n,)
    test: np.ndarray,  # (N, D)
) -> np.ndarray:  # (N,)
    """A support-vector classifier with the kernel exp(−γ|x − y|²), C and γ chosen by cross-validation on `labels`."""
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    distances = euclidean_distances(labelled, squared=True)
    searches = [
        GridSearchCV(SVC(kernel="precomputed"), {"C": PENALTIES}, cv=folds(labels)).fit(
            np.exp(-width * distances), labels
        )
        for width in WIDTHS
    ]
    best = int(np.argmax([search.best_score_ for search in searches]))
    return searches[best].predict(np.exp(-WIDTHS[best] * euclidean_distances(test, labelled, squared=True)))


def logistic_predictions(labelled: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Multinomial logistic regression, its L2 penalty chosen by cross-validation on `labels`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    # a variance of 1 a coordinate is what the solver's steps are made for
    factor = labelled.shape[1] ** 0.5
    settings = {"C": [c / labelled.shape[1] for c in INVERSE_STRENGTHS]}
    search = GridSearchCV(LogisticRegression(max_iter=2000), settings, cv=folds(labels)).fit(labelled * factor, labels)
    return search.predict(test * factor)


class NetClassifier(nn.Module):
    """The layers of energy nets, each on its own size, and one linear map from all their top maps to the classes.

    The top maps are scaled as frozen ones are, by what the nets compute before training; the linear map starts at 0.
    """

    def __init__(self, nets: Sequence[ScoreNet], classes: int, scale: Scale) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.scale = scale
        features = sum(len(centre) for centre in scale.centres)
        self.head = nn.Linear(features, classes).to(next(self.nets.parameters()).device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:  # one (N, C, s, s) a net -> (N, classes)
        maps = [top_map(net, x) for net, x in zip(self.nets, inputs, strict=True)]
        return self.head(self.scale(maps) * self.head.in_features**0.5)


def net_predictions(
    nets: Sequence[ScoreNet],  # where training begins; they are left as they are
    reference: Sequence[Tensor],  # inputs of images whose labels nobody looks at, one (N, C, s, s) a net
    labelled: Sequence[Tensor],
    labels: np.ndarray,
    test: Sequence[Tensor],
    *,
    seed: int,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = WEIGHT_DECAY,
) -> np.ndarray:  # (N,)
    """Train nets and a linear map on the labelled images alone, all weights at once, and classify `test`.

    Cross-entropy, AdamW on batches of 64, a cosine schedule to 0, no augmentation.
    """
    classes, targets = np.unique(labels, return_inverse=True)
    device = labelled[0].device
    copies = [net.copied().to(device).requires_grad_(True) for net in nets]
    model = NetClassifier(copies, len(classes), Scale(read_maps(readable(copies, reference), reference)))
    known = torch.from_numpy(targets).to(device)
    trained = [p for name, p in model.named_parameters() if ".head." not in name]  # all but the heads of the energies
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    with contextlib.ExitStack() as stack:
        for net in copies:
            stack.enter_context(net.observing())
        for _ in range(steps):
            if len(order) < min(BATCH, len(known)):
                order = torch.randperm(len(known), generator=generator)
            chosen, order = order[:BATCH].to(device), order[BATCH:]
            optimiser.zero_grad()
            F.cross_entropy(model([x[chosen] for x in labelled]), known[chosen]).backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        scores = model.head(
            model.scale(read_maps(readable(copies, reference), test)).to(device) * model.head.in_features**0.5
        )
    return classes[scores.argmax(1).cpu().numpy()]


@torch.no_grad()
def readable(nets: Sequence[ScoreNet], reference: Sequence[Tensor]) -> list[ScoreNet]:
    """The nets under statistics that no batch changes; those of `reference` where they have seen nothing yet."""
    out: list[ScoreNet] = []
    for net, x in zip(nets, reference, strict=True):
        if net.norm == "batch" and not all(int(layer.norm.observed) for layer in net.convolutions if layer.norm):
            net = net.copied().to(x.device)
            with net.observing():
                net(x)
        out.append(net.freeze_norm() if net.norm == "batch" else net)
    return out
