"""Going back after divergence: the good state bit for bit, what is other from there on, and how such runs end."""

from __future__ import annotations

import io
import itertools
import json
import types
from contextlib import closing

import numpy as np
import pytest
import torch
from helpers.runs import board, same_files, same_run
from helpers.training import tiny_config, tiny_data
from rich.console import Console
from tensorboard.summary.writer import event_file_writer

from mgebm_fast import noise
from mgebm_fast.cli import app
from mgebm_fast.errors import ConfigError, DivergenceError
from mgebm_fast.learning import MultiGridTrainer, Run
from mgebm_fast.learning.run import checkpoint, records
from mgebm_fast.learning.run.divergence.rollback import History
from mgebm_fast.learning.run.divergence.watch import WINDOW, RunAway, Watch
from mgebm_fast.learning.run.rule import Factors

BANK = {"scales": [2.0], "orientations": 2}
COUPLED = {"langevin": {"steps": 3, "step_size": 0.3, "reference_std": 1.0}, "value_range": [-4.0, 4.0]}
LATENT = {"latent": 2, "generator_width": 2, "infer_steps": 2}
FAMILIES = {
    "multigrid": {"stabilise": {"ema": 0.9, "data_noise": 0.03, "noise_anneal": 0.3}, "flips": True,
                  "spectral_norm": True, "optimiser": {"schedule": "cosine"}},
    "multigrid, bank": {"multigrid": {"bank_size": 12}, "stabilise": {"ema": 0.9}},
    "batch statistics": {"norm": "batch", "optimiser": {"name": "sgd", "momentum": 0.9}, "batch_parts": 2},
    "cd": {"method": "cd", "stabilise": {"data_noise": 0.1}},
    "single-grid-cd": {"method": "single-grid-cd"},
    "short-run": {"method": "short-run"},
    "pcd": {"method": "pcd"},
    "shared bank": {"method": "pcd", "pcd": {"bank_size": 16, "restart": 0.3}},
    "generative-convnet": {"method": "generative-convnet", **COUPLED,
                           "generative-convnet": {"layers": [[3, 3, 1], [2, 3, 1]], "grow": 0.9}},
    "frame": {"method": "frame", "frame": BANK, **COUPLED},
    "frame, Hamiltonian": {"method": "frame", "frame": {**BANK, "leapfrog_steps": 2}, **COUPLED},
    "cooperative": {"method": "cooperative", "cooperative": LATENT},
    "abp": {"method": "abp", "abp": {**LATENT, "expand": True, "occlude": "pepper"}},
    "spatial-temporal": {"method": "spatial-temporal", "batch_size": 2, **COUPLED,
                         "spatial-temporal": {"size": [4, 6, 8], "layers": [[3, 3, 2]]}},
}  # fmt: skip
IN_MEMORY = ("multigrid", "multigrid, bank", "shared bank")  # without a folder too
# Which images are shown, and how, and where their energies are looked at: no matter of chains.
DATA = (noise.Purpose.DATA_ORDER, noise.Purpose.AUGMENTATION, noise.Purpose.PROBE)


def data_for(changes):
    if changes.get("method") != "spatial-temporal":
        return None
    return np.random.default_rng(0).integers(0, 256, (6, 6, 8, 1), dtype=np.uint8)


@pytest.fixture
def run(trainer):
    """A trainer of six updates that may go back twice, with good states after 0, 2, 4 and 6."""

    def make(out=None, console=None, attempts=2, **changes):
        rollback = {"attempts": attempts, **changes.pop("rollback", {})}
        return trainer(out=out, data=data_for(changes), console=console, rollback=rollback, **changes)

    return make


