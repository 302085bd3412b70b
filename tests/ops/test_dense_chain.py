from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from torch import nn

import mgebm_fast as mg
from mgebm_fast import ops
from mgebm_fast.gradient import stack
from mgebm_fast.ops import counters, dense_chain
from mgebm_fast.ops.update import update

OP = "dense_chain"
FORM = dict(drift=0.045, noise_std=0.3)


def net_4():
    """The published net of the 4×4 grid, narrow, and with an activation that is not piecewise linear."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2), nn.LeakyReLU(0.2), nn.Conv2d(8, 12, 3, 1, 1), nn.SiLU(),
        nn.Conv2d(12, 16, 3, 1, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0),
    )  # fmt: skip


def read(energy, x):
    found = stack.read(energy, x)
    assert not isinstance(found, str), found
    return found


def gradient(energy, x):
    leaf = x.double().requires_grad_()
    return torch.autograd.grad(energy.double()(leaf).sum(), leaf)[0]


def small(seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    sizes = (12, 20, 9)
    weights = [torch.randn(b, a, generator=generator).to(device) for a, b in zip(sizes, sizes[1:])]
    biases = [torch.randn(20, generator=generator).to(device), None]
    head = torch.randn(9, generator=generator).to(device)
    net = ops.dense_net(weights, biases, head, activations=["leaky_relu", "elu"], slopes=[0.2, 0.0], dtype=dtype)
    return net, torch.randn(5, 3, 2, 2, generator=generator).to(device)


def test_a_stack_as_matrices_has_the_energys_gradient(backend):
    name, device = backend
    energy = net_4().to(device)
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    net = ops.dense_net_of(read(energy, x), torch.float32)
    assert net.sizes == (48, 32, 48, 64)
    start = x.clone()
    ops.dense_chain_(x, net, steps=1, drift=1000.0, noise_std=0.0, backend=name)  # far: x's own rounding is small
    want = 1000 * gradient(energy, start)
    assert ((start - x).double() - want).norm() < 1e-5 * want.norm()


def test_batch_statistics_are_those_of_the_net(backend):
    name, device = backend
    torch.manual_seed(0)
    energy = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2, 2, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 12, 3, 1, 1),
        nn.SiLU(), nn.Conv2d(12, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64, 1),
        nn.Flatten(0),
    ).to(device)  # fmt: skip
    with torch.no_grad():
        for norm in (energy[1], energy[6]):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(device)
    net = ops.dense_net_of(read(energy, x), torch.float32)
    assert net.coupled and [norm and norm.sites for norm in net.norms] == [4, None, 4]
    start = x.clone()
    ops.dense_chain_(x, net, steps=1, drift=1000.0, noise_std=0.0, backend=name)
    want = 1000 * gradient(energy, start)
    assert ((start - x).double() - want).norm() < 1e-5 * want.norm()


def test_steps_are_langevin_steps(backend):
    name, device = backend
    net, x = small(device=device)
    settings = dict(reference_std=2.0, clamp=(-1, 1), grad_clamp=0.5, seed=3, first_sample=7, **FORM)
    keep = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(2)).to(device) < 0.7
    want = x.clone()
    for k in range(4):
        step = want.clone()
        ops.dense_chain_(step, net, steps=1, drift=1.0, noise_std=0.0, backend="reference")
        ops.langevin_step_(want, want - step, step=6 + k, mask=keep, backend="reference", **settings)
    place = torch.tensor(6, device=device)
    got = ops.dense_chain_(x.clone(), net, steps=4, first_step=6, mask=keep, scale=8.0, backend=name, **settings)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    held = ops.dense_chain_(x.clone(), net, steps=4, first_step=place, mask=keep, scale=8.0, backend=name, **settings)
    assert torch.equal(got, held)
    assert torch.equal(ops.dense_chain_(x.clone(), net, steps=0, backend=name, **FORM), x)
    assert ops.dense_chain_(x[:0], net, steps=2, backend=name, **FORM).shape == (0, 3, 2, 2)


def test_numbers_from_memory_vary_by_step(backend):
    """What a captured chain reads: a table of all steps, or of one for all."""
    name, device = backend
    net, x = small(device=device)
    place = counters.check("f", 5, 12, x.device, seed=3, first_sample=7, step=6, stream=0, steps=3)
    law = update(drift=0.045, noise_std=0.3, reference_std=2.0, grad_clamp=0.5)
    rows = [(0.045, 0.3, 0.25), (0.03, 0.2, 0.5), (0.01, 0.0, 0.0)]

    def advance(x, numbers, steps, place):
        dense_chain.launch(x, net, steps, 8.0, None, None, numbers, place, 1, name)
        return x

    for table in (rows, rows[:1]):
        memory = torch.tensor(table, device=device)[:, None]
        numbers = dataclasses.replace(law, drift=math.nan, noise_std=math.nan, inverse_variance=math.nan, table=memory)
        got, want = advance(x.clone(), numbers, 3, place), x.clone()
        for k, here in enumerate(place.steps(0, 3)):
            drift, noise_std, inverse_variance = table[k % len(table)]
            step = dataclasses.replace(law, drift=drift, noise_std=noise_std, inverse_variance=inverse_variance)
            advance(want, step, 1, here)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_new_values_in_place():
    net, x = small()
    other = small(seed=4)[0]
    pointer = net.weights[0].data_ptr()
    net.update_([w[:b, :a] for w, a, b in zip(other.weights, (12, 20), (20, 9))], [other.biases[0][:20], None],
                other.head[:9])  # fmt: skip
    got, want = (ops.dense_chain_(x.clone(), n, steps=2, seed=1, **FORM) for n in (net, other))
    assert torch.equal(got, want) and net.weights[0].data_ptr() == pointer


def test_new_gains_in_place():
    given = dict(weights=[torch.randn(8, 6)], biases=[None], head=torch.randn(8), activations=["silu"], slopes=[0.0])
    gains = torch.rand(2, 4)
    net, other = (ops.dense_net(**given, norms=[(gain, 1e-5)]) for gain in gains)
    place = net.norms[0].gain.data_ptr()
    net.update_(given["weights"], [None], given["head"], [gains[1]])
    assert torch.equal(net.norms[0].gain, other.norms[0].gain) and net.norms[0].gain.data_ptr() == place
    assert net.norms[0].gain[:8].tolist() == gains[1].repeat_interleave(2).tolist()
    for wrong in (None, [None], [torch.rand(8)], [gains[0], None]):
        with pytest.raises(ValueError, match="gains must be of shapes"):
            net.update_(given["weights"], [None], given["head"], wrong)
    assert torch.equal(net.norms[0].gain, other.norms[0].gain)


def test_programs_that_would_wait_for_ever_are_refused():
    """On CPU tensors Triton's programs run one after another."""
    net, x = small()
    coupled = ops.dense_net([torch.randn(8, 12)], [None], torch.randn(8), activations=["silu"], slopes=[0.0],
                            norms=[(torch.ones(4), 1e-5)])  # fmt: skip
    place = counters.check("f", 17, 12, x.device, seed=3, first_sample=0, step=0, stream=0, steps=1)
    for one, split in ((net, 2), (coupled, 1)):
        start = torch.randn(17, 3, 2, 2)
        state = start.clone()
        with pytest.raises(mg.BackendError, match="programs run one after another"):
            dense_chain.launch(state, one, 1, 1.0, None, None, update(**FORM), place, split, "triton")
        assert torch.equal(state, start)


