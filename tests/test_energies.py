"""Energies made of energies: their laws against closed forms, their gradients, what runs them, and what they refuse.

Means and variances are z-scores of 5,000 independent chains, each tested at |z| < 5: a correct chain fails one with
probability 6e-7.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.energies import Classifier, Scaled, Sum, Tempered

STEP, STEPS, CHAINS = 0.8, 20, 5_000


def gaussian(mean: float, precision: float):
    return lambda x: 0.5 * precision * (x - mean).square().sum(1)


def classifier(classes: int = 5, features: int = 2) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(features, 16), nn.SiLU(), nn.Linear(16, classes))


FIRST, SECOND = gaussian(-1.0, 0.5), gaussian(2.0, 1.5)
LAWS = {  # energy, mean and precision of its Gaussian law
    "sum": (Sum(FIRST, SECOND), 1.25, 2.0),
    "sum of three, one a sum": (Sum(Sum(FIRST, SECOND), gaussian(-3.0, 2.0)), -0.875, 4.0),
    "scaled": (Scaled(SECOND, 0.4), 2.0, 0.6),
    "a negative part": (Sum(SECOND, Scaled(FIRST, -1.0)), 3.5, 1.0),
    "tempered": (Tempered(SECOND, 3.0), 2.0, 0.5),
    "cold": (Tempered(FIRST, 0.25), -1.0, 2.0),
    "tempered sum": (Tempered(Sum(FIRST, SECOND), 2.0), 1.25, 1.0),
    # exp(f_y) = N(x | y, 1), so that a class is a Gaussian of its own
    "class": (Classifier(lambda x: torch.cat([-0.5 * (x - y).square() for y in (0.0, 1.0, 4.0)], 1), 2), 4.0, 1.0),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_law_is_the_closed_gaussian(name: str) -> None:
    energy, mean, precision = LAWS[name]
    start = torch.zeros(CHAINS, 1)
    x = mg.langevin_sample(energy, start, steps=STEPS, step_size=STEP, seed=7).double()
    a = 1 - STEP**2 / 2 * precision  # x ← x − δ²/2 · λ (x − m) + δ ε
    variance = STEP**2 * (1 - a ** (2 * STEPS)) / (1 - a**2)
    z = (x - mean * (1 - a**STEPS)) / math.sqrt(variance)
    assert abs(float(z.mean())) * math.sqrt(CHAINS) < 5
    assert abs(float(z.square().mean()) - 1) * math.sqrt(CHAINS / 2) < 5


def test_a_changed_number_counts_from_the_next_chain_on() -> None:
    chain, x = mg.Langevin(20, step_size=0.5), torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    tempered, scaled, read = Tempered(SECOND, 1.0), Scaled(SECOND, 1.0), Classifier(classifier(), 0)
    before = [chain(energy, x, seed=0) for energy in (tempered, scaled, read)]
    tempered.temperature, scaled.factor, read.label = 4.0, 0.25, 3
    after = [chain(energy, x, seed=0) for energy in (tempered, scaled, read)]
    assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    torch.testing.assert_close(after[0], after[1])
    torch.testing.assert_close(after[0], chain(Tempered(SECOND, 4.0), x, seed=0))


@pytest.mark.parametrize("label, conditional", [(None, False), (3, False), (3, True)])
def test_a_classifier_is_the_energy_that_its_table_says(label: int | None, conditional: bool) -> None:
    net, x = classifier(), torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    energy = Classifier(net, label, conditional=conditional)
    logits = net(x)
    if label is None:
        expected = -logits.exp().sum(1).log()
    else:
        expected = F.cross_entropy(logits, torch.full((24,), 3), reduction="none") if conditional else -logits[:, 3]
    torch.testing.assert_close(energy(x), expected)
    by_hand = x
    for _ in range(20):
        leaf = by_hand.detach().requires_grad_()
        scores = net(leaf)
        value = scores.log_softmax(1)[:, 3] if conditional else scores.logsumexp(1) if label is None else scores[:, 3]
        by_hand = leaf.detach() + 0.1 * torch.autograd.grad(value.sum(), leaf)[0]
    torch.testing.assert_close(mg.Langevin(20, drift=0.1, noise_std=0.0)(energy, x), by_hand)


@pytest.mark.skipif(not native.available(), reason="the compiled module is not built")
def test_the_engine_reads_a_composition_whole() -> None:
    """A net, a classifier of its own width and a function, added, scaled and cooled: one call for all steps."""
    net = mg.nets.multigrid_net(8, norm="none", variant="compact", width=0.2)
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 10))
    tether = lambda x: (F.avg_pool2d(x, 4) - 0.3).square().sum((1, 2, 3)) / 0.02  # noqa: E731
    energy = Tempered(Sum(net, Scaled(Classifier(logits, 3, conditional=True), 2.0), tether), 0.5)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    chain = mg.Langevin(20, drift=1e-3, noise_std=0.01, clamp=(0, 1))
    explained = chain.explain(energy, x)
    assert explained.plan == "graph", str(explained)
    expected = chain(energy, x, seed=0, callback=lambda *_: None)  # with a callback, by autograd
    torch.testing.assert_close(chain(energy, x, seed=0), expected, rtol=0, atol=1e-5)


def test_parts_are_submodules_and_copies_are_whole() -> None:
    net, other = classifier(1), classifier(4)
    flat = nn.Sequential(net, nn.Flatten(0))
    energy = Tempered(Sum(flat, SECOND, Scaled(Classifier(other), 0.5)), 2.0)
    assert set(energy.parameters()) == {*net.parameters(), *other.parameters()}
    assert energy.energy.energies[0] is flat and energy.energy.energies[1] is SECOND
    x = torch.randn(3, 2)
    copied = copy.deepcopy(energy)
    assert torch.equal(copied(x), energy(x)) and not set(copied.parameters()) & set(energy.parameters())
    energy(x).sum().backward()  # weights train
    assert all(p.grad is not None for p in energy.parameters())


def test_a_model_takes_them_as_nets() -> None:
    nets = [
        Tempered(mg.nets.multigrid_net(size, channels=1, norm="none", variant="compact", width=0.1), 0.5)
        for size in (2, 4)
    ]
    model = mg.MultiGrid((1, 2, 4), channels=1, nets=nets)
    x = torch.rand(3, 1, 4, 4) * 255
    torch.testing.assert_close(model.energies(x)[4], 2 * nets[1].energy(x).detach())


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: Sum(), ValueError, "Sum: energies must be one or more energies, got none"),
        (lambda: Sum(FIRST, 3.0), TypeError, r"Sum: energies\[1\] must be a module or a callable, got float"),
        (lambda: Scaled(None, 1.0), TypeError, "Scaled: energy must be a module or a callable, got NoneType"),
        (lambda: Scaled(FIRST, math.nan), ValueError, "Scaled: factor must be a finite number, got nan"),
        (lambda: Scaled(FIRST, True), ValueError, "Scaled: factor must be a finite number, got True"),
        (lambda: Tempered(FIRST, 0), ValueError, "Tempered: temperature must be a finite number > 0, got 0"),
        (lambda: Tempered(FIRST, math.inf), ValueError, "Tempered: temperature must be a finite number > 0, got inf"),
        (lambda: Classifier("net"), TypeError, "Classifier: logits must be a module or a callable, got str"),
        (lambda: Classifier(FIRST, -1), ValueError, "Classifier: label must be an int >= 0 or None, got -1"),
        (lambda: Classifier(FIRST, 1.0), ValueError, "Classifier: label must be an int >= 0 or None, got 1.0"),
        (lambda: Classifier(FIRST, conditional=True), ValueError, "Classifier: label must be a class where condit"),
    ],
)
def test_what_is_refused(make, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    "energy, words",
    [
        (Sum(FIRST, lambda x: x), r"Sum: energies\[1\] must return shape \(N,\), N = 6 samples, got \(6, 2\)"),
        (Scaled(lambda x: FIRST(x)[:, None], 2.0), r"Scaled: energy must return .* got \(6, 1\)"),
        (Tempered(lambda x: FIRST(x).sum(), 2.0), r"Tempered: energy must return .* got \(\)"),
        (Sum(lambda x: 1.0), r"Sum: energies\[0\] must return .* got float"),
        (Classifier(FIRST), r"Classifier: logits must return shape \(N, K\), N = 6 samples, got \(6,\)"),
        (Classifier(lambda x: x, 2), "Classifier: label must be below 2, the number of classes, got 2"),
    ],
)
def test_what_would_broadcast_is_refused_in_a_chain(energy: nn.Module, words: str) -> None:
    x: Tensor = torch.zeros(6, 2)
    for steps in (1, 20):  # by autograd, and where a graph would be read
        with pytest.raises(ValueError, match=words):
            mg.langevin_sample(energy, x, steps=steps, step_size=0.1)


def test_a_label_stays_one_where_it_is_needed() -> None:
    energy = Classifier(classifier(), 1, conditional=True)
    with pytest.raises(ValueError, match="label must be an int >= 0, got None"):
        energy.label = None
    assert energy.label == 1