def diverge(ours, *places, seen=None):
    """Let update number u (from 1) of attempt a fail where (u, a) is in `places`, as a rule says it; `seen` is called
    before every update."""
    update = ours.rule.update

    def failing(batch, iteration, **options):
        if seen is not None:
            seen(iteration, ours.rule)
        if (iteration + 1, ours.rule.attempt) in places:
            raise DivergenceError("training: it was made to fail")
        return update(batch, iteration, **options)

    ours.rule.update = failing
    return ours


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[part].keys() == b[part].keys() and all(torch.equal(a[part][name], b[part][name]) for name in a[part])
        for part in a
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_good_state_is_gone_on_from_with_other_noise_and_half_the_rate(run, tmp_path, monkeypatch, family):
    changes = FAMILIES[family]
    run(tmp_path / "plain", attempts=0, **changes).fit(4)
    good = tmp_path / "plain/checkpoints/step_000004"

    def from_the_good_state(attempt, rate):
        fresh = run(attempts=0, **changes)
        fresh.resume(good)
        at_good = fresh.rule.snapshot()
        fresh.rule.attempt, fresh.rule.factors = attempt, {"": Factors(rate, 1.5)}
        fresh.fit()
        return at_good, fresh.rule.snapshot()

    at_good, expected = from_the_good_state(1, 0.5)
    drawn, states, whose, stream = {0: set(), 1: set()}, [], None, noise.stream

    def seen(iteration, rule):
        nonlocal whose
        whose = drawn[rule.attempt] if iteration in (4, 5) else None
        if (iteration, rule.attempt) == (4, 1):
            states.append(rule.snapshot())

    def spied(purpose, grid=0):
        word = stream(purpose, grid)
        if whose is not None and purpose not in DATA:
            whose.add(word)
        return word

    monkeypatch.setattr(noise, "stream", spied)
    for out in (tmp_path / "run", None) if family in IN_MEMORY else (tmp_path / "run",):
        ours = diverge(run(out, **changes), (6, 0), seen=seen)
        assert ours.fit().finished and ours.iteration == 6
        whose = None
        assert equal(states.pop(), at_good) and not states
        assert equal(ours.rule.snapshot(), expected)
        assert ours.rule.attempt == 1 and ours.rule.factors_of().rate == 0.5
    assert drawn[0] and drawn[1] and not drawn[0] & drawn[1]
    assert not equal(from_the_good_state(1, 1.0)[1], expected)


def test_what_a_run_says_and_writes(run, tmp_path):
    words = io.StringIO()
    diverge(run(tmp_path, Console(file=words, width=40), log_every=2), (4, 0), (6, 1)).fit()
    said = [line for line in words.getvalue().splitlines() if "rollback" in line]
    assert said == [
        "training: it was made to fail; back to update 2, with the learning rate times 0.5 and other noise in its "
        "chains from here on (rollback 1 of at most 2)",
        "training: it was made to fail; back to update 4, with the learning rate times 0.25 and other noise in its "
        "chains from here on (rollback 2 of at most 2)",
    ]
    lines = Run(tmp_path).metrics()
    assert [(r["step"], r.get("rollbacks"), r.get("diverged_at"), r.get("lr_factor")) for r in lines] == [
        (2, None, None, 1.0), (2, 1, 4, None), (4, None, None, 0.5), (4, 2, 6, None), (6, None, None, 0.25),
    ]  # fmt: skip
    state = json.loads((tmp_path / "checkpoints/step_000006/state.json").read_text())["rollback"]
    assert [(e["at"], e["to"], e["factor"]) for e in state["made"]] == [(4, 2, 0.5), (6, 4, 0.5)]
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_each_return_adds_noise_to_observed_images(run, tmp_path):
    """By `rollback.data_noise_factor`, for the rest of the run, a resumed one included; no noise stays none."""
    noisy = {"stabilise": {"data_noise": (0.0, 0.04), "noise_anneal": 0.5}, "rollback": {"data_noise_factor": 1.25}}
    words = io.StringIO()
    ours = diverge(run(tmp_path, Console(file=words, width=40), log_every=2, **noisy), (4, 0), (6, 1))
    ours.fit(5)
    assert ours.rule.numbers(0).data_noise == [0.0, 0.04 * 1.25]
    again = run(tmp_path, log_every=2, **noisy)
    again.resume()
    assert again.rule.numbers(0).data_noise == [0.0, 0.04 * 1.25]
    diverge(again, (6, 1)).fit()
    assert again.rule.numbers(5).data_noise == pytest.approx([0.0, 0.04 * 1.25**2 * 0.5])
    assert "the learning rate times 0.5, data noise times 1.25 and other noise in its chains" in words.getvalue()
    factors = [record.get("data_noise_factor") for record in Run(tmp_path).metrics() if "lr_factor" in record]
    assert factors == [None, 1.25, 1.25**2]


