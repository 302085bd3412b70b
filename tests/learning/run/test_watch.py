"""The watch: planted failures are seen before samples are mud, healthy runs are not stopped, and the best is kept."""

from __future__ import annotations

import json
import math
import types
from io import StringIO

import numpy as np
import pytest
import torch
from helpers.training import tiny_config, tiny_data
from rich.console import Console

from mgebm_fast.errors import DivergenceError
from mgebm_fast.learning import MultiGridTrainer, Run
from mgebm_fast.learning.run import checkpoint
from mgebm_fast.learning.run.divergence.measure import energy_distance, error_of
from mgebm_fast.learning.run.divergence.rollback import History
from mgebm_fast.learning.run.divergence.states import MemoryStates
from mgebm_fast.learning.run.divergence.watch import RunAway, Watch
from mgebm_fast.learning.run.feed import Batches
from mgebm_fast.models import storage

HEALTHY = {"gradient_clamped": 0.6, "saturated": 0.1, "spread": 1.1, "gradient_to_noise": 7.0}


def watching(**changes):
    return Watch(tiny_config(stabilise={"energy_l2": 0.02}, watch=changes))


def feed(watch, gaps, **of_record):
    """The update that trips, None where none does; every 20th has a record."""
    for update, gap in enumerate(gaps, start=1):
        record = {f"size_8/{k}": v for k, v in {**HEALTHY, **of_record}.items()} if update % 20 == 0 else {}
        watch.check({"size_8/gap": gap, **record}, update)


def healthy(n=4000, seed=0):
    """Gaps as the 8×8 net of a colour run has them: noise whose scale triples as noise anneals, with single spikes."""
    draw = np.random.default_rng(seed)
    gaps = draw.normal(scale=0.3, size=n) * np.linspace(1, 3, n)
    gaps[draw.integers(150, n, 5)] *= 4
    return gaps


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_never_stopped(seed):
    feed(watching(), healthy(seed=seed))


def test_the_collapse_that_was_recorded_is_seen_early():
    """The 8×8 net of cifar10 at 32×32: from −0.4 to −37 within 150 updates, the wall of energy_l2 = 0.02 at 50."""
    slide = -0.4 * (37 / 0.4) ** (np.arange(150) / 150)
    with pytest.raises(RunAway, match=r"size 8, more than .*watch.gap") as error:
        feed(watching(), [*healthy(1000) / 2, *slide])
    assert (
        1000 < int(str(error.value).split("update ")[1].split(":")[0]) <= 1120
        and error.value.net == "the net of size 8"
    )
    slow = -0.4 * 1.002 ** np.arange(4000)  # too slow for its own history: the wall is for that
    with pytest.raises(RunAway, match=r"more than 12.5 \(0.25 of the wall"):
        feed(watching(gap_growth=0.0), slow)


@pytest.mark.parametrize(
    ("of_record", "key"),
    [({"gradient_clamped": 0.95}, "clamped"), ({"saturated": 0.6}, "saturated"), ({"spread": 0.2}, "spread"),
     ({"spread": 3.5}, "spread"), ({"spread": float("nan")}, "spread")],
)  # fmt: skip
def test_what_records_show_counts_three_times_in_a_row(of_record, key):
    with pytest.raises(RunAway, match=rf"size 8 collapses at update 160: .*\(watch\.{key}\)"):
        feed(watching(), healthy(400), **of_record)
    feed(watching(**{key: 0.0}), healthy(400), **of_record)
    feed(watching(on=False), healthy(400) * 1e6, **of_record)


def test_bounds_of_rollback_hold_where_the_watch_is_off():
    config = tiny_config(watch={"on": False}, rollback={"gap_max": 5.0, "gap_ratio": None})
    with pytest.raises(RunAway, match=r"at update 2: 6 apart at size 8, more than 5 \(rollback.gap_max\)"):
        feed(Watch(config), [4.0, 6.0])
    off = watching(on=False)
    feed(off, [1.0] * 150)
    stored = History(tiny_config(watch={"on": False}), types.SimpleNamespace(stiffness_bounds={}))
    stored.watch.restore(off.state())
    again = watching(on=False)
    again.restore(json.loads(json.dumps(stored.state(good=True)))["rollback"]["watch"])
    with pytest.raises(RunAway, match=r"31 apart at size 8, more than 30 \(30 times .*, rollback.gap_ratio"):
        again.check({"size_8/gap": 31.0}, 151)
    feed(Watch(tiny_config(watch={"on": False}, rollback={"gap_ratio": None})), [1.0] * 150 + [1e6])


