"""Folders as the Hugging Face hub has them: config.json, model.safetensors and a model card. Nothing uses a network."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import files
from ..checks import is_int
from ..errors import CheckpointError, Refused
from ..pictures import image_grid, save_png
from . import storage

AnyPretrained = TypeVar("AnyPretrained", bound="Pretrained")
CONFIG, CARD, SAMPLES, TRAINING = "config.json", "README.md", "samples.png", "config.toml"
_SEED = 0  # of the samples in the picture


class Pretrained:
    """Of a `Model`: how it is written as such a folder, and read from one."""

    def save_pretrained(
        self, folder: str | os.PathLike, *, figures: Mapping[str, Any] | None = None, samples: int = 64,
        half: bool = False,
    ) -> list[Path]:  # fmt: skip
        """Write a folder as the Hugging Face hub has them; the files written.

        config.json, model.safetensors (and model.json, its checksum), samples.png, and README.md, a model card with the
        data, command, seed and figures of the run that `mg.load` found the model in (also config.toml then). Other
        files in the folder are kept, and so is a README.md that is there. Nothing uses a network.

        Args:
            figures: for the card, as `evaluation.evaluate` returns them. Default: those that `mgebm evaluate --record`
                added to the run, else the last record of training.
            samples: in the picture; 0: no picture.
            half: store float32 tensors rounded to float16. The picture and `figures` are of the model as it is.
        """
        return _save(self, Path(folder), figures, samples, half)

    @classmethod
    def from_pretrained(
        cls: type[AnyPretrained], folder: str | os.PathLike, *, device: torch.device | str = "cpu"
    ) -> AnyPretrained:
        """The model of a local folder that `save_pretrained` wrote, of the class that its file names; nothing is
        downloaded. CheckpointError where it is no such folder, is damaged, or config.json describes another model."""
        path = Path(folder)
        if not path.is_dir():
            raise CheckpointError(
                f"from_pretrained: folder must be a local folder, got {path}, which is none; nothing is downloaded"
            )
        file = path / storage.MODEL_FILE
        model_class: Any = cls
        model = model_class.load(storage.check_regular(file) if os.path.lexists(file) else path, device=device)
        _check(path, model.kind, model.config())
        return model


def _save(model: Any, folder: Path, figures: Mapping[str, Any] | None, samples: int, half: bool) -> list[Path]:
    if not is_int(samples, 0):
        raise Refused("samples", "be an int >= 0", repr(samples), "save_pretrained")
    if not (figures is None or isinstance(figures, Mapping)):
        raise TypeError(f"save_pretrained: figures must be a dict, got {type(figures).__name__}")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"save_pretrained: folder must be a folder or new, got the file {folder}")
    picture = _picture(model, samples) if samples else None
    training = _shared_config(model)
    files.make_folder(folder.parent)
    with files.folder_beside(folder) as temporary:
        storage.write_checked(temporary / storage.MODEL_FILE, lambda path: model.save(path, half=half))
        described = {"model_type": "mgebm_fast", "kind": model.kind, **model.config()}
        files.write_bytes(temporary / CONFIG, (json.dumps(described, indent=1) + "\n").encode())
        if picture is not None:
            save_png(temporary / SAMPLES, picture)
        if training is not None:
            files.write_bytes(temporary / TRAINING, training.to_toml().encode())
        if not (folder / CARD).exists():  # one that was written by hand is not lost
            text = card(model, training, folder.resolve().name, figures, picture is not None)
            files.write_bytes(temporary / CARD, text.encode())
        files.make_folder(folder)
        written = []
        for path in sorted(temporary.iterdir()):
            path.replace(folder / path.name)
            written.append(folder / path.name)
    files.synchronise(folder, inside=True)
    return written


def _check(folder: Path, kind: str, config: Mapping[str, Any]) -> None:
    """CheckpointError where config.json is there and describes another model than model.safetensors."""
    path = folder / CONFIG
    if not files.is_regular(path):
        raise CheckpointError(f"from_pretrained: must be a folder with {CONFIG} and {storage.MODEL_FILE}, got {folder}")
    try:
        described = json.loads(files.read_regular(path, storage.MOST_JSON))
        own = {"model_type": "mgebm_fast", "kind": kind, **config}
        differs = described != json.loads(json.dumps(own))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"must be the configuration of a model as JSON, got {error}", path) from None
    if differs:
        raise CheckpointError(f"must describe the model in {storage.MODEL_FILE}, got another configuration", path)


def _picture(model: Any, count: int) -> Any:
    """A picture of samples: of videos the frames of one; None for sounds."""
    dimensions = len(getattr(model, "shape", (0, 0)))
    if dimensions == 1:
        return None
    try:
        drawn = model.sample(count if dimensions == 2 else 1, seed=_SEED)
    except ValueError as error:
        if "train it" not in str(error):
            raise
        return None  # an untrained model has no samples yet
    assert isinstance(drawn, Tensor)
    pixels = model.to_uint8(drawn)
    if pixels.dim() == 5:
        pixels = pixels[0].transpose(0, 1)
    return image_grid(pixels, scale=max(1, -(-40 // pixels.shape[-1])))


def _shared_config(model: Any) -> Any:
    """The configuration of the model's run, without paths of this machine; None where it is of no run."""
    if model.origin is None:
        return None
    config = model.origin.config
    paths = {"data": config.data, "start_from": config.start_from}
    shared = {key: Path(path).name for key, path in paths.items() if path is not None and Path(path).is_absolute()}
    return dataclasses.replace(config, **shared)


