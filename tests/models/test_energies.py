"""Energies of given images: every model that has a net, units, the reference, gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch

import mgebm_fast as mg
from mgebm_fast import ops
from mgebm_fast.errors import DivergenceError
from mgebm_fast.models import CoopNets, Frame, GenerativeConvNet, GeneratorModel, MultiGrid, SingleGrid, SpatialTemporal
from mgebm_fast.models.latent import Inference
from mgebm_fast.nets import ConvSpec, DeconvSpec, Generator

CHAIN = mg.Langevin(2, drift=0.5, noise_std=0.1, reference_std=2.0, reference_mean=0.5)
SHARED = {"channels": 1, "langevin": CHAIN, "value_range": (-1.0, 1.0)}
SMALL = {**SHARED, "norm": "none", "variant": "compact", "width": 0.1}
LAYERS = [ConvSpec(3, 3), ConvSpec(4, 3, 2)]


def generator(size):
    return Generator(2, [DeconvSpec(3, size // 2, size // 2), DeconvSpec(1, 4, 2)])


MODELS = {
    "MultiGrid": lambda: MultiGrid((1, 2, 4), **SMALL, batch_size=3),
    "SingleGrid": lambda: SingleGrid(4, **SMALL),
    "GenerativeConvNet": lambda: GenerativeConvNet(6, LAYERS, depth=1, **SHARED),
    "Frame": lambda: Frame(6, layers=LAYERS, leapfrog_steps=2, **SHARED),
    "CoopNets": lambda: CoopNets(8, generator(8), Inference(2, 0.1, 0.3), **SMALL),
    "video": lambda: SpatialTemporal((4, 6, 6), LAYERS, **SHARED),
    "sound": lambda: SpatialTemporal((8,), LAYERS, **SHARED),
}


def images(model, n=5):
    low, high = model.value_range
    shape = model.sample_shape(model.sizes[-1])
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1)) * (high - low) + low


@pytest.mark.parametrize("kind", MODELS)
def test_energies_are_those_of_the_nets_in_use(kind):
    model = MODELS[kind]()
    x = images(model)
    found, potential = model.energies(x), model.energies(x, reference=True)
    assert list(found) == list(model.sizes[1:])
    grids = [*ops.pyramid(x, model.sizes[1:-1]), x]
    for net, at_size, size in zip(model.active_nets, grids, found, strict=True):
        torch.testing.assert_close(found[size], net(at_size).detach())
        reference = (at_size - 0.5).square().flatten(1).sum(1) / (2 * 2.0**2)
        torch.testing.assert_close(potential[size], found[size] + reference)
    torch.testing.assert_close(model.energy(x), sum(found.values()))
    torch.testing.assert_close(model.energy(x, reference=True), sum(potential.values()))
    assert not model.energy(x).requires_grad


def test_bytes_are_pixels_in_the_models_units():
    model = MultiGrid((1, 2, 4), **{**SMALL, "value_range": (0.0, 2.0)})
    x = model.to_uint8(images(model))
    torch.testing.assert_close(model.energy(x), model.energy(model.from_uint8(x)))


def test_gradients_go_to_the_pixels_alone():
    model = MODELS["MultiGrid"]()
    x = images(model).requires_grad_()
    model.energy(x).sum().backward()
    leaf = x.detach().clone().requires_grad_()
    total = sum(net(grid).sum() for net, grid in zip(model.nets, [*ops.pyramid(leaf, [2]), leaf], strict=True))
    torch.testing.assert_close(x.grad, torch.autograd.grad(total, leaf)[0])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_statistics_couple_what_is_asked_together():
    model = MultiGrid((1, 4), **{**SMALL, "norm": "batch"}, batch_size=2)
    x = images(model)
    with model.nets[0].observing():
        model.nets[0](x)
    torch.testing.assert_close(model.energies(x)[4], model.nets[0](x).detach())  # one batch, not groups of two
    assert not torch.allclose(model.energy(x)[:2], model.energy(x[:2]))
    frozen = model.freeze_norm()
    torch.testing.assert_close(frozen.energy(x)[:2], frozen.energy(x[:2]))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([1.0], TypeError, "energies: x must be a uint8 or float32 tensor, got list"),
        (
            torch.zeros(1, 1, 4, 4, dtype=torch.float64),
            TypeError,
            "uint8 or float32 tensor, got torch.float64",
        ),
        (torch.zeros(1, 1, 4, 5), ValueError, r"x must have shape \(N, 1, 4, 4\), got \(1, 1, 4, 5\)"),
        (torch.full((1, 1, 4, 4), float("nan")), ValueError, "x must be finite, got NaN or infinite pixels"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(x, error, words):
    with pytest.raises(error, match=words):
        MODELS["MultiGrid"]().energies(x)


def test_an_energy_that_is_not_finite_is_no_answer():
    model = MODELS["MultiGrid"]()
    x = images(model)
    with torch.no_grad():
        model.nets[1].head.bias.fill_(float("inf"))
    with pytest.raises(DivergenceError, match="energies: must be finite, got -inf for image 0 at size 4"):
        model.energies(x)


def test_no_images_have_no_energies_and_a_generator_alone_has_none():
    model = MODELS["MultiGrid"]()
    assert model.energy(images(model, 0)).shape == (0,)
    assert not hasattr(GeneratorModel(generator(8), Inference(2, 0.1, 0.3)), "energies")
