"""CD-K, PCD, single-grid CD and short-run chains against their closed forms on affine energies, and their banks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.factors import Linear
from helpers.training import tiny_config, tiny_data

from mgebm_fast import noise, ops
from mgebm_fast.errors import ConfigError
from mgebm_fast.learning import METHODS, MultiGridTrainer, SingleGridRule, build_model, merge
from mgebm_fast.learning.methods.banks import Slots
from mgebm_fast.learning.run import loop
from mgebm_fast.models import MultiGrid, SingleGrid
from mgebm_fast.nets import multigrid_net
from mgebm_fast.sampling import langevin

SINGLE = ("cd", "pcd", "single-grid-cd", "short-run")
STEPS, DRIFT, NOISE, SIGMA, MEAN, SEED, LR = 3, 0.3, 0.2, 1.5, 0.25, 5, 0.125
AFFINE = {
    "seed": SEED,
    "sizes": [1, 4],
    "precision": "fp32",
    "langevin": {
        "steps": STEPS, "drift": DRIFT, "noise_std": NOISE, "reference_std": SIGMA, "reference_mean": MEAN,
        "clamp": False,
    },
    "optimiser": {"name": "sgd", "lr": LR},
}  # fmt: skip


def uniform(ids, step, purpose):
    """Uniform starts in [−1, 1] by the reference of the noise, float64."""
    words, _ = noise.words(len(ids), 16, seed=SEED, step=step, first_sample=ids, stream=noise.stream(purpose, 1))
    return noise.uniform(words).flatten(1)[:, :16].double().reshape(-1, 1, 4, 4) * 2 - 1


def langevin_noise(ids, step):
    where = noise.stream(noise.Purpose.TRAINING_CHAIN, 1)
    words, _ = noise.words(len(ids), 16, seed=SEED, step=step, first_sample=ids, stream=where)
    return noise.normal(words).reshape(-1, 1, 4, 4)


def chain(start, force, ids, iteration):
    """The affine chain in closed form: x_K = x̂ + a^K (x_0 − x̂) + Σ_k a^(K−1−k) s ε_k, x̂ = m + σ²∇f, a = 1 − d/σ²."""
    a, rest = 1 - DRIFT / SIGMA**2, MEAN + SIGMA**2 * force
    x = rest + a**STEPS * (start - rest)
    for k in range(STEPS):
        x = x + a ** (STEPS - 1 - k) * NOISE * langevin_noise(ids, iteration * STEPS + k)
    return x


def one_net(net, method, config):
    start = {"pcd": "bank", "single-grid-cd": "colours"}.get(method, "noise")
    return SingleGrid(4, channels=1, start=start, langevin=config.dynamics(), nets=[net], value_range=(-1, 1))


def start_of(method, observed, ids, iteration, bank=None):
    if method == "cd":
        return observed
    if method == "single-grid-cd":
        return observed.mean((2, 3), keepdim=True).expand_as(observed)
    if method == "short-run":
        return uniform(ids, iteration, noise.Purpose.INITIAL_STATE)
    return bank[ids]


@pytest.mark.parametrize("method", SINGLE)
def test_gradient_on_a_linear_energy_is_the_closed_form(method):
    """∇_w(mean E(observed) − mean E(synthesised)) = mean x_K − mean x_0, over two updates of 20 images by 8."""
    config = tiny_config(method=method, **AFFINE)
    net = Linear()
    model = one_net(net, method, config)
    trainer = MultiGridTrainer(model, tiny_data(), config, quiet=True)
    weight = net.weight.detach().double()
    bank = uniform(torch.arange(24), 0, noise.Purpose.INITIAL_STATE)
    for iteration in range(4):  # in pcd the fourth goes on with the first one's chains
        batch = tiny_data().batch(slice(8))
        observed = batch.double() / 127.5 - 1
        ids = (torch.arange(8) + 8 * iteration) % 24 if method == "pcd" else torch.arange(8)
        x = chain(start_of(method, observed, ids, iteration, bank), weight, ids, iteration)
        bank[ids] = x
        trainer.step(batch)
        weight = weight - LR * (x.mean(0) - observed.mean(0))
        torch.testing.assert_close(net.weight.detach().double(), weight, atol=2e-6, rtol=0)
    if method == "pcd":
        torch.testing.assert_close(model.bank.double(), bank, atol=2e-6, rtol=0)


@pytest.mark.parametrize("method", SINGLE)
def test_gradient_through_convolutions_is_the_closed_form(method):
    """With the identity for an activation f is affine: ∇f gives its chain, the mean images give its gradient."""
    config = tiny_config(method=method, **AFFINE)
    net = multigrid_net(4, 1, 0.125, "none", "compact", activation="none", seed=2)
    trainer = MultiGridTrainer(one_net(net, method, config), tiny_data(), config, quiet=True)
    reference = copy.deepcopy(net).double()
    batch = tiny_data().batch(slice(8))
    observed, ids = batch.double() / 127.5 - 1, torch.arange(8)
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    (force,) = torch.autograd.grad(-reference(x).sum(), x)
    bank = uniform(ids, 0, noise.Purpose.INITIAL_STATE)
    end = chain(start_of(method, observed, ids, 0, bank), force, ids, 0)
    loss = reference(observed.mean(0, keepdim=True)) - reference(end.mean(0, keepdim=True))
    gradients = torch.autograd.grad(loss.sum(), list(reference.parameters()))
    trainer.step(batch)
    for got, before, gradient in zip(net.parameters(), reference.parameters(), gradients, strict=True):
        torch.testing.assert_close(got.detach().double(), before.detach() - LR * gradient, atol=1e-5, rtol=1e-5)


def test_cd_starts_at_what_the_net_observes(trainer):
    """With data noise the chain starts at the noisy images: with drift and noise next to nothing it stays there."""
    noisy = {"data_noise": 0.2, "data_noise_clamp": True}
    ours = trainer(method="cd", langevin={"steps": 1, "drift": 1e-9, "noise_std": 0.0}, stabilise=noisy)
    metrics = ours.step(tiny_data(8).batch(slice(None)))
    assert metrics["size_4/gap"] == pytest.approx(0, abs=1e-5)


def test_single_grid_takes_the_finest_net_and_all_the_steps(trainer):
    changes = {"langevin": {"steps": [3, 5]}, "optimiser": {"lr": [1, 2]}, "stabilise": {"data_noise": [0.1, 0.2]}}
    ours = trainer(method="single-grid-cd", **changes)
    many = build_model(tiny_config(**changes))
    assert len(ours.model.nets) == 1 and ours.model.nets[0].config() == many.nets[-1].config()
    assert ours.model.langevin[0].steps == 3 + 5
    assert (ours.rule.config.optimiser.lr, ours.rule.config.stabilise.data_noise) == ((2,), (0.2,))
    assert trainer(method="cd", **changes).model.langevin[0].steps == 5  # the finest net's own, elsewhere


def test_short_run_starts_are_uniform_in_the_range():
    config = tiny_config(method="short-run", value_range=[-0.5, 2.0], seed=3)
    model = build_model(config)
    rule = SingleGridRule(model, config, images=20)
    observed = [torch.zeros(4096, 1, 1, 1), torch.zeros(4096, 1, 4, 4)]
    x = rule.initial.begin(observed, 7, 0, 0)[1].double()
    values = ((x + 0.5) / 2.5).flatten().sort().values
    assert 0 <= values[0] and values[-1] <= 1
    n = values.numel()
    distance = (values - (torch.arange(n) + 0.5) / n).abs().max() + 0.5 / n
    assert distance < 2.23 / n**0.5  # Kolmogorov: false alarms 1 in 10,000
    assert not torch.equal(x, rule.initial.begin(observed, 8, 0, 0)[1].double())


@pytest.mark.parametrize("method", SINGLE)
def test_chains_do_not_depend_on_how_a_batch_is_split(method):
    config = tiny_config(method=method, seed=9, precision="fp32")
    rule = SingleGridRule(build_model(config), config, images=20)
    observed = rule.observed(tiny_data(8).batch(slice(None)))
    (whole,) = rule.synthesise(observed, 2, 0).images
    parts = [rule.synthesise([x[i : i + n] for x in observed], 2, i).images[0] for i, n in ((0, 3), (3, 5))]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", (*SINGLE, "multigrid"))
def test_no_counter_is_used_twice(trainer, method, monkeypatch):
    """Training and sampling draw from disjoint (stream, step, sample id)."""
    used: list[tuple[int, int, int]] = []

    def note(stream, step, steps, first, n):
        if stream == noise.stream(noise.Purpose.PROBE):
            return  # the directions that energies are measured in are always the same, and teach nothing
        ids = first.tolist() if isinstance(first, torch.Tensor) and first.dim() else range(int(first), int(first) + n)
        used.extend((stream, step + k, i) for k in range(steps) for i in ids)

    draw, words, prepare = ops.noise, noise.words, langevin.prepare

    def noted_draw(shape, *, step, stream, first_sample=0, **rest):
        note(stream, step, 1, first_sample, shape[0])
        return draw(shape, step=step, stream=stream, first_sample=first_sample, **rest)

    def noted_words(n, elements, *, step, stream, first_sample=0, **rest):
        note(stream, step, 1, first_sample, n)
        return words(n, elements, step=step, stream=stream, first_sample=first_sample, **rest)

    def noted_prepare(energy, x, steps, numbers, *, first_sample, first_step, stream, **rest):
        note(stream, first_step, steps, first_sample, len(x))
        return prepare(
            energy, x, steps, numbers, first_sample=first_sample, first_step=first_step, stream=stream, **rest
        )

    ours = trainer(method=method, stabilise={"data_noise": 0.1}, flips=True)
    if method == "pcd":
        ours = trainer(method=method, pcd={"bank_size": 24, "restart": 0.5}, flips=True, stabilise={"data_noise": 0.1})
    if method == "multigrid":
        ours = trainer(multigrid={"bank_size": 24}, flips=True, stabilise={"data_noise": 0.1})
    # The measure of the best state draws the same samples at every checkpoint, as pictures do, and teaches nothing.
    monkeypatch.setattr(loop, "measured_together", lambda rule, reference, ranks: None)
    monkeypatch.setattr(ops, "noise", noted_draw)
    monkeypatch.setattr(noise, "words", noted_words)
    monkeypatch.setattr(langevin, "prepare", noted_prepare)
    ours.fit(3)
    ours.model.sample(9, seed=ours.config.seed)
    assert len(used) > 100 and len(used) == len(set(used))


# banks


def test_own_slots_are_visited_once_an_epoch():
    slots = Slots.of(None, 8, 20, 0.0, seed=1)
    assert slots.size == 24 and not slots.shared
    epoch = torch.cat([slots.at(i, 0, 8) for i in range(3)])
    assert torch.equal(epoch.sort().values, torch.arange(24))
    assert torch.equal(slots.at(3, 0, 8), slots.at(0, 0, 8))
    assert torch.equal(slots.at(1, 2, 3), slots.at(1, 0, 8)[2:5])


def test_shared_slots_are_different_draws_of_every_chain():
    slots = Slots.of(50, 8, 20, 0.0, seed=1)
    drawn = [slots.at(i, 0, 8) for i in range(200)]
    assert all(len(set(ids.tolist())) == 8 for ids in drawn)
    counts = torch.bincount(torch.cat(drawn), minlength=50).double()
    # 200 draws of 8 in 50 without replacement: mean 32, variance 200 · 0.16 · 0.84; a false alarm in 20,000 for all 50.
    assert (counts - 32).abs().max() < 4.9 * (200 * 0.16 * 0.84) ** 0.5
    assert torch.equal(slots.at(3, 5, 3), drawn[3][5:])
    assert not torch.equal(drawn[0], Slots.of(50, 8, 20, 0.0, seed=2).at(0, 0, 8))


@pytest.mark.parametrize("restart", [0.0, 0.05, 0.5, 1.0])
def test_restarted_share(restart):
    slots = Slots.of(20000, 8, 20, restart, seed=4)
    share = slots.restarted(3, torch.arange(20000)).double().mean().item()
    assert abs(share - restart) <= 4 * np.sqrt(restart * (1 - restart) / 20000)  # false alarms 1 in 15,000
    ids = torch.tensor([17, 3, 900])
    assert torch.equal(slots.restarted(3, ids), slots.restarted(3, torch.arange(20000))[ids])


def test_restarted_chains_begin_at_new_noise_and_the_others_go_on():
    config = tiny_config(method="pcd", pcd={"bank_size": 64, "restart": 0.5}, batch_size=32, seed=SEED)
    rule = SingleGridRule(build_model(config), config, images=20)
    state, bank = rule.initial, rule.model.bank.double()
    ids, x = state.begin([torch.zeros(32, 1, 1, 1)], 4, 0, 0)
    x = x.double()
    anew = state.slots.restarted(4, ids)
    assert 0 < anew.sum() < 32
    torch.testing.assert_close(x[~anew], bank[ids][~anew])
    fresh = uniform(ids, 5, noise.Purpose.INITIAL_STATE)
    torch.testing.assert_close(x[anew], fresh[anew], atol=1e-6, rtol=0)
    assert not torch.equal(fresh, uniform(ids, 0, noise.Purpose.INITIAL_STATE))


def test_only_the_slots_of_the_batch_move(trainer):
    ours = trainer(method="pcd", pcd={"bank_size": 40})
    before = ours.model.bank.clone()
    ids = ours.rule.initial.slots.at(0, 0, 8)
    ours.step(tiny_data(8).batch(slice(None)))
    moved = (ours.model.bank != before).flatten(1).any(1)
    assert set(moved.nonzero().flatten().tolist()) == set(ids.tolist())


def test_an_update_that_is_not_applied_leaves_the_bank(trainer):
    from mgebm_fast.errors import DivergenceError

    ours = trainer(method="pcd")
    with torch.no_grad():
        ours.model.nets[0].head.bias.fill_(torch.inf)
    before = ours.model.bank.clone()
    with pytest.raises(DivergenceError):
        ours.step(tiny_data(8).batch(slice(None)))
    assert torch.equal(ours.model.bank, before)


@pytest.mark.parametrize("options", [{}, {"bank_size": 12, "restart": 0.3}])
def test_resuming_is_exact_to_the_bank(trainer, tmp_path, options):
    whole = trainer(method="pcd", pcd=options)
    whole.fit()
    first = trainer(method="pcd", pcd=options)
    first.fit(3)
    first.save(tmp_path / "checkpoint")
    second = trainer(method="pcd", pcd=options)
    assert second.resume(tmp_path / "checkpoint") == 3
    second.fit()
    a, b = whole.model.state_dict(), second.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_keeps_its_bank(trainer, tmp_path):
    trainer(method="pcd", pcd={"bank_size": 12}).save(tmp_path / "checkpoint")
    for options, message in (({"bank_size": 16}, "pcd.bank_size must be 12"), ({}, "pcd.bank_size must be 12"),
                             ({"bank_size": 12, "restart": 0.1}, "pcd.restart must be 0.0")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            trainer(method="pcd", pcd=options).resume(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="method must be 'pcd'"):
        trainer(method="cd").resume(tmp_path / "checkpoint")


def test_a_bank_holds_a_batch_and_one_process(trainer):
    with pytest.raises(ConfigError, match=r"pcd.bank_size must be at least batch_size \(8\), got 7"):
        trainer(method="pcd", pcd={"bank_size": 7})
    with pytest.raises(ConfigError, match="batch_parts must be 1"):
        trainer(method="pcd", batch_parts=2)


@pytest.mark.parametrize(("method", "start"), [("pcd", "bank"), ("single-grid-cd", "colours"), ("cd", "noise")])
def test_a_given_model_must_start_samples_as_its_method_does(method, start):
    config = tiny_config(method=method, sizes=[1, 4])
    for other in {"bank", "colours", "noise"} - {start}:
        model = SingleGrid(
            4, start=other, channels=1, langevin=config.dynamics(), norm="none", variant="compact", value_range=(-1, 1)
        )
        words = f"the model's start must be '{start}', .* of the method '{method}' starts from, got '{other}'"
        with pytest.raises(ValueError, match=words):
            MultiGridTrainer(model, tiny_data(), config, quiet=True)


@pytest.mark.parametrize("method", [m for m in METHODS if m in ("cd", "single-grid-cd", "short-run")])
def test_a_batch_in_parts_learns_the_same(trainer, method):
    one = trainer(method=method, precision="fp32", optimiser={"name": "sgd", "lr": 0.1})
    two = trainer(method=method, precision="fp32", optimiser={"name": "sgd", "lr": 0.1}, batch_parts=2)
    one.fit(2)
    two.fit(2)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("method", SINGLE)
def test_a_run_trains_and_its_file_samples_the_same(trainer, tmp_path, method, norm):
    ours = trainer(out=tmp_path / "run", method=method, norm=norm, stabilise={"ema": 0.9, "noise_anneal": 0.5})
    ours.fit()
    loaded = MultiGrid.load(tmp_path / "run")
    assert type(loaded) is SingleGrid and loaded.start == ours.model.start
    with ours.rule.averaged_weights():
        assert torch.equal(loaded.sample(5, seed=2), ours.model.sample(5, seed=2))
    assert merge(ours.config, {}) == ours.config
