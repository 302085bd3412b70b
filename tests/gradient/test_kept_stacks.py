"""Readings and packed chains that are kept from call to call: never a result of weights, or of a net, of before."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient import kept, plan
from mgebm_fast.gradient import stack as stacks
from mgebm_fast.ops.conv_chain import packed
from mgebm_fast.ops.conv_chain.sharing import weights_stay

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason="without the compiled module nothing is packed")


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 3, 2, 1), nn.SiLU(), nn.Flatten(),
        nn.Linear(256, 1), nn.Flatten(0),
    )  # fmt: skip


def energy_net(**settings) -> nn.Module:
    return mg.nets.multigrid_net(8, 1, variant="compact", **{"norm": "none", **settings})


NETS = {"sequential": sequential, "energy net": energy_net}


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def step(net: nn.Module, x: torch.Tensor | None = None, **options) -> torch.Tensor:
    return mg.langevin_sample(
        net, images() if x is None else x, steps=1, drift=0.5, noise_std=0.0, precision="fp32", **options
    )


def by_optimiser(net: nn.Module) -> None:
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    net(images(1)).sum().backward()
    optimiser.step()


def in_place(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)


def in_data(net: nn.Module) -> None:  # counts no write
    for parameter in net.parameters():
        parameter.data.mul_(1.5)


def by_numpy(net: nn.Module) -> None:  # torch sees nothing of it
    next(net.parameters()).detach().numpy()[:] *= 1.5


def one_number(net: nn.Module) -> None:
    list(net.parameters())[2].data.view(-1)[-1] += 0.5


def last_number(net: nn.Module) -> None:  # of what becomes the head
    [p for p in net.parameters() if p.dim() == 2][-1].data.view(-1)[-1] += 0.5


def other_data(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data = parameter.data * 1.5


def other_storage(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.set_(parameter.detach() * 1.5)


def other_parameters(net: nn.Module) -> None:
    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.detach() * 1.5))


def by_state_dict(net: nn.Module) -> None:
    net.load_state_dict({name: tensor * 1.5 for name, tensor in net.state_dict().items()})


def by_assignment(net: nn.Module) -> None:
    net.load_state_dict({name: tensor * 1.5 for name, tensor in net.state_dict().items()}, assign=True)


def by_copy(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter * 1.5)


def in_inference_mode(net: nn.Module) -> None:
    with torch.inference_mode():
        for parameter in net.parameters():
            parameter.data.mul_(1.5)


def transposed_memory(net: nn.Module) -> None:  # the same address, other numbers
    weight = list(net.parameters())[2]
    weight.data = weight.data.as_strided(weight.shape, (9, weight.stride(0), *weight.stride()[2:]))


CHANGES = [
    by_optimiser, in_place, in_data, by_numpy, one_number, last_number, other_data, other_storage, other_parameters,
    by_state_dict, by_assignment, by_copy, in_inference_mode,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_changed_weights_are_seen(make, change):
    torch.manual_seed(0)
    net = make()
    before = step(net)
    assert torch.equal(step(net), before)
    for _ in range(2):
        change(net)
        after = step(net)
        assert not torch.equal(after, before)
        assert torch.equal(after, step(copy.deepcopy(net)))  # of which nothing is kept
        before = after


def test_weights_that_lie_otherwise_at_one_address():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(512, 1),
        nn.Flatten(0),
    )  # fmt: skip
    before = step(net)
    transposed_memory(net)
    after = step(net)
    assert not torch.equal(after, before) and torch.equal(after, step(copy.deepcopy(net)))


def to_other_activation(net: nn.Module) -> None:
    if isinstance(net, nn.Sequential):
        net[1] = nn.ReLU()
    else:
        net.activation = "relu"


def to_other_slope(net: nn.Module) -> None:
    (net[1] if isinstance(net, nn.Sequential) else net).negative_slope = 0.7


def to_a_hook(net: nn.Module) -> None:
    net.register_forward_hook(lambda module, inputs, output: 2 * output)


def to_another_forward(net: nn.Module) -> None:
    net.forward = lambda x: (x**2).flatten(1).sum(1)


@pytest.mark.parametrize("change", [to_other_activation, to_other_slope, to_a_hook, to_another_forward])
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_another_net_is_seen(make, change):
    torch.manual_seed(0)
    net = make()
    before = step(net)
    change(net)
    expected = images().requires_grad_()
    slope = torch.autograd.grad(net(expected).sum(), expected)[0]
    after = step(net)
    torch.testing.assert_close(after, images() - 0.5 * slope, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-3, atol=1e-4)


def test_a_method_that_is_replaced_on_a_class_is_seen(monkeypatch):
    net = energy_net()
    before = step(net)
    monkeypatch.setattr(type(net), "score", lambda self, x: (x**2).flatten(1).sum(1))
    assert not torch.allclose(step(net), before)


def counted(monkeypatch) -> list[int]:
    packs, module = [], native.module()

    class Counting:
        def __getattr__(self, name):
            return getattr(module, name)

        def conv_chain_pack(self, jobs, threads):
            packs.append(len(jobs))
            module.conv_chain_pack(jobs, threads)

    monkeypatch.setattr(packed.native, "module", Counting)
    return packs


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_what_did_not_change_is_neither_read_nor_packed_again(make, monkeypatch):
    net, packs, reads = make(), counted(monkeypatch), []
    monkeypatch.setattr(kept.stacks, "read", lambda *a, _read=stacks.read, **k: (reads.append(0), _read(*a, **k))[1])
    step(net)
    assert packs and reads
    done = len(packs), len(reads)
    step(net)
    assert (len(packs), len(reads)) == done
    in_data(net)
    step(net)
    assert len(packs) == done[0] + 1 and len(reads) == done[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: energy_net(spectral_norm=True),
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 1), nn.Flatten(0)
        ).eval(),
    ],
    ids=["spectral norm", "running statistics"],
)
def test_computed_weights_are_computed_each_time(make):
    net = make()
    before = step(net)
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.data.add_(0.5 * torch.rand(buffer.shape))
    after = step(net)
    assert not torch.equal(after, before) and torch.equal(after, step(copy.deepcopy(net)))


class Chosen(nn.Module):
    """A parametrisation that gives the weight itself, or a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turned", torch.zeros(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.mT if self.turned else weight


