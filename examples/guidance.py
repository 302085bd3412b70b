"""Guidance: the digit that a classifier names, from a model that was trained without labels.

    mgebm train digits-pcd --out runs/pcd
    python examples/guidance.py runs/pcd guidance.png

E(x)/T − w · log p(y | x), from the model's own samples. A row for each class.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import mgebm_fast as mg
from mgebm_fast.energies import Classifier, Scaled, Sum, Tempered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run or a model file of `mgebm train digits-pcd`")
    parser.add_argument("out", help="the picture")
    parser.add_argument("--num", type=int, default=12, help="samples of a class")
    parser.add_argument("--steps", type=int, default=500, help="of a guided chain")
    parser.add_argument("--weight", type=float, default=5.0, help="w")
    parser.add_argument("--temperature", type=float, default=0.002, help="T")
    parser.add_argument("--epochs", type=int, default=20, help="of the classifier")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = mg.load(args.run, device="cpu")
    size = model.sizes[-1]
    data = mg.data.load("digits", size=size, channels=1, split="train")
    images, labels = model.from_uint8(data.batch(slice(None))), torch.from_numpy(data.labels)
    net = nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * size**2, 10))
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(args.epochs):
        for part in torch.randperm(len(images)).split(64):
            noisy = images[part] + 0.5 * torch.randn_like(images[part])  # chains are noisy: so is what it learns from
            loss = F.cross_entropy(net(noisy), labels[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    energy, start = Tempered(model.active_nets[-1], args.temperature), model.sample(args.num, seed=0)
    chain = mg.Langevin(args.steps, step_size=(2 * args.temperature) ** 0.5, clamp=model.value_range)
    rows = []
    for label in range(10):
        x = chain(Sum(energy, Scaled(Classifier(net, label, conditional=True), args.weight)), start, seed=label)
        rows.append(model.to_uint8(x))
        shares = [float((net(y).argmax(1) == label).float().mean()) for y in (start, x)]
        print(f"class {label}: the classifier sees it in {shares[0]:.0%} of the samples before, {shares[1]:.0%} after")
    print(mg.pictures.save_png(args.out, mg.pictures.image_grid(torch.cat(rows), columns=args.num, scale=4)))


if __name__ == "__main__":
    main()
