"""conv_learn: energies and weight gradients against float64 autograd, and what they do not depend on."""

from __future__ import annotations

import dataclasses
import importlib
import random
import signal
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.stacks import images, make

from mgebm_fast import native
from mgebm_fast.ops.conv_learn import Learnt, conv_learn, conv_learn_reference

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")
ACTIVATIONS = [("leaky_relu", 0.2), ("leaky_relu", -0.5), ("relu", 0.0), ("silu", 1.0), ("elu", 1.0), ("none", 1.0)]


def tensors(found: Learnt) -> dict[str, torch.Tensor]:
    """All that was found, by name."""
    named = {"energies": found.energies, "head": found.head, "bias": found.bias}
    for index, stage in enumerate(found.stages):
        for part in filter(None, (stage, stage.norm)):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                if isinstance(value, torch.Tensor):
                    named[f"{index} {type(part).__name__} {field.name}"] = value
    return named


def upstream(samples: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sign = torch.ones(samples)
    sign[samples // 2 :] = -1
    return sign / samples, 0.02 * torch.rand(samples, generator=generator) / samples


def random_stack(draw: random.Random):
    dims = draw.choice([1, 2, 2, 3])
    size = tuple(draw.randint(3, {1: 24, 2: 10, 3: 6}[dims]) for _ in range(dims))
    channels, smallest, layers = draw.choice([1, 2, 3, 17]), min(size), []
    dilation = draw.choice([1, 1, 2])
    for _ in range(draw.randint(1, 4)):
        kernel = draw.randint(1, max(1, min(5, (smallest - 1) // dilation + 1)))
        stride, padding = draw.choice([1, 1, 2, 3]), draw.randint(0, kernel // 2 + 1)
        layers.append((draw.choice([5, 16, 33, 40]), kernel, stride, padding))
        smallest = (smallest + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    activation, slope = draw.choice(ACTIVATIONS)
    norm = draw.random() < 0.5
    seed = draw.randint(0, 10**6)
    stages, head = make(
        size, channels, layers, norm=norm, activation=activation, slope=slope, dilation=dilation, seed=seed
    )
    return stages, head, channels, size


@pytest.mark.parametrize("seed", range(20))
def test_random_stacks_are_as_near_to_float64_as_torch_is(seed, isa):
    draw = random.Random(seed)
    stages, head, channels, size = random_stack(draw)
    # Of two or three values statistics leave almost nothing but rounding errors.
    few = [1, 2, 3] if not stages[0].norm else [2, 3] if stages[-1].out_size > (2,) else [32]
    samples = draw.choice([*few, 64])
    split = samples // 2 if stages[0].norm and samples > 3 else samples
    x = images(samples, channels, size)
    arguments = (stages, head, x, *upstream(samples), 0.3, split)
    expected = tensors(conv_learn_reference(*arguments))
    by_torch = tensors(conv_learn_reference(*arguments, torch.float32))
    found = tensors(conv_learn(*arguments[:5], bias=0.3, split=split))
    assert found.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        # Torch may happen to be exact; and what cancels to nothing is rounding errors of larger numbers.
        bound = 2 * (by_torch[name] - value).norm() + 4e-6 * value.norm() + 1e-7 * largest
        assert (found[name] - value).norm() <= bound, name


module = importlib.import_module("mgebm_fast.ops.conv_learn")


@pytest.fixture
def multiplies_bfloat(monkeypatch):
    """A CPU that is said to multiply bfloat16: others compute the same in float32 from rounded operands, slowly."""
    monkeypatch.setattr(module, "has_bfloat", lambda: True)


def bfloat(t):
    return t.bfloat16().to(t.dtype)


class Rounded(torch.autograd.Function):
    """A convolution whose gradients are products of bfloat16 operands: of the input, and if `turned` of the weight."""

    @staticmethod
    def forward(ctx, x, weight, convolve, turned):
        ctx.save_for_backward(x, weight)
        ctx.convolve, ctx.turned = convolve, turned
        return convolve(x, weight)

    @staticmethod
    def backward(ctx, grad):
        def gradient(operands, wanted, grad):
            with torch.enable_grad():
                operands = [t.detach().requires_grad_() for t in operands]
                return torch.autograd.grad(ctx.convolve(*operands), operands[wanted], grad)[0]

        x, weight = ctx.saved_tensors
        of_x = gradient((x, bfloat(weight)), 0, bfloat(grad)) if ctx.needs_input_grad[0] else None
        if ctx.turned:
            return of_x, gradient((bfloat(x), weight), 1, bfloat(grad)), None, None
        return of_x, gradient((x, weight), 1, grad), None, None


def rounded_reference(turned, *arguments):
    """conv_learn_reference with operands rounded where the engine rounds them: layers of eight channels or more."""

    def patched(convolve):
        def rounded(h, weight, bias, *geometry):
            if not h.requires_grad or min(weight.shape[:2]) < 8:
                return convolve(h, weight, bias, *geometry)
            z = Rounded.apply(h, weight, lambda a, b: convolve(a, b, None, *geometry), turned)
            return z if bias is None else z + bias.reshape(-1, *[1] * (z.dim() - 2))

        return rounded

    names = ("conv1d", "conv2d", "conv3d")
    with mock.patch.multiple(F, **{name: patched(getattr(F, name)) for name in names}):
        return conv_learn_reference(*arguments)


@pytest.mark.parametrize("splits", [False, True], ids=["float32 forward", "split forward"])
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512bf16", "amx"])
@pytest.mark.parametrize("seed", [1, 4, 11, 16, 17, 38, 67, 71])  # stacks of later layers with eight channels or more
def test_gradients_from_bfloat16_operands(seed, isa, splits, multiplies_bfloat, monkeypatch):
    compiled, before = native.module(), native.isa()
    if not compiled.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setattr(module, "splits", lambda: splits)
    try:
        draw = random.Random(seed)
        stages, head, channels, size = random_stack(draw)
        samples = draw.choice([6, 16, 19, 37] if not stages[0].norm else [37, 64])
        split = samples // 2 if stages[0].norm else samples
        arguments = (stages, head, images(samples, channels, size), *upstream(samples), 0.3, split)
        exact = tensors(conv_learn_reference(*arguments))
        unit = 32 if isa == "amx" else 16  # with half of a tile empty weights learn in float32
        rounded = tensors(rounded_reference(2 * samples >= -(-samples // unit) * unit, *arguments))
        found = tensors(conv_learn(*arguments[:5], bias=0.3, split=split, bfloat=True))
        by_float32 = tensors(conv_learn(*arguments[:5], bias=0.3, split=split))
        largest = max(value.norm() for value in exact.values())
        for name, value in rounded.items():
            # A float32 that falls to the other side of a bfloat16's middle moves by a whole unit: a few do, and of the
            # split forward's, whose errors are larger, some more.
            bound = (0.5 if splits else 0.1) * (value - exact[name]).norm()
            bound += (3e-5 if splits else 1e-5) * value.norm() + 1e-7 * largest
            assert (found[name] - value).norm() <= bound + 2 * (by_float32[name] - exact[name]).norm(), name
            assert (found[name] - exact[name]).norm() <= 0.03 * exact[name].norm() + 1e-5 * largest, name
        of_first = "0 StageGradients weight"
        assert (found[of_first] - by_float32[of_first]).norm() > 1e-4 * exact[of_first].norm()
        # Of three products of bfloat16 numbers, operands have 17 bits: an error of 2^-17 each, and of rounding.
        if splits:
            assert (found["energies"] - exact["energies"]).norm() <= 3e-5 * exact["energies"].norm()
        else:
            assert torch.equal(found["energies"], by_float32["energies"])
    finally:
        compiled.set_isa(before)


@pytest.mark.parametrize("bfloat", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch"])
def test_no_bit_depends_on_threads(norm, bfloat, isa, threads, multiplies_bfloat):
    stages, head = make((9, 9), 3, [(24, 5, 2, 2), (40, 3, 1, 1), (16, 3, 1, 1)], norm=norm)
    x = images(14, 3, (9, 9))
    runs = []
    for count in (1, 2, 3):
        threads(count)
        runs.append(tensors(conv_learn(stages, head, x, *upstream(14), split=7, bfloat=bfloat)))
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


@pytest.mark.parametrize("bfloat", [False, True], ids=["fp32", "bf16"])
def test_an_energy_does_not_depend_on_its_batch_nor_on_the_layout_of_x(bfloat, multiplies_bfloat):
    stages, head = make((8, 8), 3, [(24, 3, 1, 1), (20, 3, 2, 1)], activation="silu")
    x = images(40, 3, (8, 8))
    whole = conv_learn(stages, head, x, *upstream(40), bfloat=bfloat)
    for first, last in ((0, 1), (5, 9), (30, 40)):
        part = conv_learn(stages, head, x[first:last], *(u[first:last] for u in upstream(40)), bfloat=bfloat)
        assert torch.equal(part.energies, whole.energies[first:last])
    other = conv_learn(stages, head, x.to(memory_format=torch.channels_last), *upstream(40), bfloat=bfloat)
    assert all(torch.equal(value, tensors(whole)[name]) for name, value in tensors(other).items())


def test_batches_before_and_after_the_split_are_normalised_apart():
    stages, head = make((4, 4), 2, [(8, 3, 1, 1)], norm=True)
    x = torch.cat([images(5, 2, (4, 4)), 3 + images(7, 2, (4, 4), seed=2)])
    found = conv_learn(stages, head, x, *upstream(12), split=5)
    for part in (slice(0, 5), slice(5, 12)):
        alone = conv_learn(stages, head, x[part], *(u[part] for u in upstream(12)))
        torch.testing.assert_close(found.energies[part], alone.energies, rtol=1e-5, atol=1e-5)
    first = conv_learn(stages, head, x[:5], *(u[:5] for u in upstream(12))).stages[0].norm
    assert torch.equal(found.stages[0].norm.mean, first.mean)
    assert torch.equal(found.stages[0].norm.variance, first.variance)


@pytest.mark.parametrize("bfloat", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("where", ["x", "weight", "later weight", "bias"])
def test_what_is_not_finite_shows_also_behind_a_relu(where, bfloat, multiplies_bfloat):
    stages, head = make((4, 4), 2, [(8, 3, 1, 1), (8, 3, 1, 1)], activation="relu", slope=0.0)
    x = images(9, 2, (4, 4))
    places = {"x": x, "weight": stages[0].weight, "later weight": stages[1].weight, "bias": stages[1].bias}
    places[where].view(-1)[0] = -torch.inf
    found = conv_learn(stages, head, x, *upstream(9), bfloat=bfloat)
    assert found.energies[0].isnan() and found.bias.isnan()
    assert all(stage.weight.isnan().any() for stage in found.stages)


def test_bfloat16_is_refused_where_the_cpu_or_the_backend_has_none(monkeypatch):
    stages, head = make((4, 4), 2, [(8, 3, 1, 1), (8, 3, 1, 1)])
    arguments = (stages, head, images(3, 2, (4, 4)), *upstream(3))
    with pytest.raises(ValueError, match="bfloat=True needs the native backend"):
        conv_learn(*arguments, bfloat=True, backend="reference")
    monkeypatch.setattr(module, "has_bfloat", lambda: False)
    with pytest.raises(ValueError, match="bfloat needs AVX512_BF16 or AMX"):
        conv_learn(*arguments, bfloat=True)


def test_a_signal_ends_the_call():
    stages, head = make((64, 64), 3, [(64, 3, 1, 1), (64, 3, 1, 1)])
    x = images(32, 3, (64, 64))

    def handler(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.06)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(1000):
                conv_learn(stages, head, x, *upstream(32))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


BAD = {
    "x must be a float32": lambda a: a | {"x": a["x"].double()},
    "x must have shape": lambda a: a | {"x": a["x"][:, :1]},
    "linear must have one number a sample, 4": lambda a: a | {"linear": a["linear"][:3]},
    "head must be": lambda a: a | {"head": a["head"][:3]},
    "split must be 1 to 4": lambda a: a | {"split": 5},
    "stages must be 1 to": lambda a: a | {"stages": []},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    stages, head = make((4, 4), 2, [(8, 3, 1, 1)])
    linear, square = upstream(4)
    given = {"stages": stages, "head": head, "x": images(4, 2, (4, 4)), "linear": linear, "square": square}
    with pytest.raises((TypeError, ValueError), match=message):
        conv_learn(**BAD[message](given))


def test_one_value_a_channel_has_no_statistics():
    stages, head = make((3, 3), 2, [(8, 3, 1, 0)], norm=True)
    with pytest.raises(ValueError, match="more than one value a channel"):
        conv_learn(stages, head, images(3, 2, (3, 3)), *upstream(3), split=2)
