"""Energies made of energies: sums, multiples, temperatures, and classifiers read as energies.

A part is any module or callable (N, ...) -> (N,). Modules become submodules, whose weights move and train with the
whole; each class is an `nn.Module` itself, so that they go into each other, into chains and into models. The engine
reads them as it reads their parts: where those run natively, so does the whole, in one call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .checks import finite_number, is_int, number, positive_number
from .errors import Refused

Function = Callable[[Tensor], Tensor]


class Sum(nn.Module):
    """E(x) = E₁(x) + … + E_k(x), whose law exp(−E) is the product of the laws of its parts.

    Args:
        *energies: one or more, each (N, ...) -> (N,).

    Raises TypeError: a part is not callable. ValueError: there is none; or, when it is called, a part returns another
    shape than (N,), which would broadcast against the others.
    """

    def __init__(self, *energies: Function) -> None:
        super().__init__()
        if not energies:
            raise Refused("energies", "be one or more energies", "none", "Sum")
        self._count = len(energies)
        for place, energy in enumerate(energies):
            setattr(self, f"energy{place}", _callable(energy, f"energies[{place}]", "Sum"))

    @property
    def energies(self) -> tuple[Function, ...]:
        """The parts, in order; a module is the submodule `energy0`, `energy1`, …"""
        return tuple(getattr(self, f"energy{number}") for number in range(self._count))

    def forward(self, x: Tensor) -> Tensor:  # (N, ...) -> (N,)
        parts = [_one_each(energy(x), x, f"energies[{i}]", "Sum") for i, energy in enumerate(self.energies)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


class Scaled(nn.Module):
    """w · E(x): the law's density to the power w. A weight of a part of a `Sum`, as of a classifier in guidance.

    Args:
        energy: (N, ...) -> (N,).
        factor: w, any finite number; below 0 it turns low energies into high ones.

    `factor` may be changed between chains. Raises TypeError: `energy` is not callable. ValueError: `factor`.
    """

    def __init__(self, energy: Function, factor: float) -> None:
        super().__init__()
        self.energy = _callable(energy, "energy", "Scaled")
        self.factor = factor

    @property
    def factor(self) -> float:
        return self._factor

    @factor.setter
    def factor(self, factor: float) -> None:
        self._factor = finite_number(factor, "factor", "Scaled")

    def forward(self, x: Tensor) -> Tensor:  # (N, ...) -> (N,)
        return self.factor * _one_each(self.energy(x), x, "energy", "Scaled")


class Tempered(nn.Module):
    """E(x)/T, whose law is exp(−E(x)/T): flatter above T = 1, concentrated at the lowest energies as T goes to 0.

    Args:
        energy: (N, ...) -> (N,).
        temperature: T, a finite number above 0.

    `temperature` may be changed between chains, as in annealing. A Gaussian reference of the chain is no part of the
    energy and stays as it is. Raises TypeError: `energy` is not callable. ValueError: `temperature`.
    """

    def __init__(self, energy: Function, temperature: float) -> None:
        super().__init__()
        self.energy = _callable(energy, "energy", "Tempered")
        self.temperature = temperature

    @property
    def temperature(self) -> float:
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self._temperature = positive_number(temperature, "temperature", "Tempered")

    def forward(self, x: Tensor) -> Tensor:  # (N, ...) -> (N,)
        return _one_each(self.energy(x), x, "energy", "Tempered") / self.temperature


class Classifier(nn.Module):
    """The energy of a classifier with logits f(x), (N, K), as in "Your Classifier is Secretly an Energy Based Model"
    (Grathwohl et al., ICLR 2020, section 3).

    Args:
        logits: f, (N, ...) -> (N, K).
        label: y in 0 … K−1, or None.
        conditional: beside a label: log p(y|x) in place of the logit, which is what guidance adds to another energy.

    | label | conditional | E(x) | law |
    |---|---|---|---|
    | None | | −logsumexp_k f_k(x) | p(x) |
    | y | False | −f_y(x) | p(x, y) for this y, and so p(x given y) |
    | y | True | −f_y(x) + logsumexp_k f_k(x) | p(y given x), a density in x with a reference or another energy only |

    `label` may be changed between chains. Raises TypeError: `logits` is not callable. ValueError: `label` is no int of
    at least 0; `conditional` without one; or, when it is called, logits that are not (N, K), or have no class `label`.
    """

    def __init__(self, logits: Function, label: int | None = None, *, conditional: bool = False) -> None:
        super().__init__()
        self.logits = _callable(logits, "logits", "Classifier")
        if conditional and label is None:
            raise Refused("label", "be a class where conditional is True", None, "Classifier")
        self.conditional = conditional
        self.label = label

    @property
    def label(self) -> int | None:
        return self._label

    @label.setter
    def label(self, label: int | None) -> None:
        label = number(label)
        if not (label is None and not self.conditional) and not is_int(label, 0):
            must = "be an int >= 0" if self.conditional else "be an int >= 0 or None"
            raise Refused("label", must, repr(label), "Classifier")
        self._label = label

    def forward(self, x: Tensor) -> Tensor:  # (N, ...) -> (N,)
        logits = self.logits(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != x.shape[0]:
            raise Refused("logits", f"return shape (N, K), N = {x.shape[0]} samples", _shape(logits), "Classifier")
        if self.label is None:
            return -torch.logsumexp(logits, 1)
        if self.label >= logits.shape[1]:
            raise Refused("label", f"be below {logits.shape[1]}, the number of classes", self.label, "Classifier")
        chosen = logits[:, self.label]
        return torch.logsumexp(logits, 1) - chosen if self.conditional else -chosen


def _callable(energy: Function, name: str, where: str) -> Function:
    if not callable(energy):
        raise TypeError(f"{where}: {name} must be a module or a callable, got {type(energy).__name__}")
    return energy


def _one_each(energies: Tensor, x: Tensor, name: str, where: str) -> Tensor:
    """The energies, which must be one a sample: anything else would broadcast against another part."""
    if not isinstance(energies, Tensor) or tuple(energies.shape) != (x.shape[0],):
        raise Refused(name, f"return shape (N,), N = {x.shape[0]} samples", _shape(energies), where)
    return energies


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
