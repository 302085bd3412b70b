"""In-painting: hide the lower half of held-out digits, and let the chains of a trained model fill it.

    python examples/inpainting.py runs/digits inpainting.png

Rows: the image, what the model is given, three fillings with noise of their own. Known pixels are held in every grid.
"""

from __future__ import annotations

import argparse

import torch

import mgebm_fast as mg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run or a model file of `mgebm train digits`")
    parser.add_argument("out", help="the picture")
    parser.add_argument("--num", type=int, default=12, help="images")
    args = parser.parse_args()

    model = mg.load(args.run)
    size = model.sizes[-1]
    images = mg.data.load("digits", size=size, channels=1, split="held_out").batch(range(args.num))
    hidden = torch.zeros(args.num, 1, size, size, dtype=torch.bool)
    hidden[:, :, size // 2 :] = True
    known = model.from_uint8(images)

    rows = [images, torch.where(hidden, 127, images)]
    for seed in range(3):
        rows.append(model.to_uint8(model.sample(args.num, seed=seed, mask=hidden, known=known)))
    picture = mg.pictures.image_grid(torch.cat(rows), columns=args.num, scale=4)
    print(mg.pictures.save_png(args.out, picture))


if __name__ == "__main__":
    main()
