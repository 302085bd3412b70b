"""Makes the polynomial coefficients of csrc/include/mgebm/normal.h: near-minimax fits at 40 digits, rounded to float32.

python scripts/fit_polynomials.py        (needs mpmath and numpy)
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath as mp
import numpy as np

NODES, PASSES = 400, 200
mp.mp.dps = 40


def fit(function: Callable, low: float, high: float, terms: int, weight: Callable) -> tuple[np.ndarray, float]:
    """Coefficients of 1, t, t² … that nearly minimise the largest weighted error (Lawson's reweighting)."""
    middle, half = (mp.mpf(low) + high) / 2, (mp.mpf(high) - low) / 2
    nodes = [middle + half * mp.cos(mp.pi * (2 * k + 1) / (2 * NODES)) for k in range(NODES)]
    matrix = np.array([[float(t**j * weight(t)) for j in range(terms)] for t in nodes])
    target = np.array([float(function(t) * weight(t)) for t in nodes])
    importance = np.ones(NODES)
    for _ in range(PASSES):
        root = np.sqrt(importance)
        coefficients = np.linalg.lstsq(matrix * root[:, None], target * root, rcond=None)[0]
        error = np.abs(matrix @ coefficients - target)
        importance = importance * (error / error.max() + 1e-12)
        importance /= importance.sum()
    return coefficients, float(error.max())


def log_tail(f):
    """P of ln(1 + f) = f − f²/2 + f³ P(f)."""
    return mp.mpf(1) / 3 - f / 4 if abs(f) < 1e-8 else (mp.log1p(f) - f + f * f / 2) / f**3


def sine(s):
    """sin(πr/2)/r of s = r²."""
    return mp.pi / 2 if s == 0 else mp.sin(mp.pi / 2 * mp.sqrt(s)) / mp.sqrt(s)


def cosine(s):
    """(cos(πr/2) − 1)/r² of s = r²."""
    return -(mp.pi**2) / 8 if s == 0 else (mp.cos(mp.pi / 2 * mp.sqrt(s)) - 1) / s


def main() -> None:
    fits = {
        "log": fit(log_tail, mp.sqrt(0.5) - 1, mp.sqrt(2) - 1, 8, lambda f: abs(f) ** 2 + mp.mpf("1e-3")),
        "sine": fit(sine, 0, mp.mpf("0.2501"), 4, lambda s: mp.mpf(1)),
        "cosine": fit(cosine, mp.mpf("1e-9"), mp.mpf("0.2501"), 4, lambda s: s + mp.mpf("1e-3")),
    }
    for name, (coefficients, error) in fits.items():
        values = ", ".join(f"{np.float32(c):.9g}f" for c in coefficients)
        print(f"{name}, lowest order first (largest weighted error {error:.1e}): {values}")


if __name__ == "__main__":
    main()
