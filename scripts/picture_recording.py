"""A picture of clips of a run of the method spatial-temporal over samples of it, as docs/results shows them.

python scripts/picture_recording.py runs/fire docs/images/fire.png
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from mgebm_fast.data.sound import spectrogram, waveform
from mgebm_fast.learning import Run
from mgebm_fast.learning.methods.spatial_temporal import as_sound
from mgebm_fast.pictures import labelled_panel, save_png

FRAMES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out")
    options = parser.parse_args()
    run = Run(options.run)
    model, clips = run.model(), run.data()
    if model.is_video:
        observed = clips.batch([0, len(clips) // 2])
        shown = [i * model.shape[0] // FRAMES for i in range(FRAMES)]
        rows = [
            ("observed: frames of two clips", observed),
            ("synthesised: three chains", model.to_uint8(model.sample(3))),
        ]
        panels = [(title, x[:, :, shown].transpose(1, 2).flatten(0, 1)) for title, x in rows]
        picture = labelled_panel(panels, across=1, columns=FRAMES, gap=2, cell=64)
    else:
        sounds = [("observed", clips.batch([0])[0]), ("synthesised", model.sample(1)[0])]
        panels = [
            (f"{title}: waveform, and spectrum from 0 to {model.rate / 2000:.1f} kHz", draw(as_sound(model, x)))
            for title, x in sounds
        ]
        picture = labelled_panel(panels, across=1, columns=2, gap=6, cell=480)
    save_png(options.out, picture)


def draw(samples: np.ndarray) -> torch.Tensor:  # (L,) -> (2, 1, h, w) uint8
    return torch.from_numpy(np.stack([waveform(samples), spectrogram(samples)])[:, None])


if __name__ == "__main__":
    main()
