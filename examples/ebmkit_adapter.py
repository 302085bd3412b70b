"""ebmkit, each way: our chain of their sampler's arguments, and our chain as a sampler of their losses and Trainer.

    pip install ebmkit
    python examples/ebmkit_adapter.py

Energies need no adapter: in both packages they are any callable (N, ...) -> (N,), low where data are likely.
"""

import dataclasses

import ebm
import torch
from torch import Tensor

import mgebm_fast as mg


def langevin(sampler: ebm.LangevinDynamics) -> mg.Langevin:
    """The chain of `sampler.sample`: x − η clip(∇E, ±g) + σ ε, with σ = √(2η) where they have None."""
    if type(sampler) is not ebm.LangevinDynamics:
        raise ValueError(f"{type(sampler).__name__} is another sampler: only LangevinDynamics has this step")
    noise_std = (2 * sampler.step_size) ** 0.5 if sampler.noise_scale is None else sampler.noise_scale
    return mg.Langevin(
        sampler.steps, drift=sampler.step_size, noise_std=noise_std, grad_clamp=sampler.grad_clip, clamp=sampler.clamp
    )


class Chain(ebm.Sampler):
    """A chain of mgebm_fast as their Sampler: every call draws a seed of its own from torch's generator."""

    def __init__(self, chain: mg.Langevin) -> None:
        super().__init__(chain.steps)
        self.chain = chain

    def step(self, energy, x: Tensor) -> Tensor:
        return dataclasses.replace(self.chain, steps=1)(energy, x)

    def sample(self, energy, x_init: Tensor, *, steps: int | None = None, return_trajectory: bool = False) -> Tensor:
        chain = self.chain if steps is None else dataclasses.replace(self.chain, steps=steps)
        if not return_trajectory:
            return chain(energy, x_init)
        return torch.stack([x_init.detach(), *(x.clone() for _, x in chain.trajectory(energy, x_init, every=1))])


def main() -> None:
    torch.manual_seed(0)
    start = torch.rand(16, 1, 8, 8)
    theirs = ebm.LangevinDynamics(step_size=10.0, steps=60, noise_scale=0.005, grad_clip=0.01, clamp=(0, 1))
    net = mg.nets.multigrid_net(8, channels=1, norm="none", variant="compact", width=0.5)
    for name, x in (("ebmkit", theirs.sample(net, start)), ("mg.Langevin", langevin(theirs)(net, start))):
        print(f"{name}: energy {net(x).mean().item():.4f}, was {net(start).mean().item():.4f}")

    data = mg.data.load("digits", size=8, channels=1)
    images = torch.from_numpy(data.images[:512]).float() / 255
    buffer = ebm.ReplayBuffer(256, (1, 8, 8), init_fn=torch.rand)
    loss = ebm.ContrastiveDivergence(Chain(langevin(theirs)), buffer=buffer, energy_reg=0.1)
    history = ebm.Trainer(net, loss, lr=1e-3).fit(images, steps=20, batch_size=64, verbose=False)
    gaps = [record["energy_gap"] for record in history]
    print(f"their Trainer and loss with our chain: energy gap {gaps[0]:+.4f} to {gaps[-1]:+.4f} in {len(gaps)} updates")


if __name__ == "__main__":
    main()