def test_a_parametrisation_that_gives_another_view_of_the_same_memory():
    net = sequential()
    nn.utils.parametrize.register_parametrization(net[0], "weight", Chosen())
    net.eval()
    before = step(net)
    assert torch.equal(step(net), before)
    net[0].parametrizations.weight[0].turned.fill_(1)
    after = step(net)
    assert not torch.equal(after, before) and torch.equal(after, step(copy.deepcopy(net)))


def test_batches_of_any_size_share_one_packed_chain(monkeypatch):
    net, packs = energy_net(), counted(monkeypatch)
    alone = [step(copy.deepcopy(net), x=images()[:n]) for n in (5, 4, 3)]
    del packs[:]
    assert all(torch.equal(step(net, x=images()[:n]), expected) for n, expected in zip((5, 4, 3), alone))
    assert len(packs) == 1
    in_data(net)
    assert torch.equal(step(net, x=images()[:4]), step(copy.deepcopy(net), x=images()[:4]))


def test_a_plan_keeps_the_weights_that_it_was_made_with():
    net, x = energy_net(), images()
    first = plan(net, x, "fp32")
    before = first.gradient(x)
    in_data(net)
    second = plan(net, x, "fp32")
    assert not torch.equal(second.gradient(x), before)
    assert torch.equal(first.gradient(x), before)
    first.refresh()
    assert torch.equal(first.gradient(x), second.gradient(x))


def test_weights_that_are_not_finite_are_refused_each_time_and_forgotten():
    net = energy_net()
    before = step(net)
    weight = net.layers[0].weight
    good = weight.detach().clone()
    weight.data.view(-1)[3] = torch.nan
    for _ in range(2):
        with pytest.raises(mg.DivergenceError, match="finite"):
            step(net)
    weight.data.copy_(good)
    assert torch.equal(step(net), before)


def test_an_update_packs_for_itself_and_leaves_what_is_kept():
    net = energy_net()
    before = step(net)
    with weights_stay():
        assert torch.equal(step(net), before)
    in_data(net)
    with weights_stay():
        within = step(net)
    assert not torch.equal(within, before) and torch.equal(step(net), within)


@pytest.mark.parametrize("steps", [1, 16])
@pytest.mark.parametrize("make", [sequential, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))])
def test_weights_that_torch_is_to_swap_are_not_referred_to(make, steps):
    net = make()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        mg.langevin_sample(net, images(), steps=steps, drift=0.5, noise_std=0.0)
        net.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(parameter.dtype == torch.float64 for parameter in net.parameters())


def test_nothing_keeps_the_energy_alive():
    net = energy_net()
    step(net)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
