"""The four claims of "A Theory of Generative ConvNet" (Xie, Lu, Zhu, Wu, ICML 2016) in one picture.

    python examples/plot_theory.py docs/images/theory.png

Needs matplotlib. tests/learning/test_theory.py has the claims as tests.
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import mgebm_fast as mg
from mgebm_fast.gradient import energy_gradient
from mgebm_fast.nets import ConvSpec, EnergyNet

SIGMA, DELTA, SIZE = 0.8, 0.3, 9


def build_net() -> EnergyNet:
    layers = [ConvSpec(6, 3, 2), ConvSpec(4, 3)]
    net = EnergyNet(SIZE, 1, layers, norm="none", activation="relu", head="sum", seed=1)
    with torch.no_grad():
        net.layers[1].weight.abs_()  # f is then convex, and descent ends inside a piece
    return net


def top_down(net: EnergyNet, x: Tensor) -> Tensor:
    """B = ∇f(x)."""
    return -energy_gradient(net, x, precision="fp32")


def descend(net: EnergyNet, x: Tensor, **options: float) -> Tensor:
    return mg.langevin_sample(net, x, step_size=DELTA, reference_std=SIGMA, precision="fp32", **options)


def parameter_gradient(net: EnergyNet, value: Tensor) -> Tensor:
    weights = [layer.weight for layer in net.convolutions]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, weights, retain_graph=True)])


def main(path: str) -> None:
    net, generator = build_net(), torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, SIZE, SIZE, generator=generator)
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")

    # (a) along a line f is piecewise linear: between kinks the potential is a Gaussian's
    line = torch.linspace(-1, 1, 801, dtype=torch.float64).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        f = net.double().score(x[:1].double() + line * x[1:2])
    net.float()
    second = (f[2:] - 2 * f[1:-1] + f[:-2]).abs().clamp_min(1e-16)
    axes[0].semilogy(line.flatten()[1:-1], second, ".", markersize=2)
    axes[0].set(title="(a) second differences of f on a line", xlabel="place on the line")

    # (b) one step without noise against the reconstruction error
    step = descend(net, x, steps=1, noise_scale=0.0) - x
    error = x - SIGMA**2 * top_down(net, x)
    axes[1].plot(error.flatten(), step.flatten(), ".", markersize=2)
    ends = torch.tensor([float(error.min()), float(error.max())])
    axes[1].plot(ends, -(DELTA**2) / (2 * SIGMA**2) * ends, linewidth=0.8)
    axes[1].set(title="(b) drift = −(δ²/2σ²)·error", xlabel="x − σ²∇f(x)", ylabel="step")

    # (c) descent ends where an image reconstructs itself
    errors = []
    for _ in range(80):
        errors.append((x - SIGMA**2 * top_down(net, x)).flatten(1).norm(dim=1))
        x = descend(net, x, steps=5, noise_scale=0.0)
    axes[2].semilogy(torch.arange(80) * 5, torch.stack(errors))
    axes[2].set(title="(c) ‖x − σ²∇f(x)‖ in descent", xlabel="step")

    # (d) the gradient of CD-1, averaged over chains, against that of the reconstruction error
    x = torch.randn(1, 1, SIZE, SIZE, generator=generator)
    many = x.expand(20000, -1, -1, -1)
    y = x.clone().requires_grad_()
    b = torch.autograd.grad(net.score(y).sum(), y, create_graph=True)[0]
    wanted = -(DELTA**2) / (4 * SIGMA**4) * parameter_gradient(net, (x - SIGMA**2 * b).square().sum())
    # f of x's piece is linear in the image: its gradient at a chain's mean end is the mean of gradients.
    after = descend(net, many, steps=1).mean(0, keepdim=True)
    found = parameter_gradient(net, (b * (x - after)).sum())
    axes[3].plot(wanted, found, ".", markersize=3)
    ends = torch.tensor([float(wanted.min()), float(wanted.max())])
    axes[3].plot(ends, ends, linewidth=0.8)
    axes[3].set(title="(d) CD-1, mean of 20,000 chains", xlabel="−(δ²/4σ⁴)·gradient of ‖x − σ²B‖²", ylabel="gradient")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "theory.png")
