"""What diagnose and explain measure is what samples go through: the energy and the chain that run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mgebm_fast.evaluation import diagnosis
from mgebm_fast.evaluation.diagnosis import diagnose
from mgebm_fast.models import Frame, GenerativeConvNet, MultiGrid, SingleGrid
from mgebm_fast.nets import ConvSpec, EnergyNet
from mgebm_fast.sampling import Langevin

RANGE = (-4.0, 4.0)
STEPS = 8


def growing(depth):
    chain = Langevin(3, step_size=0.3, reference_std=1.0, clamp=RANGE)
    layers = [ConvSpec(4, 3), ConvSpec(3, 3, 2)]
    options = {"channels": 1, "langevin": chain, "value_range": RANGE, "init_std": 0.5, "sample_steps": STEPS}
    return GenerativeConvNet(4, layers, depth=depth, **options)


def frame(leapfrog_steps, step_size=0.3):
    net = EnergyNet(4, 1, [ConvSpec(4, 3)], norm="none", activation="relu", seed=6)
    chain = Langevin(3, step_size=step_size, reference_std=1.0, clamp=RANGE)
    model = Frame(
        4, nets=[net], leapfrog_steps=leapfrog_steps, sample_steps=STEPS, channels=1, langevin=chain, value_range=RANGE
    )
    model.set_weights(torch.tensor([0.5, -0.3, 0.4, 0.2]))
    return model


def single(steps):
    return SingleGrid(2, channels=1, langevin=Langevin(steps, step_size=0.1), norm="none", variant="compact", width=0.1)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_model_in_growth_is_measured_by_the_layers_in_use(depth):
    model = growing(depth)
    x = model.sample(5, seed=3, precision="fp32")
    trace = diagnose(model, num=5, seed=3).chains[0].trace
    with torch.no_grad():
        expected = model.net(x).double()
    np.testing.assert_allclose(trace.energy[-1], expected, rtol=1e-5)
    np.testing.assert_allclose(trace.potential[-1], expected + x.double().square().flatten(1).sum(1) / 2, rtol=1e-5)


def test_hamiltonian_chains_are_measured_by_their_own_acceptance():
    model = frame(3)
    result = model.exact(STEPS)(model.net, model.zeros(6), grid=1, seed=3, precision="fp32")
    chain = diagnose(model, num=6, seed=3).chains[0]
    assert result.x.equal(model.sample(6, seed=3, precision="fp32"))
    # A record after step k is of the proposal of step k + 1.
    np.testing.assert_allclose(chain.trace.log_acceptance[:-1], result.log_ratio[1:].clamp(max=0), atol=1e-5)
    np.testing.assert_allclose(chain.trace.potential[-1], result.potential, rtol=1e-5)
    assert chain.figures["step_size"] == pytest.approx(0.3) and "drift" not in chain.figures
    lengthened = diagnose(model, num=2, steps=4).chains[0].figures
    assert lengthened["steps"] == lengthened["recorded"] == 4 and model.sample_steps == STEPS


def test_a_hamiltonian_chain_that_stands_still_is_said_to():
    notes = diagnose(frame(3, step_size=3.0), num=6).notes
    assert any("the chain refuses nearly every proposal" in note for note in notes)
    assert not any("a corrected chain would" in note for note in notes)


def test_explain_is_of_the_chain_that_samples():
    assert frame(3).explain(2).startswith(f"grid 1 (size 4)\n  chain: HMC, {STEPS} steps of 3 leapfrog of size 0.3")
    assert frame(None).explain(2).startswith(f"grid 1 (size 4)\n  chain: {STEPS} steps")


@pytest.mark.parametrize(("steps", "recorded"), [(9, 9), (10, 10), (19, 10)])
def test_a_chain_has_as_many_records_as_a_plot_can_show(steps, recorded, monkeypatch):
    monkeypatch.setattr(diagnosis, "RECORDS", 10)
    assert diagnose(single(steps), num=2).chains[0].figures["recorded"] == recorded


def test_every_is_a_positive_number_of_steps():
    assert diagnose(single(6), num=2, every=4).chains[0].figures["recorded"] == 2
    for every in (0, -1):
        with pytest.raises(ValueError, match=f"every must be a positive int, got {every}"):
            diagnose(single(6), num=2, every=every)


class Bowl(torch.nn.Module):
    """Of pixels ‖x‖²; the label planes have a steep energy of their own, which no chain feels that holds them."""

    def forward(self, x):
        return (x[:, :1].square() + 100 * x[:, 1:].square().sum(1, keepdim=True)).flatten(1).sum(1)


def test_label_planes_do_not_count():
    found = []
    for classes in ((), ("left", "right")):
        model = MultiGrid(
            (1, 2, 4), nets=[Bowl(), Bowl()], channels=1, classes=classes, value_range=RANGE,
            langevin=Langevin(STEPS, drift=0.3, noise_std=0.5),
        )  # fmt: skip
        labels = (torch.tensor([0, 1, 1]),) if classes else ()
        model.set_colours(torch.tensor([[-1.0], [0.5], [2.0]]), *labels)
        found.append(diagnose(model, num=6, seed=3).chains)
    for plain, of_classes in zip(*found, strict=True):
        for key in ("acceptance", "gradient_to_noise"):
            assert of_classes.figures[key] == pytest.approx(plain.figures[key], rel=1e-4)
        np.testing.assert_allclose(of_classes.trace.quantities["mean"], plain.trace.quantities["mean"], rtol=1e-5)
        for (_, x), (_, expected) in zip(of_classes.trace.states, plain.trace.states, strict=True):
            assert torch.equal(x, expected)