def collapse(ours, *places):
    """Let the watch find a collapse of a net after update number u of attempt a, for (u, a, net) in `places`."""
    check = ours._loop.history.watch.check

    def checked(metrics, update):
        check(metrics, update)
        for at, attempt, net in places:
            if (update, ours.rule.attempt) == (at, attempt):
                raise RunAway(f"training: {net} was made to collapse", net)

    ours._loop.history.watch.check = checked
    return ours


SIZES = {"sizes": [1, 2, 4], "stabilise": {"data_noise": (0.02, 0.04)}}


def test_a_net_that_ran_away_alone_is_changed_alone(run, tmp_path):
    """Its rate and its data noise, in the records, in words, after a stop; what the others learn is as before."""
    words, changes = io.StringIO(), {**SIZES, "log_every": 2, "rollback": {"data_noise_factor": 2.0}}
    ours = collapse(run(tmp_path, Console(file=words, width=40), **changes), (4, 0, "size_4"))
    ours.fit(5)
    again = run(tmp_path, Console(file=words, width=40), **changes)
    again.resume()
    for rule in (ours.rule, again.rule):
        assert rule.factors == {"": Factors(), "size_4": Factors(0.5, 2.0)}
        assert rule.numbers(5).data_noise == [0.02, 0.08] and rule.numbers(5).rates == [1e-3, 5e-4]
    again.fit()
    said = words.getvalue()
    assert "back to update 2, with the learning rate of the net of size 4 times 0.5, its data noise times 2" in said
    assert "went back 1 time, the learning rate of the net of size 4 ended at 0.5 of that asked for, its data" in said
    last = Run(tmp_path).metrics()[-1]
    assert last["lr_factor"] == 1.0 and last["size_4/lr_factor"] == 0.5 and last["size_4/data_noise_factor"] == 2.0
    assert not {"size_2/lr_factor", "size_2/data_noise_factor", "data_noise_factor"} & last.keys()

    with_it = run(**SIZES)  # the same noise, and nothing slowed
    with_it.resume(tmp_path / "checkpoints/step_000002")
    with_it.rule.factors = {"": Factors()}
    for iteration in range(2, 6):
        with_it.rule.update(with_it._loop.batches.batch(iteration), iteration)
    coarse, fine = zip(ours_nets(again), ours_nets(with_it))
    assert torch.equal(*coarse) and not torch.equal(*fine)


def ours_nets(trainer):
    return [torch.cat([p.detach().flatten() for p in net.parameters()]) for net in trainer.model.nets]


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("method, sizes", [("multigrid", [1, 2, 4]), ("short-run", [1, 4])])
def test_each_net_that_ran_away_is_changed_alone_every_time(run, tmp_path, folder, method, sizes):
    """The one that did twice by both factors, the other by one of its own; all of it where there is one net."""
    out, words = tmp_path if folder else None, io.StringIO()
    places = (6, 0, "size_4"), (6, 1, f"size_{sizes[1]}"), (5, 2, "size_4")
    ours = collapse(run(out, Console(file=words, width=40), attempts=3, method=method, sizes=sizes), *places)
    assert ours.fit().finished and [entry.to for entry in ours._loop.history.made] == [4, 2, 4]
    nets = {"size_4": Factors(0.25), "size_2": Factors(0.5)}
    assert ours.rule.factors == ({"": Factors(0.125)} if method == "short-run" else {"": Factors(), **nets})
    if folder and method == "multigrid":
        ends = "the net of size 4 ended at 0.25 of that asked for, the learning rate of the net of size 2 ended at 0.5"
        assert ends in words.getvalue()


