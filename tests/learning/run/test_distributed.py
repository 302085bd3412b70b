"""Ranks: two processes over gloo equal one that runs the same parts, every bit; what ends one ends both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import forked, rank_program
from helpers.rank_program import VARIANTS, part_values
from helpers.training import tiny_config, tiny_data
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from typer.testing import CliRunner

from mgebm_fast import ops
from mgebm_fast.cli import app
from mgebm_fast.errors import BackendError, ConfigError, DivergenceError
from mgebm_fast.learning import MultiGridTrainer, Run, build_model
from mgebm_fast.learning.methods.contrastive import _OF_RECORD
from mgebm_fast.learning.run import checkpoint
from mgebm_fast.learning.run.distributed import RankLost, Ranks, local_device
from mgebm_fast.learning.run.feed import Batches

ROOT = Path(__file__).resolve().parents[3]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks went through `rank_program.py`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ranks")
    alone = MultiGridTrainer(None, tiny_data(), tiny_config(), out=folder / "alone", device="cpu", quiet=True)
    alone.fit(2)
    said = [folder / f"rank_{rank}.txt" for rank in range(2)]
    pair = [forked.start(said[rank], rank_program.main, rank, folder) for rank in range(2)]
    try:
        for process in pair:
            process.join(300)
    finally:
        for process in pair:
            process.kill()
    assert [process.exitcode for process in pair] == [0, 0], "\n".join(path.read_text() for path in said)
    return folder


@pytest.fixture(scope="module")
def ends(ranks: Path) -> list[dict]:
    return [json.loads((ranks / f"rank_{rank}.json").read_text()) for rank in range(2)]


def same_bits(a: Path, b: Path, last: str = "step_000006") -> None:
    for name in (f"checkpoints/{last}/{file}.safetensors" for file in ("model", "optimiser")):
        ours, theirs = (checkpoint.read_tensors(run / name) for run in (a, b))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), (name, key)
    records = [
        [{k: v for k, v in record.items() if k != "seconds_per_update"} for record in Run(run).metrics()]
        for run in (a, b)
    ]
    assert records[0] == records[1] and records[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one_process(ranks, trainer, tmp_path, variant):
    trainer(out=tmp_path / "one", **{"batch_parts": 2, **VARIANTS[variant]}).fit()
    same_bits(tmp_path / "one", ranks / variant)
    for name in ("config.toml", "model.safetensors", "samples/step_000006.png"):
        assert (tmp_path / "one" / name).read_bytes() == (ranks / variant / name).read_bytes(), name


def test_parts_are_another_run_than_the_whole(ranks, trainer, tmp_path):
    trainer(out=tmp_path / "whole", **VARIANTS["batch statistics"]).fit()
    ours, theirs = (
        checkpoint.read_tensors(run / "model.safetensors") for run in (tmp_path / "whole", ranks / "batch statistics")
    )
    assert any(not torch.equal(ours[key], theirs[key]) for key in ours)


def test_resumed_ranks_equal_the_uninterrupted(ranks, ends):
    assert [end["resumed at"] for end in ends] == [4, 4]
    same_bits(ranks / "resumed", ranks / "adam")


def test_one_process_goes_on_with_a_run_of_two_ranks(ranks, trainer):
    changes = {**VARIANTS["batch statistics"], "batch_parts": 2}
    alone = trainer(out=ranks / "alone later", **changes)
    assert alone.resume() == 2
    alone.fit()
    same_bits(ranks / "alone later", ranks / "batch statistics")


def test_ranks_begin_with_the_weights_of_the_first(ranks, trainer, tmp_path):
    MultiGridTrainer(
        build_model(tiny_config(seed=0)), tiny_data(), tiny_config(batch_parts=2), device="cpu", quiet=True,
        out=tmp_path / "one",
    ).fit(2)  # fmt: skip
    same_bits(tmp_path / "one", ranks / "other weights", "step_000002")


def test_the_mean_is_added_in_the_order_of_parts(ranks):
    alone = Ranks().mean(lambda x, first: part_values(first), torch.zeros(12), 12, 232)
    expected = [torch.stack(v).double().mean(0) for v in zip(*map(part_values, range(12)), strict=True)]
    for rank in range(2):
        for ours, theirs, exact in zip(torch.load(ranks / f"{rank}.pt"), alone, expected, strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours.double(), exact, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("variant", ["batch statistics", "adam"])
def test_samples_of_two_ranks_are_those_of_one_process(ranks, variant, tmp_path):
    out = tmp_path / "one.npy"
    app(["sample", str(ranks / variant), "--num", "10", "--out", str(out)], standalone_mode=False)
    assert out.read_bytes() == (ranks / f"{variant}.npy").read_bytes()


@pytest.mark.parametrize(
    ("scene", "kind", "message"),
    [
        ("other images", "ValueError", "every rank must have the same images, got another on rank 1"),
        ("other seed", "ValueError", "every rank must have the same configuration"),
        ("three parts", "ConfigError", "the number of ranks must divide batch_parts, 3, got 2"),
        ("a run of one part", "ConfigError", "batch_parts must be 1, .* got 2"),
        ("folder in use", "FileExistsError", "new or empty folder"),
        ("diverging", "DivergenceError", "the chain of sample 5; stopped at update 4, .*step_000002"),
        ("full disk", "OSError", "full"),
    ],
)
def test_an_error_of_one_rank_ends_both(ends, scene, kind, message):
    import re

    for end in ends:
        assert end[scene][0] == kind and re.search(message, end[scene][1]), end[scene]


def test_ranks_go_back_together(ranks, ends, trainer, tmp_path):
    """Where one of them diverged, to the state after update 4; as one process does."""
    assert [end["back"] for end in ends] == [[6, 1, 0.25], [6, 1, 0.25]]
    changes = {**VARIANTS["batch statistics"], "batch_parts": 2, "rollback": {"attempts": 1, "lr_factor": 0.25}}
    one = trainer(out=tmp_path / "one", **changes)
    synthesise = one.rule.synthesise

    def diverge_once(observed, iteration, *more):
        if iteration == 4 and one.rule.attempt == 0:
            raise DivergenceError("the chain of sample 5")
        return synthesise(observed, iteration, *more)

    one.rule.synthesise = diverge_once
    one.fit()
    same_bits(tmp_path / "one", ranks / "back")


def test_ranks_without_a_folder_end_in_one_best_state(ends):
    assert "that of update 1, the best from before" in ends[0]["in memory"][1]
    assert ends[0]["the best"] == ends[1]["the best"] and ends[0]["the best"][0] == 1


def test_a_full_disk_says_how_to_go_on(ranks, ends):
    assert "the disk is full" in ends[0]["full disk"][1] and "begin again with" in ends[0]["full disk"][1]
    assert not list((ranks / "full disk/checkpoints").iterdir())


def test_a_signal_to_one_rank_stops_both_after_the_same_update(ranks, ends):
    assert [end["stopped"] for end in ends] == [[False, 3], [False, 3]]
    assert checkpoint.read(ranks / "stopped/checkpoints/step_000003")["iteration"] == 3


def test_the_first_rank_alone_speaks(ends):
    assert "stopped after 3 of 40 updates" in ends[0]["words"] and ends[1]["words"] == ""


def test_a_rank_that_vanishes_ends_the_other(ends):
    kind, message = ends[0]["lost"]
    assert kind == "RankLost" and "lost/checkpoints/step_000002, is whole; go on with" in message


def test_of_the_first_two_ranks_the_one_that_is_left_speaks():
    for rank, silent in ((0, False), (1, False), (2, True)):
        ranks = Ranks(rank)
        with pytest.raises(RankLost, match="rank 0 cannot be reached any more"), ranks._reaching("rank 0"):
            raise RuntimeError("connection closed by peer")
        assert ranks.failed is silent


TINY = ["--set", "steps=3", "--set", "langevin.steps=2", "--set", "batch_size=8", "--set", "width=0.1",
        "--device", "cpu", "--set", "norm=batch"]  # fmt: skip


def command_of_a_rank(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    app(arguments, standalone_mode=False)


def test_the_command_under_torchrun(tmp_path):
    """torchrun's own launcher, of ranks that are forked."""
    two, one, logs = tmp_path / "two", tmp_path / "one", tmp_path / "logs"
    result = CliRunner().invoke(app, ["train", "digits", *TINY, "--set", "batch_parts=2", "--out", str(one)])
    assert result.exit_code == 0, result.output  # first: ranks then have all that training imports
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="pair", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.1, start_method="fork",
        logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
    )  # fmt: skip
    elastic_launch(launch, command_of_a_rank)(["train", "digits", *TINY, "--out", str(two)])
    said = "".join(path.read_text() for path in sorted(logs.rglob("stderr.log")))
    assert said.count("1437 images of digits") == 1 and "2 ranks" in said
    assert said.count("3 updates done") == 1
    same_bits(one, two, "step_000003")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_over_nccl(tmp_path):
    """cuDNN's weight gradients need not repeat bit for bit; the first update's energies come before any of them."""
    tiny = ["cuda" if word == "cpu" else word for word in TINY]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mgebm_fast",
    ]
    records = {}
    for name, program, more in (
        ("two", launch, []),
        ("one", [sys.executable, "-m", "mgebm_fast"], ["--set", "batch_parts=2"]),
    ):
        out = tmp_path / name
        command = [*program, "train", "digits", *tiny, "--set", "log_every=1", *more, "--out", str(out)]
        subprocess.run(command, env=ALONE, check=True, timeout=300)
        records[name] = Run(out).metrics()
    assert [r["step"] for r in records["two"]] == [1, 2, 3]
    for key in ("size_2/energy_observed", "size_8/energy_synthesised"):
        assert records["two"][0][key] == pytest.approx(records["one"][0][key], rel=1e-3, abs=1e-4)


