"""Nets that join a run later (`begin`)."""

from __future__ import annotations

import dataclasses
import io
import warnings

import pytest
import torch
from helpers.runs import same_run
from helpers.training import tiny_config, tiny_data
from rich.console import Console
from typer.testing import CliRunner

import mgebm_fast as mg
from mgebm_fast.cli import app
from mgebm_fast.errors import ConfigError
from mgebm_fast.learning import METHODS, Run, build_model, merge
from mgebm_fast.learning.run.divergence.watch import WINDOW, RunAway, Watch
from mgebm_fast.sampling import cascade as cascades

LATE = {"begin": [0.0, 0.5], "stabilise": {"ema": 0.9, "noise_anneal": 0.4}, "optimiser": {"schedule": "cosine"}}


def test_a_net_joins_after_its_share_of_the_run():
    assert tiny_config(begin=[0.0, 0.5]).first_updates() == (0, 3)
    assert tiny_config(begin=[0.0, 0.5], steps=100, log_every=20).first_updates() == (0, 50)
    assert tiny_config(begin=[0.0, 0.58], steps=100).first_updates() == (0, 58)  # 57.99999999999999
    assert tiny_config(begin=[0.0, 1 - 1e-12], steps=10).first_updates() == (0, 9)  # in the last update at the latest
    assert tiny_config(begin=[0.0, 0.5], steps=1).first_updates() == (0, 0)
    assert tiny_config(begin=[0.0, 0.5], steps=0).first_updates() == (0, 0)
    assert tiny_config().first_updates() == (0, 0)


@pytest.mark.parametrize(
    "begin, words",
    [
        ([0.1, 0.5], r"begin must be a list, with 0 for the coarsest net, .* got \[0.1, 0.5\]"),
        ([0.0, 0.5, 0.2], r"never falls from there on, or 0, got \[0.0, 0.5, 0.2\]"),
        (0.5, "begin must be a list, with 0 for the coarsest net, .* or 0, got 0.5"),
        ([0.0, 1.0], "begin must be a number >= 0 and < 1, or a list"),
        ([0.0], "begin must be one value, or a list of 2"),
    ],
)
def test_what_begin_may_be(begin, words):
    sizes = [1, 2, 4, 8] if isinstance(begin, list) and len(begin) == 3 else [1, 2, 4]
    with pytest.raises(ConfigError, match=words):
        tiny_config(begin=begin, sizes=sizes)


@pytest.mark.parametrize(
    "sizes, begin",
    [([1, 32], (0.0,)), ([1, 4, 32], (0.0, 0.5)), ([1, 16, 64], (0.0, 0.5)), ([1, 2, 8, 16], (0.0,) * 3)],
)
def test_it_is_fitted_to_other_sizes(sizes, begin):
    """By the nearest size, but for the coarsest net."""
    before = tiny_config(sizes=[1, 2, 8, 32], begin=[0.0, 0.0, 0.5])
    assert merge(before, {"sizes": sizes}).begin == begin


def test_shifts_are_fitted_to_other_sizes():
    before = tiny_config(sizes=[1, 2, 8, 32], shifts=4)
    assert [merge(before, {"sizes": [1, last]}).shifts for last in (64, 16, 4, 2)] == [8, 2, 0, 0]
    assert merge(before, {"sizes": [1, 4], "shifts": 3}).shifts == 3


def test_until_then_it_has_no_chain_and_its_weights_stay(trainer, monkeypatch):
    ours, chains, walk = trainer(**LATE), [], cascades.walk

    def counted(sizes, *arguments, **more):
        chains.append(tuple(sizes))
        return walk(sizes, *arguments, **more)

    monkeypatch.setattr(cascades, "walk", counted)
    before = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    late = [name for name in before if name.startswith("nets.1.")]
    for iteration in range(3):
        metrics = ours.rule.update(tiny_data(8).batch(slice(None)), iteration, detail=True)
        assert {name.partition("/")[0] for name in metrics if "/" in name} == {"size_2"}
        assert all(torch.equal(ours.model.state_dict()[name], before[name]) for name in late)
    assert ours.rule.samples(4) is None and set(chains) == {(1, 2)}
    assert [title for title, _ in ours.rule.panels(tiny_data(4).batch(slice(None)))[0]] == [
        "samples 1x1", "samples 2x2", "data 1x1", "data 2x2",
    ]  # fmt: skip
    chains.clear()
    metrics = ours.rule.update(tiny_data(8).batch(slice(None)), 3, detail=True)
    assert {name.partition("/")[0] for name in metrics if "/" in name} == {"size_2", "size_4"}
    assert chains == [(1, 2, 4)] and ours.rule.samples(4).shape == (4, 1, 4, 4)
    assert not all(torch.equal(ours.model.state_dict()[name], before[name]) for name in late)


