"""Diagnostics: ESS, R-hat and autocorrelation against closed forms, and what a recorder measures against float64."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest
import torch

import mgebm_fast as mg
from mgebm_fast import noise, ops
from mgebm_fast.nets import ConvSpec, EnergyNet
from mgebm_fast.sampling import diagnostics
from mgebm_fast.sampling.diagnostics import Recorder, autocorrelation, ess, split_rhat


def autoregressive(rho, draws, chains, seed=0):
    """Stationary y_k = ρ y_{k−1} + √(1 − ρ²) ε, (draws, chains)."""
    rng = np.random.default_rng(seed)
    y = np.empty((draws, chains))
    y[0] = rng.normal(size=chains)
    for k in range(1, draws):
        y[k] = rho * y[k - 1] + math.sqrt(1 - rho**2) * rng.normal(size=chains)
    return y


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_ess_of_an_autoregressive_chain(rho):
    pytest.importorskip("arviz")
    found = ess(autoregressive(rho, 5000, 8))
    # the estimate scatters by a few per cent at these lengths; 15 % is five times that
    assert found == pytest.approx(40_000 * (1 - rho) / (1 + rho), rel=0.15)


def test_split_rhat_is_its_formula_and_sees_what_it_should():
    pytest.importorskip("arviz")
    same = autoregressive(0.3, 400, 6)
    halves = np.concatenate([same[:200], same[200:]], 1)
    within, between = halves.var(0, ddof=1).mean(), 200 * halves.mean(0).var(ddof=1)
    expected = math.sqrt((199 / 200 * within + between / 200) / within)
    assert split_rhat(same, method="split") == pytest.approx(expected, rel=1e-10)
    assert split_rhat(same) < 1.02
    assert split_rhat(same + np.arange(6)) > 1.5  # chains apart
    assert split_rhat(same + np.linspace(0, 5, 400)[:, None]) > 1.3  # halves apart: no chain is where it was
    assert split_rhat(same * np.array([1, 1, 1, 5, 5, 5])) > 1.05  # the same mean, other spreads: folded draws


def test_ess_and_rhat_are_those_on_record():
    """By arviz 0.23.4 and 1.3.0 alike."""
    pytest.importorskip("arviz")
    y = autoregressive(0.5, 400, 6) + np.linspace(0, 1, 6)
    found = [ess(y), split_rhat(y), split_rhat(y, method="split")]
    np.testing.assert_allclose(found, [64.76992688803877, 1.0686362811656749, 1.0685144902985415], rtol=1e-9)


def test_too_few_draws_say_nothing():
    pytest.importorskip("arviz")
    assert ess(np.zeros((3, 4))) is None and split_rhat(np.ones((50, 4))) is None
    assert ess(np.full((50, 4), np.nan)) is None
    with pytest.raises(ValueError, match=r"draws must have shape \(draws, chains\), got \(50,\)"):
        ess(np.zeros(50))


def test_a_missing_arviz_is_told(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "arviz":
            raise ModuleNotFoundError("No module named 'arviz'", name="arviz")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    for function in (ess, split_rhat):
        with pytest.raises(ModuleNotFoundError, match=r'need arviz: pip install "mgebm_fast\[diagnostics\]"'):
            function(np.zeros((9, 2)))


def test_autocorrelation_is_the_direct_sum():
    y = autoregressive(0.7, 60, 3, seed=2) + np.array([0.0, 0.5, -0.5])
    away, n = y - y.mean(), len(y)
    variance = (away**2).sum() / n
    direct = [(away[: n - t] * away[t:]).sum() / (n - t) / variance for t in range(30)]
    np.testing.assert_allclose(autocorrelation(y), direct, rtol=0, atol=1e-12)
    long = autocorrelation(autoregressive(0.8, 20_000, 4), lags=6)
    np.testing.assert_allclose(long, 0.8 ** np.arange(6), atol=0.03)
    assert np.isnan(autocorrelation(np.ones((9, 2)))).all()
    with pytest.raises(ValueError, match=r"lags must be in \[1, 60\]"):
        autocorrelation(y, lags=61)


# the recorder


def quartic(x):
    return (x.double() ** 4).flatten(1).sum(1) / 4


def start(n=6, *shape):
    return torch.randn(n, *(shape or (5,)), generator=torch.Generator().manual_seed(1))


def test_what_is_recorded_is_what_float64_says():
    chain = mg.Langevin(steps=7, drift=0.05, noise_std=0.2, reference_std=1.5, reference_mean=0.3, grad_clamp=2.0)
    x, states = start(), []
    recorder = Recorder(quartic, chain, seed=9, grid=3)

    def both(step, state):
        recorder(step, state)
        states.append(state.clone().double())

    end = chain(quartic, x, seed=2, first_step=4, callback=both)
    trace = recorder.trace()
    assert torch.equal(end.double(), states[-1]) and list(trace.steps) == list(range(4, 11))
    temperature = 0.2**2 / 0.1

    def potential(x):
        return quartic(x) + (x - 0.3).square().sum(1) / (2 * 1.5**2)

    def pull(x):
        return (x**3).clamp(-2, 2) + (x - 0.3) / 1.5**2

    for k, state in enumerate(states):
        np.testing.assert_allclose(trace.energy[k], quartic(state), rtol=1e-6)
        np.testing.assert_allclose(trace.potential[k], potential(state), rtol=1e-6)
        ratio = (0.05 * pull(state)).square().mean(1).sqrt() / 0.2
        np.testing.assert_allclose(trace.gradient_to_noise[k], ratio, rtol=1e-5)
        np.testing.assert_allclose(trace.quantities["mean"][k], state.mean(1), rtol=1e-6, atol=1e-7)
        # the ratio of densities of one step of this chain, from the momenta that are defined
        epsilon = ops.noise((6, 5), seed=9, step=5 + k, stream=noise.stream(noise.Purpose.MOMENTUM, 3)).double()
        there = state - 0.05 * pull(state) + 0.2 * epsilon

        def log_q(end, begin):
            return -(end - begin + 0.05 * pull(begin)).square().sum(1) / (2 * 0.2**2)

        log_ratio = (potential(state) - potential(there)) / temperature + log_q(state, there) - log_q(there, state)
        np.testing.assert_allclose(trace.log_acceptance[k], log_ratio.clamp(max=0), rtol=0, atol=2e-4)
    np.testing.assert_allclose(trace.acceptance, np.exp(trace.log_acceptance))
    assert trace.acceptance.min() < 0.9


def test_a_corrected_chains_acceptance_is_its_own():
    """The momentum of a record is that of the chain's next step, so the decision can be told beforehand."""
    for chain in (mg.MALA(steps=30, step_size=0.7), mg.HMC(steps=30, leapfrog_steps=3, step_size=0.5)):
        recorder = Recorder(quartic, chain, seed=4)
        result = chain(quartic, start(40), seed=4, callback=recorder)
        trace = recorder.trace()
        np.testing.assert_allclose(trace.log_acceptance[:-1], result.log_ratio[1:], rtol=0, atol=1e-9)
        np.testing.assert_allclose(trace.potential[-1], result.potential, rtol=1e-12)
        assert 0.3 < trace.acceptance.mean() < 0.97


