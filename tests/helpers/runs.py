"""Whether two runs are the same, bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

from mgebm_fast.learning import Run
from mgebm_fast.learning.run import checkpoint
from mgebm_fast.models import Model


def same_files(a: Path, b: Path, last: str) -> None:
    """Weights, averages, optimiser state, banks, last picture and final model are equal, every bit."""
    checkpoints = [f"checkpoints/{last}/{path.name}" for path in a.glob(f"checkpoints/{last}/*.safetensors")]
    assert len(checkpoints) >= 2
    for name in ("model.safetensors", *checkpoints):
        ours, theirs = (checkpoint.read_tensors(run / name) for run in (a, b))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), (name, key)
    assert (a / f"samples/{last}.png").read_bytes() == (b / f"samples/{last}.png").read_bytes()


def same_run(a: Path, b: Path) -> None:
    same_files(a, b, "step_000006")
    timeless = [
        [{k: v for k, v in record.items() if k != "seconds_per_update"} for record in Run(run).metrics()]
        for run in (a, b)
    ]
    assert timeless[0] == timeless[1] and [r["step"] for r in timeless[0]] == [1, 2, 3, 4, 5, 6]
    samples = [Model.load(run).sample(4, seed=5) for run in (a, b)]
    assert torch.equal(*samples)


def board(folder):
    """(step, value) of each point of the curve `gap`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("gap")]
