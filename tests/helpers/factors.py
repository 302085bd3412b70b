"""A linear factor model x = b + Wz + sε, whose best W is known in closed form, and an energy that is linear in x."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

S, FACTORS = 0.3, 2


def factor_data(n=240, seed=0):
    """n images of 4×4 from x = b + Wz + sε, float32, with orthogonal columns of W of lengths 2.4 and 1.2."""
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.normal(size=(16, FACTORS)))
    weight = directions * np.array([2.4, 1.2])
    x = 0.3 + rng.normal(size=(n, FACTORS)) @ weight.T + S * rng.normal(size=(n, 16))
    return torch.from_numpy(x.astype(np.float32)).reshape(n, 1, 4, 4)


def matrix(model):
    return model.generator.layers[0].weight.detach().double().flatten(1).T  # (16, d)


def angles(a, b):
    """Principal angles between the columns' spans, in degrees."""
    (qa, _), (qb, _) = torch.linalg.qr(a), torch.linalg.qr(b)
    return torch.rad2deg(torch.linalg.svdvals(qa.T @ qb).clamp(max=1).arccos())


def likeliest(x):
    """W of the maximum likelihood of x = b + Wz + sε with s known: U(Λ − s²)^½ of the data's covariance (Tipping and
    Bishop, 1999), float64."""
    values, vectors = torch.linalg.eigh(torch.cov(x.double().flatten(1).T, correction=0))
    return vectors[:, -FACTORS:] * (values[-FACTORS:] - S**2).sqrt()


class Linear(nn.Module):
    """E(x) = −⟨w, x⟩."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 16).reshape(1, 4, 4))

    def forward(self, x):
        return -(x * self.weight).flatten(1).sum(1)
