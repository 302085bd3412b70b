from __future__ import annotations

import importlib.util
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgebm_fast import native, ops
from mgebm_fast.ops import backend as backends
from mgebm_fast.ops.langevin_step import launcher

OP = "langevin_step"
SHAPES = [(1,), (3, 5), (2, 3, 7), (2, 3, 5, 7), (3, 3, 8, 8), (1, 4, 16, 17), (2, 2, 3, 4, 5), (2, 3, 33, 32)]
FORM = dict(drift=0.045, noise_std=0.3)


def inputs(shape, *, dtype=torch.float32, device="cpu", seed=0):
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.uniform(0, 255, shape), dtype=torch.float32, device=device)
    grad = torch.tensor(rng.normal(0, 3, shape), dtype=torch.float32, device=device).to(dtype)
    return x, grad


def expected_step(x, grad, *, drift, noise_std, sigma=None, mean=0.0, clip=None, clamp=None, mask=None, **place):
    """The formula of DESIGN §1 in float64 numpy, with the reference's normals."""
    state, force = x.cpu().double().numpy(), grad.cpu().double().numpy()
    if clip is not None:
        force = np.clip(force, -clip, clip)
    if sigma is not None:
        force = force + (state - mean) / sigma**2
    eps = ops.noise(tuple(x.shape), backend="reference", **{"seed": 0, "step": 0, **place}).double().numpy()
    result = state - drift * force + noise_std * eps
    if clamp is not None:
        result = np.clip(result, *clamp)
    if mask is not None:
        result = np.where(np.broadcast_to(mask.cpu().numpy(), result.shape), result, state)
    return torch.tensor(result)


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matches_float64(backend, shape, dtype):
    name, device = backend
    x, grad = inputs(shape, dtype=dtype, device=device)
    place = dict(seed=3, step=5, first_sample=7, stream=65536)
    expected = expected_step(x, grad, sigma=50.0, mean=100.0, clip=2.0, clamp=(10.0, 240.0), **FORM, **place)
    got = ops.langevin_step_(
        x,
        grad,
        reference_std=50.0,
        reference_mean=100.0,
        grad_clamp=2.0,
        clamp=(10.0, 240.0),
        backend=name,
        **FORM,
        **place,
    )
    assert got is x
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=3e-5)


def test_coupled_form_is_half_the_square_and_tau_delta(backend):
    name, device = backend
    x, grad = inputs((2, 3, 8, 8), device=device)
    coupled = ops.langevin_step_(x.clone(), grad, step_size=0.3, noise_scale=0.5, seed=1, backend=name)
    expected = expected_step(x, grad, drift=0.3**2 / 2, noise_std=0.15, seed=1)
    torch.testing.assert_close(coupled.cpu().double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("layouts", [("nhwc", "nhwc"), ("nchw", "nhwc"), ("nhwc", "nchw")])
@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (2, 3, 5, 7), (3, 5, 9), (2, 3, 4, 5, 6), (1, 600, 2, 3), (1, 1500, 2)]
)
def test_layouts_agree_bit_for_bit(backend, layouts, shape):
    name, device = backend
    x, grad = inputs(shape, device=device)
    arguments = dict(step_size=0.3, reference_std=50.0, clamp=(0, 255), seed=2, step=4, backend=name)
    plain = ops.langevin_step_(x.clone(), grad, **arguments)
    other_x, other_grad = (channels_last(t) if layout == "nhwc" else t for t, layout in zip((x, grad), layouts))
    other = ops.langevin_step_(other_x.clone(), other_grad, **arguments)
    assert torch.equal(plain, other)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("mask_shape", [(2, 3, 6, 8), (1, 1, 6, 8), (6, 8), (2, 1, 1, 1), (1, 3, 1, 1), (8,), ()])
def test_mask_holds_bits(backend, mask_shape, layout):
    name, device = backend
    x, grad = inputs((2, 3, 6, 8), device=device)
    x[0, 0, 0, :3] = torch.tensor([float("nan"), 300.0, -5.0])
    if layout == "nhwc":
        x, grad = channels_last(x), channels_last(grad)
    mask = torch.tensor(np.random.default_rng(1).random(mask_shape) < 0.5, device=device).reshape(mask_shape)
    before = x.clone()
    free = ops.langevin_step_(x.clone(), grad, clamp=(0, 255), seed=1, backend=name, **FORM)
    held = ops.langevin_step_(x, grad, clamp=(0, 255), seed=1, mask=mask, backend=name, **FORM)
    # Bits are compared as integers: held NaNs and values outside the clamp must survive.
    expected = torch.where(mask, free, before)
    assert torch.equal(held.view(torch.int32), expected.view(torch.int32))