def test_a_record_where_a_run_stopped_is_not_counted():
    watch = Watch(tiny_config(log_every=20))
    bad = {"size_8/gap": 0.1, "size_8/gradient_clamped": 0.99, "size_8/spread": 1.0}
    for update in range(1, 151):
        watch.check({"size_8/gap": 0.1} if update % 20 and update != 150 else bad, update)
    assert watch.strikes == {"size_8/gradient_clamped": 2}  # of 120 and 140


def rising(start=0.07, until=1200, over=300, to=0.5, n=2000):
    """The rms gradient over its clip of a 64×64 net that ended so: flat, and sevenfold within 300 updates."""
    return np.interp(np.arange(1, n + 1), [1, until, until + over, n], [start, start, to, to])


def feed_gradients(watch, values, first=1):
    for update, value in enumerate(values, start=first):
        record = {**HEALTHY, "gradient_clamped": float(value)} if update % 20 == 0 else {}
        watch.check({"size_8/gap": 0.1, **{f"size_8/{k}": v for k, v in record.items()}}, update)


def test_a_net_that_grows_steep_is_seen_before_its_gap_says_so():
    with pytest.raises(
        RunAway, match=r"size 8 collapses at update 1300: .* times its highest before, more than 2"
    ) as error:
        feed_gradients(watching(), rising())
    assert "stabilise.data_noise" in error.value.advice
    feed_gradients(watching(steepness=0.0), rising())
    feed_gradients(watching(), rising(until=20, over=400))  # as young nets do
    feed_gradients(watching(), rising(over=300, to=0.13))  # less than twice
    slow = 0.07 * 1.0025 ** np.minimum(np.arange(1000), 1000)  # twelvefold, less than twice within 200 updates
    feed_gradients(watching(), slow)
    again = watching()
    feed_gradients(again, rising()[:1290])
    again, state = watching(), json.loads(json.dumps(again.state()))
    again.restore(state)
    with pytest.raises(RunAway, match="at update 1300"):
        feed_gradients(again, rising()[1290:], first=1291)


def test_a_resumed_watch_trips_where_the_other_does():
    series = [*healthy(700), *(-np.geomspace(0.4, 40, 120))]
    whole, again = watching(), watching()
    feed(again, series[:650])
    stored = json.loads(json.dumps(again.state()))
    again = watching()
    again.restore(stored)
    found = []
    for watch, begin in ((whole, 0), (again, 650)):
        with pytest.raises(RunAway) as error:
            for update, gap in enumerate(series[begin:], start=begin + 1):
                watch.check({"size_8/gap": gap}, update)
        found.append(str(error.value))
    assert found[0] == found[1]


def batches(n, size=64):
    return (
        torch.from_numpy(np.random.default_rng(i).integers(60, 200, (size, 1, 4, 4), dtype=np.uint8)) for i in range(n)
    )


@pytest.mark.parametrize("bad", [0, 255])
def test_a_corrupted_batch_is_refused_before_it_is_learnt_from(bad):
    watch = watching()
    for update, batch in enumerate(batches(150), start=1):
        watch.check_batch(batch, update)
    one = next(batches(1))
    one[0] = bad  # one odd image is no corrupted batch
    watch.check_batch(one, 151)
    with pytest.raises(RunAway, match="the batch of update 152 is unlike those before it"):
        watch.check_batch(torch.full_like(one, bad), 152)
    spoilt = one / 128 - 1
    spoilt[3, 0, 1, 2] = float("nan")
    with pytest.raises(RunAway, match="pixels that are not finite"):
        watch.check_batch(spoilt, 1)


def test_what_is_known_of_batches():
    watch, (batch,) = watching(), batches(1)
    watch.check_batch(batch, 1)
    pixels = batch.numpy() / 255
    expected = {"mean": pixels.mean(), "std": pixels.std(), "step": np.abs(np.diff(pixels)).mean()}
    assert {name: mean for name, (mean, _) in watch.of_batches.items()} == pytest.approx(expected, rel=1e-5)