def test_smaller_steps_are_accepted_more():
    rates = []
    for delta in (1.2, 0.6, 0.3, 0.1):
        chain = mg.Langevin(steps=40, step_size=delta)
        recorder = Recorder(lambda x: x.square().sum(1) / 2, chain)
        chain(lambda x: x.square().sum(1) / 2, start(200, 8), callback=recorder)
        rates.append(recorder.trace().after(0.5).acceptance.mean())
    assert rates == sorted(rates) and rates[0] < 0.8 and rates[-1] > 0.99


def test_batches_become_one_trace_and_records_are_thinned():
    chain = mg.Langevin(steps=10, step_size=0.3)
    x = start(9)
    whole, parts = Recorder(quartic, chain, every=3, seed=0), Recorder(quartic, chain, every=3, seed=0)
    chain(quartic, x, seed=0, callback=whole)
    for first, piece in ((0, x[:5]), (5, x[5:])):
        chain(quartic, piece, seed=0, first_sample=first, callback=parts)
    a, b = whole.trace(), parts.trace()
    assert list(a.steps) == list(b.steps) == [0, 3, 6, 9]
    for name in ("energy", "log_acceptance", "gradient_to_noise"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-6, atol=1e-9)
    for name, values in a.quantities.items():
        np.testing.assert_allclose(values, b.quantities[name], rtol=1e-6, atol=1e-9)
    assert parts.trace(samples=7).energy.shape == (4, 7)
    later = a.after(0.5)
    assert list(later.steps) == [6, 9] and np.array_equal(later.potential, a.potential[2:])
    assert [step for step, _ in a.states] == [0, 3, 6, 9] and a.states[0][1].shape == (8, 5)


