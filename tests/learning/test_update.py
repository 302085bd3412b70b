"""The multi-grid update against its formula written out, and what a non-finite one does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.cases import covering
from helpers.training import tiny_config, tiny_data
from torch.overrides import TorchFunctionMode

from mgebm_fast import noise, ops
from mgebm_fast.errors import DivergenceError
from mgebm_fast.gradient import native
from mgebm_fast.gradient.graph import plan as graphs
from mgebm_fast.learning import MultiGridTrainer, build_model
from mgebm_fast.learning.methods import contrast
from mgebm_fast.learning.methods.multigrid import MultiGridRule
from mgebm_fast.learning.methods.optim import state_tensors
from mgebm_fast.learning.methods.synthesis import Synthesis
from mgebm_fast.models import MultiGrid


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("iteration", [0, 1, 4])
def test_update_is_its_formula(trainer, norm, iteration):
    lr, noises, l2 = 0.5, [0.1, 0.2], 0.05
    changes = {
        "norm": norm,
        "optimiser": {"name": "sgd", "lr": lr},
        "stabilise": {
            "data_noise": noises,
            "energy_l2": l2,
            "noise_anneal": [0.8, 0.5],
            "noise_anneal_share": [1.0, 0.6],
        },  # fmt: skip
        "seed": 11,
        "precision": "fp32",
    }
    ours, config = trainer(**changes), tiny_config(**changes)
    batch = tiny_data(8).batch(slice(None))
    ours._loop.iteration = iteration
    metrics = ours.step(batch)

    model = build_model(config)
    # of 6 updates: 0.8 at the last one; a half from update 0.6 · 5 = 3 on
    factors = {0: (1.0, 1.0), 1: (0.96, 5 / 6), 4: (0.84, 0.5)}[iteration]
    x = batch.float() / 127.5 - 1
    observed = [x.mean((2, 3), keepdim=True), torch.nn.functional.avg_pool2d(x, 2), x]
    chain = observed[0]
    for grid, net in enumerate(model.nets, start=1):
        chain = ops.upsample(chain, 2)
        for k in range(3):
            chain.requires_grad_(True)
            (g,) = torch.autograd.grad(net(chain).sum(), chain)
            chain = chain.detach()
            ops.langevin_step_(
                chain, g, drift=1.0, noise_std=0.03 * factors[grid - 1], clamp=(-1, 1), seed=11,
                step=3 * iteration + k, stream=noise.stream(noise.Purpose.TRAINING_CHAIN, grid),
            )  # fmt: skip
        draw = ops.noise(x.shape[:2] + chain.shape[2:], seed=11, step=iteration,
                         stream=noise.stream(noise.Purpose.DATA_NOISE, grid))  # fmt: skip
        real, fake = net(observed[grid] + noises[grid - 1] * factors[grid - 1] * draw), net(chain)
        loss = real.mean() - fake.mean() + l2 * (real.square().mean() + fake.square().mean())
        grads = torch.autograd.grad(loss, list(net.parameters()))
        for parameter, gradient, got in zip(
            net.parameters(), grads, ours.model.nets[grid - 1].parameters(), strict=True
        ):
            expected = parameter.detach() - lr * gradient
            torch.testing.assert_close(got.detach(), expected, atol=2e-5, rtol=1e-4)
            assert not torch.equal(got, parameter) or not gradient.any()
        size = config.sizes[grid]
        assert metrics[f"size_{size}/noise_factor"] == pytest.approx(factors[grid - 1])
        assert metrics[f"size_{size}/energy_observed"] == pytest.approx(real.mean().item(), abs=1e-5)
        assert metrics[f"size_{size}/energy_synthesised"] == pytest.approx(fake.mean().item(), abs=1e-5)
        assert metrics[f"size_{size}/gap"] == pytest.approx((real.mean() - fake.mean()).item(), abs=1e-5)


def test_running_statistics_follow_observed_images_alone(trainer):
    ours = trainer(norm="batch", stabilise={"data_noise": 0.0})
    batch = tiny_data(8).batch(slice(None))
    reference = build_model(tiny_config(norm="batch"))
    ours.step(batch)
    for grid, size in ((1, 2), (2, 4)):
        (real,) = ops.pyramid(batch, [size])
        with reference.nets[grid - 1].observing():
            reference.nets[grid - 1](reference.from_uint8(real))
        for name, buffer in reference.nets[grid - 1].named_buffers():
            torch.testing.assert_close(ours.model.nets[grid - 1].get_buffer(name), buffer)
            assert buffer.any()


def test_float_and_byte_batches_are_the_same(trainer):
    batch = tiny_data(8).batch(slice(None))
    a, b = trainer(), trainer()
    a.step(batch)
    b.step(b.model.from_uint8(batch))
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_each_update_has_noise_of_its_own(trainer):
    ours, starts = trainer(optimiser={"lr": 1e-12}), []
    batch = tiny_data(8).batch(slice(None))
    run = ours.model.run
    ours.model.run = lambda *a, **k: starts.append(k["first_step"]) or run(*a, **k)
    ours.step(batch)
    ours.step(batch)
    assert starts == [[0, 0], [3, 3]]


@pytest.mark.parametrize(
    ("stabilise", "optimiser"),
    [
        ({"ema": 0.9}, {}),
        ({}, {"grad_clip_norm": 0.01, "warmup": 3}),
        ({}, {"lr": [1e-3, 5e-4], "per_layer_divide": True}),
    ],
)
def test_options_train(trainer, stabilise, optimiser):
    ours = trainer(stabilise=stabilise, optimiser=optimiser, spectral_norm=True, activation="silu", flips=True)
    before = parameters(ours.model)
    ours.fit()
    assert ours.iteration == 6
    after = parameters(ours.model)
    assert all(bool(torch.isfinite(p).all()) for p in after)
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))


def test_chains_leave_the_weights_trainable(trainer):
    ours = trainer()
    ours.step(tiny_data(8).batch(slice(None)))
    assert all(p.requires_grad and p.grad is None for p in ours.model.parameters())


def overflow(ours):
    with torch.no_grad():
        ours.model.nets[1].head.bias.fill_(torch.inf)  # the chain, which sees gradients only, stays finite


def test_a_non_finite_energy_stops_before_anything_is_applied(trainer):
    ours = trainer()
    overflow(ours)
    before = parameters(ours.model)
    with pytest.raises(DivergenceError, match=r"grid 2 \(size 4\) became non-finite at update 1"):
        ours.step(tiny_data(8).batch(slice(None)))
    assert all(torch.equal(p, q) for p, q in zip(before, parameters(ours.model), strict=True))
    assert ours.iteration == 0


NORMS = [{"norm": "none", "spectral_norm": True}, {"norm": "batch", "spectral_norm": False}]
OPTIMISERS = [{"name": "adam"}, {"name": "adamw", "weight_decay": 0.1}, {"name": "sgd", "momentum": 0.9}]
OPTIMISERS += [{"name": "muon"}]


@pytest.mark.parametrize(("norm", "optimiser", "after", "fused"), covering(NORMS, OPTIMISERS, [0, 1], [True, False]))
def test_a_spoilt_update_leaves_no_trace(trainer, norm, optimiser, after, fused):
    changes = {**norm, "optimiser": optimiser, "stabilise": {"ema": 0.9}, "width": 0.5}  # of 16 channels: muon's
    good, bad = tiny_data(8).batch(slice(None)), torch.tensor([[3e38, -3e38]]).repeat(8, 1, 4, 2)
    ours, plain = trainer(**changes), trainer(**changes)
    for run in (ours, plain):
        for built in run.rule.optimisers:
            built.defaults["fused"] = fused
            for group in built.param_groups:
                group["fused"] = fused
        for _ in range(after):
            run.step(good)
    with pytest.raises(DivergenceError, match=r"of grid 2 \(size 4\) became non-finite"):
        ours.step(bad)
    assert ours.iteration == after
    for _ in range(2):
        ours.step(good)
        plain.step(good)
    for (name, got), expected in zip(ours.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name
    for a, b in zip(ours.rule.optimisers, plain.rule.optimisers, strict=True):
        got, expected = state_tensors(a), state_tensors(b)
        assert got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)
    assert all(torch.equal(a, b) for a, b in zip(ours.rule.average._mean, plain.rule.average._mean, strict=True))


class Looks(TorchFunctionMode):
    """Counts the reads of a tensor's values by the host: what makes it wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        if name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "nonzero"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("detail", [True, False])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_numbers_of_an_update_are_read_once(trainer, norm, detail, monkeypatch):
    # The native plans, of CPUs alone, check the weights that they pack: no device waits for that.
    monkeypatch.setattr(graphs, "not_finite", lambda graph: "")
    monkeypatch.setattr(graphs, "GraphChain", lambda graph: SimpleNamespace(gradient=torch.zeros_like))
    chain = SimpleNamespace(gradient=torch.zeros_like, finite=True)
    monkeypatch.setattr(native, "packed", lambda stack, bfloat: chain)
    monkeypatch.setattr(contrast, "readable", lambda *_: "what GPUs run is tested")
    ours = trainer(norm=norm, optimiser={"grad_clip_norm": 1.0, "grad_rescale_max": 1.0}, stabilise={"ema": 0.9})
    images = [torch.rand(8, 1, size, size) for size in ours.config.sizes[1:]]
    ours.rule.synthesise = lambda *arguments: Synthesis(images)  # chains have a host sync of their own
    batch = tiny_data(8).batch(slice(None))
    ours.rule.update(batch, 0, detail=detail)
    with Looks() as looks:
        ours.rule.update(batch, 1, detail=detail)
    assert looks.found == ["tolist"]


