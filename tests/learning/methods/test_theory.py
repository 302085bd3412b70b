"""The numerical claims of "A Theory of Generative ConvNet" (Xie, Lu, Zhu, Wu, ICML 2016), on the package's own code.

Where ReLUs switch, f changes its piece; all references here are float64 forward passes and their autograd.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from mgebm_fast import noise
from mgebm_fast.gradient import energy_gradient
from mgebm_fast.nets import ConvSpec, EnergyNet
from mgebm_fast.sampling import langevin_sample

SIGMA, DELTA, SIZE = 0.8, 0.3, 7


def net(seed=0, *, head="sum", gain=1.0):
    """Two layers with biases, so that pieces are not cones; float32, as chains are."""
    made = EnergyNet(SIZE, 2, [ConvSpec(5, 3, 2), ConvSpec(4, 3)], norm="none", activation="relu", head=head, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.mul_(gain)
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return made


def images(n=4, seed=1):
    return torch.randn(n, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def double(model):
    copy = EnergyNet.from_config(model.config())
    copy.load_state_dict(model.state_dict())
    return copy.double()


def pattern(model, x):
    """Which ReLUs are on, (N, all units) bool."""
    maps = []
    for layer in model.layers:
        x = layer(x)
        maps.append((x > 0).flatten(1))
    return torch.cat(maps, 1)


def top_down(model, x):
    """B = ∇f(x) by the deconvolutions of the paper, written out: each map's binary pattern times what comes down."""
    maps = [x]
    for layer in model.layers:
        maps.append(layer(maps[-1]))
    down = torch.ones_like(maps[-1]) if model.head is None else model.head.weight.reshape(maps[-1][:1].shape)
    for layer, below, above in zip(reversed(model.layers), maps[-2::-1], maps[:0:-1], strict=True):
        rest = [(b + 2 * layer.padding - layer.kernel) % layer.stride for b in below.shape[2:]]
        down = torch.nn.functional.conv_transpose2d(
            down * (above > 0), layer.weight, None, layer.stride, layer.padding, rest
        )
    return down


@pytest.mark.parametrize("head", ["sum", "linear"])
def test_a_piece_is_gaussian_and_the_gradient_is_the_top_down_pass(head):
    """(a): f = ⟨x, B⟩ + a while the pattern holds, so second differences vanish, and the potential is
    ‖x − σ²B‖²/2σ² + const."""
    model = double(net(head=head))
    x = images().double()
    b = top_down(model, x).detach()
    engine = -energy_gradient(net(head=head), x.float(), precision="fp32").double()
    torch.testing.assert_close(engine, b, rtol=2e-6, atol=2e-6)

    step = 1e-4 * images(seed=2).double()
    left, middle, right = x - step, x, x + step
    within = (pattern(model, left) == pattern(model, right)).all(1)
    assert within.sum() >= 3  # steps so small rarely meet a wall of the piece
    f = [model.score(where)[within] for where in (left, middle, right)]
    second = f[0] - 2 * f[1] + f[2]
    assert second.abs().max() < 1e-12
    torch.testing.assert_close(f[2] - f[0], 2 * (step * b).flatten(1).sum(1)[within], rtol=1e-8, atol=1e-12)

    def potential(y):
        return (y.square().flatten(1).sum(1) / (2 * SIGMA**2) - model.score(y))[within]

    def quadratic(y):
        return ((y - SIGMA**2 * b).square().flatten(1).sum(1) / (2 * SIGMA**2))[within]

    constants = torch.stack([potential(y) - quadratic(y) for y in (left, middle, right)])
    assert (constants - constants[1]).abs().max() < 1e-11


def test_second_differences_do_not_vanish_across_pieces():
    """What (a) says of one piece is not true of all of them: the test above would notice a smooth net."""
    model = double(net())
    x, step = images().double(), images(seed=2).double()
    changed = (pattern(model, x - step) != pattern(model, x + step)).any(1)
    second = model.score(x - step) - 2 * model.score(x) + model.score(x + step)
    assert changed.all() and second.abs().min() > 1e-3


