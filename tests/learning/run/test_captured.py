"""Captured updates on a CPU: the body of the graph stands for its replay, and every run must be the eager one."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from helpers.runs import same_files
from helpers.training import tiny_data
from rich.console import Console

from mgebm_fast.data import ImageData
from mgebm_fast.errors import BackendError
from mgebm_fast.learning import Run
from mgebm_fast.learning.methods import captured
from mgebm_fast.learning.methods.banks import BankCascade
from mgebm_fast.learning.run import checkpoint
from mgebm_fast.learning.run.divergence.watch import RunAway
from mgebm_fast.sampling import graphs
from mgebm_fast.sampling.static import StaticCascade

CHANGES = {
    "plain": {"stabilise": {"ema": 0.9, "data_noise": [0.03, 0.0], "noise_anneal": 0.3, "energy_l2": 0.01},
              "optimiser": {"schedule": "cosine", "warmup": 3, "grad_clip_norm": 0.5},
              "langevin": {"steps": 3, "drift": 1.0, "noise_std": {"start": 0.06, "end": 0.0}, "grad_clamp": 0.3}},
    "batch": {"norm": "batch", "stabilise": {"ema": 0.9, "data_noise": 0.05, "data_noise_clamp": True},
              "optimiser": {"name": "sgd", "momentum": 0.9, "grad_rescale_max": 0.1}},
    "spectral": {"spectral_norm": True, "flips": True, "optimiser": {"name": "adamw", "per_layer_divide": True},
                 "langevin": {"steps": [3, 2], "step_size": 0.3, "reference_std": 1.0}},
    "muon": {"width": 0.5, "optimiser": {"name": "muon", "weight_decay": 0.1, "schedule": "cosine"}},
    "stiff": {"stabilise": {"data_noise": 0.05, "stiffness": 1e-6}, "checkpoint_every": 5},
    "linear": {"multigrid": {"upsampling": "linear"}, "stabilise": {"data_noise": 0.05}},
    "growing": {"begin": [0.0, 0.5], "stabilise": {"ema": 0.9, "data_noise": 0.05, "noise_anneal": 0.3},
                "optimiser": {"schedule": "cosine", "warmup": 3}},
    "growing bank": {"begin": [0.0, 0.5], "multigrid": {"bank_size": 12, "conditional": True, "upsampling": "linear"}},
    "conditional": {"multigrid": {"conditional": True}, "stabilise": {"data_noise": 0.05}},
    "bank": {"multigrid": {"bank_size": 12, "bank_share": 0.5, "bank_renewal": 0.5, "conditional": True},
             "stabilise": {"noise_anneal": 0.3},
             "langevin": {"steps": 3, "drift": 1.0, "noise_std": {"start": 0.06, "end": 0.01}, "grad_clamp": 0.3}},
    "bank of the finest": {"multigrid": {"bank_size": 12, "bank_grids": 1, "bank_share": 0.25}, "begin": [0.0, 0.25]},
    "bank of the finest, all stored": {"multigrid": {"bank_size": 12, "bank_grids": 1, "bank_share": 1.0,
                                                     "conditional": True, "upsampling": "linear"}},
    "bank of batch statistics": {"norm": "batch", "multigrid": {"bank_size": 12, "bank_share": 1.0},
                                 "langevin": {"steps": [2, 3], "step_size": 0.3}},
}  # fmt: skip


class Recorded(list):
    """The captures made: a body each, which a replay runs again."""

    def record(self, lane, body, device):
        body()
        if "CapturedUpdate" in body.__qualname__:  # else of a sampled cascade
            self.append(body)
        return body


@pytest.fixture
def recorded(monkeypatch):
    """From a call of this on, CPUs have graphs."""
    made = Recorded()

    def begin():
        monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
        monkeypatch.setattr(captured.Lane, "record", lambda *arguments: made.record(*arguments))
        return made

    return begin


def make(trainer, out, changes, **more):
    if "multigrid" in changes:
        pixels = tiny_data().images
        more["data"] = ImageData(pixels, np.arange(len(pixels)) % 2, ("even", "odd"))
    run = {"steps": 12, "log_every": 5, "checkpoint_every": 4, "sample_every": 0, "rollback": {"attempts": 2}}
    return trainer(out=out, **{**run, **changes, **more})


def same(a, b):
    """Weights, averages, moments and records are equal, every bit; records of the steps that both have."""
    same_files(a, b, "step_000012")
    records = [
        {r["step"]: {k: v for k, v in r.items() if k != "seconds_per_update"} for r in Run(run).metrics()}
        for run in (a, b)
    ]
    shared = records[0].keys() & records[1].keys()
    assert {5, 10, 12} <= shared
    # A spectral norm's weights of before and after its last power iteration round to other bfloat16 numbers, and
    # stiffness is of differences of gradients.
    for step in shared:
        for stiff, bound in ((False, 1e-7), (True, 1e-3)):
            one, two = ({k: v for k, v in r[step].items() if k.endswith("stiffness") == stiff} for r in records)
            assert one == pytest.approx(two, rel=1e-4, abs=bound), step


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_the_eager_one_bit_for_bit_also_where_it_is_stopped(trainer, tmp_path, recorded, name):
    make(trainer, tmp_path / "eager", CHANGES[name]).fit()
    captures = recorded()
    ours = make(trainer, tmp_path / "captured", CHANGES[name])
    ours.fit(1)
    assert len(captures) == 2 and "a CUDA graph each; measures are read every 5 updates" in ours.explain()
    ours.fit(7)
    ours = make(trainer, tmp_path / "captured", CHANGES[name])
    ours.resume()
    ours.fit()
    assert len(captures) == (6 if "begin" in CHANGES[name] else 4)  # one more where a net joins
    same(tmp_path / "eager", tmp_path / "captured")


def spoil_weights(ours, monkeypatch):
    batches, found = ours._loop.batches, []
    read = batches.batch

    def batch(iteration, other):
        if iteration == 6 and not found and ours.rule.attempt == 0:
            found.append(iteration)
            with torch.no_grad():
                ours.model.nets[1].head.bias.fill_(torch.inf)
        return read(iteration, other)

    batches.batch = batch


def collapse(ours, monkeypatch):
    check = ours._loop.history.watch.check

    def checked(metrics, update):
        check(metrics, update)
        if update == 7 and ours.rule.attempt == 0:
            raise RunAway("training: it was made to fail", "size_4")

    ours._loop.history.watch.check = checked


def refuse_a_batch(ours, monkeypatch):
    check, found = ours._loop.history.watch.check_batch, []

    def checked(batch, update):
        if update == 7 and not found:
            found.append(update)
            raise RunAway("training: it was made to fail", "data", "batch")
        check(batch, update)

    ours._loop.history.watch.check_batch = checked


@pytest.mark.parametrize("fault, name", [(spoil_weights, "plain"), (collapse, "plain"), (collapse, "bank")])
def test_a_run_goes_back_to_where_an_eager_one_does(trainer, tmp_path, recorded, monkeypatch, fault, name):
    """Found up to log_every updates later, at the same update: the state that is gone back to is the same."""
    for kind in ("eager", "captured"):
        captures = recorded() if kind == "captured" else []
        ours = make(trainer, tmp_path / kind, CHANGES[name])
        fault(ours, monkeypatch)
        assert ours.fit().finished
    assert len(captures) == 4
    going_back = [[r for r in Run(tmp_path / name).metrics() if "rollbacks" in r] for name in ("eager", "captured")]
    assert going_back[0] == going_back[1] and going_back[0][0]["diverged_at"] == 7
    same(tmp_path / "eager", tmp_path / "captured")


def test_a_run_leaves_a_batch_out_as_an_eager_one_does(trainer, tmp_path, recorded, monkeypatch):
    for kind in ("eager", "captured"):
        captures = recorded() if kind == "captured" else []
        ours = make(trainer, tmp_path / kind, CHANGES["plain"])
        refuse_a_batch(ours, monkeypatch)
        assert ours.fit().finished and ours.rule.attempt == 0
    assert len(captures) == 2
    same(tmp_path / "eager", tmp_path / "captured")


@pytest.mark.parametrize("name, cascade", [("batch", StaticCascade), ("bank", BankCascade)])
def test_an_update_that_could_not_be_applied_is_made_again_without_a_graph(
    trainer, tmp_path, recorded, monkeypatch, name, cascade
):
    """As where 16 bits overflow: nothing after it is applied either, until the measures are read."""
    make(trainer, tmp_path / "eager", CHANGES[name]).fit()
    recorded()
    ours, runs, run_once = make(trainer, tmp_path / "captured", CHANGES[name]), [], cascade.run_once

    def failing(self):
        run_once(self)
        runs.append(1)
        if len(runs) == 2 + 2:  # two captures, and update 2
            self.healthy.fill_(False)

    monkeypatch.setattr(cascade, "run_once", failing)
    eager, update = [], ours.rule.update
    ours.rule.update = lambda batch, iteration, **options: (
        eager.append(iteration) or update(batch, iteration, **options)
    )
    ours.fit()
    assert eager == [1, 2, 3]  # to where update 2 was found out, before the checkpoint after update 4
    same(tmp_path / "eager", tmp_path / "captured")


def test_what_an_error_left_unread_is_read_before_it_is_saved_or_goes_on(trainer, tmp_path, recorded, monkeypatch):
    """Update 5 could not be applied, and the data of update 7 fail before that is known."""
    make(trainer, tmp_path / "eager", CHANGES["batch"]).fit()
    recorded()
    ours, runs, run_once = make(trainer, tmp_path / "captured", CHANGES["batch"]), [], StaticCascade.run_once
    read = ours._loop.batches.batch

    def failing(self):
        run_once(self)
        runs.append(1)
        if len(runs) == 2 + 6:  # two captures, and update 5
            self.healthy.fill_(False)

    def batch(iteration, other):
        if iteration == 7 and ours.iteration == 7:
            raise OSError("the data are gone")
        return read(iteration, other)

    monkeypatch.setattr(StaticCascade, "run_once", failing)
    ours._loop.batches.batch = batch
    with pytest.raises(OSError, match="the data are gone"):
        ours.fit()
    ours.save(tmp_path / "saved")
    assert ours.iteration == 5 and checkpoint.read(tmp_path / "saved")["iteration"] == 5
    ours._loop.batches.batch = read
    ours.fit()
    same(tmp_path / "eager", tmp_path / "captured")


def test_measures_are_read_once_for_many_updates(trainer, recorded, monkeypatch):
    recorded()
    reads, read = [], captured.CapturedUpdate.read
    monkeypatch.setattr(captured.CapturedUpdate, "read", lambda self: reads.append(self.waiting) or read(self))
    console = Console(file=io.StringIO(), width=200)
    ours = trainer(steps=50, log_every=20, checkpoint_every=0, sample_every=0, console=console)
    ours._loop.announces = True  # as on a GPU
    ours.fit()
    assert console.file.getvalue().count("updates: a CUDA graph each; measures are read every 20 updates\n") == 1
    assert reads == [20, 20, 10]


def test_what_is_not_captured_says_why(trainer, recorded, monkeypatch):
    def reason(**changes):
        return trainer(**changes).explain().removeprefix("updates: without a CUDA graph, because ")

    assert reason() == "CUDA graphs are not for cpu devices"
    assert reason(method="pcd") == "this method has none"
    with pytest.raises(BackendError, match="graph = true cannot be had: CUDA graphs are not for cpu"):
        trainer(graph=True).fit()
    recorded()
    assert reason(graph=False) == "graph = false"
    assert reason(batch_parts=2) == "batches are learnt from in 2 parts"
    monkeypatch.setenv("MGEBM_GRAPHS", "0")
    assert reason() == "MGEBM_GRAPHS=0" and "a CUDA graph each" in trainer(graph=True).explain()
    monkeypatch.delenv("MGEBM_GRAPHS")
    batch = tiny_data(8).batch(slice(None))
    full = trainer()
    full.rule.static_chains = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.\n8 MiB"))
    full.rule.launch(batch, 0)
    assert full.explain().endswith("because CUDA out of memory. 8 MiB")
    fails = trainer()
    monkeypatch.setattr(captured.Lane, "record", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    before = fails.rule.snapshot()
    fails.rule.launch(batch, 0)
    assert fails.explain().endswith("because its capture failed: no memory")
    fresh = trainer()
    fresh.rule.update(batch, 0)
    for part, tensors in fresh.rule.snapshot().items():
        assert all(torch.equal(tensors[name], fails.rule.snapshot()[part][name]) for name in tensors)
    assert not torch.equal(before["model"]["nets.0.head.weight"], fails.rule.snapshot()["model"]["nets.0.head.weight"])