def test_a_batch_that_was_refused_before_does_not_count_as_a_net_that_ran_away(run):
    """Its return is of all nets; the first of a net after it is of that net alone."""
    ours = run(sizes=[1, 2, 4], stabilise={"data_noise": (0.0, 0.04)})
    diverge(collapse(ours, (6, 1, "size_2")), (4, 0)).fit()
    assert ours.rule.factors == {"": Factors(0.5, 1.5), "size_2": Factors(0.25, 1.5)}


def test_a_return_of_an_older_version_left_data_noise_as_it_was():
    history = History(tiny_config(stabilise={"data_noise": 0.04}), types.SimpleNamespace(stiffness_bounds={}))
    history.restore({"rollback": {"made": [{"at": 4, "to": 2, "factor": 0.5, "why": "it ran away"}]}})
    assert history.factors() == history.factors("size_4") == Factors(0.5, 1.0)


def test_abandoned_records_are_gone_from_both_places(tmp_path, monkeypatch):
    # TensorBoard reads files in the order of their names: second, then a number that is not padded.
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(event_file_writer, "time", types.SimpleNamespace(time=lambda: next(seconds)))
    with closing(records.Recorder(tmp_path, 0)) as recorder:
        for step in (1, 2, 3):
            recorder.add(step, {"gap": float(step)})
        recorder.rewind(1, 0)
        recorder.add(1, {"rollbacks": 1, "diverged_at": 4})
        recorder.add(2, {"gap": 20.0})
    expected = [(1, 1.0), (2, 20.0)]
    assert board(tmp_path) == expected
    lines = records.read(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["gap"]) for r in lines if "gap" in r] == expected and lines[1]["diverged_at"] == 4
    records.truncate(tmp_path / "metrics.jsonl", 1)
    assert len(records.read(tmp_path / "metrics.jsonl")) == 1  # as a checkpoint from before knows it


def test_too_often(run, tmp_path):
    for out in (tmp_path, None):
        ours = diverge(run(out), (5, 0), (6, 1), (6, 2))
        last = "the last good checkpoint is .*step_000004" if out else "there is no checkpoint yet"
        with pytest.raises(DivergenceError, match=f"stopped at update 6, .*went back 2 times before; {last}"):
            ours.fit()
    with pytest.raises(DivergenceError, match="update 6, which was not saved; there is no.*rollback.attempts lets"):
        diverge(run(attempts=0), (6, 0)).fit()
    more = run(tmp_path, attempts=3)
    more.resume()
    assert more.fit().finished and more.rule.attempt == 2  # the third one was not needed


@pytest.mark.parametrize("folder", [False, True])
def test_after_the_last_divergence_a_trainer_is_in_its_best_state_as_a_whole(run, tmp_path, folder):
    """Weights, updates made, schedules, and what is gone back to if it goes on."""
    changes = {"stabilise": {"ema": 0.9, "noise_anneal": 0.3}, "steps": 8}
    ours = run(tmp_path / "r" if folder else None, attempts=1, **changes)
    offer = ours._loop.states.offer
    ours._loop.states.offer = lambda done, *a: offer(done, *a) if done <= 2 else None
    diverge(ours, (6, 0), (6, 1))
    with pytest.raises(DivergenceError, match="that of update 2, the best"):
        ours.fit()
    assert ours.iteration == 2 and checkpoint.read(ours.save(tmp_path / "saved"))["iteration"] == 2
    fresh = run(attempts=1, **changes)
    fresh.fit(2)
    assert ours.model.langevin == fresh.model.langevin and equal(ours.rule.snapshot(), fresh.rule.snapshot())
    ours._loop.history.made = []
    ours._loop.history.tell(ours.rule)
    back = diverge(ours, (4, 0))
    back.fit(5)
    assert [entry.to for entry in back._loop.history.made] == [2]


