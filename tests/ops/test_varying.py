"""Numbers of the update that differ by step, sample and element: every backend against the formula, and by parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mgebm_fast import ops
from mgebm_fast.gradient.stack import read
from mgebm_fast.ops import dense_chain_, dense_net_of
from mgebm_fast.ops.conv_chain import conv_chain, has_bfloat
from mgebm_fast.ops.update import update

OP = "langevin_step"
PLACE = dict(seed=3, first_sample=7, stream=65536)


def inputs(shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=random) for _ in range(3)]


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def column(values, x):
    return values.double().reshape(-1, *(1,) * (x.dim() - 1))


@pytest.mark.parametrize("shape", [(3, 5), (6, 3, 4, 4), (5, 2, 3, 5), (2, 3, 33, 32)])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "grad channels-last"])
@pytest.mark.parametrize("what", ["sample", "mean", "means", "all"])
def test_matches_float64(backend, shape, layout, what):
    name, device = backend
    x, grad, mean = inputs(shape)
    count = shape[0]
    sizes = torch.linspace(0.2, 0.9, count) if what in ("sample", "all") else torch.full((count,), 0.4)
    scales = torch.linspace(0.0, 1.0, count) if what in ("sample", "all") else torch.full((count,), 0.7)
    sigma = torch.linspace(0.5, 2.0, count) if what in ("sample", "all") else torch.full((count,), 0.8)
    mean = {"sample": torch.zeros(()), "mean": mean[0]}.get(what, mean)
    eps = ops.noise(shape, backend="reference", step=5, **PLACE).double()
    drift = column(sizes, x) ** 2 / 2
    force = grad.double().clamp(-0.6, 0.6) + (x.double() - mean.double()) / column(sigma, x) ** 2
    expected = x.double() - drift * force + column(scales, x) * column(sizes, x) * eps
    if layout != "contiguous" and len(shape) > 2:
        grad = channels_last(grad)
        x = channels_last(x) if layout == "channels-last" else x
    one = what not in ("sample", "all")
    numbers = [float(v[0]) if one else v[None].to(device) for v in (sizes, scales, sigma)]
    got = ops.langevin_step_(
        x.to(device), grad.to(device), step_size=numbers[0], noise_scale=numbers[1], reference_std=numbers[2],
        reference_mean=float(mean) if what == "sample" else mean.to(device), grad_clamp=0.6, step=5, backend=name,
        **PLACE,
    )  # fmt: skip
    torch.testing.assert_close(got.double().cpu(), expected, rtol=0, atol=3e-6)


def test_a_sample_with_numbers_of_its_own_is_that_sample_alone(backend):
    """Bit for bit, but for the reference; masked and clamped as well."""
    name, device = backend
    x, grad, mean = (t.to(device) for t in inputs((6, 3, 5, 4)))
    mask = (x > 0.3)[:, :1]
    drift, noise = torch.linspace(0.1, 1, 6).double(), torch.linspace(0.01, 0.5, 6).double()
    common = dict(reference_std=0.7, clamp=(0.0, 1.0), step=2, seed=3, backend=name)
    got = ops.langevin_step_(
        x.clone(), grad, drift=drift.to(device), noise_std=noise.to(device), reference_mean=mean, mask=mask, **common
    )
    for i in range(6):
        own = ops.langevin_step_(
            x[i : i + 1].clone(), grad[i : i + 1], drift=float(drift[i]), noise_std=float(noise[i]), first_sample=i,
            reference_mean=mean[i], mask=mask[i : i + 1], **common,
        )  # fmt: skip
        rounding = 2e-7 if name == "reference" else 0  # it takes numbers in float64, of a table in float32
        torch.testing.assert_close(got[i : i + 1], own, rtol=0, atol=rounding)


def test_the_conv_chain_s_backends_agree():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU(),
                               nn.Flatten(), nn.Linear(8 * 9, 1), nn.Flatten(0))  # fmt: skip
    x, _, mean = inputs((5, 3, 6, 6))
    stack = read(net, x)
    law = dict(
        steps=3, step_size=[0.3, 0.2, 0.1], noise_scale=torch.linspace(0, 1, 5), reference_std=torch.rand(3, 5) + 0.5,
        reference_mean=mean, seed=1,
    )  # fmt: skip
    native, reference = (
        conv_chain(stack.stages, stack.head, x, backend=backend, **law) for backend in ("native", "reference")
    )
    torch.testing.assert_close(native, reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bfloat", [False, True], ids=["fp32", "bf16"])
def test_samples_of_a_conv_chain_have_their_own_numbers_whatever_their_place_and_the_threads(bfloat, threads):
    """More samples than one thread takes at a time, against chains of one sample each."""
    if bfloat and not has_bfloat():
        pytest.skip("no bfloat16 here")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                        nn.Linear(16 * 4, 1), nn.Flatten(0))  # fmt: skip
    (x, _, mean), sizes, stds = inputs((50, 2, 4, 4)), torch.rand(1, 50) + 0.1, torch.rand(1, 50) + 0.5
    stack = read(net, x)

    def chain(first, last):
        return conv_chain(
            stack.stages, stack.head, x[first:last], steps=2, step_size=sizes[:, first:last],
            reference_std=stds[:, first:last], reference_mean=mean[first:last], seed=1, first_sample=first,
            bfloat=bfloat, backend="native",
        )  # fmt: skip

    threads(1)
    alone = torch.cat([chain(i, i + 1) for i in range(50)])
    for count in (1, 2, 3, 5):
        threads(count)
        assert torch.equal(chain(0, 50), alone)


X = torch.zeros(4, 3, 2, 2)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(step_size=[0.1, 0.2]), r"step_size must hold one value a step, 3, or be a Schedule, got 2"),
        (dict(step_size=[0.1, -0.2, 0.1]), r"step_size must be finite and at least 1e-18 in every entry, got values"),
        (dict(step_size=[0.1, "a", 0.1]), "step_size must be a number, or a list of numbers, one a step"),
        (dict(step_size=torch.ones(5)), r"step_size must be a number, 3 values \(one a step\), 4 \(one a sample\)"),
        (dict(step_size=torch.ones(4, 3)), r"of shape \(3, 4\), got shape \(4, 3\)"),
        (dict(step_size=torch.tensor([0.1, float("nan"), 0.1])), "step_size must be finite"),
        (dict(step_size=torch.ones(3, dtype=torch.bool)), "step_size must hold real numbers, got torch.bool"),
        (dict(step_size=np.array(["a"])), "step_size must hold real numbers"),
        (dict(step_size=torch.ones(0)), "step_size must hold a value"),
        (dict(drift=[0.1] * 3), "drift and noise_std go together"),
        (dict(drift=[0.1] * 3, step_size=0.1), "got both"),
        (dict(step_size=0.1, reference_std=[1.0, 0.0, 1.0]), "reference_std must be finite and at least 1e-18"),
        (dict(step_size=0.1, reference_mean=X), "reference_mean must be given with reference_std, got a tensor alone"),
        (dict(step_size=0.1, reference_std=1, reference_mean=X[:3]), r"reference_mean must broadcast to x's shape"),
        (dict(step_size=0.1, reference_std=1, reference_mean=X / 0), "reference_mean must be finite"),
        (dict(step_size=0.1, grad_clamp=[1.0, 2.0]), "grad_clamp must be a number"),
    ],
)
def test_bad_numbers_are_named(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        update(x=X, steps=3, where="f", **given)


def test_a_length_that_is_both_steps_and_samples_is_refused():
    with pytest.raises(ValueError, match=r"as there are 4 steps and as many samples: a list or shape \(4, 1\)"):
        update(x=X, steps=4, step_size=torch.ones(4))
    values = [0.1, 0.2, 0.3, 0.4]
    schedule = update(x=X, steps=4, drift=values, noise_std=0.0).table
    assert schedule.shape == (4, 1, 3) and torch.equal(schedule[:, 0, 0], torch.tensor(values))
    by_sample = update(x=X, steps=4, drift=torch.tensor([values]), noise_std=0.0).table
    assert by_sample.shape == (1, 4, 3) and torch.equal(by_sample[0, :, 0], torch.tensor(values))


def test_ops_of_fixed_numbers_refuse_what_varies():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))
    with pytest.raises(TypeError, match="step_size must be a number, got"):
        dense_chain_(X.clone(), dense_net_of(read(net, X)), steps=3, step_size=[0.1, 0.2, 0.3])
