"""Schedules, the changes of gradients, optimiser state as tensors, and averaged weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mgebm_fast.errors import CheckpointError
from mgebm_fast.learning import OptimiserConfig
from mgebm_fast.learning.methods import optim
from mgebm_fast.learning.methods.ema import Average
from mgebm_fast.learning.methods.optim import (
    build_optimiser,
    condition_,
    load_state_tensors,
    map_areas,
    norm,
    orthogonal,
    rate_factor,
    state_tensors,
    step,
)
from mgebm_fast.nets import multigrid_net


def test_schedules():
    cosine = OptimiserConfig(schedule="cosine", final_lr=0.1)
    assert rate_factor(cosine, 0, 100) == 1.0
    assert rate_factor(cosine, 50, 100) == pytest.approx(0.55)
    assert rate_factor(cosine, 100, 100) == pytest.approx(0.1)
    held = OptimiserConfig(schedule="linear", hold=0.5)
    assert [rate_factor(held, i, 100) for i in (0, 50, 75, 100)] == pytest.approx([1, 1, 0.5, 0])
    warm = OptimiserConfig(warmup=4)
    assert [rate_factor(warm, i, 100) for i in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    step = OptimiserConfig(schedule="step", decay_every=12, decay_factor=0.94337)
    assert rate_factor(step, 10**6, 1, epoch=11) == 1.0
    assert rate_factor(step, 0, 1, epoch=25) == pytest.approx(0.94337**2)


def test_gradient_changes_are_made_in_order():
    gradients = [torch.tensor([4.0, -8.0]), torch.tensor([0.25])]
    assert float(norm(gradients)) == pytest.approx(math.sqrt(80.0625))
    condition_(gradients, OptimiserConfig(per_layer_divide=True), [4.0, 1.0])
    assert gradients[0].tolist() == [1.0, -2.0]
    condition_(gradients, OptimiserConfig(grad_rescale_max=1.0))
    assert gradients[0].tolist() == [0.5, -1.0] and gradients[1].tolist() == [0.25]
    condition_(gradients, OptimiserConfig(grad_clip_value=0.75))
    assert gradients[0].tolist() == [0.5, -0.75]
    condition_(gradients, OptimiserConfig(grad_clip_norm=0.1))
    assert float(norm(gradients)) == pytest.approx(0.1)
    zero = [torch.zeros(3)]
    condition_(zero, OptimiserConfig(grad_clip_norm=0.1, grad_rescale_max=1.0))
    assert zero[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_step_of_adam_is_torchs_own_and_is_told_to_who_listens(name):
    config = OptimiserConfig(name=name, weight_decay=0.1, betas=(0.5, 0.99))
    heard, generator = [], torch.Generator().manual_seed(0)
    nets = [[nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(2))] for _ in "ab"]
    direct, listened = (build_optimiser(net, config) for net in nets)
    listened.register_step_post_hook(lambda *_: heard.append(0))  # goes by the optimiser's own step
    for k in range(5):
        gradients = [torch.randn(p.shape, generator=generator) for p in nets[0][:2]]
        spoilt = torch.tensor(float(k == 3))
        before = [p.detach().clone() for p in nets[0]]
        for net, optimiser in zip(nets, (direct, listened)):
            step(optimiser, net, [*(g.clone() for g in gradients), None], 0.1 / (k + 1), spoilt)
        assert len(heard) == k + 1
        assert [torch.equal(p, q) for p, q in zip(before, nets[0])] == [k == 3, k == 3, True]
        assert all(torch.equal(p, q) for p, q in zip(*nets))
        mine, theirs = state_tensors(direct), state_tensors(listened)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert float(mine["0.step"]) == 4


@pytest.mark.parametrize("kernel", [None, lambda *_, **__: None, lambda weights: None])
def test_without_torchs_kernel_a_step_is_the_optimisers_own(kernel, monkeypatch):
    def trained() -> tuple[nn.Parameter, dict[str, torch.Tensor]]:
        weight = nn.Parameter(torch.ones(5, 3))
        optimiser = build_optimiser([weight], OptimiserConfig(name="adam"))
        for k in range(3):
            step(optimiser, [weight], [torch.full((5, 3), k + 1.0)], 0.1, torch.zeros(()))
        return weight, state_tensors(optimiser)

    calls = []
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, _step=torch.optim.Adam.step: (calls.append(0), _step(self))
    )
    weight, state = trained()
    assert len(calls) == 1  # which makes the state
    own = torch._fused_adam_
    monkeypatch.setattr(torch, "_fused_adam_", kernel)
    optim._kernel.cache_clear()
    try:
        assert optim._kernel("_fused_adam_") is None
        monkeypatch.setattr(torch, "_fused_adam_", own)
        other, same = trained()
    finally:
        optim._kernel.cache_clear()
    assert len(calls) == 4 and torch.equal(weight, other)
    assert state.keys() == same.keys() and all(torch.equal(state[key], same[key]) for key in state)


def test_a_torch_whose_listeners_are_not_found_makes_its_own_steps(monkeypatch):
    optimiser = build_optimiser([nn.Parameter(torch.ones(3))], OptimiserConfig(name="adam"))
    assert optim._is_plain_adam(optimiser, torch.zeros(()))
    monkeypatch.delattr(optim.heard_by_all, "_global_optimizer_post_hooks")
    assert not optim._is_plain_adam(optimiser, torch.zeros(()))


@pytest.mark.parametrize("config", [OptimiserConfig(), OptimiserConfig(name="sgd", momentum=0.9)])
def test_weights_in_another_order_of_memory_learn_the_same(config):
    def trained(order: torch.memory_format, resumed: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 2, 2, generator=generator).contiguous(memory_format=order))
        optimiser = build_optimiser([weight], config)
        for k in range(4):
            step(optimiser, [weight], [torch.randn(4, 3, 2, 2, generator=generator)], 0.1, torch.zeros(()))
            if k == 1 and resumed:
                state = {name: value.contiguous() for name, value in state_tensors(optimiser).items()}
                optimiser = build_optimiser([weight], config)
                load_state_tensors(optimiser, state, "here")
        return weight.detach()

    expected = trained(torch.contiguous_format, False)
    for resumed in (False, True):
        assert torch.equal(trained(torch.channels_last, resumed), expected)


def test_map_areas_of_the_published_net():
    net = multigrid_net(64, width=0.05, variant="A")
    areas = map_areas(net)
    assert [areas[id(layer.weight)] for layer in net.layers] == [32 * 32, 16 * 16, 16 * 16]
    assert areas[id(net.layers[0].norm.weight)] == 32 * 32
    assert id(net.head.weight) not in areas


@pytest.mark.parametrize(
    "config",
    [
        OptimiserConfig(), OptimiserConfig(name="sgd", momentum=0.9), OptimiserConfig(name="adamw"),
        OptimiserConfig(name="muon"), OptimiserConfig(name="muon", muon_momentum=0.0),
    ],
)  # fmt: skip
def test_optimiser_state_comes_back_exactly(config):
    def parameters():
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 3), (4,), (20, 16, 3, 3), (17, 40))]

    def advance(optimiser, parameters, times):
        for t in times:
            for i, parameter in enumerate(parameters):
                parameter.grad = torch.sin(parameter.detach() + t + i)
            optimiser.step()

    whole, parts = parameters(), parameters()
    optimiser = build_optimiser(whole, config)
    advance(optimiser, whole, range(5))
    first = build_optimiser(parts, config)
    advance(first, parts, range(2))
    second = build_optimiser(parts, config)
    load_state_tensors(second, state_tensors(first), "here")
    advance(second, parts, range(2, 5))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    a, b = state_tensors(optimiser), state_tensors(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(CheckpointError, match="not of this optimiser"):
        load_state_tensors(second, {"7.exp_avg": torch.zeros(3)}, "here")
    with pytest.raises(CheckpointError, match=r"must have shape \(4, 3\)"):
        load_state_tensors(second, {"0.exp_avg": torch.zeros(3)}, "here")


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (256, 20), (16, 16)])
def test_orthogonal_keeps_directions_and_levels_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten(1)
    for scale in (1e-8, 1.0, 1e6):
        made = orthogonal(scale * matrix)
        u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        on_directions = u.T @ made.double() @ v.T
        assert 0.6 < on_directions.diag().min() and on_directions.diag().max() < 1.3
        assert (on_directions - on_directions.diag().diag()).abs().max() < 1e-3
    assert torch.equal(orthogonal(torch.zeros(16, 20)), torch.zeros(16, 20))


def test_orthogonal_levels_singular_values_down_to_a_thousandth():
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 24, generator=generator).double())[0] for n in (24, 200))
    values = torch.logspace(0, -2.6, 24).double()
    made = u.T @ orthogonal(((u * values) @ v.T / values.norm()).float()).double() @ v
    assert 0.6 < made.diag().min() and made.diag().max() < 1.3
    x = values / values.norm()
    for _ in range(5):  # the same steps, on the singular values
        x = x * (3.4445 - 4.7750 * x**2 + 2.0315 * x**4)
    torch.testing.assert_close(made, x.diag(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("momentum", [0.9, 0.0, 0.6])
def test_muon_moves_hidden_layers_along_orthogonal_momentum_and_others_as_adamw_does(momentum, decay):
    generator = torch.Generator().manual_seed(0)
    shapes = {"first": (32, 3, 3, 3), "bias": (32,), "hidden": (24, 32, 3, 3), "head": (1, 24)}
    weights = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    twins = {name: nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    config = OptimiserConfig(name="muon", muon_momentum=momentum, weight_decay=decay, muon_rms=(0.1, 0.3))
    ours = build_optimiser(weights.values(), config, 1)
    adamw = build_optimiser(twins.values(), OptimiserConfig(name="adamw", weight_decay=decay))
    beta, lr, moving = momentum, 0.1, torch.zeros(24, 288, dtype=torch.float64)
    expected = weights["hidden"].detach().double().flatten(1)
    for _ in range(3):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes.values()]
        step(ours, list(weights.values()), gradients, lr, torch.zeros(()))
        step(adamw, list(twins.values()), gradients, lr, torch.zeros(()))
        gradient = gradients[2].double().flatten(1)
        moving = beta * moving + gradient
        direction = orthogonal(beta * moving + gradient)
        assert 0.8 < math.sqrt(288) * float(direction.square().mean().sqrt()) < 1.2  # rms of about 1
        expected = (1 - lr * decay) * expected - lr * 0.3 * math.sqrt(288) * direction
        torch.testing.assert_close(weights["hidden"].detach().flatten(1), expected.float(), rtol=1e-4, atol=1e-5)
    for name in ("first", "bias", "head"):
        torch.testing.assert_close(weights[name], twins[name])
    assert not torch.equal(weights["hidden"], twins["hidden"])


def test_average_follows_its_formula_and_leaves_the_weights_alone():
    model = nn.Linear(2, 1)
    average = Average(model, 0.5)
    expected = model.weight.detach().clone()
    for t in range(6):
        with torch.no_grad():
            model.weight += t + 1
        average.update(t)
        expected = expected + (1 - min(0.5, (1 + t) / (10 + t))) * (model.weight.detach() - expected)
    assert torch.allclose(average.state()["weight"], expected)
    late = Average(model, 0.5, {model.bias: 4})
    assert late.firsts == [0, 4] and late.shares(3) == [1 - 4 / 13, 0.0] and late.shares(5) == [0.6, 1 - 2 / 11]
    old = {name: mean.clone() for name, mean in late.state().items()}
    with torch.no_grad():
        model.weight += 1
        model.bias += 1
    late.update(5)
    assert torch.allclose(late.state()["weight"], old["weight"] + 0.6)
    assert torch.allclose(late.state()["bias"], old["bias"] + 1 - 2 / 11)
    before = model.weight.detach().clone()
    with average.applied():
        assert torch.equal(model.weight, average.state()["weight"])
    assert torch.equal(model.weight, before)
