"""What passes through an update: its numbers, what its chains made, what is learnt from it and measured of it, and a
further optimiser's step."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean, median

import torch
from torch import Tensor, nn

from ... import noise, ops
from ...models import EnergyModel
from ...sampling.langevin import Langevin
from ..config.sections import OptimiserConfig

_PROBED = 16  # images that the largest curvature is looked for at


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What differs from one update to the next beside its images: numbers, or 0-dim tensors on the device, which a
    captured update reads.

    Args:
        iteration: updates made before.
        rates: the learning rate of each net.
        data_noise: std of the noise on each net's observed images; 0.0, and no tensor, where there never is any.
        shares: what the weights count for in their average, of each group that begins together.
        nets: how many nets learn, the coarsest ones.
    """

    iteration: int | Tensor
    rates: Sequence[float | Tensor]
    data_noise: Sequence[float | Tensor]
    shares: Sequence[float | Tensor]
    nets: int


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """What the chains of one part of a batch made.

    Args:
        images: one batch a net, float32.
        ids: the sample ids of the chains: of the first, the others following, or of each.
        latents: z of the images that the chains started from, of a method with a generator.
    """

    images: list[Tensor]
    ids: int | Tensor = 0
    latents: Tensor | None = None


@dataclasses.dataclass
class GridLearned:
    """What one net learns from one part of a batch: a gradient a parameter, and two mean energies, 0-dim."""

    gradients: list[Tensor]
    observed: Tensor
    synthesised: Tensor


