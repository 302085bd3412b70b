"""A hand-written Langevin loop, and the one call that replaces it: the same law, with noise that can be named again.

    python examples/replace_a_loop.py

What is printed at the end are differences between chains that are the same chain run in parts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import mgebm_fast as mg

STEPS, DRIFT, NOISE, CLIP = 60, 10.0, 0.005, 0.01  # IGEBM's


def loop(energy: nn.Module, x: Tensor) -> Tensor:
    """What most code bases have: five passes over memory a step, and noise that no one can draw again."""
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
        x = x - DRIFT * gradient.clamp(-CLIP, CLIP) + NOISE * torch.randn_like(x)
        x = x.clamp(0, 1)
    return x.detach()


def main() -> None:
    torch.manual_seed(0)
    energy = mg.nets.multigrid_net(32, norm="none", variant="compact")
    start = torch.rand(16, 3, 32, 32)

    dynamics = mg.Langevin(steps=STEPS, drift=DRIFT, noise_std=NOISE, grad_clamp=CLIP, clamp=(0, 1))
    print(dynamics.explain(energy, start))
    samples = dynamics(energy, start, seed=1)
    for name, result in (("the loop", loop(energy, start)), ("mg.Langevin", samples)):
        print(f"{name}: mean energy {energy(result).mean().item():.4f}, was {energy(start).mean().item():.4f}")

    # Noise belongs to (seed, sample, step, pixel): halves of the batch, one after the other, get the same.
    halves = [dynamics(energy, start[i : i + 8], seed=1, first_sample=i) for i in (0, 8)]
    print(f"16 samples against 8 + 8: {_apart(samples, torch.cat(halves)):.1e} apart")
    # So do 60 steps against 20 and then 40.
    begin, rest = (dataclasses.replace(dynamics, steps=steps) for steps in (20, 40))
    resumed = rest(energy, begin(energy, start, seed=1), seed=1, first_step=20)
    print(f"60 steps against 20 + 40: {_apart(samples, resumed):.1e} apart")


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


if __name__ == "__main__":
    main()