class Graphs:
    """Chains as graphs give them: without a look, and with a verdict that is read later."""

    def __init__(self, ours, verdicts):
        self.synthesise, self.verdicts, self.seen = ours.rule.synthesise, list(verdicts), []
        ours.rule.synthesise = self

    def __call__(self, observed, iteration, first_sample, session):
        results, unread = self.synthesise(observed, iteration, first_sample), session.unread
        self.seen.append(unread is not None)
        if unread is None:
            return results
        unread.append(torch.tensor(self.verdicts.pop(0)))
        spoilt = [torch.full_like(x, torch.nan) for x in results.images]
        return results if bool(unread[-1]) else Synthesis(spoilt)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_chains_that_were_not_healthy_are_run_again_with_a_look(trainer, norm, parts):
    changes = {"norm": norm, "batch_parts": parts, "stabilise": {"ema": 0.9}}
    ours, plain = trainer(**changes), trainer(**changes)
    faked = Graphs(ours, [True] * (2 * parts - 1) + [False] + [True] * parts)
    batch = tiny_data(8).batch(slice(None))
    for _ in range(3):
        assert ours.step(batch) == plain.step(batch)
    for (name, got), expected in zip(ours.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name
    assert faked.seen == [True] * 2 * parts + [False] * parts + [True] * parts


def test_a_run_that_diverges_names_the_last_good_checkpoint(trainer, tmp_path):
    ours = trainer(out=tmp_path / "run")
    ours.fit(2)
    overflow(ours)
    with pytest.raises(DivergenceError, match=r"stopped at update 3, which was not saved; .*step_000002") as caught:
        ours.fit()
    assert "grid 2" in str(caught.value)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["best", "step_000002"]


def test_without_detail_a_step_is_the_same_and_measures_no_samples(trainer):
    a, b, batch = trainer(), trainer(), tiny_data().batch(slice(0, 8))
    whole, less = a.step(batch), b.step(batch, detail=False)
    assert {name.rpartition("/")[2] for name in whole.keys() - less.keys()} >= {"gradient_to_noise", "spread"}
    assert less.items() <= whole.items()
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:.*the fp16 gradient overflowed")
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_a_chain_that_diverges_names_grid_and_step(trainer, precision):
    ours = trainer(langevin={"clamp": False}, precision=precision)
    with torch.no_grad():
        ours.model.nets[1].head.weight.fill_(3e38)
    with pytest.raises(DivergenceError, match=r"grid 2 \(size 4\).*step"):
        ours.step(tiny_data(8).batch(slice(None)))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.zeros(8, 1, 4, 4, dtype=torch.float64), TypeError, "uint8 or float32"),
        (torch.zeros(8, 1, 4, 4, dtype=torch.int64), TypeError, "uint8 or float32"),
        (torch.zeros(8, 3, 4, 4), ValueError, r"shape \(N, 1, 4, 4\), got \(8, 3, 4, 4\)"),
        (torch.zeros(8, 1, 8, 8), ValueError, r"shape \(N, 1, 4, 4\)"),
        (torch.full((8, 1, 4, 4), float("nan")), ValueError, "finite"),
    ],
)
def test_wrong_batches(trainer, batch, error, message):
    with pytest.raises(error, match=message):
        trainer().step(batch)


