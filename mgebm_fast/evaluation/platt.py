"""A support-vector classifier with pairwise Platt probabilities, as libsvm computes them.

scikit-learn offers this as `SVC(probability=True)` up to 1.10, and removes it in 1.11. Here its `SVC` gives decision
values alone; folds, sigmoids and coupling are computed by libsvm's recipe, so that probabilities are those on record.

Sources: Platt (Advances in Large Margin Classifiers, 1999); Lin, Lin, Weng (Machine Learning 68, 2007), Newton's method
for the sigmoid; Wu, Lin, Weng (JMLR 5, 2004), the coupling of pairs (their second method).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

_FOLDS = 5
_LEAST = 1e-7  # pairwise probabilities are kept this far from 0 and 1
_NEWTON_STEPS = 100


class PlattSVC:
    """`SVC(C=C, gamma="scale", probability=True, random_state=random_state)` for float64 X (N, D) and labels (N,)."""

    def __init__(self, C: float, random_state: int) -> None:
        self.C, self.random_state = C, random_state

    def fit(self, X: np.ndarray, y: np.ndarray) -> PlattSVC:
        import sklearn
        from sklearn.svm import SVC

        self.classes_ = np.unique(y)
        gamma = 1.0 / (X.shape[1] * (X.var() or 1.0))  # "scale", of all images in every fold too
        seed = np.random.RandomState(self.random_state).randint(np.iinfo(np.intc).max)
        self.sigmoids: list[tuple[float, float]] = []
        with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
            self._machine = SVC(C=self.C, gamma=gamma, decision_function_shape="ovo").fit(X, y)
            for first, second in itertools.combinations(self.classes_, 2):
                chosen = np.concatenate([np.flatnonzero(y == first), np.flatnonzero(y == second)])
                signs = np.where(y[chosen] == first, 1, -1)
                machine = SVC(C=self.C, gamma=gamma)
                self.sigmoids.append(_sigmoid(_held_out_values(machine, X[chosen], signs, seed), signs))
        return self

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """(N, classes), rows that add up to 1."""
        values = self._machine.decision_function(X)
        if values.ndim == 1:  # of two classes: positive for the second
            values = -values[:, None]
        slopes, shifts = np.array(self.sigmoids).T
        return _coupled(np.clip(_logistic(values * slopes + shifts), _LEAST, 1 - _LEAST), len(self.classes_))


def _held_out_values(machine: Any, X: np.ndarray, signs: np.ndarray, seed: int) -> np.ndarray:
    """The decision value of each image by a machine that learnt from the other folds."""
    n = len(signs)
    order, values = _shuffled(n, seed), np.empty(n)
    for fold in range(_FOLDS):
        begin, end = fold * n // _FOLDS, (fold + 1) * n // _FOLDS
        held, rest = order[begin:end], np.concatenate([order[:begin], order[end:]])
        present = np.unique(signs[rest])
        if not len(held):
            continue
        if len(present) < 2:  # nothing to learn: the sign of the class that is there
            values[held] = present.sum()
        else:
            values[held] = machine.fit(X[rest], signs[rest]).decision_function(X[held])
    return values


def _shuffled(n: int, seed: int) -> np.ndarray:
    """A permutation of n: Fisher-Yates by Mersenne Twister words, brought into [0, n − i) as by Lemire (2019)."""
    spare = 64  # a word is refused once in 2³²/n
    words = iter(np.random.RandomState(seed).randint(0, 2**32, n + spare, dtype=np.uint32).tolist())
    order = list(range(n))
    for i in range(n):
        left = n - i
        product = next(words) * left
        while product % 2**32 < 2**32 % left:  # a word that would favour small numbers
            product = next(words) * left
        j = i + (product >> 32)
        order[i], order[j] = order[j], order[i]
    return np.array(order)


def _logistic(z: np.ndarray) -> np.ndarray:
    """1/(1 + exp(z)), without overflow."""
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, small, 1.0) / (1 + small)


def _sigmoid(values: np.ndarray, signs: np.ndarray) -> tuple[float, float]:
    """(A, B) of P(first class) = 1/(1 + exp(A·value + B)): the regularised maximum likelihood, by Newton's method."""
    first = int((signs > 0).sum())
    second = len(signs) - first
    target = np.where(signs > 0, (first + 1) / (first + 2), 1 / (second + 2))

    def loss(slope: float, shift: float) -> float:
        z = values * slope + shift
        return float((np.where(z >= 0, target, target - 1) * z + np.log1p(np.exp(-np.abs(z)))).sum())

    slope, shift = 0.0, float(np.log((second + 1) / (first + 1)))
    least = loss(slope, shift)
    for _ in range(_NEWTON_STEPS):
        p = _logistic(values * slope + shift)
        weight, error = p * (1 - p), target - p
        gradient = np.array([(values * error).sum(), error.sum()])
        if np.abs(gradient).max() < 1e-5:
            break
        mixed = (values * weight).sum()
        hessian = np.array([[(values**2 * weight).sum(), mixed], [mixed, weight.sum()]]) + 1e-12 * np.eye(2)
        step = -np.linalg.solve(hessian, gradient)
        size = 1.0
        while size >= 1e-10:  # halved until the loss falls enough
            trial = (slope + size * step[0], shift + size * step[1])
            if (found := loss(*trial)) < least + 1e-4 * size * float(gradient @ step):
                (slope, shift), least = trial, found
                break
            size /= 2
        else:
            break
    return float(slope), float(shift)


def _coupled(pairs: np.ndarray, classes: int) -> np.ndarray:  # (N, classes·(classes − 1)/2) -> (N, classes)
    """The p that minimises Σ_{i≠j} (r_ji p_i − r_ij p_j)², r_ij the pairwise probability of i; to 0.005/classes."""
    r = np.zeros((len(pairs), classes, classes))
    above = np.triu_indices(classes, 1)
    r[:, above[0], above[1]] = pairs
    r[:, above[1], above[0]] = 1 - pairs
    q = -r * r.transpose(0, 2, 1)
    diagonal = np.arange(classes)
    q[:, diagonal, diagonal] = np.square(r).sum(1)
    p = np.full((len(pairs), classes), 1 / classes)
    open_ = np.arange(len(pairs))  # the rows that have not converged
    for _ in range(max(100, classes)):
        part = q[open_]
        qp = np.einsum("nij,nj->ni", part, p[open_])
        total = (p[open_] * qp).sum(1)
        far = np.abs(qp - total[:, None]).max(1) >= 0.005 / classes
        open_, part, qp, total = open_[far], part[far], qp[far], total[far]
        if not len(open_):
            break
        x = p[open_]
        for t in range(classes):
            own = part[:, t, t]
            change = (total - qp[:, t]) / own
            x[:, t] += change
            total = (total + change * (change * own + 2 * qp[:, t])) / (1 + change) ** 2
            qp = (qp + change[:, None] * part[:, t]) / (1 + change[:, None])
            x /= 1 + change[:, None]
        p[open_] = x
    return p