def test_a_best_later_than_the_state_that_was_gone_back_to_stays(run, tmp_path):
    with pytest.raises(DivergenceError, match="that of update 4, the best"):
        diverge(run(tmp_path), (6, 0), (5, 1), (3, 2)).fit()
    more = run(tmp_path, attempts=3)
    assert more.resume() == 2
    more.fit(3)
    assert checkpoint.read(tmp_path / "checkpoints/best")["iteration"] == 4


def test_before_the_first_checkpoint(run, tmp_path):
    whole = diverge(run(tmp_path / "a"), (1, 0), (2, 1))
    assert whole.fit().finished and whole.rule.attempt == 2
    assert [(r["step"], r.get("diverged_at")) for r in Run(tmp_path / "a").metrics()][:3] == [(0, 1), (0, 2), (1, None)]
    memory = diverge(run(), (1, 0), (2, 1))
    memory.fit()
    assert equal(memory.rule.snapshot(), whole.rule.snapshot())


def test_noise_that_anneals_is_back_where_it_was(run):
    """Back at update 0 chains have their full noise again."""
    changes = {"stabilise": {"noise_anneal": 0.3}, "checkpoint_every": 0}
    ours, fresh = diverge(run(**changes), (5, 0)), run(**changes)
    ours.fit()
    fresh.rule.attempt, fresh.rule.factors = 1, {"": Factors(0.5, 1.5)}
    for iteration in range(6):
        fresh.rule.update(fresh._loop.batches.batch(iteration), iteration)
    assert equal(ours.rule.snapshot(), fresh.rule.snapshot())


PLACES = (6, 0), (6, 1)


def test_stopped_and_resumed_equals_the_uninterrupted(run, tmp_path):
    """The stop after update 5 leaves a checkpoint there, to which no run goes back."""
    diverge(run(tmp_path / "a", keep_checkpoints=1), *PLACES).fit()
    diverge(run(tmp_path / "b", keep_checkpoints=1), *PLACES).fit(5)
    assert [p.name for p in checkpoint.listed(tmp_path / "b/checkpoints")] == ["step_000004", "step_000005"]
    again = diverge(run(tmp_path / "b", keep_checkpoints=1), *PLACES)
    assert again.resume() == 5
    again.fit(5)
    again.fit()
    same_files(tmp_path / "a", tmp_path / "b", "step_000006")
    ours, theirs = (
        [{k: v for k, v in r.items() if k != "seconds_per_update"} for r in Run(tmp_path / name).metrics()]
        for name in "ab"
    )
    assert ours == theirs and [r["step"] for r in ours] == [1, 2, 3, 4, 4, 4, 5, 6]
    made = [checkpoint.read(tmp_path / name / "checkpoints/step_000006")["rollback"] for name in "ab"]
    assert made[0] == made[1] and len(made[0]["made"]) == 2


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory):
    """A run that diverges at `PLACES`."""
    out = tmp_path_factory.mktemp("runs") / "a"
    config = tiny_config(rollback={"attempts": 2})
    diverge(MultiGridTrainer(None, tiny_data(), config, out=out, device="cpu", quiet=True), *PLACES).fit()
    return out