def test_its_noise_and_its_rate_begin_when_it_does(trainer):
    config = tiny_config(**LATE, steps=11)
    assert config.first_updates() == (0, 5)
    factors = [config.noise_factors(iteration) for iteration in (0, 5, 6, 10)]
    assert factors == [pytest.approx(pair) for pair in [(1.0, 1.0), (0.7, 1.0), (0.64, 0.88), (0.4, 0.4)]]
    rule = trainer(**LATE, steps=11).rule
    rates = [rule.numbers(iteration).rates for iteration in (0, 5, 8)]
    assert rates[1][1] == rates[0][0] == config.optimiser.lr  # the start of the cosine, for each
    assert rates[2][1] == pytest.approx(config.optimiser.lr * 0.5)  # three of its six updates
    metrics = rule.update(tiny_data(8).batch(slice(None)), 8)
    assert metrics["size_4/lr_factor"] == pytest.approx(0.5) and "size_2/lr_factor" not in metrics


def test_its_average_begins_when_it_does(trainer):
    """The initial weights of a net count in its average for as little as they would if it had begun at once."""
    ours, plain = trainer(**LATE, steps=40), tiny_data(8).batch(slice(None))
    first = ours.rule.first_updates[1]
    weight = ours.model.nets[1].head.weight
    name = next(name for name, parameter in ours.model.named_parameters() if parameter is weight)
    initial = weight.detach().clone()
    ours.rule.update(plain, first)
    expected = initial + 0.9 * (weight.detach() - initial)  # 1 − 1/10
    torch.testing.assert_close(ours.rule.average.state()[name], expected)
    coarse = ours.rule.average.shares(first)[0]
    assert coarse == pytest.approx(1 - min(0.9, (1 + first) / (10 + first)))


def test_in_a_run_of_other_length_nets_that_wait_join_at_their_share_of_it():
    """Those that learn already joined when they did; none joins in the past, or by what was set by hand."""
    config = tiny_config(sizes=[1, 2, 4, 8], begin=[0.0, 0.4, 0.8], steps=10)
    assert config.first_updates() == (0, 4, 8)
    for made, steps, joins in [
        (0, 20, (0, 8, 16)), (5, 20, (0, 4, 16)), (9, 20, (0, 4, 8)), (10, 99_999_999, (0, 4, 8)),
        (3, 5, (0, 3, 4)), (4, 6, (0, 4, 4)), (5, 6, (0, 4, 5)), (7, 8, (0, 4, 7)),
    ]:  # fmt: skip
        other = dataclasses.replace(config, steps=steps).paced_as(config, made)
        assert other.first_updates() == joins and other.steps == steps, (made, steps)
    other = dataclasses.replace(config, steps=20, begin=(0.0, 0.1, 0.2))
    assert other.paced_as(config, 5, {"begin"}).begin is other.begin
    assert config.paced_as(config, 5) is config


def test_a_run_with_more_steps_has_the_noise_and_the_rates_of_its_new_length():
    """At 40 of 80 updates noise is half-way; what was set by hand, or is of other grids, stays."""
    late = {**LATE, "stabilise": {"noise_anneal": [0.3, 0.5], "noise_anneal_share": [0.7, 1.0]}}
    config = tiny_config(**late, steps=40)
    longer = dataclasses.replace(config, steps=80).paced_as(config, 40)
    assert longer.stabilise is config.stabilise and longer.first_updates() == config.first_updates() == (0, 20)
    assert longer.noise_factors(40) == pytest.approx((1 - 0.7 * 40 / (0.7 * 79), 1 - 0.5 * 20 / 59))
    assert config.noise_factors(39) == pytest.approx((0.3, 0.5))
    plain = dataclasses.replace(tiny_config(steps=5), steps=9)
    assert plain.paced_as(tiny_config(steps=5), 5) is plain  # no net that joins late
    other = dataclasses.replace(config, sizes=(1, 2, 4, 8), steps=80)
    assert other.paced_as(config, 40) is other


def test_the_watch_of_a_run_that_became_longer_begins_anew(trainer, tmp_path):
    """It does not compare gaps at a higher rate and more noise with what they were; a stop changes nothing."""
    ours = trainer(out=tmp_path, steps=4)
    ours.fit()
    same, longer = trainer(out=tmp_path, steps=4), trainer(out=tmp_path, steps=9)
    same.resume(), longer.resume()
    before = ours._loop.history.watch.state()
    assert same._loop.history.watch.state() == before and before["count"] == 4
    assert longer._loop.history.watch.state()["count"] == 0 and not longer._loop.history.watch.means
    longer.fit(6)
    again = trainer(out=tmp_path, steps=9)
    again.resume()
    assert again._loop.history.watch.state() == longer._loop.history.watch.state() and again._loop.iteration == 6