def test_a_model_of_ones_own_keeps_its_chains():
    from mgebm_fast.sampling import Langevin

    chains = [Langevin(steps=2, step_size=0.2, clamp=(0, 255)), Langevin(steps=3, step_size=0.1, clamp=(0, 255))]
    model = MultiGrid((1, 2, 4), channels=1, langevin=chains, width=0.1, variant="compact", norm="none", batch_size=5)
    trainer = MultiGridTrainer(model, tiny_data(), steps=2, optimiser={"lr": 0.01}, quiet=True)
    assert trainer.config.dynamics() == tuple(chains) and trainer.config.batch_size == 5
    assert trainer.config.optimiser.lr == 0.01
    trainer.fit()
    assert trainer.iteration == 2 and model.langevin == tuple(chains)


def test_model_and_configuration_must_fit():
    model = build_model(tiny_config())
    with pytest.raises(ValueError, match=r"config.sizes must be the model's, \(1, 2, 4\), got \(1, 4\)"):
        MultiGridTrainer(model, tiny_data(), tiny_config(sizes=[1, 4]))
    with pytest.raises(ValueError, match=r"data must be 1 x 4 x 4.*got 3 x 4 x 4"):
        MultiGridTrainer(model, tiny_data(channels=3), tiny_config())
    with pytest.raises(ValueError, match="at least one image"):
        MultiGridTrainer(model, tiny_data(0), tiny_config())


def test_a_bf16_update_is_near_the_fp32_one(trainer):
    # One update from the same chain starts: the chains differ by the gradient's rounding, far less than by their noise.
    losses = {}
    for precision in ("fp32", "bf16"):
        losses[precision] = trainer(precision=precision, seed=5).step(tiny_data(8).batch(slice(None)))
    for name, value in losses["fp32"].items():
        bound = 0.3 if name.endswith("stiffness") else 0.1  # of differences of gradients
        assert losses["bf16"][name] == pytest.approx(value, rel=bound, abs=5e-3), name


def test_noisy_data_stay_in_the_range_where_asked():
    images = torch.rand(8, 1, 4, 4) * 2 - 1
    noisy = {}
    for clamped in (False, True):
        config = tiny_config(stabilise={"data_noise": 2.0, "data_noise_clamp": clamped})
        rule = MultiGridRule(build_model(config), config, images=20)
        noisy[clamped] = rule._with_noise(images.clone(), 2, rule.numbers(0), 0)
    assert noisy[False].abs().max() > 1
    assert torch.equal(noisy[True], noisy[False].clamp(-1, 1))
