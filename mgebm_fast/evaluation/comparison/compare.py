"""A comparison of methods at equal compute: presets × seeds trained into one folder, and each run measured alike.

    OUT/<preset>/seed-<n>/       the run folder, as `mgebm train` makes it
    OUT/<preset>/seed-<n>.json   the figures measured of it

What is there is used again, so that a comparison that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ...data import ImageData
from ...errors import DivergenceError
from ...files import read_regular, write_inside
from ...learning import Run, TrainConfig, train, work
from ...learning.run.checkpoint import checksum
from ...models.occlusions import KINDS, occlusion
from ...models.storage import MOST_JSON
from ..evaluate import Judges, evaluate, fit_judges
from ..inpainting import inpaint, length_rows, pick_length
from ..labels import labels_of
from .runs import Entry, check_data, state

_VERSION = 4  # of the figures: those stored under another version are measured again


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that, with the run and the images, determine the figures."""

    num: int = 1000  # samples
    seed: int = 0  # of samples, occlusions, feature space and recogniser, the same for all runs
    inpainted: int = 360  # held-out images, or all where there are fewer


class Interrupted(Exception):
    """A signal stopped the training of a run; its state was saved."""


def compare(
    runs: Sequence[Entry],
    training: ImageData,
    held_out: ImageData,
    settings: Settings,
    *,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
    console: Any = None,  # where the training of a run is shown; None: nowhere
    threads: Callable[[TrainConfig | None], None] = lambda config: None,  # called before a run, and before figures
    resume_command: str = "the same command",
) -> list[dict[str, Any]]:
    """Train what is missing, measure what was not measured, and give one record a run (`measured`).

    All runs are checked before the first is trained. A run that diverges has a record with `failed` and no figures.
    Raises ConfigError: a folder holds another run, or one of other images. Interrupted: a signal ended the training.
    """
    for entry in runs:
        if state(entry) != "missing":
            check_data(entry, training)
    images = [_checksum(data) for data in (training, held_out)]
    judges: Judges | None = None
    records = []
    for number, entry in enumerate(runs, start=1):
        head = f"[{number}/{len(runs)}] {entry.title}"
        failed = None
        standing = state(entry)
        if standing != "finished":
            threads(entry.config)
            say(f"{head}: {'going on with' if standing == 'unfinished' else 'training'} {entry.config.steps:,} updates")
            try:
                outcome = train(
                    entry.config, out=entry.folder, data=training, held_out=held_out, device=device, console=console,
                    quiet=console is None, resume=standing == "unfinished", resume_command=resume_command,
                )  # fmt: skip
            except DivergenceError as error:
                if not (
                    entry.folder.is_dir() and Run(entry.folder).collapse
                ):  # else its model is the best from before: measured, with a note
                    failed = str(error)
            else:
                if not outcome.finished:
                    raise Interrupted(entry.title)
        threads(None)
        if failed is None:
            wanted = _conditions(entry, training.name, images, settings, device)
            record = _stored(entry, wanted)
            if record is None:
                if judges is None:
                    say("training the judges: feature space and recogniser")
                    judges = fit_judges(
                        training, held_out, seed=settings.seed, device=device, progress=console is not None
                    )
                say(f"{head}: measuring")
                try:
                    record = measured(entry, training, held_out, judges, settings, device) | {"conditions": wanted}
                    stored = record | {"crc32": checksum(record)}
                    text = json.dumps(stored, allow_nan=False, ensure_ascii=False, indent=1)
                    write_inside(entry.figures, (text + "\n").encode())
                except DivergenceError as error:
                    failed = str(error)
        if failed is not None:
            record = _identity(entry) | {"failed": failed}
        assert record is not None
        records.append(record)
        say(f"{head}: {summary(record)}")
    return records


