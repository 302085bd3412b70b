"""What may be handed to native code: plain tensors; anything else is an error or takes another way, never a crash."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from helpers.stacks import images, net, place
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import mgebm_fast as mg
from mgebm_fast import ops
from mgebm_fast.ops.conv_chain import ConvChain
from mgebm_fast.ops.state import why_not_plain
from mgebm_fast.ops.update import update

FORM = dict(step_size=0.3, seed=1)


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


class Doubled(torch.Tensor):
    """A subclass whose functions run twice as far: what ignores it gives other numbers."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        if getattr(function, "__name__", "").startswith("langevin_step_"):
            args[0].as_subclass(torch.Tensor).mul_(2)
        return out


def emptied() -> torch.Tensor:
    x = torch.randn(4, 3, 8, 8)
    x.untyped_storage().resize_(16)
    return x


def unusual() -> dict[str, torch.Tensor]:
    x = torch.randn(4, 3, 8, 8)
    with FakeTensorMode():
        fake = torch.empty(4, 3, 8, 8)
    return {
        "two": TwoTensor(x, x.clone()), "fake": fake, "meta": x.to("meta"), "freed": emptied(),
        "negative": torch.view_as_complex(torch.randn(4, 3, 8, 8, 2)).conj().imag, "sparse": x.to_sparse(),
        "subclass": x.as_subclass(Plain), "functional": torch._to_functional_tensor(x),
    }  # fmt: skip


def test_one_function_says_what_is_plain():
    x = torch.randn(4, 3, 8, 8)
    assert [why_not_plain(t) for t in (x, torch.nn.Parameter(x), x[:, :2], x.mT, torch.empty(0), x[1:].clone())] == [
        ""
    ] * 6
    assert all(why_not_plain(t) for t in unusual().values())
    assert why_not_plain(x.as_subclass(Plain), dispatched=True) == ""
    assert why_not_plain(TwoTensor(x, x), dispatched=True)


@pytest.mark.parametrize("name", list(unusual()))
def test_a_chain_refuses_what_is_not_plain(name):
    stages, head = net()
    chain = ConvChain(stages, head)
    if name == "negative":  # values that memory does not hold are read, not ignored
        x = unusual()[name]
        assert torch.equal(chain.gradient(x), chain.gradient(x.clone()))
        y = x.clone()
        chain.advance_(x, 2, update(step_size=0.3), place())
        chain.advance_(y, 2, update(step_size=0.3), place())
        assert torch.equal(x, y)
        return
    with pytest.raises((TypeError, ValueError, RuntimeError), match="x must|plain tensors"):
        chain.gradient(unusual()[name])
    with pytest.raises((TypeError, ValueError, RuntimeError), match="x must|plain tensors"):
        chain.advance_(unusual()[name], 1, update(step_size=0.3), place())


@pytest.mark.parametrize("name", ["two", "meta", "freed"])
@pytest.mark.parametrize("field", ["weight", "bias"])
def test_weights_that_are_not_plain_are_refused(name, field):
    stages, head = net()
    x = torch.randn_like(getattr(stages[0], field))
    wrapped = {"two": lambda: TwoTensor(x, x.clone()), "meta": lambda: x.to("meta"), "freed": lambda: x}[name]()
    if name == "freed":
        x.untyped_storage().resize_(4)
    with pytest.raises(TypeError, match="plain tensors"):
        ConvChain([dataclasses.replace(stages[0], **{field: wrapped}), *stages[1:]], head)


@pytest.mark.parametrize("name", ["two", "freed", "subclass", "meta", "functional"])
def test_a_step_never_crashes(name):
    x = unusual()[name]
    grad = torch.zeros(4, 3, 8, 8)
    if name in ("two", "subclass"):
        assert ops.langevin_step_(x, grad, **FORM) is x
        return
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        ops.langevin_step_(x, grad, backend="native", **FORM)