def test_nan_is_not_clamped_away(backend):
    name, device = backend
    x, grad = inputs((1, 1, 4, 4), device=device)
    grad[0, 0, 1, 2] = float("nan")
    x[0, 0, 3, 3] = float("nan")
    ops.langevin_step_(x, grad, clamp=(0, 255), grad_clamp=1.0, backend=name, **FORM)
    assert torch.isnan(x).nonzero().tolist() == [[0, 0, 1, 2], [0, 0, 3, 3]]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**32 - 8),
    step=st.integers(0, 2**32 - 1),
)
def test_zero_step_and_zero_noise_is_the_identity(shape, seed, first, step):
    x, grad = inputs(shape)
    before = x.clone()
    ops.langevin_step_(x, grad, drift=0.0, noise_std=0.0, clamp=(0, 255), seed=seed, first_sample=first, step=step)
    assert torch.equal(x, before)


@settings(max_examples=40, deadline=None)
@given(
    cut=st.integers(0, 6),
    seed=st.integers(0, 2**64 - 1),
    layout=st.sampled_from(["nchw", "nhwc"]),
    count=st.integers(1, 4),
)
def test_split_and_threads_do_not_matter(cut, seed, layout, count):
    x, grad = inputs((6, 3, 40, 41))
    if layout == "nhwc":
        x, grad = channels_last(x), channels_last(grad)
    arguments = dict(step_size=0.3, reference_std=50.0, clamp=(0, 255), seed=seed, step=9)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = ops.langevin_step_(x.clone(), grad, first_sample=10, **arguments)
        torch.set_num_threads(count)
        parts = x.clone()
        ops.langevin_step_(parts[:cut], grad[:cut], first_sample=10, **arguments)
        ops.langevin_step_(parts[cut:], grad[cut:], first_sample=10 + cut, **arguments)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole, parts)


def test_instruction_sets_agree_bit_for_bit(isa):
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x, grad = inputs(shape, dtype=dtype)
            arguments = dict(step_size=0.3, reference_std=50.0, clamp=(0, 255), grad_clamp=4.0, seed=5)
            got = ops.langevin_step_(x.clone(), grad, **arguments)
            native.module().set_isa("portable")
            expected = ops.langevin_step_(x.clone(), grad, **arguments)
            native.module().set_isa(isa)
            assert torch.equal(got, expected)


def test_every_half_is_read_exactly():
    native.module()
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        grad = bits.view(dtype)[None]
        x = torch.zeros(1, 2**16)
        ops.langevin_step_(x, grad, drift=1.0, noise_std=0.0)
        expected = -grad.float()
        assert torch.equal(x.isnan(), expected.isnan())
        assert torch.equal(x.nan_to_num(nan=1.0), expected.nan_to_num(nan=1.0))


def test_the_noise_is_the_noise_op(backend):
    name, device = backend
    place = dict(seed=8, step=2, first_sample=torch.tensor([5, 1, 9], device=device), stream=3)
    x = torch.zeros(3, 2, 5, device=device)
    ops.langevin_step_(x, x.clone(), drift=0.0, noise_std=1.0, backend=name, **place)
    assert torch.equal(x, ops.noise((3, 2, 5), device=device, backend=name, **place))


def test_tensor_counters_out_of_range_give_nan_or_an_error(backend):
    name, device = backend
    x, grad = inputs((2, 3, 4), device=device)
    step = torch.tensor(2**32, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match="step must stay"):
            ops.langevin_step_(x, grad, step=step, backend=name, **FORM)
    else:
        assert ops.langevin_step_(x, grad, step=step, backend=name, **FORM).isnan().all()


def test_empty_batch(backend):
    name, device = backend
    x = torch.empty(0, 3, 4, 4, device=device)
    assert ops.langevin_step_(x, x.clone(), backend=name, **FORM).shape == (0, 3, 4, 4)


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (X.double(), FORM, "x must be float32 .*torch.float64"),
        (X.int(), FORM, "x must be float32 .*torch.int32"),
        (X[:, :, ::2], FORM, "x must be contiguous or channels-last"),
        (X.clone().requires_grad_(), FORM, "x must not require grad"),
        (X, dict(), "step_size .* or drift and noise_std .* got neither"),
        (X, dict(step_size=0.1, drift=0.1, noise_std=0.1), "got both"),
        (X, dict(drift=0.1), "drift and noise_std go together"),
        (X, dict(step_size=0.1, noise_std=0.1), "noise_std goes with drift"),
        (X, dict(noise_scale=0.5, **FORM), "noise_scale goes with step_size"),
        (X, dict(step_size=-0.1), "step_size must be finite and > 0, got -0.1"),
        (X, dict(step_size=float("nan")), "step_size must be finite"),
        (X, dict(step_size="big"), "step_size must be a number"),
        (X, dict(reference_std=0.0, **FORM), "reference_std must be finite and > 0"),
        (X, dict(reference_std=1e-200, **FORM), "reference_std must be at least 1e-18"),
        (X, dict(grad_clamp=-1.0, **FORM), "grad_clamp must be"),
        (X, dict(clamp=(1, 0), **FORM), r"clamp must be \(low, high\) with low < high"),
        (X, dict(clamp=3, **FORM), "clamp must be a pair"),
        (
            X,
            dict(mask=torch.ones(5, dtype=torch.bool), **FORM),
            r"mask must broadcast to x's shape \(2, 3, 4, 4\), got \(5,\)",
        ),
        (X, dict(mask=torch.ones(4), **FORM), "mask must be a bool tensor"),
        (X, dict(grad=X[:1], **FORM), r"grad must have x's shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
        (X, dict(grad=X.double(), **FORM), "grad must be float32, float16 or bfloat16"),
    ],
)
def test_bad_arguments_are_named(x, arguments, message):
    before = x.detach().clone()
    with pytest.raises((ValueError, TypeError), match=message):
        ops.langevin_step_(x, **{"grad": torch.zeros(x.shape), **arguments})
    assert torch.equal(x.detach(), before)


