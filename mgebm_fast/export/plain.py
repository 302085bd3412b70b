"""A model's energies and chains in plain PyTorch: the source that an exported sampler is made of.

This file imports nothing of mgebm_fast, and `script.py` copies what a model needs of it, function by function, into
the file that it writes. A model is a dict of plain values here (`describe.plain_model`), its tensors a dict by name.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL: dict = {}  # in an exported script: the model


class Energy(nn.Sequential):
    """E(x) = −f(x), one number an image, low where data are likely; f is the net's only output, or the sum of all."""

    def __init__(self, net: dict) -> None:
        super().__init__(*layers_of(net))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, *size) -> (N,)
        return -super().forward(x).sum(1)


def stacked_layers(net: dict) -> list[nn.Module]:
    """Convolutions one after the other, each with its norm and activation, and a linear layer or none."""
    ndim, channels = len(net["size"]), net["channels"]
    layers: list[nn.Module] = []
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    normalise = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[ndim - 1]
    batch = net["norm"] == "batch"  # statistics of the batch, in the sampler too: they couple its samples
    for outputs, kernel, stride in net["layers"]:
        layers.append(convolution(channels, outputs, kernel, stride, kernel // 2, bias=not batch))
        if batch:
            layers.append(normalise(outputs, track_running_stats=False))
        activation = getattr(nn, net["activation"])
        layers.append(activation(net["negative_slope"]) if activation is nn.LeakyReLU else activation())
        channels = outputs
    layers.append(nn.Flatten())
    if net["features"]:
        layers.append(nn.Linear(net["features"], 1))
    return layers


class Residual(nn.Module):
    """x ↦ s(x) + body(x); s is the identity, or a convolution where the channels change."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def residual_layers(net: dict) -> list[nn.Module]:
    """A convolution, stages of residual blocks with average pooling between them, and a linear layer."""
    ndim, inputs = len(net["size"]), net["stages"][0]
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    halve = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[ndim - 1]

    def activation() -> nn.Module:
        kind = getattr(nn, net["activation"])
        return kind(net["negative_slope"]) if kind is nn.LeakyReLU else kind()

    layers: list[nn.Module] = [convolution(net["channels"], inputs, 3, 1, 1)]
    for stage, outputs in enumerate(net["stages"]):
        if stage:
            layers.append(halve(2))
        for _ in range(net["depth"]):
            body = nn.Sequential(
                activation(),
                convolution(inputs, outputs, 3, 1, 1),
                activation(),
                convolution(outputs, outputs, 3, 1, 1),
            )
            shortcut = nn.Identity() if inputs == outputs else convolution(inputs, outputs, 1)
            layers.append(Residual(body, shortcut))
            inputs = outputs
    layers.append(activation())
    if net["head"] != "linear":
        layers.append((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[ndim - 1](1))
    return [*layers, nn.Flatten(), nn.Linear(net["features"], 1)]


def layers_of(net: dict) -> list[nn.Module]:
    """The layers of a net; in an exported script one of the functions above."""
    return residual_layers(net) if "stages" in net else stacked_layers(net)


class Energies(nn.ModuleDict):
    """The energies of every size: x at the finest (N, C, *size) -> (N, sizes), coarse to fine, of x's block means."""

    def __init__(self, model: dict) -> None:
        super().__init__({f"size_{net['size'][-1]}": Energy(net) for net in model["nets"]})
        self.factors = [model["nets"][-1]["size"][-1] // net["size"][-1] for net in model["nets"]]

    def forward(self, x: Tensor) -> Tensor:
        grids = (x if factor == 1 else F.avg_pool2d(x, factor) for factor in self.factors)
        return torch.stack([net(grid) for net, grid in zip(self.values(), grids)], 1)


class Generator(nn.Sequential):
    """x = g(z): transposed convolutions, and tanh into the range of pixels."""

    def __init__(self, net: dict) -> None:
        inputs = net["latent"]
        layers: list[nn.Module] = []
        for channels, kernel, stride in net["layers"]:
            padding = (kernel - stride + 1) // 2
            rest = stride - kernel + 2 * padding
            layers.append(nn.ConvTranspose2d(inputs, channels, kernel, stride, padding, rest))
            activation = getattr(nn, net["activation"])
            layers.append(activation(net["negative_slope"]) if activation is nn.LeakyReLU else activation())
            inputs = channels
        super().__init__(*layers[:-1])  # the image has no activation
        self.tanh, (self.low, self.high) = net["output"] == "tanh", net["value_range"]

    def forward(self, z: Tensor) -> Tensor:  # (N, latent, m, m) -> (N, C, S, S)
        x = super().forward(z)
        return torch.tanh(x) * ((self.high - self.low) / 2) + (self.high + self.low) / 2 if self.tanh else x


def start_colours(model: dict, stored: dict, first: int, n: int, random: torch.Generator) -> Tensor:
    """1×1 images: colours drawn from those of the training images."""
    rows = stored["colours"]
    return rows[torch.randint(len(rows), (n,), generator=random)][:, :, None, None]


def start_noise(model: dict, stored: dict, first: int, n: int, random: torch.Generator) -> Tensor:
    """Uniform noise in the range of pixels."""
    low, high = model["value_range"]
    return torch.rand(n, *model["shape"], generator=random) * (high - low) + low


def start_mean(model: dict, stored: dict, first: int, n: int, random: torch.Generator) -> Tensor:
    """Images whose every pixel is the mean of the reference."""
    return torch.full((n, *model["shape"]), model["chains"][0]["reference_mean"])


def start_bank(model: dict, stored: dict, first: int, n: int, random: torch.Generator) -> Tensor:
    """Persistent chains of training, drawn at random."""
    bank = stored["bank"]
    return bank[torch.randint(len(bank), (n,), generator=random)]


def start_bank_in_order(model: dict, stored: dict, first: int, n: int, random: torch.Generator) -> Tensor:
    """Sample i goes on from the persistent chain i of training, or i modulo their number."""
    bank = stored["bank"]
    return bank[(torch.arange(n) + first) % len(bank)]


@torch.no_grad()
def start_generator(model: dict, stored: dict, first: int, n: int, random: torch.Generator) -> Tensor:
    """Images g(z) of draws z ~ N(0, I)."""
    generator = Generator(model["generator"])
    prefix = "generator."
    generator.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)})
    side = model["generator"]["latent_map"]
    return generator(torch.randn(n, model["generator"]["latent"], side, side, generator=random))