def _conditions(
    entry: Entry, data: str, images: Sequence[str], settings: Settings, device: torch.device | str
) -> dict[str, Any]:
    """What the figures of a run are a function of; figures measured under others are not used."""
    return {
        "version": _VERSION,
        **dataclasses.asdict(settings),
        "data": data,
        "images": list(images),
        "model": hashlib.sha256(Run(entry.folder).model_file().read_bytes()).hexdigest(),
        "device": torch.device(device).type,
        # threads change the last bits of the feature space, and so all figures measured in it
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _checksum(data: ImageData) -> str:
    """CRC-32 of all pixels, with the number of images."""
    return f"{len(data)}:{zlib.crc32(np.ascontiguousarray(data.images).data):08x}"


def _stored(entry: Entry, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The record measured under these conditions; None where there is none, or a damaged one."""
    try:
        record = json.loads(read_regular(entry.figures, MOST_JSON))
        whole = record.pop("crc32") == checksum(record)
        return record if whole and record["conditions"] == wanted else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _identity(entry: Entry) -> dict[str, Any]:
    config = entry.config
    return {
        "preset": entry.preset, "method": config.method, "seed": config.seed, "updates": config.steps,
        "work": work(config),
    }  # fmt: skip


def measured(
    entry: Entry,
    training: ImageData,
    held_out: ImageData,
    judges: Judges,
    settings: Settings,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The record of a finished run: what it is, its `figures`, baselines (`real`), what judged them, and `inpainting`,
    the length of the chains by kind of occlusion.

    figures, numbers or None where the data do not allow them:
      kid, fid, fid_matched, confident_share, nearest_distance   as `evaluate` has them
      smallest_class_share                                       of class_shares
      <kind>_error, <kind>_psnr                                  as `inpaint` has them, for square, doodle, pepper, at
                                                                 the lengths that `pick_length` picks
      seconds_an_update, seconds                                 the median update, and all updates
    """
    run = Run(entry.folder)
    model = run.model(device)
    evaluated = evaluate(model, training, held_out, num=settings.num, seed=settings.seed, judges=judges, progress=False)
    figures: dict[str, Any] = {
        "kid": evaluated["kid"],
        "fid": evaluated["fid"],
        "fid_matched": evaluated["fid_matched"],
    }
    real: dict[str, Any] = {"kid": evaluated["kid_real"], "fid_matched": evaluated["fid_real"]}
    for suffix, into in (("", figures), ("_real", real)):
        shares = evaluated.get(f"class_shares{suffix}")
        into["confident_share"] = evaluated.get(f"confident_share{suffix}")
        into["smallest_class_share"] = min(shares.values()) if shares else None
        into["nearest_distance"] = evaluated[f"nearest_distance{suffix}"]
    lengths: dict[str, dict[str, Any]] = {}
    if len(held_out):
        chosen = np.random.default_rng(settings.seed).permutation(len(held_out))[: settings.inpainted]
        images, labels = held_out.batch(chosen), labels_of(model, held_out, chosen)
        tried = length_rows(training, settings.seed)
        options: dict[str, Any] = {"labels": labels_of(model, training, tried), "seed": settings.seed}
        for kind in KINDS:
            mask = occlusion(kind, len(chosen), model.sizes[-1], seed=settings.seed)
            picked = pick_length(model, training.batch(tried), kind, **options)
            lengths[kind] = picked.figures()
            filled = inpaint(model, images, mask, labels=labels, seed=settings.seed, length=picked.length).figures()
            for key in ("error", "psnr"):
                figures[f"{kind}_{key}"], real[f"{kind}_{key}"] = filled[key], filled[f"{key}_mean_fill"]
    metrics = run.metrics()
    return _identity(entry) | {
        "figures": figures | timing(metrics),
        **({"collapse": run.collapse} if run.collapse else {}),
        "rollbacks": int(max((record.get("rollbacks", 0) for record in metrics), default=0)),
        "real": real,
        "inpainting": lengths,
        "num": settings.num,
        "num_real": evaluated["num_real"],
        "feature_space": evaluated["feature_space"],
        "recogniser": evaluated.get("recogniser"),
        "notes": evaluated["notes"],
    }


def timing(metrics: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Median seconds of an update, and seconds of all updates that count, from the records of a run.

    Updates that a rollback (`[rollback]`) undid are in no record.
    """
    timed = [record for record in metrics if "seconds_per_update" in record]  # a rollback's record has no time
    if not timed:
        return {"seconds_an_update": None, "seconds": None}
    steps = [0, *(record["step"] for record in timed)]
    spent = [record["seconds_per_update"] for record in timed]
    total = sum(each * (after - before) for each, before, after in zip(spent, steps, steps[1:], strict=False))
    return {"seconds_an_update": statistics.median(spent), "seconds": total}


def summary(record: dict[str, Any]) -> str:
    """The run in a few words, for progress."""
    if "failed" in record:
        return f"no figures: {record['failed']}"
    figures = record["figures"]
    words = [f"KID {figures['kid']:.4f}"]
    if figures["confident_share"] is not None:
        words.append(f"recognised {figures['confident_share']:.3f}")
    errors = [figures.get(f"{kind}_error") for kind in KINDS]
    if all(error is not None and math.isfinite(error) for error in errors):
        words.append("in-painting error " + " ".join(f"{error:.3f}" for error in errors))
    return ", ".join(words)


def samples_of(entry: Entry, n: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The first n of the samples that were measured, (n, C, S, S) uint8."""
    model = Run(entry.folder).model(device)
    made = model.sample(n, seed=seed)
    assert isinstance(made, torch.Tensor)
    return model.to_uint8(made).cpu()