@pytest.mark.parametrize("words", ["Triton Error [CUDA]: too many blocks in cooperative launch", "out of memory"])
def test_a_launch_that_does_not_fit_says_how_to_go_on(monkeypatch, words):
    """The driver refuses it before any step is made; other errors of its are left as they are."""
    kernel = importlib.import_module("mgebm_fast.kernels.dense_chain")

    def refuse(*args, **kwargs):
        raise RuntimeError(words)

    monkeypatch.setattr(kernel, "dense_chain_", refuse)
    net, x = small()
    place = counters.check("f", 5, 12, x.device, seed=3, first_sample=0, step=0, stream=0, steps=1)
    expected, match = (
        (mg.BackendError, "1 tiles of 16 samples with split = 1") if "blocks" in words else (RuntimeError, words)
    )
    with pytest.raises(expected, match=match) as caught:
        dense_chain.launch(x, net, 1, 1.0, None, None, update(**FORM), place, 1, "triton")
    assert caught.type is expected


def test_the_first_bad_step_is_kept(backend):
    name, device = backend
    net, x = small(device=device)
    bad = torch.tensor(ops.NO_BAD_STEP, device=device)
    arguments = dict(bad_step=bad, clamp=(-1, 1), grad_clamp=1.0, first_step=3, backend=name, **FORM)
    ops.dense_chain_(x.clone(), net, steps=2, **arguments)
    assert bad.item() == ops.NO_BAD_STEP
    x[2, 0, 0, 0] = torch.inf
    ops.dense_chain_(x, net, steps=2, **arguments)
    assert bad.item() == 3