def test_a_subclass_with_functions_of_its_own_is_asked():
    x = torch.randn(2, 3, 4)
    expected = 2 * ops.langevin_step_(x.clone(), torch.zeros(2, 3, 4), **FORM)
    found = ops.langevin_step_(x.clone().as_subclass(Doubled), torch.zeros(2, 3, 4), **FORM)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)


def test_functionalisation_is_an_error_of_torchs_and_no_crash():
    grad = torch.randn(2, 3, 4)
    run = torch.func.functionalize(lambda x: ops.langevin_step_(x.clone(), grad, **FORM))
    with pytest.raises(RuntimeError, match="functionaliz"):
        run(torch.randn(2, 3, 4))


def test_a_batched_step_is_an_error_and_no_crash():
    x = torch.randn(5, 2, 3)
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        torch.vmap(lambda row: ops.langevin_step_(row, torch.zeros(2, 3), **FORM))(x)


def test_a_negative_gradient_is_read_as_it_is():
    grad = torch.view_as_complex(torch.randn(2, 3, 2)).conj().imag
    assert grad.is_neg()
    x = torch.zeros(2, 3)
    found = ops.langevin_step_(x.clone(), grad, drift=1.0, noise_std=0.0)
    assert torch.equal(found, -grad.clone())


def test_a_chain_is_not_copied_or_pickled():
    chain = ConvChain(*net())
    for made in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            made(chain)


@pytest.mark.parametrize("field", ["bias", "weight"])
def test_vectors_of_the_wrong_length_are_refused(field):
    stages, head = net(norm=True)
    norm = dataclasses.replace(stages[1].norm, **{field: torch.ones(39)})
    with pytest.raises(ValueError, match=rf"norm.{field} must be \(40,\), got \(39,\)"):
        ConvChain([stages[0], dataclasses.replace(stages[1], norm=norm), stages[2]], head)
    stages, head = net()
    with pytest.raises(ValueError, match=r"bias must be \(24,\), got \(23,\)"):
        ConvChain([dataclasses.replace(stages[0], bias=torch.ones(23)), *stages[1:]], head)
    with pytest.raises(ValueError, match=r"head must be \(16, 4, 4\), as the last map is, got \(15, 4, 4\)"):
        ConvChain(stages, head[:15])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_give_no_finite_gradient(value):
    stages, head = net()
    stages[0].bias[0] = value
    stages = [dataclasses.replace(stage, activation="relu", slope=0.0) for stage in stages]
    assert torch.isnan(ConvChain(stages, head).gradient(images(4, 3, (8, 8)))).all()


NUMBERS = [
    np.float32(0.25),
    np.float64(0.25),
    torch.tensor(0.25),
    torch.tensor(0.25, dtype=torch.float64),
    np.array(0.25),
]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: type(v).__name__)
def test_numbers_of_other_kinds_are_numbers(value):
    x, grad = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    expected = ops.langevin_step_(x.clone(), grad, step_size=0.25, clamp=(-1.0, 0.25), reference_std=0.25, seed=3)
    found = ops.langevin_step_(
        x.clone(), grad, step_size=value, clamp=[-1, value], reference_std=value, seed=np.int64(3), step=np.int32(0)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [np.int64, np.array, lambda n: torch.tensor(n, dtype=torch.int32)])
