"""The law of the chain against closed forms: x_K = m + a^K (x_0 − m) + (1 − a^K) v w + Gaussian noise.

Each figure is a z-score of a sum of independent Gaussian terms whose law under a correct chain is known, tested at
|z| < 5: a correct chain fails one with probability 6e-7, the whole file (about 100 figures a backend) with 6e-5. In
Triton's interpreter, where a few hundred values make the tails of the squares heavier, with less than 1e-3. Seeds are
fixed, so that a pass stays a pass.
"""

import math

import pytest
import torch

from mgebm_fast import ops
from mgebm_fast.nets import ConvSpec, EnergyNet
from mgebm_fast.sampling import langevin_sample

LIMIT = 5.0


def decay(drift, noise_std, precision, steps):
    """(a^K, variance of the noise part) of x ← x − drift·precision·(x − m) + noise_std·ε after K steps."""
    a = 1.0 - drift * precision
    return a**steps, noise_std**2 * (1.0 - a ** (2 * steps)) / (1.0 - a**2)


def start(mean, spread, shape):
    return mean + spread * torch.randn(shape, generator=torch.Generator().manual_seed(11), dtype=torch.float32)


def check(residual, variance, regressors):
    """`residual` holds i.i.d. N(0, variance) entries (N, ...), independent of the fixed `regressors`."""
    z = residual.double().cpu() / math.sqrt(variance)
    n = z.numel()
    figures = {
        "mean": z.mean() * math.sqrt(n),
        "variance": (z.square().mean() - 1.0) * math.sqrt(n / 2.0),
        # Sums over the batch: far too large where samples share their noise.
        "between samples": (z.sum(0).square() / len(z) - 1.0).sum() / math.sqrt(2.0 * z[0].numel()),
        # Neighbours in memory: the four normals of one Philox call.
        "between pixels": (z.flatten(1)[:, :-1] * z.flatten(1)[:, 1:]).sum() / math.sqrt(n - len(z)),
    }
    for name, fixed in regressors.items():
        fixed = fixed.double().cpu().expand(z.shape)
        figures[name] = (z * fixed).sum() / fixed.square().sum().sqrt()
    failed = {name: float(value) for name, value in figures.items() if not abs(value) < LIMIT}
    assert not failed, failed


@pytest.mark.parametrize(
    "sigma, delta, tau, steps",
    [
        (1.0, 0.5, 1.0, 5),  # the transient
        (1.0, 0.5, 1.0, 40),  # stationary to 3e-5: variance σ²/(1 − δ²/4σ²) = 1.0667
        (1.0, 0.5, 0.3, 10),  # a smaller noise scale
        (50.0, 0.3, 1.0, 30),  # the paper's figures, whose relaxation takes 55,600 steps
        (20.0, 9.0, 1.0, 6),  # large steps on the scale of pixels
    ],
)
@pytest.mark.parametrize("target", ["energy", "reference", "both"])
def test_transient_mean_and_variance_on_a_gaussian(place, shape, sigma, delta, tau, steps, target):
    device, backend = place
    mean = 2.0 * sigma
    # "both": two halves of the precision, one of them in the energy.
    share = {"energy": 1.0, "reference": 0.0, "both": 0.5}[target]
    reference_std = None if share == 1.0 else sigma / math.sqrt(1.0 - share)

    def energy(x):
        return share * ((x - mean) / sigma).square().flatten(1).sum(1) / 2.0 + 0.0 * x.flatten(1).sum(1)

    x0 = start(mean - 3.0 * sigma, sigma, shape).to(device)
    x = langevin_sample(
        energy, x0, steps=steps, step_size=delta, noise_scale=tau, reference_std=reference_std,
        reference_mean=mean if reference_std else 0.0, seed=17, backend=backend,
    )  # fmt: skip
    shrunk, variance = decay(delta**2 / 2.0, tau * delta, 1.0 / sigma**2, steps)
    away = (x0 - mean).double()
    check(x.double() - mean - shrunk * away, variance, {"start": away})
    if steps == 40:
        assert variance == pytest.approx(sigma**2 / (1.0 - delta**2 / (4.0 * sigma**2)), rel=1e-4)


def test_transient_mean_and_variance_of_the_decoupled_form(place, shape):
    device, backend = place
    x0 = start(0.0, 1.0, shape).to(device)

    def energy(x):
        return (x - 1.0).square().flatten(1).sum(1)  # precision 2

    x = langevin_sample(energy, x0, steps=7, drift=0.05, noise_std=0.2, seed=23, backend=backend)
    shrunk, variance = decay(0.05, 0.2, 2.0, 7)
    away = (x0 - 1.0).double()
    check(x.double() - 1.0 - shrunk * away, variance, {"start": away})


@pytest.mark.parametrize("delta, sigma", [(0.5, 1.0), (0.4, 3.0)])
def test_law_through_an_affine_conv_net(place, shape, delta, sigma):
    device, backend = place
    layers = [ConvSpec(8, 5, 2), ConvSpec(12, 3), ConvSpec(6, 3, 2)]
    net = EnergyNet(8, 3, layers, norm="none", activation="leaky_relu", negative_slope=1.0, seed=3)
    with torch.no_grad():
        net.head.weight.mul_(20.0)
    probe = EnergyNet.from_config(net.config()).double()
    probe.load_state_dict(net.state_dict())
    units = torch.eye(3 * 8 * 8, dtype=torch.float64).reshape(-1, 3, 8, 8)
    with torch.no_grad():
        w = (probe.score(units) - probe.score(torch.zeros_like(units[:1]))).reshape(1, 3, 8, 8)
    assert w.abs().mean() > 0.1

    steps = 12
    x0 = start(0.0, sigma, shape).to(device)
    x = langevin_sample(
        net.to(device), x0, steps=steps, step_size=delta, reference_std=sigma, reference_mean=0.5, seed=29,
        backend=backend,
    )  # fmt: skip
    shrunk, variance = decay(delta**2 / 2.0, delta, 1.0 / sigma**2, steps)
    away = (x0 - 0.5).double()
    pulled = (1.0 - shrunk) * sigma**2 * w.to(device)
    check(x.double() - 0.5 - shrunk * away - pulled, variance, {"start": away, "score": w})


def test_noise_is_independent_between_steps_grids_and_seeds(place, shape):
    device, backend = place
    x0 = torch.zeros(shape, device=device)

    def flat(x):
        return 0.0 * x.flatten(1).sum(1)

    def chain(steps=1, **where):
        return langevin_sample(flat, x0, steps=steps, drift=1.0, noise_std=1.0, backend=backend, **where)

    first = chain(seed=1)
    n = x0.numel()
    # A sum of two steps has twice the variance of one; a repeated counter would make it four times.
    check(chain(steps=2, seed=1), 2.0, {})
    for other in (
        chain(seed=2),
        chain(seed=1, first_step=1),
        chain(seed=1, stream=1),
        chain(seed=1, first_sample=1000),
    ):
        assert abs(float((first * other).sum())) < LIMIT * math.sqrt(n)


def test_noise_of_a_step_is_the_op_s(place, shape):
    device, backend = place
    x = langevin_sample(
        lambda x: 0.0 * x.flatten(1).sum(1), torch.zeros(shape, device=device), steps=1, drift=1.0, noise_std=1.0,
        seed=3, first_step=9, first_sample=5, stream=7, backend=backend,
    )  # fmt: skip
    noise = ops.noise(shape, seed=3, step=9, first_sample=5, stream=7, backend="reference")
    torch.testing.assert_close(x.cpu(), noise, rtol=0, atol=1e-6)
