"""Runs whose chains have schedules: trained, resumed, stored, loaded, made longer, measured and exported."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.runs import same_run

import mgebm_fast as mg
from mgebm_fast.errors import ConfigError, Refused
from mgebm_fast.evaluation.diagnosis import diagnose
from mgebm_fast.export import export
from mgebm_fast.learning import Run
from mgebm_fast.models import Frame, GenerativeConvNet, MultiGrid
from mgebm_fast.models.latent import Inference
from mgebm_fast.nets import ConvSpec

ANNEALED = {
    "langevin": {
        "steps": 3, "drift": 0.1, "noise_std": [mg.Schedule(0.1, 0.01), [0.1, 0.05, 0.0]],
        "reference_std": mg.Schedule(2, 1, "cosine"),
    },
    "stabilise": {"noise_anneal": 0.5},
}  # fmt: skip


def test_a_run_with_schedules(trainer, tmp_path):
    trainer(out=tmp_path / "a", **ANNEALED).fit()
    trainer(out=tmp_path / "b", **ANNEALED).fit(4)
    resumed = trainer(out=tmp_path / "b", **ANNEALED)
    assert resumed.resume() == 4 and resumed.fit().finished
    same_run(tmp_path / "a", tmp_path / "b")

    records = list(Run(tmp_path / "a").metrics())
    ratios = [value for record in records for key, value in record.items() if key.endswith("gradient_to_noise")]
    assert ratios and all(map(math.isfinite, ratios))

    model = mg.load(tmp_path / "a")
    assert model.langevin == resumed.model.langevin  # those of the last update
    assert model.langevin[0].noise_std == mg.Schedule(0.05, 0.005) and model.langevin[1].noise_std == (0.05, 0.025, 0)
    longer = model.chains(2.0)
    assert [chain.steps for chain in longer] == [6, 6] and longer[0].noise_std == model.langevin[0].noise_std
    assert torch.isfinite(model.sample(2, seed=1, length=2.0)).all()

    x = torch.rand(3, 1, 4, 4)
    with_reference, without = model.energy(x, reference=True), model.energy(x)
    moved = sum(0.5 * at.square().flatten(1).sum(1) for at in (mg.ops.pyramid(x, [2])[0], x))  # σ = 1 at the end
    torch.testing.assert_close(with_reference, without + moved)

    found = diagnose(model, num=4)
    assert any("whose numbers vary" in note for note in found.notes)
    assert [chain.figures["noise_std"] for chain in found.chains] == pytest.approx([0.005, 0.0])
    export(model, "sampler", tmp_path / "annealed.py")


def test_a_list_of_another_length_in_the_samples_chain():
    """The default chain of a sample is longer than training's: a list is stretched."""
    chain = mg.Langevin(2, drift=[0.2, 0.1], noise_std=0.1)
    model = GenerativeConvNet(4, [ConvSpec(2, 3)], sample_steps=3, channels=1, langevin=chain, value_range=(-1, 1))
    assert model.sampling[0].drift == pytest.approx((0.2, 0.15, 0.1))


def test_what_takes_no_schedule_says_so(trainer, tmp_path):
    law = {"channels": 1, "value_range": (-1, 1), "langevin": mg.Langevin(2, step_size=mg.Schedule(0.2, 0.1))}
    with pytest.raises(Refused, match="Frame: step_size must be a number here"):
        Frame(4, layers=[ConvSpec(2, 3)], leapfrog_steps=2, **law)
    with pytest.raises(Refused, match="Inference: step_size must be a number here"):
        Inference(2, mg.Schedule(0.2, 0.1), 0.3)
    by_sample = mg.Langevin(2, step_size=torch.rand(5) + 0.1)
    model = MultiGrid((1, 4), channels=1, langevin=by_sample, variant="compact", width=0.1)
    with pytest.raises(Refused, match="langevin's step_size must hold no tensor or array to be stored"):
        model.save(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="langevin.step_size must be a number > 0"):
        mg.MultiGridTrainer(model, torch.zeros(8, 1, 4, 4, dtype=torch.uint8), device="cpu", quiet=True)


def test_a_given_model_with_schedules_is_trained_as_it_is(tmp_path):
    chain = mg.Langevin(2, drift=[0.2, 0.1], noise_std=mg.Schedule(0.1, 0.01))
    model = MultiGrid((1, 2, 4), channels=1, langevin=chain, variant="compact", norm="none", width=0.1,
                      value_range=(-1, 1))  # fmt: skip
    data = torch.randint(0, 256, (8, 1, 4, 4), dtype=torch.uint8)
    own = mg.MultiGridTrainer(model, data, device="cpu", quiet=True)
    assert own.config.dynamics() == (chain, chain)
