"""`mgebm export`: a run's model for programs without mgebm_fast, or as a folder to share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..errors import Refused, suggest
from .options import RunPath
from .outputs import check_place


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, with the ending that --to names.")],
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="state-dict, torchscript, onnx, sampler or pretrained; see below.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Write a model for programs that do not have mgebm_fast, or as a folder to share.

    \b
    Examples:
      mgebm export runs/digits digits.safetensors --to state-dict
      mgebm export runs/digits digits.pt --to torchscript
      mgebm export runs/digits digits.onnx --to onnx
      mgebm export runs/digits digits.py --to sampler
      mgebm export runs/digits digits/ --to pretrained

    \b
    --to:
      state-dict   X.safetensors: weights of plain nn.Sequentials, whose code stands in the file's metadata
      torchscript  X.pt: energies (N, sizes), coarse to fine, of images x (N, C, H, W) float32; torch.jit.load reads it
      onnx         X.onnx: the same; needs pip install "mgebm_fast[onnx]" to write
      sampler      X.py, one readable file with energies and chains, and its weights X.safetensors beside it
      pretrained   a folder in the way of Hugging Face: config.json, model.safetensors, a model card with samples

    Pixels are float32 in the model's range of values, which is printed. Averaged (EMA) weights are taken where the run
    has them. Every export is compared with the model's own energies before it is written. With batch normalisation all
    but sampler and pretrained hold the model under its running statistics; docs/export.md says more.
    """
    from ..export import FORMATS
    from ..export import export as write
    from ..learning import load
    from ..models.pretrained import CONFIG, SAMPLES, TRAINING
    from ..models.storage import CHECKSUM_FILE, MODEL_FILE

    if to not in FORMATS:
        raise ValueError(f"--to: must be one of {', '.join(FORMATS)}, got {to!r}{suggest(to, FORMATS)}")
    targets = [out, out.with_suffix(".safetensors")] if to == "sampler" else [out]
    check_place(out, "OUT", folder=to == "pretrained")
    if to == "pretrained":
        targets = [out / name for name in (CONFIG, MODEL_FILE, CHECKSUM_FILE, SAMPLES, TRAINING)]
    existing = [path for path in targets if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"OUT: must be new, got {existing[0]}, which exists (--overwrite replaces it)")
    model = load(run, device="cpu")
    try:
        written = write(model, to, out)
    except Refused as error:
        raise error.named("OUT" if error.name == "out" else "run") from None
    low, high = model.value_range
    shape = ", ".join(map(str, getattr(model, "shape", (model.sizes[-1],) * 2)))
    typer.echo(f"{run}: {', '.join(map(str, written))}", err=True)
    typer.echo(f"images: float32 (N, {model.channels}, {shape}) from {low:g} to {high:g}", err=True)
    if model.coupled and to in ("state-dict", "torchscript", "onnx"):
        typer.echo("batch normalisation: the energies are those under its running statistics", err=True)
    if to == "sampler":
        ending = "png" if len(getattr(model, "shape", (0, 0))) == 2 else "npy"
        typer.echo(f"next: python {shlex.quote(str(out))} --num 16 --out samples.{ending}", err=True)