def test_shuffled_bytes_are_unlike_images_of_the_same_mean_and_std():
    watch, ramp = watching(), torch.arange(0, 256, 4, dtype=torch.uint8).view(1, 1, 1, 64).expand(16, 1, 4, 64)
    shuffled = ramp[..., torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    for update in range(1, 151):
        watch.check_batch(ramp, update)
    with pytest.raises(RunAway, match=r"batch of update 151 .*: the mean step between its neighbours is 0\.\d+ of the"):
        watch.check_batch(shuffled, 151)
    watch.check_batch(ramp, 151)


def test_a_gap_of_a_net_that_has_hardly_any_may_grow_to_one():
    watch = watching()
    feed(watch, [0.003] * 150)
    watch.check({"size_8/gap": 0.9}, 151)  # 300 times the mean, and nothing: nets of size 2 do that
    with pytest.raises(RunAway, match=r"1\.1 apart at size 8, more than 1 \(30 times its running mean"):
        watch.check({"size_8/gap": 1.1}, 152)


def test_the_energy_distance():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 3, 8, 8, generator=draw) for _ in range(2))
    mud = torch.zeros_like(x) + torch.randn(64, 3, 1, 1, generator=draw)
    assert abs(energy_distance(x, y)) < 0.2 < 5 < energy_distance(mud, y)
    features = torch.cat([y.flatten(1), y.diff(dim=2).flatten(1), y.diff(dim=3).flatten(1)], 1)
    assert error_of(y) == pytest.approx(float(torch.pdist(features).mean()) / 64, rel=1e-5) and error_of(None) == 0


def test_the_best_state_is_the_newest_that_is_not_clearly_worse_than_another():
    """A run's measure is lowest after a few updates, by chance, and no better picture may be thrown away for it."""
    states = MemoryStates(History(tiny_config(), types.SimpleNamespace(stiffness_bounds={})), 2)
    rule = types.SimpleNamespace(snapshot=lambda: None)
    found = []
    for iteration, measure in enumerate([None, None, 0.6, 5.0, math.inf, 0.9, 0.4, 0.75, 0.71, None, 9.0]):
        states.offer(iteration, measure, 0.13, rule, {})
        found.append(states.best())
    assert found == [
        (0, None), (1, None), (2, 0.6), (2, 0.6), (2, 0.6), (5, 0.6), (6, 0.4), (6, 0.4), (8, 0.4), (8, 0.4), (8, 0.4)
    ]  # fmt: skip


COLLAPSING = {
    "sizes": [1, 4], "stabilise": {"energy_l2": 0.01}, "optimiser": {"lr": 0.3}, "steps": 400, "checkpoint_every": 20,
    "log_every": 10, "sample_every": 0, "keep_checkpoints": 1, "width": 0.1, "precision": "fp32",
    "rollback": {"attempts": 1, "lr_factor": 1.0},
}  # fmt: skip


def test_a_run_that_collapses_leaves_its_best_model_and_says_so(tmp_path):
    trainer = MultiGridTrainer(
        None, tiny_data(), tiny_config(**COLLAPSING), out=tmp_path / "r", device="cpu", quiet=True
    )
    with pytest.raises(
        DivergenceError, match=r"went back 1 time.*What to change for the net of size \d: .*best from before"
    ):
        trainer.fit()
    run = Run(tmp_path / "r")
    state = checkpoint.read(tmp_path / "r/checkpoints/best")
    assert not run.finished and f"that of update {state['iteration']}, the best from before" in run.collapse
    measures = [r["held_out/energy_distance"] for r in run.metrics() if "held_out/energy_distance" in r]
    assert state["measure"] <= min(measures)
    best = checkpoint.read_tensors(tmp_path / "r/checkpoints/best/model.safetensors")
    final = checkpoint.read_tensors(tmp_path / "r/model.safetensors")
    assert all(torch.equal(final[name], best[name]) for name in final)


def test_where_the_best_is_damaged_the_newest_good_state_is_the_model(tmp_path, trainer):
    ours = trainer(out=tmp_path, steps=8)
    launch = ours.rule.launch

    def fail(batch, iteration, **options):
        if iteration == 5:
            (tmp_path / "checkpoints/best/state.json").write_text("{")
            raise DivergenceError("training: it was made to fail")
        launch(batch, iteration, **options)

    ours.rule.launch = fail
    with pytest.raises(DivergenceError, match="that of update 4, the best from before the collapse"):
        ours.fit()
    assert "its model is that of update 4" in Run(tmp_path).collapse and ours.iteration == 4