def test_the_device_of_a_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device() == local_device("cuda") == torch.device("cuda:1") and local_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="--device: must be auto, cpu or cuda under torchrun, .* got 'cuda:0'"):
        local_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BackendError, match="--nproc-per-node must be at most the 1 GPUs"):
        local_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_device().type == "cpu"


# One process


def test_a_batch_in_parts_is_the_whole_batch_up_to_rounding(trainer):
    batch, changes = tiny_data(8).batch(slice(None)), {"optimiser": {"name": "sgd", "lr": 0.5}, "precision": "fp32"}
    changes["stabilise"] = {"data_noise": 0.1, "energy_l2": 0.1}
    whole, parts = trainer(**changes), trainer(batch_parts=4, **changes)
    a, b = whole.step(batch), parts.step(batch)
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=1e-4)
    for name, value in a.items():
        if name.rpartition("/")[2] not in _OF_RECORD:  # of the first part alone
            assert b[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_running_statistics_are_the_mean_over_parts(trainer):
    ours = trainer(norm="batch", batch_parts=2, stabilise={"data_noise": 0.0})
    batch = tiny_data(8).batch(slice(None))
    ours.step(batch)
    halves = [build_model(tiny_config(norm="batch")) for _ in range(2)]
    for grid, size in ((1, 2), (2, 4)):
        (real,) = ops.pyramid(batch, [size])
        for half, images in zip(halves, real.split(4), strict=True):
            with half.nets[grid - 1].observing():
                half.nets[grid - 1](half.from_uint8(images))
        for name, buffer in ours.model.nets[grid - 1].named_buffers():
            values = [half.nets[grid - 1].get_buffer(name) for half in halves]
            expected = values[0] if name.endswith("observed") else torch.stack(values).double().mean(0).float()
            torch.testing.assert_close(buffer, expected)
    assert ours.model.batch_size == 4  # data-free sampling couples as many samples as training did


def test_shares_of_the_ranks_are_the_batch():
    whole = Batches(tiny_data(), 8, seed=3, flips=True)
    halves = [Batches(tiny_data(), 8, seed=3, flips=True, places=places) for places in (range(4), range(4, 8))]
    for iteration in range(6):
        assert torch.equal(torch.cat([half.batch(iteration) for half in halves]), whole.batch(iteration))


def test_parts_that_do_not_divide_the_batch(trainer):
    with pytest.raises(ConfigError, match="batch_parts must divide batch_size, 8, got 3"):
        trainer(batch_parts=3)
    with pytest.raises(ValueError, match="must divide into 4 equal parts over 1 ranks, got 6 images"):
        trainer(batch_parts=4).step(tiny_data(6).batch(slice(None)))


def test_a_bank_of_chains_takes_whole_batches(trainer):
    with pytest.raises(ConfigError, match="batch_parts must be 1, on one rank, for the method 'pcd'"):
        trainer(method="pcd", batch_parts=2)