def test_what_is_no_dense_chain_says_why():
    x = torch.zeros(2, 3, 8, 8)
    energy = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 1), nn.Flatten(0))
    assert "map of 8×8" in ops.dense_net_of(read(energy, x))
    deep = [layer for _ in range(5) for layer in (nn.Conv2d(3, 3, 1), nn.ReLU())]
    energy = nn.Sequential(*deep, nn.Flatten(), nn.Linear(48, 1), nn.Flatten(0))
    assert "5 layers" in ops.dense_net_of(read(energy, x[:, :, :4, :4]))
    energy = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 1),
                           nn.Flatten(0))  # fmt: skip
    assert "batch statistics of 9 pixels" in ops.dense_net_of(read(energy, x[:, :, :3, :3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=torch.zeros(2, 11)), "12 elements a sample, got shape"),
        (dict(x=torch.zeros(2, 12).double()), "x must be float32"),
        (dict(steps=-1), "steps must be an int >= 0, got -1"),
        (dict(scale=0.0), "scale must be finite and > 0, got 0.0"),
        (dict(split=0), r"split must be in \[1, 32\], got 0"),
        (dict(steps=2, first_step=2**32 - 1), "first_step must stay in"),
        (dict(bad_step=torch.zeros(2, dtype=torch.int64)), "bad_step must hold one int64"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    net, x = small()
    with pytest.raises((ValueError, TypeError), match=message):
        ops.dense_chain_(**{"x": x, "net": net, "steps": 1, **FORM, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weights=[torch.zeros(4, 12)]), "must be of 1 to 4 layers"),
        (dict(weights=[torch.zeros(4, 12), torch.zeros(3, 5)]), r"weights\[1\] must be \(3, 4\), got \(3, 5\)"),
        (dict(biases=[torch.zeros(3), None]), r"biases\[0\] must be \(4,\), got \(3,\)"),
        (dict(head=torch.zeros(2)), "head must hold 3 entries, got 2"),
        (dict(activations=["relu", "gelu"]), "activation must be one of"),
        (dict(weights=[torch.zeros(4, 300), torch.zeros(3, 4)]), "sizes must be at most 256"),
        (dict(norms=[None]), "norms must be of 1 to 4 layers"),
        (dict(norms=[(torch.ones(3), 1e-5), None]), r"norms\[0\]: the gain must be \(C,\), and 4 outputs C times one"),
        (dict(norms=[None, (torch.ones(1), 1e-5)]), r"norms\[1\]: the gain must be \(C,\), and 3 outputs"),
        (dict(norms=[(torch.ones(4), 0.0), None]), r"norms\[0\]: eps must be finite and > 0 in float32, got 0.0"),
    ],
)
def test_bad_nets_are_named(arguments, message):
    given = dict(weights=[torch.zeros(4, 12), torch.zeros(3, 4)], biases=[None, None], head=torch.zeros(3),
                 activations=["relu", "relu"], slopes=[0.0, 0.0])  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.dense_net(**{**given, **arguments})


@pytest.mark.parametrize("norms", [None, [None, (torch.ones(9), 1e-3)]])
def test_opcheck(norms):
    _, x = small()
    weights = [torch.randn(20, 12), torch.randn(9, 20)]
    net = ops.dense_net(weights, [None, None], torch.randn(9), activations=["leaky_relu", "elu"], slopes=[0.2, 0.0],
                        norms=norms)  # fmt: skip
    numbers = (0.1, 0.2, 0.0, 0.0, 1.0, -1.0, 1.0)
    gains = [norm and norm.gain for norm in net.norms]
    arguments = (x, torch.tensor(ops.NO_BAD_STEP), list(net.weights), list(net.biases), gains, [0, 1], [0.0, 1e-3],
                 net.head, list(net.sizes), "leaky_relu,elu", list(net.slopes), 2, 1.0, None, *numbers, 1, None, 0,
                 None, 3, None, 0, 1, "reference")  # fmt: skip
    torch.library.opcheck(torch.ops.mgebm_fast.dense_chain_.default, arguments)