def test_the_drift_is_a_reconstruction_error():
    """(b): a noise-free step moves x by −(δ²/2σ²)(x − σ²B(x))."""
    model, x = net(), images()
    moved = (
        langevin_sample(
            model, x, steps=1, step_size=DELTA, noise_scale=0.0, reference_std=SIGMA, precision="fp32"
        ).double()
        - x.double()
    )
    error = x.double() - SIGMA**2 * top_down(double(model), x.double())
    torch.testing.assert_close(moved, -(DELTA**2) / (2 * SIGMA**2) * error, rtol=1e-5, atol=1e-6)


def test_descent_ends_at_images_that_reconstruct_themselves():
    """(c): noise-free descent ends, where that is inside a piece, at x̂ = σ²B(x̂).

    With nonnegative weights above the first layer f is convex, and no wall between pieces attracts.
    """
    model, found = net(gain=1.3), 0
    with torch.no_grad():
        model.layers[1].weight.abs_()
    x = langevin_sample(
        model, 3 * images(16), steps=2000, step_size=DELTA, noise_scale=0.0, reference_std=SIGMA, precision="fp32"
    )
    further = langevin_sample(
        model, x, steps=200, step_size=DELTA, noise_scale=0.0, reference_std=SIGMA, precision="fp32"
    )
    reference = double(model)
    modes = []
    for i in range(len(x)):
        one, after = x[i : i + 1].double(), further[i : i + 1].double()
        if (one - after).abs().max() > 1e-6:  # its limit is on a wall between pieces
            continue
        found += 1
        modes.append(one)
        torch.testing.assert_close(one, SIGMA**2 * top_down(reference, one), rtol=1e-5, atol=1e-5)
    assert found >= 12
    assert max(float((a - b).abs().max()) for a in modes for b in modes) > 0.1  # more than one mode


def test_cd_1_descends_a_reconstruction_error():
    """(d): with the pattern held, E ∇θ[f(x) − f(x₁)] = −(δ²/4σ⁴) ∇θ ‖x − σ²B‖², x₁ one step of the chain from x.

    The expectation over the noise of f(x₁) = ⟨x₁, B⟩ + a on the piece is exact with ± pairs of the same draw: what is
    left of it, ⟨δε, ∇θB⟩, cancels. The chain's own step makes x₁, antithetically by its noise's sign.
    """
    model, x = net(), images(2)
    stream = noise.stream(noise.Purpose.USER)
    settings = dict(steps=1, step_size=DELTA, reference_std=SIGMA, precision="fp32", seed=3, stream=stream)
    noisy = langevin_sample(model, x, **settings).double()
    still = langevin_sample(model, x, noise_scale=0.0, **settings).double()
    after = [noisy, 2 * still - noisy]
    assert (noisy - still).std() == pytest.approx(DELTA, rel=0.15)

    reference = double(model)
    fixed = pattern(reference, x.double())
    parameters = {name: p.detach().clone().requires_grad_() for name, p in reference.named_parameters()}

    def piece(weights, y):
        """f with x's pattern in place of the ReLUs, affine in y."""
        held, maps = fixed, y
        for index, layer in enumerate(reference.layers):
            maps = torch.nn.functional.conv2d(
                maps, weights[f"layers.{index}.weight"], weights[f"layers.{index}.bias"], layer.stride, layer.padding
            )
            count = maps[0].numel()
            maps, held = maps * held[:, :count].reshape(maps.shape), held[:, count:]
        return maps.flatten(1).sum(1)

    def gradients(value):
        return torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)

    start = x.double()
    torch.testing.assert_close(piece(parameters, start), functional_call(reference, parameters, start).neg())
    cd = gradients(sum((piece(parameters, start) - piece(parameters, end)).sum() for end in after) / len(after))
    y = start.clone().requires_grad_()
    (b,) = torch.autograd.grad(piece(parameters, y).sum(), y, create_graph=True)
    error = (start - SIGMA**2 * b).square().sum()
    expected = [-(DELTA**2) / (4 * SIGMA**4) * g for g in gradients(error)]
    weights = 0
    for name, got, want in zip(parameters, cd, expected, strict=True):
        if name.endswith("bias"):  # ⟨x, B⟩ alone has the pattern's share of them: both sides are 0
            assert want.abs().max() == 0 and got.abs().max() < 1e-9
            continue
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
        weights += 1
    assert weights == 2
