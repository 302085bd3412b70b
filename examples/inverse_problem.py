"""An inverse problem by a tether: digits of which half the pixels were measured, with noise.

    mgebm train digits-pcd --out runs/pcd
    python examples/inverse_problem.py runs/pcd inverse.png

With y = A x + noise of deviation s, the posterior's energy is E(x)/T + |A x − y|² / 2s²: the model's, at a temperature
T, and a tether. Persistent chains make a model whose long chains stay at its data. Rows: the image, what was measured,
two samples of the posterior, the mean of all of them.
"""

import argparse

import torch

import mgebm_fast as mg
from mgebm_fast.energies import Sum, Tempered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run or a model file of `mgebm train digits-pcd`")
    parser.add_argument("out", help="the picture")
    parser.add_argument("--num", type=int, default=12, help="images")
    parser.add_argument("--samples", type=int, default=16, help="of each posterior")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--noise", type=float, default=0.3, help="s, in units of pixels from -1 to 1")
    parser.add_argument("--temperature", type=float, default=0.002, help="T")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = mg.load(args.run, device="cpu")
    data = mg.data.load("digits", size=model.sizes[-1], channels=1, split="held_out")
    truth = model.from_uint8(data.batch(range(args.num)))
    seen = torch.rand_like(truth) < 0.5
    measured = torch.where(seen, truth + args.noise * torch.randn_like(truth), 0)
    each, weight = (part.repeat(args.samples, 1, 1, 1) for part in (measured, seen / (2 * args.noise**2)))

    def tether(x):  # (samples · num, 1, S, S) -> (samples · num,)
        return (weight * (x - each).square()).sum((1, 2, 3))

    posterior = Sum(Tempered(model.active_nets[-1], args.temperature), tether)
    chain = mg.Langevin(args.steps, step_size=(2 * args.temperature) ** 0.5, clamp=model.value_range)
    x = chain(posterior, each.clamp(*model.value_range), seed=0)
    samples = x.reshape(args.samples, args.num, *truth.shape[1:])
    for name, guess in (("measured", measured), ("posterior mean", samples.mean(0))):
        print(f"{name}: {float((guess - truth).square().mean().sqrt()):.3f} root mean square from the image")
    rows = model.to_uint8(torch.cat([truth, measured, samples[0], samples[1], samples.mean(0)]))
    print(mg.pictures.save_png(args.out, mg.pictures.image_grid(rows, columns=args.num, scale=4)))


if __name__ == "__main__":
    main()