def test_a_net_that_has_begun_is_not_told_to_wait(trainer, tmp_path):
    """It would stand still, and its schedules would begin anew; one that has not may be."""
    ours = trainer(out=tmp_path, **LATE)
    assert ours.rule.first_updates == (0, 3)
    ours.fit(5)
    with pytest.raises(ConfigError, match="begin: must leave the net of size 4 learning, which began after update 3 a"):
        trainer(out=tmp_path, **{**LATE, "begin": [0.0, 0.9]}, steps=10).resume()
    trainer(out=tmp_path, **{**LATE, "begin": [0.0, 0.4]}, steps=10).resume()  # after update 4
    other = trainer(out=tmp_path / "waits", **LATE)
    other.fit(2)
    later = trainer(out=tmp_path / "waits", **{**LATE, "begin": [0.0, 0.9]}, steps=10)
    later.resume()
    assert later.rule.first_updates == (0, 9)


def test_what_is_to_come_is_said(trainer, tmp_path):
    said = io.StringIO()
    trainer(out=tmp_path, console=Console(file=said), **LATE).fit(2)
    assert "size 4 joins after update 3" in said.getvalue()
    said = io.StringIO()
    again = trainer(out=tmp_path, console=Console(file=said), **LATE)
    again.resume()
    again.fit(3)
    assert "size 4 joins after update 3" in said.getvalue()
    said = io.StringIO()
    again = trainer(out=tmp_path, console=Console(file=said), **LATE)
    again.resume()
    again.fit()
    assert "joins" not in said.getvalue()


def test_the_time_left_goes_by_the_work_of_the_nets_that_learn(trainer):
    rule = trainer(**LATE, langevin={"steps": [4, 2], "drift": 1.0, "noise_std": 0.1}).rule
    coarse, fine = ((2 * k + 6) * net.macs() for k, net in zip((4, 2), rule.model.nets))
    assert rule.cost(3) == 3 * coarse and rule.cost(6) == 6 * coarse + 3 * fine


def test_a_run_stopped_before_and_after_it_joins_is_the_same(trainer, tmp_path):
    trainer(out=tmp_path / "whole", **LATE).fit()
    for place, stop in (("before", 2), ("at", 3), ("after", 4)):
        trainer(out=tmp_path / place, **LATE).fit(stop)
        again = trainer(out=tmp_path / place, **LATE)
        again.resume()
        again.fit()
        same_run(tmp_path / "whole", tmp_path / place)
    records = Run(tmp_path / "whole").metrics()
    assert ["size_4/gap" in record for record in records] == [False] * 3 + [True] * 3


def test_a_model_says_that_a_net_of_it_has_not_begun(trainer, tmp_path):
    trainer(out=tmp_path, **LATE).fit(3)  # it begins in the next one
    words = "at update 3 the net of size 4 has not begun to learn in this run"
    with pytest.warns(UserWarning, match=words):
        mg.load(tmp_path)
    shown = CliRunner().invoke(app, ["sample", str(tmp_path), "--num", "2", "--out", str(tmp_path / "few.png")])
    assert shown.exit_code == 0 and words in shown.stderr
    again = trainer(out=tmp_path, **LATE)
    again.resume()
    again.fit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mg.load(tmp_path)


def test_one_net_alone_begins_at_once():
    for method in ("cd", "single-grid-cd", "abp"):
        config = tiny_config(method=method, begin=[0.0, 0.5])
        assert build_model(config) is not None
        assert METHODS[method].narrow(config).first_updates() == (0,)


def test_the_watch_gives_a_net_that_joins_its_own_time():
    """Bounds relative to its past begin WINDOW updates after it, in which it may do as it likes."""
    watch = Watch(tiny_config(rollback={"attempts": 1, "gap_ratio": 20.0}))
    for update in range(1, 3 * WINDOW + 1):
        watch.check({"size_2/gap": 0.1}, update)
    start = 3 * WINDOW + 1
    for update in range(start, start + WINDOW):
        watch.check({"size_2/gap": 0.1, "size_4/gap": 40.0 if update == start + 2 else 0.1}, update)
    again = Watch(tiny_config(rollback={"attempts": 1, "gap_ratio": 20.0}))
    again.restore(watch.state())
    for one in (watch, again):
        with pytest.raises(RunAway, match="apart at size 4"):
            one.check({"size_2/gap": 0.1, "size_4/gap": 40.0}, start + WINDOW)