@pytest.mark.parametrize("moment", ["at once", "before the checkpoint", "in it", "before the records", "later"])
def test_killed_while_it_goes_back(run, gone_back, tmp_path, monkeypatch, moment):
    ours = diverge(run(tmp_path / "b"), *PLACES)
    folder = ours._loop.folder
    set_aside, save = folder.set_later_aside, folder.save

    def killed(*args, **options):
        if ours.rule.attempt:
            raise Killed

    with monkeypatch.context() as patched:
        if moment == "at once":
            folder.set_later_aside = lambda step: (killed(), set_aside(step))
        elif moment == "before the checkpoint":
            folder.save = lambda *a: (killed(), save(*a))
        elif moment == "in it":
            write = checkpoint.write_tensors
            patched.setattr(checkpoint, "write_tensors", lambda *a: (killed(), write(*a)))
        elif moment == "before the records":
            patched.setattr(ours._loop, "_record_going_back", killed)
        else:
            diverge(ours, seen=lambda iteration, rule: killed() if iteration == 5 else None)
        with pytest.raises(Killed):
            ours.fit()
    again = diverge(run(tmp_path / "b"), *PLACES)
    assert again.resume() == 4 and again.rule.attempt == (1 if moment in ("before the records", "later") else 0)
    again.fit()
    same_files(gone_back, tmp_path / "b", "step_000006")
    for out in (gone_back, tmp_path / "b"):
        lines = [(r["step"], r.get("rollbacks")) for r in Run(out).metrics()]
        assert lines == [(1, None), (2, None), (2, 2), (3, None), (4, None), (5, None), (6, None)]


def test_diverging_again_before_a_newer_good_state_it_goes_further_back(run, tmp_path):
    """To 4, 2, 0 and 0 again; with one checkpoint kept, always to the same."""
    places = [(6, 0), (5, 1), (3, 2), (1, 3)]
    for out in (tmp_path, None):
        ours = diverge(run(out, attempts=4), *places)
        ours.fit()
        assert [e.to for e in ours._loop.history.made] == [4, 2, 0, 0] and ours.rule.factors_of().rate == 1 / 16
    assert [(r["step"], r.get("rollbacks")) for r in Run(tmp_path).metrics()[:3]] == [(0, 3), (0, 4), (1, None)]
    one = diverge(run(keep_checkpoints=1, attempts=3), (6, 0), (5, 1), (6, 2))
    one.fit()
    assert [e.to for e in one._loop.history.made] == [4, 4, 4]


def test_a_damaged_good_state_gives_way_to_an_older_one(run, tmp_path):
    def damage(iteration, rule):
        if iteration == 5 and rule.attempt == 0:
            (tmp_path / "checkpoints/step_000004/optimiser.safetensors").write_bytes(b"")

    ours = diverge(run(tmp_path), (6, 0), seen=damage)
    assert ours.fit().finished
    assert [r["step"] for r in Run(tmp_path).metrics()] == [1, 2, 2, 3, 4, 5, 6]
    assert checkpoint.read(tmp_path / "checkpoints/step_000004")["rollback"]["made"][0]["to"] == 2


@pytest.mark.parametrize("family", ["multigrid", "abp"])
def test_a_run_that_does_not_diverge_is_the_same_with_and_without(run, tmp_path, family):
    for name, attempts in (("off", 0), ("on", 3)):
        run(tmp_path / name, attempts=attempts, **FAMILIES[family]).fit()
    same_run(tmp_path / "off", tmp_path / "on")
    assert checkpoint.read(tmp_path / "off/checkpoints/step_000006")["rollback"]["made"] == []


def test_energies_that_run_away_are_brought_back(run, tmp_path):
    """A learning rate at which energies of ±1e4 come within updates; halved often enough, none above 10."""
    wild = {"optimiser": {"lr": 20.0}, "steps": 12, "rollback": {"attempts": 20, "gap_max": 10.0}}
    config = tiny_config(**wild)
    words = io.StringIO()
    from helpers.training import tiny_data

    def trainer(settings, out=None):
        return MultiGridTrainer(
            None, tiny_data(), settings, out=out, device="cpu", console=Console(file=words, width=40)
        )

    ours = trainer(config, tmp_path)
    ours.fit()
    assert 1 < ours.rule.attempt < 20 and "ran away from each other" in words.getvalue()
    gaps = [abs(value) for r in Run(tmp_path).metrics() for name, value in r.items() if name.endswith("/gap")]
    assert len(gaps) == 24 and max(gaps) <= 10
    once = tiny_config(**{**wild, "rollback": {"attempts": 1, "gap_max": 10.0}})
    with pytest.raises(DivergenceError, match=r"more than 10 \(rollback.gap_max\); .*was not saved; .*back 1 time "):
        trainer(once).fit()


