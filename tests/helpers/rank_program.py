"""What test_distributed.py starts twice: each rank goes through the same scenes, and leaves in a folder what a scene
trained and, in rank_R.json, how it ended."""

from __future__ import annotations

import contextlib
import datetime
import errno
import io
import itertools
import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from mgebm_fast.cli import app
from mgebm_fast.errors import DivergenceError
from mgebm_fast.learning import MultiGridTrainer, build_model
from mgebm_fast.learning.run import checkpoint
from mgebm_fast.learning.run.distributed import Ranks
from mgebm_fast.learning.run.divergence import measure

from .training import tiny_config, tiny_data

VARIANTS = {
    "adam": {"stabilise": {"ema": 0.9, "data_noise": 0.03, "noise_anneal": 0.3, "energy_l2": 0.01}, "flips": True,
             "spectral_norm": True, "optimiser": {"schedule": "cosine", "grad_clip_norm": 0.5}},
    "batch statistics": {"norm": "batch", "optimiser": {"name": "sgd", "momentum": 0.9}},
    "growing": {"begin": [0.0, 0.5], "norm": "batch", "stabilise": {"noise_anneal": 0.3}},
    "four parts": {"norm": "batch", "batch_parts": 4},
    "stiff": {"stabilise": {"stiffness": 1e-6, "data_noise": 0.03}},
}  # fmt: skip


def part_values(first: int) -> list[torch.Tensor]:
    """Stands for what a part gives, for means whose order of addition shows."""
    generator = torch.Generator().manual_seed(first)
    return [torch.randn(33, 7, generator=generator) * 10.0 ** (first % 5), torch.randn((), generator=generator)]


def main(rank: int, folder: Path) -> None:
    meet = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=meet)
    words, ends = io.StringIO(), {}

    def trainer(name: str | None = None, data=None, model=None, **changes) -> MultiGridTrainer:
        return MultiGridTrainer(
            model, tiny_data() if data is None else data, tiny_config(**changes), device="cpu",
            out=None if name is None else folder / name, console=Console(file=words, width=1000),
        )  # fmt: skip

    @contextlib.contextmanager
    def ended(name: str):
        try:
            yield
        except Exception as error:
            ends[name] = [type(error).__name__, str(error)]

    for name, changes in VARIANTS.items():
        trainer(name, **changes).fit()
    trainer("resumed", **VARIANTS["adam"]).fit(4)
    again = trainer("resumed", **VARIANTS["adam"])
    ends["resumed at"] = again.resume()
    again.fit()
    trainer("alone later", **VARIANTS["batch statistics"]).fit(2)
    trainer("other weights", model=build_model(tiny_config(seed=rank))).fit(2)
    torch.save(
        Ranks.present().mean(lambda x, first: part_values(first), torch.zeros(6), 4 * 3, 232), folder / f"{rank}.pt"
    )

    for name in ("batch statistics", "adam"):
        app(["sample", str(folder / name), "--num", "10", "--out", str(folder / f"{name}.npy")], standalone_mode=False)

    with ended("other images"):
        trainer(data=tiny_data(20 + rank))
    with ended("other seed"):
        trainer(seed=rank)
    with ended("three parts"):
        trainer(batch_size=9, batch_parts=3)
    with ended("a run of one part"):
        trainer("alone").resume()
    with ended("folder in use"):
        trainer("adam", **VARIANTS["adam"]).fit()

    diverging = trainer("diverging", steps=40)
    synthesise = diverging.rule.synthesise

    def diverge(observed, iteration, *more):
        if rank == 1 and iteration == 3:
            raise DivergenceError("the chain of sample 5")
        return synthesise(observed, iteration, *more)

    diverging.rule.synthesise = diverge
    with ended("diverging"):
        diverging.fit()

    back = trainer("back", rollback={"attempts": 1, "lr_factor": 0.25}, **VARIANTS["batch statistics"])
    once = back.rule.synthesise

    def diverge_once(observed, iteration, *more):
        if rank == 1 and iteration == 4 and back.rule.attempt == 0:
            raise DivergenceError("the chain of sample 5")
        return once(observed, iteration, *more)

    back.rule.synthesise = diverge_once
    back.fit()
    ends["back"] = [back.iteration, back.rule.attempt, back.rule.factors_of().rate]

    best, found = trainer(steps=40, checkpoint_every=1), itertools.count(1)
    measured, measure.measured = measure.measured, lambda *_: 2.0 ** next(found)  # the first state is the best
    chains = best.rule.synthesise
    best.rule.synthesise = lambda observed, iteration, *more: (
        chains(observed, iteration, *more) if iteration < 4 else diverge(observed, 3, *more)
    )
    with ended("in memory"):
        best.fit()
    measure.measured = measured
    ends["the best"] = [best.iteration, *(float(weights.detach().sum()) for weights in best.model.parameters())]

    full, write = trainer("full disk"), checkpoint.write_tensors
    checkpoint.write_tensors = lambda path, tensors: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full", str(path)))
    with ended("full disk"):
        full.fit()
    checkpoint.write_tensors = write

    stopped = trainer("stopped", steps=40)
    update = stopped.rule.update

    def told(batch, iteration, **options):
        if rank == 1 and iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(batch, iteration, **options)

    stopped.rule.update = told
    outcome = stopped.fit()
    ends["stopped"] = [outcome.finished, outcome.iteration]

    ends["words"] = words.getvalue()
    lost = trainer("lost", steps=40)
    going = lost.rule.update

    def leave(batch, iteration, **options):
        if rank == 1 and iteration == 3:
            (folder / "rank_1.json").write_text(json.dumps(ends))
            os._exit(0)
        return going(batch, iteration, **options)

    lost.rule.update = leave
    with ended("lost"):
        lost.fit()
    (folder / f"rank_{rank}.json").write_text(json.dumps(ends))
    os._exit(0)  # the group cannot be left in order with a rank gone
