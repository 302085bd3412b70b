from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mgebm_fast import ops
from mgebm_fast.ops import counters, edge_step
from mgebm_fast.ops.update import update

OP = "edge_step"
CASES = [  # x, kernel, stride, padding, K
    ((3, 3, 8, 8), 5, 2, 2, 16),
    ((2, 3, 9, 7), 3, 1, 1, 16),
    ((2, 1, 6, 5), 4, 2, 0, 24),
    ((5, 3, 4, 4), 5, 2, 2, 16),
]
FORM = dict(drift=0.045, noise_std=0.3)


def channels_last(t):
    return t.to(memory_format=torch.channels_last)


def case(shape, kernel, stride, padding, out_channels, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = 255 * torch.rand(shape, generator=generator)
    weight = torch.randn(out_channels, shape[1], kernel, kernel, generator=generator).to(dtype)
    size = functional.conv2d(x, weight.float(), None, stride, padding).shape
    upstream = torch.randn(size, generator=generator).to(dtype)
    return x.to(device), upstream.to(device), ops.edge_weights(weight.to(device), stride=stride, padding=padding)


def by_autograd(x, upstream, weights):
    """The data gradient in float64, on the CPU."""
    x = x.cpu().double().requires_grad_()
    z = functional.conv2d(x, weights.weight.cpu().double(), None, weights.stride, weights.padding, weights.dilation)
    return torch.autograd.grad(z, x, upstream.cpu().double())[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape, kernel, stride, padding, out_channels", CASES)
def test_is_langevin_step_with_the_data_gradient(backend, shape, kernel, stride, padding, out_channels, layout, dtype):
    name, device = backend
    x, upstream, weights = case(shape, kernel, stride, padding, out_channels, dtype, device)
    settings = dict(reference_std=50.0, clamp=(0, 255), grad_clamp=4.0, seed=3, step=5, first_sample=7, **FORM)
    gradient = (by_autograd(x, upstream, weights) * 0.25).float()
    want = ops.langevin_step_(x.cpu().clone(), gradient, backend="reference", **settings)
    if layout == "nhwc":
        x, upstream = channels_last(x), channels_last(upstream)
    got = ops.edge_step_(x, upstream, weights, unscale=0.25, backend=name, **settings)
    assert got is x
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=6e-5)


def test_mask_and_device_numbers(backend):
    name, device = backend
    x, upstream, weights = case(*CASES[0], device=device)
    mask = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(device) < 0.5
    before, plain = (
        x.clone(),
        ops.edge_step_(x.clone(), upstream, weights, unscale=0.5, step=9, seed=1, backend=name, **FORM),
    )
    held = dict(unscale=torch.tensor(0.5, device=device), step=torch.tensor(9, device=device), mask=mask)
    got = ops.edge_step_(x, upstream, weights, seed=1, backend=name, **held, **FORM)
    assert torch.equal(got, torch.where(mask, plain, before))


def test_numbers_from_memory(backend):
    """What a captured chain reads."""
    name, device = backend
    x, upstream, weights = case(*CASES[0], device=device)
    place = counters.check("f", 3, 192, x.device, seed=3, first_sample=7, step=6, stream=0)
    law = update(reference_std=50.0, grad_clamp=4.0, **FORM)
    got, want = x.clone(), x.clone()
    for state, numbers in ((got, law.in_memory(x.device)), (want, law)):
        edge_step.launch(state, upstream, weights, None, 0.5, None, None, numbers, place, name)
    assert not torch.equal(got, x)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)  # the reference's numbers are float64


def test_the_first_bad_step_is_kept(backend):
    name, device = backend
    x, upstream, weights = case(*CASES[0], device=device)
    bad = torch.tensor(ops.NO_BAD_STEP, device=device)
    arguments = dict(bad_step=bad, clamp=(0, 255), grad_clamp=1.0, backend=name, **FORM)
    ops.edge_step_(x.clone(), upstream, weights, step=2, **arguments)
    assert bad.item() == ops.NO_BAD_STEP
    upstream[2, 3, 1, 1] = torch.inf
    for step, kept in ((6, 6), (7, 6), (torch.tensor(4, device=device), 4)):
        ops.edge_step_(x.clone(), upstream, weights, step=step, **arguments)
        assert bad.item() == kept


def test_new_weights_in_place(backend):
    name, device = backend
    x, upstream, weights = case(*CASES[0], device=device)
    other = torch.randn(weights.weight.shape, generator=torch.Generator().manual_seed(9)).to(device)
    pointer = weights.packed.data_ptr()
    weights.update_(other)
    assert weights.packed.data_ptr() == pointer
    fresh = ops.edge_weights(other, stride=2, padding=2)
    got, want = (ops.edge_step_(x.clone(), upstream, w, seed=1, backend=name, **FORM) for w in (weights, fresh))
    assert torch.equal(got, want)


def test_empty_batch(backend):
    name, device = backend
    x, upstream, weights = case(*CASES[0], device=device)
    assert ops.edge_step_(x[:0], upstream[:0], weights, backend=name, **FORM).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight=torch.zeros(16, 3, 5)), r"weight must be \(K, C, kh, kw\), got \(16, 3, 5\)"),
        (dict(stride=3), "stride must be 1 or 2, got 3"),
        (dict(padding=-1), "padding must be >= 0"),
        (dict(weight=torch.zeros(16, 17, 3, 3)), "channels must be at most 64, got 128"),
        (dict(dtype=torch.float64), "dtype must be float32, float16 or bfloat16"),
        (dict(stride=(1, 2, 1)), "stride must be an int or two"),
    ],
)
def test_bad_weights_are_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ops.edge_weights(**{"weight": torch.zeros(16, 3, 5, 5), "stride": 2, **arguments})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, u: dict(x=x.double()), "edge_step_: x must be float32"),
        (lambda x, u: dict(x=x[:, :2].contiguous()), "x must have the 3 channels of the weights, got 2"),
        (lambda x, u: dict(upstream=u[:1]), r"upstream must be \(3, 16, 4, 4\)"),
        (lambda x, u: dict(upstream=u.half()), "upstream must be torch.float32, as the weights are"),
        (lambda x, u: dict(upstream=u.transpose(2, 3)), "upstream must be contiguous or channels-last"),
        (lambda x, u: dict(unscale=float("inf")), "unscale must be finite, got inf"),
        (lambda x, u: dict(unscale=torch.ones(2)), "unscale must be a number or a 0-dim float32 tensor"),
        (lambda x, u: dict(bad_step=torch.zeros(1)), "bad_step must hold one int64"),
        (lambda x, u: dict(drift=-1.0), "drift must be finite and >= 0"),
        (lambda x, u: dict(step=-1), "step must stay in"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x, upstream, weights = case(*CASES[0])
    before = x.clone()
    with pytest.raises((ValueError, TypeError), match=message):
        ops.edge_step_(**{"x": x, "upstream": upstream, "weights": weights, **FORM, **change(x, upstream)})
    assert torch.equal(x, before)


def test_opcheck():
    x, upstream, w = case(*CASES[0])
    bad = torch.tensor(ops.NO_BAD_STEP)
    pairs = (list(w.stride), list(w.padding), list(w.dilation), list(w.first), list(w.taps))
    numbers = (0.1, 0.2, 0.0, 0.0, 1.0, 0.0, 255.0)
    arguments = (x, bad, upstream, w.weight, w.packed, w.places, *pairs, None, 0.5, None, *numbers, 1, None, 0, None, 3,
                 None, 0, "reference")  # fmt: skip
    torch.library.opcheck(torch.ops.mgebm_fast.edge_step_.default, arguments)
