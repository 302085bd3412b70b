"""Annealing: chains on a ring of eight modes, at a temperature that falls from 60 to 1, beside chains that stay at 1.

    python examples/annealing.py annealing.png

Both begin in one place. Cold, the chain stays in the mode that is nearest; annealed, it finds all of them,
those near the start more often.
"""

import argparse
import math

import torch

import mgebm_fast as mg
from mgebm_fast.energies import Tempered

ANGLES = torch.arange(8) * math.pi / 4
MODES = 3 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def ring(x):  # (N, 2) -> (N,): a mixture of Gaussians of deviation 0.2
    return -torch.logsumexp(-(x[:, None] - MODES).square().sum(2) / (2 * 0.2**2), 1)


def picture(x, side=96):  # (N, 2) -> (1, 1, side, side) uint8, dark where points are
    cells = ((x + 4.5) / 9 * side).long().clamp(0, side - 1)
    counts = torch.bincount(cells[:, 1] * side + cells[:, 0], minlength=side**2).reshape(1, 1, side, side)
    return (255 * torch.exp(-counts.float())).to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the picture")
    parser.add_argument("--num", type=int, default=2000, help="chains")
    parser.add_argument("--steps", type=int, default=100, help="at each of 12 temperatures")
    args = parser.parse_args()

    start, levels, panels = torch.zeros(args.num, 2) + MODES[0], 12, []
    for title, highest in (("cold", 1.0), ("annealed", 60.0)):
        energy, x = Tempered(ring, highest), start
        for level in range(levels):
            energy.temperature = highest ** (1 - level / (levels - 1))
            x = mg.langevin_sample(energy, x, steps=args.steps, step_size=0.15, seed=0, first_step=level * args.steps)
        found = torch.cdist(x, MODES).argmin(1).unique().numel()
        print(f"{title}: {found} of {len(MODES)} modes")
        panels.append((f"{title}: {found} of 8 modes", picture(x)))
    print(mg.pictures.save_png(args.out, mg.pictures.labelled_panel(panels, cell=288)))


if __name__ == "__main__":
    main()
