"""Sets of 8×8 images that are no digits, for `mgebm score`: letters, noise, shuffled digits and blank images.

    python scripts/out_of_distribution.py --out sets
    mgebm score runs/digits sets/*.npy --figure scores.png

letters: A to Z in Pillow's own font, moved, turned and blurred a little, reduced to 8×8 as the digits were; noise:
uniform bytes; shuffled: held-out digits with their pixels in random order, so that brightness is theirs; blank: one
grey each.
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import mgebm_fast as mg

SIZE, LARGE = 8, 64


def letter(symbol: str, draw: np.random.Generator) -> np.ndarray:
    """One letter in white on black, as high as a digit is."""
    canvas = Image.new("L", (LARGE, LARGE))
    font = ImageFont.load_default(float(draw.uniform(62, 74)))
    left, top, right, bottom = font.getbbox(symbol)
    place = (LARGE / 2 - (left + right) / 2 + draw.uniform(-3, 3), LARGE / 2 - (top + bottom) / 2 + draw.uniform(-3, 3))
    ImageDraw.Draw(canvas).text(place, symbol, fill=255, font=font, stroke_width=2)
    canvas = canvas.rotate(float(draw.uniform(-12, 12)), Image.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(2))
    return np.asarray(canvas, np.float64).reshape(SIZE, LARGE // SIZE, SIZE, LARGE // SIZE).mean((1, 3))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, help="folder of the .npy files")
    options.add_argument("--num", type=int, default=520, help="images a set; shuffled: all held-out digits")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    draw = np.random.default_rng(given.seed)
    digits = mg.data.load("digits", size=SIZE, channels=1, split="held_out").images
    letters = np.stack([letter(string.ascii_uppercase[i % 26], draw) for i in range(given.num)])
    letters *= 255 / letters.max((1, 2), keepdims=True)
    sets = {
        "letters": letters[:, None],
        "noise": draw.integers(0, 256, (given.num, 1, SIZE, SIZE)),
        "shuffled": draw.permuted(digits.reshape(len(digits), -1), axis=1).reshape(digits.shape),
        "blank": np.broadcast_to(draw.integers(0, 256, (given.num, 1, 1, 1)), (given.num, 1, SIZE, SIZE)),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    for name, images in sets.items():
        np.save(given.out / f"{name}.npy", images.astype(np.uint8))


if __name__ == "__main__":
    main()