def test_recording_leaves_the_chain_alone():
    net = EnergyNet(4, 1, [ConvSpec(4, 3)], norm="none", seed=0)
    chain, x = mg.Langevin(steps=5, step_size=0.1, clamp=(-1.0, 1.0)), start(3, 1, 4, 4).clamp(-1, 1)
    recorder = Recorder(net, chain)
    alone = chain(net, x, seed=0, precision="fp32")
    assert torch.equal(alone, chain(net, x, seed=0, precision="fp32", callback=recorder))
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert np.isfinite(recorder.trace().log_acceptance).all()


def test_held_pixels_do_not_count():
    mask = torch.tensor([True, True, False, False, False])
    chain = mg.Langevin(steps=2, drift=0.05, noise_std=0.2)
    recorder, small = Recorder(quartic, chain, mask=mask, seed=0), Recorder(quartic, chain, seed=0)
    x = start()
    x[:, 2:] = 1e3
    chain(quartic, x, seed=0, mask=mask, callback=recorder)
    chain(quartic, x[:, :2].contiguous(), seed=0, callback=small)
    a, b = recorder.trace().gradient_to_noise[0], small.trace().gradient_to_noise[0]
    # The noise of an element is that of its number, the same in both.
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(recorder.trace().quantities["mean"], small.trace().quantities["mean"], rtol=1e-6)
    elsewhere = Recorder(quartic, chain, mask=mask, seed=0)
    x[:, 2:] = torch.arange(6.0)[:, None]
    chain(quartic, x, seed=0, mask=mask, callback=elsewhere)
    for name in ("mean", "projection 1"):
        np.testing.assert_array_equal(recorder.trace().quantities[name], elsewhere.trace().quantities[name])


def test_noise_free_chains_have_no_acceptance():
    chain = mg.Langevin(steps=3, step_size=0.1, noise_scale=0.0, reference_std=2.0)
    recorder = Recorder(quartic, chain)
    end = chain(quartic, start(), callback=recorder)
    trace = recorder.trace()
    assert trace.acceptance is None and trace.gradient_to_noise is None and trace.after(0.3).log_acceptance is None
    expected = quartic(end) + end.double().square().sum(1) / 8
    np.testing.assert_allclose(trace.potential[-1], expected, rtol=1e-6)


def test_a_coupled_batch_is_accepted_as_one():
    net = EnergyNet(4, 1, [ConvSpec(4, 3)], norm="batch", seed=0)
    chain = mg.Langevin(steps=3, step_size=0.5)
    recorder = Recorder(net, chain)
    chain(net, start(5, 1, 4, 4), callback=recorder, seed=0)
    found = recorder.trace().log_acceptance
    assert (found == found[:, :1]).all() and (found < 0).any()


def test_nothing_recorded_is_told():
    recorder = Recorder(quartic, mg.Langevin(steps=3, step_size=0.5))
    with pytest.raises(ValueError, match="must have made a step"):
        recorder.trace()
    with pytest.raises(ValueError, match="every must be a positive int"):
        Recorder(quartic, mg.Langevin(steps=3, step_size=0.5), every=0)
    assert diagnostics.PROJECTIONS == 8
