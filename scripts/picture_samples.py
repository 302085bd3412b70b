"""A picture of training images beside samples of a run of images, as docs/results shows them.

python scripts/picture_samples.py runs/texture docs/images/texture.png
python scripts/picture_samples.py runs/object docs/images/object.png --num 24
"""

from __future__ import annotations

import argparse

from mgebm_fast.learning import Run
from mgebm_fast.pictures import labelled_panel, save_png


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out")
    parser.add_argument("--num", type=int, default=9, help="images of each (default 9)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    options = parser.parse_args()
    run = Run(options.run)
    model, data = run.model(), run.data()
    spread = [i * len(data) // options.num for i in range(options.num)]
    samples = model.to_uint8(model.sample(options.num, seed=options.seed))
    pixels = samples.shape[-1]
    panels = [("data", data.batch(spread)), ("samples", samples)]
    save_png(options.out, labelled_panel(panels, gap=6, cell=2 * pixels))


if __name__ == "__main__":
    main()