def test_opcheck_and_compile():
    x, grad = inputs((2, 3, 4, 4))
    arguments = (
        x,
        grad,
        None,
        0.1,
        0.2,
        0.0,
        0.0,
        1.0,
        0.0,
        255.0,
        None,
        None,
        1,
        None,
        0,
        None,
        0,
        None,
        0,
        "reference",
    )
    torch.library.opcheck(torch.ops.mgebm_fast.langevin_step_.default, arguments)
    varying = (*arguments[:10], torch.rand(1, 2, 3), torch.rand(x.shape), *arguments[12:])
    torch.library.opcheck(torch.ops.mgebm_fast.langevin_step_.default, varying)

    def two_steps(x, grad):
        for k in range(2):
            ops.langevin_step_(x, grad, step_size=0.3, seed=1, step=k)
        return x + 0

    def a_value_a_sample(x, grad):
        sigma, mean = torch.linspace(0.1, 0.3, len(x)), torch.ones(x.shape[1:])
        return ops.langevin_step_(x, grad, step_size=sigma, reference_std=sigma, reference_mean=mean, seed=1) + 0

    for steps in (two_steps, a_value_a_sample):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Dynamo warns where it comes upon a cache
            compiled = torch.compile(steps, backend="aot_eager", fullgraph=True)(x.clone(), grad)
        assert torch.equal(compiled, steps(x.clone(), grad))


def test_a_trace_finds_triton_where_the_native_kernels_have_no_cuda_part(monkeypatch):
    monkeypatch.setattr(native, "why_no_cuda", lambda: "a CPU wheel")
    cuda = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(backends, "torch", SimpleNamespace(cuda=cuda, compiler=torch.compiler))
    device = torch.device("cuda")
    choose = torch.compile(lambda x: x + len(ops.choose(OP, "auto", device)), backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = choose(torch.zeros(()))
    assert int(found) == len("reference" if importlib.util.find_spec("triton") is None else "triton")


def test_an_update_of_what_a_graph_saved_is_noticed():
    x = torch.zeros(2, 3)
    weight = torch.ones(2, 3, requires_grad=True)
    loss = (weight * x).sum()
    ops.langevin_step_(x, torch.zeros(2, 3), **FORM)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fake_tensors_and_modes_go_through_the_dispatcher():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listener(TorchDispatchMode):
        heard: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.heard.append(str(func))
            return func(*args, **(kwargs or {}))

    x, grad = inputs((2, 3))
    with Listener():
        ops.langevin_step_(x, grad, **FORM)
        ops.noise((2, 3), seed=0, step=0)
    assert {"mgebm_fast.langevin_step_.default", "mgebm_fast.noise.default"} <= set(Listener.heard)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(2, 3))
        assert ops.langevin_step_(fake, fake.clone(), backend="reference", **FORM) is fake


def test_flushed_subnormals_change_nothing(threads):
    x = torch.full((2, 3, 128, 128), 3e-39)
    grad = torch.full_like(x, 1e-39)

    def run():
        return ops.langevin_step_(x.clone(), grad, drift=0.5, noise_std=1.2e-38, seed=1)

    threads(1)
    expected = run()
    assert torch.set_flush_denormal(True)
    try:
        for count in (1, 2):
            threads(count)
            assert torch.equal(run(), expected)
    finally:
        torch.set_flush_denormal(False)


def test_steps_without_a_seed_never_share_their_noise():
    """They draw from torch's generator, which torch.manual_seed governs."""
    x, grad = inputs((2, 3))
    torch.manual_seed(0)
    first, second = (ops.langevin_step_(x.clone(), grad, step_size=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, ops.langevin_step_(x.clone(), grad, step_size=0.5))


@pytest.mark.skipif(not native.available(), reason="the compiled module is not built")
def test_what_a_launcher_has_the_address_of_lives():
    x, mask = torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)
    held = weakref.ref(x), weakref.ref(mask)
    launch = launcher(x, mask, "native")
    del x, mask
    assert all(tensor() is not None for tensor in held), launch