def langevin(energy: nn.Module, x: Tensor, chain: dict, random: torch.Generator) -> Tensor:
    """K steps of x ← clamp(x − drift (clip(∇E(x)) + (x − m)/σ²) + noise_std ε), ε ~ N(0, I); of a list, one a step."""
    for k in range(chain["steps"]):
        now = {name: value[k] if isinstance(value, list) else value for name, value in chain.items()}
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
        with torch.no_grad():
            if now["grad_clamp"] is not None:
                gradient = gradient.clamp(-now["grad_clamp"], now["grad_clamp"])
            if now["reference_std"] is not None:
                gradient = gradient + (x - now["reference_mean"]) / now["reference_std"] ** 2
            x = x - now["drift"] * gradient
            x = x + now["noise_std"] * torch.randn(x.shape, generator=random)
            if now["clamp"] is not None:
                x = x.clamp(*now["clamp"])
    return x.detach()


def cascade(model: dict, energies: Energies, x: Tensor, random: torch.Generator) -> Tensor:
    """The chains of all sizes from x, coarse to fine; each begins at the enlarged result of the one before. For each
    size of `cycles`, block means of the result at that size start the finer chains once more."""
    for size in (0, *model["cycles"]):
        x = F.adaptive_avg_pool2d(x, size) if size else x
        for energy, net, chain in zip(energies.values(), model["nets"], model["chains"]):
            if net["size"][-1] > size:
                if x.shape[-1] != net["size"][-1]:
                    x = enlarged(x, net["size"][-1] // x.shape[-1], model["upsampling"])
                x = langevin(energy, x, chain, random)
    return x


def enlarged(x: Tensor, factor: int, upsampling: str) -> Tensor:
    """x at a finer size, whose block means are x: replicated, or interpolated between the centres of pixels."""
    if upsampling == "nearest":
        return F.interpolate(x, scale_factor=factor, mode="nearest")
    smooth = F.interpolate(x, scale_factor=factor, mode="bilinear")
    return smooth + F.interpolate(x - F.avg_pool2d(smooth, factor), scale_factor=factor, mode="nearest")


def load(model: dict, path: Path) -> tuple[Energies, dict]:
    """The energies with their weights, and what else is stored: what chains start from."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    energies = Energies(model).requires_grad_(False)
    energies.load_state_dict({name: t for name, t in tensors.items() if name.startswith("size_")})
    return energies, {name: t for name, t in tensors.items() if not name.startswith("size_")}


def sample(model: dict, energies: Energies, stored: dict, n: int, seed: int = 0) -> Tensor:  # (n, C, *size)
    """n samples in the range of pixels, drawn in groups as in training where batch statistics couple them."""
    random, found = torch.Generator().manual_seed(seed), []
    for first in range(0, n, model["batch_size"]):
        count = model["batch_size"] if model["coupled"] else min(model["batch_size"], n - first)
        found.append(cascade(model, energies, start(model, stored, first, count, random), random))
    return torch.cat(found)[:n]


def start(model: dict, stored: dict, first: int, n: int, random: torch.Generator) -> Tensor:
    """Where the chains of samples first … first + n − 1 begin; in an exported script one of the functions above."""
    return globals()[f"start_{model['start']}"](model, stored, first, n, random)


def save(model: dict, x: Tensor, out: Path) -> None:
    """A picture with gaps between images (.png), or a float32 array (N, C, *size) in the range of pixels (.npy)."""
    import numpy as np

    if out.suffix == ".npy":
        np.save(out, x.numpy())
        return
    from PIL import Image

    low, high = model["value_range"]
    pixels = ((x - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    scale = max(1, 40 // x.shape[-1])
    pixels = F.pad(pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3), (0, 2, 0, 2), value=255)
    columns = round(len(x) ** 0.5 + 0.49)
    pixels = torch.cat([pixels, pixels.new_full((-len(x) % columns, *pixels.shape[1:]), 255)])
    grid = pixels.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(grid.numpy()).save(out)


def main() -> None:
    """Draw samples, save them, and print their energies."""
    options = argparse.ArgumentParser(description="Draw samples, save them, and print their energies.")
    options.add_argument("--num", type=int, default=16)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=Path("samples.png"), help="X.png or X.npy")
    options.add_argument("--weights", type=Path, default=Path(__file__).with_suffix(".safetensors"))
    given = options.parse_args()
    endings = (".png", ".npy") if len(MODEL["shape"]) == 3 else (".npy",)
    if given.out.suffix not in endings or not given.out.parent.is_dir():
        options.error(f"--out must end in {' or '.join(endings)}, in a folder that is there, got {given.out}")
    if given.num < 1:
        options.error(f"--num must be at least 1, got {given.num}")
    if not given.weights.is_file():
        options.error(f"--weights must be the file that lay beside this one, got {given.weights}, which is none")
    energies, stored = load(MODEL, given.weights)
    x = sample(MODEL, energies, stored, given.num, given.seed)
    save(MODEL, x, given.out)
    names, means = list(energies), energies(x).mean(0).tolist()
    print(f"{given.out}: {len(x)} samples;", ", ".join(f"mean energy at {n} {e:.4g}" for n, e in zip(names, means)))


if __name__ == "__main__":
    main()