def test_numbers_that_overflow_are_brought_back(run):
    """Unclamped chains and a learning rate that makes energies infinite."""
    ours = run(optimiser={"lr": 1e20}, langevin={"clamp": False}, precision="fp32", attempts=200,
               rollback={"attempts": 200, "lr_factor": 1e-3, "gap_ratio": None})  # fmt: skip
    assert ours.fit().finished and ours.rule.attempt > 1
    assert all(bool(p.isfinite().all()) for p in ours.model.parameters())


def gaps(*values):
    return {f"size_{2**i}/gap": value for i, value in enumerate(values, start=1)} | {"lr_factor": 1e9}


def test_run_away_is_seen_against_the_running_mean():
    numbers = np.random.default_rng(0).normal(size=WINDOW)
    watch = Watch(tiny_config(rollback={"attempts": 1, "gap_ratio": 20.0}))
    for update, number in enumerate(numbers, start=1):
        watch.check(gaps(1e6 * (update == 3), number), update)  # a young run may do as it likes
    mean = np.abs(numbers).mean()
    stored = json.loads(json.dumps(watch.state()))
    watch.check(gaps(1.0, -19.99 * mean), 101)
    watch.restore(stored)
    with pytest.raises(RunAway, match=r"at update 101: .* apart at size 4, more than .* \(20 times its running mean"):
        watch.check(gaps(1.0, -20.01 * mean), 101)
    assert watch.state() == stored
    for update in range(101, 600):  # growth by a hundredth an update is followed, and no run-away
        watch.check(gaps(1.0, mean * 1.01 ** (update - 100)), update)
    Watch(tiny_config(rollback={"attempts": 1, "gap_ratio": None})).check(gaps(1e30), 1)
    with pytest.raises(RunAway, match="update 1: 5 apart at size 2, more than 4 "):
        Watch(tiny_config(rollback={"attempts": 1, "gap_max": 4.0})).check(gaps(5.0), 1)


def test_no_attempt_has_the_counters_of_another():
    words = {
        noise.stream(noise.retried(purpose, attempt), grid)
        for purpose in noise.Purpose for attempt in (0, 1, 2, 255) for grid in (0, 1, 65535)
    }  # fmt: skip
    assert len(words) == len(noise.Purpose) * 12 and max(words) < 2**32 and max(noise.Purpose) < 256
    assert noise.stream(noise.retried(noise.Purpose.LATENT, 3), 5) == 3 << 24 | 6 << 16 | 5
    with pytest.raises(ValueError, match=r"attempt must be in \[0, 255\], got 256"):
        noise.retried(noise.Purpose.LATENT, 256)
    with pytest.raises(ConfigError, match="rollback.attempts must be a whole number >= 0 and <= 255"):
        tiny_config(rollback={"attempts": 256})


def test_the_command(tmp_path, capsys):
    tiny = [f"--set={key}" for key in ("steps=6", "langevin.steps=2", "batch_size=8", "width=0.1", "checkpoint_every=2",
                                       "optimiser.lr=300", "rollback.attempts=30", "rollback.gap_max=5")]  # fmt: skip
    app(["train", "digits", *tiny, "--device", "cpu", "--out", str(tmp_path / "r")], standalone_mode=False)
    words = capsys.readouterr().err
    assert "(rollback 1 of at most 30)" in words and f"next: mgebm sample {tmp_path / 'r'} --num 64" in words
    assert Run(tmp_path / "r").finished
