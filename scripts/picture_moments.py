"""Moments of FRAME runs: mean responses of every filter over fresh samples against those over the training images.

python scripts/picture_moments.py runs/frame runs/frame-learned docs/images/moments.png

Samples start from the reference, not from the run's chains, and take the steps that `mgebm sample` takes. Prints for
every run Σ|mean h_k(samples) − mean h_k(data)| / Σ mean h_k(data).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mgebm_fast.learning import Run
from mgebm_fast.models import Frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="runs of the method frame")
    parser.add_argument("out", help="the picture, .png")
    parser.add_argument("--num", type=int, default=36, help="samples a run (default 36)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    options = parser.parse_args()
    figure = Figure(figsize=(4 * len(options.runs), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for place, path in enumerate(options.runs, start=1):
        observed, sampled = moments(Run(path), options.num, options.seed)
        error = float((sampled - observed).abs().sum() / observed.sum())
        name = Path(path).name
        print(f"{name}: {len(observed)} moments, off by {100 * error:.1f} %")
        axes = figure.add_subplot(1, len(options.runs), place)
        top = 1.05 * float(torch.maximum(observed, sampled).max())
        axes.plot([0, top], [0, top], color="#8b8b8b", linewidth=0.8)
        axes.scatter(observed, sampled, s=10, color="#1f4e8c")
        axes.set(
            title=f"{name}: {len(observed)} moments, off by {100 * error:.1f} %", xlabel="training images",
            ylabel="samples", xlim=(0, top), ylim=(0, top), aspect="equal",
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out, dpi=100)


def moments(run: Run, num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:  # (K,) float64 each
    model, data = run.model(), run.data()
    if not isinstance(model, Frame):
        raise SystemExit(f"picture_moments: runs must be of the method frame, got {run.config.method!r}")
    means = [model.responses(model.from_uint8(data.batch(part))).double() for part in torch.arange(len(data)).split(64)]
    return torch.cat(means).mean(0), model.responses(model.sample(num, seed=seed)).double().mean(0)


if __name__ == "__main__":
    main()
