"""Latent variables of a generator: their prior draws, their posterior given images, and what both make possible."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks, noise, ops
from ..nets import Generator
from ..sampling.langevin import Langevin
from .model import Group


class Residual(nn.Module):
    """E(z) = ‖(x − g(z)) on the pixels that are not hidden‖² / 2s², one number for each image x.

    With the prior N(0, I), which a chain takes as its reference, −E(z) − ‖z‖²/2 is log p(z | x) up to a constant, of
    the model x = g(z) + s ε.
    """

    def __init__(
        self,
        generator: Generator,
        x: Tensor,  # (N, C, S, S)
        std: float,
        hidden: Tensor | None = None,  # bool, broadcastable to x, True = takes no part
    ) -> None:
        super().__init__()
        self.generator, self.x, self.scale = generator, x, 0.5 / std**2
        self.seen = None if hidden is None else (~hidden).to(x.dtype)

    def forward(self, z: Tensor) -> Tensor:  # (N, *latent_shape) -> (N,)
        if len(z) != len(self.x):
            raise ValueError(f"infer: z must hold one sample for each of the {len(self.x)} images, got {len(z)}")
        made = self.generator(z)
        if made.shape != self.x.shape:
            raise ValueError(f"infer: x must be images {tuple(made.shape)}, as g(z) is, got {tuple(self.x.shape)}")
        rest = self.x - made
        if self.seen is not None:
            rest = rest * self.seen
        return self.scale * rest.square().flatten(1).sum(1)


@dataclasses.dataclass(frozen=True)
class Inference:
    """K Langevin steps on the posterior of z given x, for the model x = g(z) + s ε, z ~ N(0, I):

        z ← z + (δ²/2)( Jᵀ(x − g(z))/s² − z ) + τδ ε,   J = ∂g/∂z

    Args:
        steps: K ≥ 1.
        step_size: δ.
        std: s, of the noise of observed pixels, in units of `value_range`.
        noise_scale: τ; 0 climbs to a mode.

    Source: Han, Lu, Zhu, Wu, "Alternating back-propagation for generator network" (AAAI 2017, arXiv 1606.08571), §3.
    """

    steps: int
    step_size: float
    std: float
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        checks.positive_number(self.std, "std", "Inference")
        self.chain().update(where="Inference")  # refuses a schedule, which both parts of `infer` would run

    def chain(self) -> Langevin:
        """The chain of z: the prior is its Gaussian reference."""
        return Langevin(self.steps, step_size=self.step_size, noise_scale=self.noise_scale, reference_std=1.0)

    def __call__(
        self,
        generator: Generator,
        x: Tensor,  # (N, C, S, S) float32
        z: Tensor,  # (N, *latent_shape) float32, the start
        *,
        hidden: Tensor | None = None,
        seed: int | None = None,
        first_sample: int | Tensor = 0,
        first_step: int = 0,
        stream: int = 0,
        backend: str = "auto",
        callback: Any = None,
        where: str = "infer",
    ) -> Tensor:
        """z after K steps, float32. `hidden`: bool, broadcastable to x, True where a pixel takes no part.

        The noise of image i at step k is a function of (seed, first_sample + i, first_step + k, stream) alone; without
        a seed every call draws one, as in `langevin_sample`. `first_sample` may be N ids. Raises DivergenceError where
        δ is too large for s.
        """
        energy = Residual(generator, x, self.std, hidden)
        return self.chain()(
            energy, z, seed=seed, first_sample=first_sample, first_step=first_step, stream=stream, precision="fp32",
            backend=backend, callback=callback, where=where,
        )  # fmt: skip


def draw_latents(
    generator: Generator,
    n: int,
    *,
    seed: int,
    step: int = 0,
    first_sample: int | Tensor = 0,
    purpose: noise.Purpose | int = noise.Purpose.SAMPLING_STATE,
) -> Tensor:
    """n draws (n, *latent_shape) of z ~ N(0, I), float32; each a function of (seed, step, sample id, purpose)."""
    device = next(generator.parameters()).device
    return ops.noise(
        (n, *generator.latent_shape), seed=seed, step=step, first_sample=first_sample,
        stream=noise.stream(purpose, 1), device=device,
    )  # fmt: skip


def between(a: Tensor, b: Tensor, points: int) -> Tensor:  # (N, …) twice -> (N, points, …)
    """Points on the great arcs from each a to its b, both included, at norms that go from one to the other's.

    A straight line between two draws of N(0, I) in many dimensions passes nearer to 0 than any draw lies.
    """
    if points < 2:
        raise ValueError(f"interpolate: points must be at least 2, got {points}")
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    norm_a, norm_b = (v.norm(dim=1, keepdim=True) for v in (flat_a, flat_b))
    unit_a, unit_b = flat_a / norm_a, flat_b / norm_b
    angle = (unit_a * unit_b).sum(1, keepdim=True).clamp(-1, 1).arccos()[:, None]  # (N, 1, 1)
    t = torch.linspace(0, 1, points, dtype=torch.float64, device=a.device)[None, :, None]
    small = angle.sin().abs() < 1e-6  # one direction, or opposite ones: a straight line is as good
    divisor = torch.where(small, 1.0, angle.sin())
    weights = [torch.where(small, line, ((part * angle).sin()) / divisor) for part, line in ((1 - t, 1 - t), (t, t))]
    arcs = weights[0] * unit_a[:, None] + weights[1] * unit_b[:, None]
    lengths = (1 - t) * norm_a[:, None] + t * norm_b[:, None]
    return (arcs * lengths).to(a.dtype).reshape(len(a), points, *a.shape[1:])


class Generates:
    """Of a model that holds a `generator` and an `inference`: what it does with its generator alone.

    `complete_steps`: of the chain on z that explains the known pixels of an image from a draw of the prior.
    """

    generator: Generator
    inference: Inference
    complete_steps: int

    def generate(self, n: int, *, seed: int = 0, first_sample: int = 0) -> Tensor:
        """n images g(z) (n, C, S, S) float32 of draws z ~ N(0, I), by the generator alone."""
        with torch.no_grad():
            return self.generator(draw_latents(self.generator, n, seed=seed, first_sample=first_sample))

    def interpolate(self, rows: int, points: int, *, seed: int = 0, first_sample: int = 0) -> Tensor:
        """(rows, points, C, S, S): row r goes from the z of sample first_sample + 2r to that of the one after it."""
        ends = draw_latents(self.generator, 2 * rows, seed=seed, first_sample=first_sample)
        z = between(ends[0::2], ends[1::2], points)
        with torch.no_grad():
            return self.generator(z.flatten(0, 1)).unflatten(0, (rows, points))

    def infer(
        self,
        x: Tensor,
        *,
        hidden: Tensor | None = None,
        steps: int | None = None,
        seed: int = 0,
        first_sample: int = 0,
        backend: str = "auto",
    ) -> Tensor:
        """z (N, *latent_shape) that explains images x where they are not hidden: `steps` Langevin steps (default:
        `complete_steps`) from a draw of the prior. The second half of the chain is noise-free, and ends at a mode."""
        steps = checks.positive_int(steps, "steps", "infer", none=True)
        steps = self.complete_steps if steps is None else steps
        z = draw_latents(self.generator, len(x), seed=seed, first_sample=first_sample)
        stream = noise.stream(noise.Purpose.LATENT, 1)
        noisy = steps // 2
        for first, count, scale in ((0, noisy, self.inference.noise_scale), (noisy, steps - noisy, 0.0)):
            if count:
                part = dataclasses.replace(self.inference, steps=count, noise_scale=scale)
                z = part(
                    self.generator, x, z, hidden=hidden, seed=seed, first_sample=first_sample, first_step=first,
                    stream=stream, backend=backend, where="infer",
                )  # fmt: skip
        return z

    def complete(
        self, known: Tensor, mask: Tensor, *, seed: int = 0, first_sample: int = 0, backend: str = "auto"
    ) -> Tensor:
        """`known` with g(z) where the mask is True, z inferred from the rest of each image."""
        z = self.infer(known, hidden=mask, seed=seed, first_sample=first_sample, backend=backend)
        with torch.no_grad():
            return torch.where(mask, self.generator(z), known)

    def draw(self, group: Group) -> Tensor:
        """The images of a group by the generator alone: completed where pixels are known, else of draws of z."""
        place = {"seed": group.seed, "first_sample": group.first_sample}
        if group.mask is not None and group.known is not None:
            return self.complete(group.known, group.mask, backend=group.backend, **place)
        return self.generate(group.n, **place)