@dataclasses.dataclass
class Learned:
    """What all nets learn from one part of a batch, or the mean over parts of it, which ranks take of flat lists."""

    grids: list[GridLearned]
    buffers: list[Tensor]  # those that follow the observed images, averaged over parts
    healthy: Tensor  # 0-dim, 1 where no chain became non-finite

    def flatten(self) -> list[Tensor]:
        """All tensors: gradients by grid, energies by grid, health, buffers."""
        gradients = [gradient for grid in self.grids for gradient in grid.gradients]
        energies = [energy for grid in self.grids for energy in (grid.observed, grid.synthesised)]
        return [*gradients, *energies, self.healthy, *self.buffers]

    @classmethod
    def unflatten(cls, tensors: Iterable[Tensor], gradients: Sequence[int]) -> Learned:
        """The inverse of `flatten` for so many gradients a grid."""
        rest = iter(tensors)
        by_grid = [list(itertools.islice(rest, count)) for count in gradients]
        grids = [GridLearned(found, next(rest), next(rest)) for found in by_grid]
        healthy = next(rest)
        return cls(grids, list(rest), healthy)


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A step that an update makes besides those of the nets: of a generator that learns from the chains."""

    optimiser: torch.optim.Optimizer
    config: OptimiserConfig
    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    loss: Tensor  # 0-dim


def with_data_noise(
    images: Tensor,  # (N, C + K, …) observed, K label planes last
    draw: Tensor,  # of N(0, 1), which is written to
    std: float | Tensor,
    bounds: tuple[float, float] | None,
    channels: int,  # C
) -> Tensor:
    """Observed images with noise of that std, but for their label planes.

    Chains are clamped to `bounds`. Unclamped data noise would let the net tell data from samples by their range alone,
    and energies would diverge.
    """
    noisy = (  # the two round alike
        torch.addcmul(images, draw, std, out=draw)
        if isinstance(std, Tensor)
        else torch.add(images, draw, alpha=std, out=draw)
    )
    if bounds is not None:
        noisy.clamp_(*bounds)
    if images.shape[1] > channels:
        noisy[:, channels:] = images[:, channels:]
    return noisy


def law_of(chain: Langevin) -> list[float]:
    """drift, noise_std and 1/σ² of a chain, their means over its steps, and the median of noise_std."""
    return law_of_table([(n.drift, n.noise_std, n.inverse_variance) for n in chain.by_step()])


def law_of_table(table: Sequence[tuple[float, float, float]]) -> list[float]:
    """`law_of` the chain whose steps have the numbers of `Langevin.table`."""
    return [*map(fmean, zip(*table)), median(noise_std for _, noise_std, _ in table)]


def measured_of_samples(
    model: EnergyModel,
    images: Sequence[Tensor],  # of the chains, one batch a net, coarse to fine
    observed: Sequence[Tensor],  # at the same sizes, or more
    gradient: Callable[[int, Tensor], Tensor],  # (net, x) -> ∇E(x)
    laws: Sequence[Sequence[float | Tensor]],  # of each chain (`law_of`)
) -> dict[str, Tensor]:
    """What is watched in samples (`divergence.watch`), 0-dim each; of numbers that vary, their mean over the chain:

    gradient_to_noise: rms of what the gradient moves a pixel by in a step, over that of the noise, where there is
    gradient_clamped: rms of the gradient over langevin.grad_clamp, where there is
    stiffness: drift times the largest curvature of the energy and its reference, at up to 16 images
        (`largest_curvature`), where there is noise
    saturated: share of pixels at the ends of value_range, less that of the data, where chains are clamped
    spread: std of all pixels, over that of the data
    """
    found, (low, high), pixels = {}, model.value_range, slice(model.channels)
    for net, (x, size, chain, real) in enumerate(zip(images, model.sizes[1:], model.langevin, observed)):
        drift, noise_std, inverse_variance, median_std = laws[net]
        noisy = isinstance(noise_std, Tensor) or noise_std > 0
        bound = math.inf if chain.grad_clamp is None else chain.grad_clamp
        if noisy or math.isfinite(bound):
            force = gradient(net, x)[:, pixels].clamp(-bound, bound)
            if math.isfinite(bound):
                found[f"size_{size}/gradient_clamped"] = force.square().mean().sqrt() / bound
            if noisy:
                force = force + (x[:, pixels] - chain.reference_mean) * inverse_variance
                found[f"size_{size}/gradient_to_noise"] = drift * force.square().mean().sqrt() / noise_std
                few, reach = x[:: max(1, len(x) // _PROBED)][:_PROBED], torch.as_tensor(median_std, device=x.device)
                reach = reach.clamp_min(1e-3 * (high - low))
                curvature = largest_curvature(partial(gradient, net), few, reach, pixels) + inverse_variance
                found[f"size_{size}/stiffness"] = drift * curvature
        x, real = x[:, pixels], real[:, pixels]
        if chain.clamp is not None:
            found[f"size_{size}/saturated"] = _at_ends(x, *chain.clamp) - _at_ends(real, *chain.clamp)
        found[f"size_{size}/spread"] = x.std(correction=0) / real.std(correction=0).clamp_min(1e-3 * (high - low))
    return found


def largest_curvature(
    gradient: Callable[[Tensor], Tensor],
    x: Tensor,  # (N, C + K, …), K label planes last, which stay
    reach: Tensor,  # 0-dim: rms of the steps whose gradients are compared, in the units of x
    pixels: slice,  # the C
    iterations: int = 8,
) -> Tensor:
    """The largest eigenvalue of ∇²E at x, the mean over the N images, 0-dim: by power iterations

        d = ∇E(x + v) − ∇E(x),    λ = ⟨d, v⟩/⟨v, v⟩,    v ← reach √n u/|u|,    u = d + ½ r v        n pixels

    from v of white noise, r the highest |d|/|v| so far: without it they would find the eigenvalue of the largest
    magnitude, a negative one where E is more concave than convex. The differences are as long as what a chain's noise
    does in a step, since nets of ReLU have no curvature but where their pieces meet. So few iterations are some
    hundredths of λ low. With batch statistics, which tie images together, it is indicative.

    A step x − drift ∇E(x) goes past the minimum along v where drift λ is above 1, and ends farther from it than it
    began where that is above 2.
    """
    stream = noise.stream(noise.Purpose.PROBE)
    steps = ops.noise(x.shape, seed=0, step=0, first_sample=0, stream=stream, device=x.device)
    steps[:, pixels.stop :] = 0
    here, length = gradient(x).clone(), reach * math.sqrt(x[0, pixels].numel())
    by_image, shift = (-1, *[1] * (x.dim() - 1)), torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        steps = steps * (length / _norms(steps)).view(by_image)
        bent = gradient(x + steps) - here
        bent[:, pixels.stop :] = 0
        largest = (bent * steps).flatten(1).sum(1) / _norms(steps).square()
        shift = torch.maximum(shift, _norms(bent) / _norms(steps))
        steps = bent + (0.5 * shift).view(by_image) * steps
    return largest.mean()


def _norms(x: Tensor) -> Tensor:  # (N, …) -> (N,)
    return x.flatten(1).norm(dim=1).clamp_min(1e-12)


def _at_ends(x: Tensor, low: float, high: float) -> Tensor:
    """The share of pixels within a thousandth of the range from its ends."""
    margin = 1e-3 * (high - low)
    return ((x <= low + margin) | (x >= high - margin)).float().mean()
