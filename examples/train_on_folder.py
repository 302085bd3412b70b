"""Train a small multi-grid model on a folder of images, and draw a grid of samples.

    python examples/train_on_folder.py photos/ --out runs/photos --steps 500

The command line does the same: mgebm train cifar10 --data photos/ --out runs/photos --set steps=500
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

import mgebm_fast as mg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="images: a folder, zip or tar, or the name of a built-in set")
    parser.add_argument("--out", type=Path, default=Path("runs/folder"))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()

    images = mg.data.load(args.folder, size=16, channels=3)
    print(f"{len(images)} images, {len(images.skipped)} skipped")

    chain = mg.Langevin(steps=30, drift=1.0, noise_std=0.03, grad_clamp=0.3, clamp=(-1.0, 1.0))
    model = mg.MultiGrid(
        (1, 2, 4, 8, 16), channels=3, langevin=chain, norm="none", variant="compact", value_range=(-1.0, 1.0)
    )
    trainer = mg.MultiGridTrainer(
        model,
        images,
        steps=args.steps,
        batch_size=args.batch,
        flips=True,
        optimiser={"lr": 1e-3, "betas": [0.0, 0.999], "schedule": "cosine"},
        stabilise={"data_noise": 0.03, "energy_l2": 0.01, "ema": 0.99},
        out=args.out,
        console=Console(stderr=True),
    )
    trainer.fit()

    samples = mg.MultiGrid.load(args.out).sample(36, seed=0)  # from the averaged weights
    picture = mg.pictures.image_grid(model.to_uint8(samples), scale=3)
    print(mg.pictures.save_png(args.out / "samples.png", picture))


if __name__ == "__main__":
    main()
