"""Generators: transposed convolutions against a loop, the linear one as a matrix, sizes, ranges, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mgebm_fast.nets import DeconvSpec, Generator, generator_layers


def scattered(x, weight, bias, stride):
    """A transposed convolution as a sum of stamps, float64: each input pixel adds its kernel, then the map is cropped
    to stride times the input, (kernel − stride + 1) // 2 pixels off the top and the left."""
    n, inputs, height, width = x.shape
    _, outputs, kernel, _ = weight.shape
    whole = np.zeros((n, outputs, height * stride + kernel, width * stride + kernel))
    for i in range(height):
        for j in range(width):
            stamp = np.einsum("nc,cokl->nokl", x[:, :, i, j], weight)
            whole[:, :, i * stride : i * stride + kernel, j * stride : j * stride + kernel] += stamp
    off = (kernel - stride + 1) // 2
    return whole[:, :, off : off + height * stride, off : off + width * stride] + bias[:, None, None]


@pytest.mark.parametrize("output", ["tanh", "none"])
def test_forward_is_the_loop(output):
    specs = [DeconvSpec(5, 3, 3), DeconvSpec(4, 4, 2), DeconvSpec(3, 5, 2), DeconvSpec(3, 3, 2), DeconvSpec(2, 3)]
    net = Generator(4, specs, output=output, value_range=(-0.5, 2.0), negative_slope=0.1, seed=3).double()
    with torch.no_grad():
        for layer in net.layers:
            layer.bias.normal_(generator=torch.Generator().manual_seed(1))
    z = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = z.numpy()[:, :, None, None]
    for spec, layer in zip(specs, net.layers, strict=True):
        x = scattered(x, layer.weight.detach().numpy(), layer.bias.detach().numpy(), spec.stride)
        x = x if spec is specs[-1] else np.where(x > 0, x, 0.1 * x)
    if output == "tanh":
        x = -0.5 + 2.5 * (1 + np.tanh(x)) / 2
    assert net.size == 24
    np.testing.assert_allclose(net(z).detach().numpy(), x, atol=1e-12)


def test_one_layer_from_a_point_is_a_matrix():
    net = Generator(3, [DeconvSpec(2, 4, 4)], output="none", seed=1)
    z = torch.randn(5, 3)
    expected = torch.einsum("nd,dchw->nchw", z, net.layers[0].weight)
    torch.testing.assert_close(net(z), expected)
    assert net(z).shape == (5, 2, 4, 4) and net.latent_shape == (3,)


@pytest.mark.parametrize(
    ("size", "latent_map", "first"),
    [(8, 1, (4, 4)), (24, 1, (3, 3)), (25, 1, (25, 25)), (6, 1, (3, 3)), (64, 4, (3, 1))],
)
def test_built_in_layers_reach_the_size(size, latent_map, first):
    layers = generator_layers(size, 3, width=2, latent_map=latent_map)
    net = Generator(4, layers, latent_map=latent_map)
    assert (layers[0].kernel, layers[0].stride) == first and layers[-2].channels == 2
    assert net(torch.zeros(2, *net.latent_shape)).shape == (2, 3, size, size)


def test_pixels_are_inside_the_range():
    net = Generator(2, generator_layers(8, 1, width=4), value_range=(0.0, 255.0))
    x = net(100 * torch.randn(50, 2)).detach()
    assert float(x.min()) >= 0 and float(x.max()) <= 255 and float(x.max() - x.min()) > 200


def test_a_map_of_latents_makes_a_stationary_texture_of_any_size():
    """A larger map makes a larger image, and a map moved by one place the image moved by all strides, inside."""
    net = Generator(3, generator_layers(16, 1, width=2, latent_map=4), latent_map=4, output="none").double()
    z = torch.randn(1, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = net(z).detach()
    assert x.shape == (1, 1, 36, 36)
    moved = net(z.roll(1, 3)).detach()
    torch.testing.assert_close(moved[..., 16:24], x[..., 12:20])


def test_weights_keep_the_scale_of_the_map():
    """He's variance for the taps that reach a pixel: hidden maps neither fade nor grow by layers."""
    net = Generator(64, generator_layers(32, 1, width=32), output="none", seed=0)
    with torch.no_grad():
        x = torch.randn(64, 64, 1, 1, generator=torch.Generator().manual_seed(0))
        scales = []
        for layer in net.layers[:-1]:
            x = layer(x)
            scales.append(float(x.square().mean()))
    assert all(0.5 < scale < 2 for scale in scales), scales


def test_config_rebuilds_and_the_seed_draws_the_weights():
    net = Generator(4, generator_layers(16, 2, width=3, latent_map=2), latent_map=2, value_range=(0, 1), seed=5)
    again = Generator.from_config(net.config(), seed=5)
    assert again.config() == net.config()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))
    other = Generator.from_config(net.config(), seed=6)
    assert not torch.equal(next(net.parameters()), next(other.parameters()))


LAYER = [DeconvSpec(1, 4, 4)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Generator(0, LAYER), "latent must be a positive int, got 0"),
        (lambda: Generator(2, []), "layers must hold at least one DeconvSpec, got none"),
        (lambda: Generator(2, LAYER, output="sigmoid"), "output must be one of tanh, none, got 'sigmoid'"),
        (lambda: Generator(2, LAYER, activation="rellu"), r"activation must be one of .* \(did you mean 'relu'\?\)"),
        (lambda: Generator(2, LAYER, value_range=(1, 1)), r"value_range must be \(low, high\) with low < high"),
        (lambda: Generator(2, LAYER)(torch.zeros(3, 4)), r"z must have shape \(N, 2\), got \(3, 4\)"),
        (lambda: DeconvSpec(1, 2, 3), "kernel must be at least stride, 3, got 2"),
        (lambda: DeconvSpec(1, 0), "kernel must be a positive int, got 0"),
        (lambda: generator_layers(24, 1, latent_map=5), "size must be latent_map, 5, times a power of 2, got 24"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