def _update(run: Any) -> int | None:
    """Of which update the model of a run is; None where there are no checkpoints to tell."""
    return run.update_of(run.find_model()[0]) if run.checkpoints() else None


def _measured(run: Any) -> tuple[str, Mapping[str, Any]]:
    """What a run knows of its model, and in what words: figures that were recorded of it, else the last of training."""
    update = _update(run)
    for record in run.evaluations():
        if record["step"] == update:
            return "By `mgebm evaluate`, beside the same of held-out images.", record
    records = run.metrics()
    return "The last record of training, no measure of quality.", records[-1] if records else {}


def _cell(value: object) -> str:
    """Words of a table's cell, which a bar or a line break would end."""
    return " ".join(str(value).split()).replace("|", "\\|")


def card(model: Any, training: Any, name: str, figures: Mapping[str, Any] | None, picture: bool) -> str:
    """The model card, in Markdown: what it is, data, command, seed, figures, samples, how to use it."""
    size = " × ".join(map(str, getattr(model, "shape", (model.sizes[-1],) * 2)))
    names = getattr(model, "classes", ())
    lines = [
        "---", "library_name: mgebm_fast", "pipeline_tag: unconditional-image-generation",
        "tags: [energy-based-model, langevin-dynamics]", "---", "", f"# {name}", "",
        f"A {model.kind} model of {model.channels}-channel samples of {size}, pixels in "
        f"[{model.value_range[0]:g}, {model.value_range[1]:g}], trained by mgebm_fast.", "",
        *([f"Class-conditional: {', '.join(names)}.", ""] if names else []),
    ]  # fmt: skip
    if picture:
        lines += [f"![Samples of seed {_SEED}, not chosen]({SAMPLES})", ""]
    lines += [
        "## Use", "", "```python", "import mgebm_fast as mg", "",
        f'model = mg.load("{name}")',
        "pictures = model.to_uint8(model.sample(16, seed=0))",
        *(["of_the_last = model.sample(16, labels=len(model.classes) - 1)"] if names else []), "```", "",
    ]  # fmt: skip
    lines += ["## Training", ""]
    if training is None:
        lines += ["Not recorded: the model was not loaded from a run (`mg.load`).", ""]
    else:
        fingerprint = model.origin.fingerprint() or {}
        count = f", {fingerprint['count']} images" if "count" in fingerprint else ""
        classes = f", classes {', '.join(map(str, training.classes))}" if training.classes else ""
        made, collapse = _update(model.origin), model.origin.collapse
        updates = f"{training.steps}" if made in (None, training.steps) else f"{made} of {training.steps}"
        again = shlex.join(["mgebm", "train", TRAINING, "--data", training.data, "--out", f"runs/{training.name}"])
        lines += [
            "| what | value |", "|---|---|",
            f"| preset | {_cell(f'{training.name}: {training.description}')} |",
            f"| data | {_cell(f'{training.data}{classes}{count}')} |",
            f"| method | {training.method} |",
            f"| updates | {updates}, batches of {training.batch_size} |",
            *([f"| collapse | {collapse} |"] if collapse else []),
            *([f"| starts from | {training.start_from} |"] if training.start_from else []),
            f"| seed | {training.seed} |", "",
            "Trained again, with the configuration beside this file:", "",
            f"    {again}", "",
        ]  # fmt: skip
    given, found = "As given by the author.", figures
    if found is None and model.origin is not None:
        given, found = _measured(model.origin)
    plain = {key: value for key, value in (found or {}).items() if isinstance(value, (int, float, str))}
    if plain:
        shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in plain.items()}
        lines += ["## Figures", "", given, "", "| figure | value |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in shown.items()]
        lines.append("")
    lines += [
        "## Limits", "",
        "Energies are known up to a constant at every size, and low energy is not quality. Samples are those of short "
        "chains, not of the exact law.", "",
    ]  # fmt: skip
    return "\n".join(lines)