def test_no_older_model_is_called_the_best_where_a_run_is_killed(tmp_path, trainer, monkeypatch):
    ours = trainer(out=tmp_path)
    ours.fit()
    write, folder = storage.write_checked, ours._loop.folder
    killed = lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    for save in (
        lambda: folder.save_before_collapse(ours.rule, 4, 7, "it was made to fail"),
        lambda: folder.save_model(ours.rule, 6, final=True),  # it went on, and came to its end
    ):
        monkeypatch.setattr(storage, "write_checked", killed)
        with pytest.raises(KeyboardInterrupt):
            save()
        assert Run(tmp_path).collapse == "" and Run(tmp_path).model_file().parent.name == "step_000006"
        monkeypatch.setattr(storage, "write_checked", write)
        folder.save_before_collapse(ours.rule, 4, 7, "it was made to fail")
        assert "that of update 4" in Run(tmp_path).collapse


def test_the_best_outlives_pruning_and_a_finished_run_is_no_collapse(tmp_path, trainer):
    out = tmp_path / "r"
    ours = trainer(out=out, keep_checkpoints=1, steps=12)
    ours.fit(2)
    state = checkpoint.read(out / "checkpoints/best")
    assert state["iteration"] == 2
    ours._loop.states.offer = lambda *a: None  # nothing better comes
    ours.fit()
    assert checkpoint.read(out / "checkpoints/best") == state and Run(out).collapse == "" and Run(out).finished
    assert len(checkpoint.listed(out / "checkpoints")) == 1


def whiten(monkeypatch, first, until):
    """Batches of white images for the updates after `first` up to `until`, in their own order alone where one is."""
    read = Batches._read

    def spoilt(self, iteration, other=0):
        images = read(self, iteration, other)
        white = first <= iteration < until and (other == 0 or until > first + 1)
        return torch.full_like(images, 255) if white else images

    monkeypatch.setattr(Batches, "_read", spoilt)


LONG = {"steps": 112, "checkpoint_every": 53, "log_every": 50, "sample_every": 0, "rollback": {"attempts": 2}}


def test_a_batch_unlike_the_others_is_left_out_and_the_run_goes_on(tmp_path, trainer, monkeypatch):
    whiten(monkeypatch, 108, 109)
    words, seen = StringIO(), []
    whole = trainer(out=tmp_path / "whole", console=Console(file=words, width=400), **LONG)
    launch = whole.rule.launch
    whole.rule.launch = lambda batch, *a, **k: (seen.append(float(batch.float().mean())), launch(batch, *a, **k))
    assert whole.fit().finished and whole._loop.history.made == [] and max(seen) < 200 and len(seen) == 112
    said = [line for line in words.getvalue().splitlines() if "left out" in line]
    assert len(said) == 1 and "the batch of update 109 is unlike those before it" in said[0]
    trainer(out=tmp_path / "parts", **LONG).fit(107)
    rest = trainer(out=tmp_path / "parts", **LONG)
    assert rest.resume() == 107 and rest.fit().finished
    assert all(torch.equal(a, b) for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True))
    relaunched = whole._loop.updates  # as after an update that could not be applied
    relaunched._seen, relaunched._others = 109, {108: 1}
    assert relaunched._batch(108).float().mean() < 200


@pytest.mark.parametrize("knows_images", [False, True])
def test_data_at_fault_end_a_run_at_once(tmp_path, trainer, monkeypatch, knows_images):
    """Going back would show the same images again; nor may others stand in where a rule knows them by their order."""
    whiten(monkeypatch, 108, 109 if knows_images else 200)
    ours = trainer(out=tmp_path, **LONG)
    ours.rule.knows_images = knows_images
    with pytest.raises(
        DivergenceError, match=r"stopped at update 109, .*What to change for the data: the data"
    ) as error:
        ours.fit()
    assert "rollback.attempts" not in str(error.value) and "that of update 106, the best" in str(error.value)
    assert ours._loop.history.made == [] and ours.rule.attempt == 0


def test_a_refused_batch_leaves_no_trace():
    watch, ramp = watching(), torch.arange(0, 256, 4, dtype=torch.uint8).view(1, 1, 1, 64).expand(16, 1, 4, 64)
    shuffled = ramp[..., torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    for update in range(1, 151):
        watch.check_batch(ramp + update % 2, update)
    before = watch.state()
    with pytest.raises(RunAway, match="step between"):
        watch.check_batch(shuffled, 151)
    assert watch.state() == before
