"""A picture of training images beside samples of a run of images, as docs/results shows them.

python scripts/picture_samples.py runs/texture docs/images/texture.png
python scripts/picture_samples.py runs/object docs/images/object.png --num 25
python scripts/picture_samples.py runs/frame docs/images/frame.png --num 6 --large 128
"""

from __future__ import annotations

import argparse

import numpy as np

from mgebm_fast.learning import Run
from mgebm_fast.pictures import BACKGROUND, labelled_panel, save_png


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out")
    parser.add_argument("--num", type=int, default=9, help="images of each (default 9)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    parser.add_argument("--large", type=int, metavar="SIZE", help="and one sample of another size, of a texture")
    options = parser.parse_args()
    run = Run(options.run)
    model, data = run.model(), run.data()
    spread = [i * len(data) // options.num for i in range(options.num)]
    samples = model.to_uint8(model.sample(options.num, seed=options.seed))
    pixels = samples.shape[-1]
    panels = [("data", data.batch(spread)), ("samples", samples)]
    picture = labelled_panel(panels, gap=6, cell=2 * pixels)
    if options.large is not None:
        large = model.to_uint8(model.at_size(options.large).sample(1, seed=options.seed))
        title = f"sample of {options.large}x{options.large}"
        picture = beside(picture, labelled_panel([(title, large)], gap=6, cell=2 * options.large))
    save_png(options.out, picture)


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:  # (h, w, 3) each
    height = max(len(left), len(right))
    padded = [np.pad(x, ((0, height - len(x)), (0, 0), (0, 0)), constant_values=BACKGROUND) for x in (left, right)]
    return np.concatenate(padded, axis=1)


if __name__ == "__main__":
    main()
