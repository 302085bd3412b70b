"""Samples made with a 16-bit gradient against samples made in float32: 30 steps of the published size, 1,024 samples.

The head's weight is set so that a step's gradient moves a pixel by as much as its noise does: an Xavier net of this
size moves it by 1/1000 of that, a trained one by less than all of it, and 16 bits would hide behind the noise.

A moment is the mean over samples of some g(x): a power of a pixel or of a channel's mean, a product of two pixels,
the energy, a digit classifier's logit; of the images, and of how far they came from their starts. Two rules:

same noise: of every moment, |mean g(16 bits) − mean g(float32)| <= 0.1 · (standard deviation of g over samples).
other noise: two-sample tests of independent samples (Kolmogorov and Smirnov's, and Welch's of the moments), corrected
    by Holm, reject none at 1 %. Seeds are fixed, so that a pass stays a pass; a new seed would fail once in 100 times.

Each rule is shown to catch a gradient that is a tenth too small.
"""

import functools

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mgebm_fast import ops
from mgebm_fast.gradient import energy_gradient
from mgebm_fast.nets import ConvSpec, EnergyNet
from mgebm_fast.sampling import Langevin

N, GROUP, SIZE = 1024, 128, 8
STEP, PIXEL = 0.3, 255.0
DYNAMICS = Langevin(30, step_size=STEP, reference_std=50.0, clamp=(0.0, PIXEL))
LAYERS = [ConvSpec(8, 5, 2), ConvSpec(12, 3), ConvSpec(16, 3)]
TOLERANCE, LEVEL = 0.1, 0.01
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def starts(seed):
    """Images of one colour, the finest grid's start in a cascade."""
    colours = ops.noise((N, 3, 1, 1), seed=seed, step=0, distribution="uniform", stream=1)
    return ops.upsample(PIXEL * colours, SIZE).to(DEVICE)


def noise_step(x, seed=99):
    return x + 5 * STEP * ops.noise(x.shape, seed=seed, step=0, stream=2, device=x.device)


@functools.cache
def net(norm, strength=1.0):
    """An Xavier net whose step moves a pixel by `strength` times what its noise does, in the root mean square."""
    made = EnergyNet(SIZE, 3, LAYERS, norm=norm, seed=3).to(DEVICE)
    gradient = energy_gradient(made, noise_step(starts(99)), precision="fp32")
    with torch.no_grad():
        made.head.weight.mul_(strength * STEP / (STEP**2 / 2 * gradient.square().mean().sqrt()))
    return made


@functools.cache
def run(norm, precision, seed, strength=1.0):
    """(samples, starts), in groups as `MultiGrid.sample` makes them."""
    x = starts(seed)
    energy = net(norm, strength)
    groups = [
        DYNAMICS(energy, x[i : i + GROUP], seed=seed, first_sample=i, precision=precision) for i in range(0, N, GROUP)
    ]
    return torch.cat(groups).cpu(), x.cpu()


@functools.cache
def classifier():
    digits = load_digits()
    fitted = LogisticRegression(max_iter=300).fit(digits.data * (PIXEL / 16), digits.target)
    return torch.tensor(fitted.coef_, dtype=torch.float32), torch.tensor(fitted.intercept_, dtype=torch.float32)


def numbers(samples, start, norm):
    """name -> (N, …): what moments and distributions are taken of."""
    weight, bias = classifier()
    with torch.no_grad():
        energy = torch.cat([net(norm)(group.to(DEVICE)).cpu() for group in samples.split(GROUP)])
    return {
        "pixel": samples.flatten(1),
        "movement": (samples - start).flatten(1),
        "channel mean": samples.mean((2, 3)),
        "channel movement": (samples - start).mean((2, 3)),
        "contrast": samples.std((2, 3)),
        "energy": energy[:, None],
        "logit": samples.mean(1).flatten(1) @ weight.T + bias,
    }


def moments(found, like):
    """name -> (N, …) of g(x), whose means are the moments; centred and scaled by `like`."""
    result, z = {}, {}
    for name, value in found.items():
        mean, std = like[name].mean(0), like[name].std(0)
        z[name] = (value - mean) / std
        powers = ("mean", "variance", "skewness", "kurtosis") if name not in ("energy", "logit") else ("mean",)
        result.update({f"{power} of {name}": z[name] ** k for k, power in enumerate(powers, start=1)})
    for name in ("pixel", "movement"):
        image = z[name].reshape(N, 3, SIZE, SIZE)
        result[f"{name}, pairs across"] = (image[..., 1:] * image[..., :-1]).flatten(1)
        result[f"{name}, pairs down"] = (image[:, :, 1:] * image[:, :, :-1]).flatten(1)
        result[f"{name}, pairs of channels"] = (image * image.roll(1, dims=1)).flatten(1)
    return result


def shifts(ours, reference):
    """Of each kind of moment the largest difference, in standard deviations."""
    a, b = moments(ours, reference), moments(reference, reference)
    return {name: float(((a[name].mean(0) - b[name].mean(0)) / b[name].std(0)).abs().max()) for name in a}


def smallest_p(ours, reference):
    """The smallest p of all two-sample tests times their number: what Holm first holds against the level."""
    p = []
    for name in ("energy", "logit", "channel mean", "channel movement", "contrast"):
        p += [stats.ks_2samp(a, b).pvalue for a, b in zip(ours[name].T, reference[name].T, strict=True)]
    # Movements are of the chain alone: the spread of the starts does not hide them.
    p += [stats.ks_2samp(a, b).pvalue for a, b in zip(ours["movement"].T, reference["movement"].T, strict=True)]
    a, b = moments(ours, reference), moments(reference, reference)
    for name in a:
        p += stats.ttest_ind(a[name].double(), b[name].double(), equal_var=False).pvalue.tolist()
    return min(p) * len(p)


def compare(norm, precision, seed, *, reference_seed, strength=1.0):
    return (
        numbers(*run(norm, precision, seed, strength), norm),
        numbers(*run(norm, "fp32", reference_seed), norm),
    )


BOTH = [("bf16", "batch"), ("fp16", "none")]


@pytest.mark.parametrize(("precision", "norm"), BOTH)
def test_every_moment_with_the_same_noise(norm, precision):
    found = shifts(*compare(norm, precision, 2, reference_seed=2))
    assert all(value <= TOLERANCE for value in found.values()), found
    assert any(found.values())  # 16 bits did run


@pytest.mark.parametrize(("precision", "norm"), BOTH)
def test_two_sample_tests_do_not_tell_them_apart(norm, precision):
    p = smallest_p(*compare(norm, precision, 2, reference_seed=1))
    assert p > LEVEL


def test_a_gradient_a_tenth_too_small_is_caught():
    found = shifts(*compare("none", "fp32", 2, reference_seed=2, strength=0.9))
    assert max(found.values()) > 2 * TOLERANCE, found
    assert smallest_p(*compare("none", "fp32", 2, reference_seed=1, strength=0.9)) < LEVEL
