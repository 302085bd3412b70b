"""Persistent contrastive divergence with a replay buffer: a loop of one's own around the sampler.

    python examples/replay_buffer.py buffer.png

Chains go on from where they were, and one in twenty begins again from noise, as in "Implicit Generation and Modeling
with Energy-Based Models" (Du and Mordatch, NeurIPS 2019). The picture has the buffer at the end.
"""

import argparse

import torch
from torch import nn

import mgebm_fast as mg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the picture")
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--buffer", type=int, default=1000, help="chains that are kept")
    args = parser.parse_args()

    torch.manual_seed(0)  # no call has a seed: each draws one from torch's generator, and no two share noise
    images = mg.data.load("digits", size=8, channels=1, split="train").batch(slice(None)) / 127.5 - 1
    energy = nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1), nn.SiLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(1024, 128),
        nn.SiLU(), nn.Linear(128, 1), nn.Flatten(0),
    )  # fmt: skip
    optimiser = torch.optim.Adam(energy.parameters(), lr=5e-4, betas=(0.0, 0.999))
    chain = mg.Langevin(steps=20, drift=1.0, noise_std=0.03, grad_clamp=0.1, clamp=(-1, 1))
    buffer = torch.rand(args.buffer, 1, 8, 8) * 2 - 1

    for update in range(args.updates):
        chosen = torch.randperm(len(buffer))[:64]
        start = buffer[chosen]
        fresh = torch.rand(len(start)) < 0.05
        start[fresh] = torch.rand_like(start[fresh]) * 2 - 1
        buffer[chosen] = samples = chain(energy, start)

        data = images[torch.randint(len(images), (len(start),))]
        data = (data + 0.03 * torch.randn_like(data)).clamp(-1, 1)
        real, drawn = energy(data), energy(samples)
        loss = real.mean() - drawn.mean() + 0.1 * (real.square() + drawn.square()).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if update % 250 == 0 or update == args.updates - 1:
            print(f"update {update}: energy gap {float((real.mean() - drawn.mean()).detach()):+.3f}")

    shown = ((buffer[:64] + 1) * 127.5).round().to(torch.uint8)
    print(mg.pictures.save_png(args.out, mg.pictures.image_grid(shown, scale=4)))


if __name__ == "__main__":
    main()