def test_sizes_and_counts_of_other_kinds_are_ints(kind):
    x, (one, two, four) = torch.rand(2, 3, 4, 4), map(kind, (1, 2, 4))
    assert torch.equal(ops.upsample(x, two), ops.upsample(x, 2))
    assert torch.equal(ops.pyramid(x, [two])[0], ops.pyramid(x, [2])[0])
    assert torch.equal(ops.noise((2,), seed=one, step=two, stream=one), ops.noise((2,), seed=1, step=2, stream=1))
    nets = (
        mg.nets.multigrid_net(four, kind(3), width=np.float32(0.25)),
        mg.nets.ResidualNet(four, one, [two], depth=one),
    )
    assert nets[0].config() == mg.nets.multigrid_net(4, 3, width=0.25).config()
    assert json.dumps([net.config() for net in (*nets, mg.EnergyNet(four, one, [mg.nets.ConvSpec(two, one)]))])
    chain = mg.Langevin(one, step_size=np.float32(0.5), clamp=(np.float32(-1), torch.nn.Parameter(torch.ones(()))))
    model = mg.MultiGrid((one, two), channels=one, norm="none", langevin=chain, seed=one)
    model.set_colours(torch.zeros(1, 1))
    assert torch.equal(model.sample(two, seed=one), model.sample(2, seed=1)) and model.sizes == (1, 2)
    assert chain == mg.Langevin(1, step_size=0.5, clamp=(-1, 1))
    energy = mg.energies.Tempered(mg.energies.Scaled(lambda x: x.sum((1, 2, 3)), torch.tensor(4.0)), np.float32(2))
    assert torch.equal(energy(x), 2 * x.sum((1, 2, 3)))


def test_a_tensor_that_changes_is_read_at_each_call():
    x, size = torch.zeros(2, 3), torch.tensor(0.5)
    ops.langevin_step_(x, torch.ones(2, 3), step_size=size, noise_scale=0.0)
    size.fill_(1.0)
    ops.langevin_step_(x, torch.ones(2, 3), step_size=size, noise_scale=0.0)
    assert torch.equal(x, torch.full((2, 3), -0.625))


def test_a_bool_is_no_number_also_after_a_one_was():
    x = torch.zeros(2, 3)
    ops.langevin_step_(x, x.clone(), step_size=1, seed=1)
    for name in ("step_size", "seed", "step", "first_sample"):
        with pytest.raises(TypeError, match=f"{name} must be"):
            ops.langevin_step_(x, x.clone(), **({"step_size": 1, "seed": 1} | {name: True}))


@pytest.mark.parametrize("ids", [[7, 1], np.array([7, 1]), torch.tensor([7, 1], dtype=torch.int32), (7, 1)])
def test_ids_of_other_kinds_are_ids(ids):
    expected = ops.noise((2, 5), seed=1, step=2, first_sample=torch.tensor([7, 1]))
    assert torch.equal(
        ops.noise((2, 5), seed=np.int64(1), step=torch.tensor(2, dtype=torch.int32), first_sample=ids), expected
    )
    with pytest.raises((TypeError, ValueError), match="first_sample must"):
        ops.noise((2, 5), seed=1, step=2, first_sample=[0.5, 1.5])


@pytest.mark.parametrize("name", ["native", "reference"])
def test_torchs_default_dtype_changes_nothing(name):
    x, grad = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    stages, head = net()

    def run():
        stepped = ops.langevin_step_(x.clone(), grad, step_size=0.1, reference_std=1.0, seed=1, backend=name)
        chained = ops.conv_chain(stages, head, x, steps=2, step_size=0.1, seed=1, backend=name)
        draws = ops.noise((2, 5), seed=1, step=2, backend=name)
        made = mg.EnergyNet(8, 3, [mg.nets.ConvSpec(4, 3)], norm="none", spectral_norm=True)
        assert mg.Langevin(2, step_size=0.1).explain(made, x).plan == "native"
        nets = made, mg.nets.ResidualNet(8, 3, [4]), mg.EnergyNet(8, 3, [mg.nets.ConvSpec(4, 3)])
        generated = mg.nets.Generator(2, mg.nets.generator_layers(8, 3))(x[:, :2, 0, 0])
        chain = mg.langevin_sample(made, x, steps=2, step_size=0.1, seed=1)
        pyramid, larger = ops.pyramid(x, [1, 4], backend=name), ops.upsample(x, 2, backend=name)
        return [stepped, chained, draws, *pyramid, larger, chain, generated, *(energy(x) for energy in nets)]

    expected = run()
    torch.set_default_dtype(torch.float64)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected, strict=True))
