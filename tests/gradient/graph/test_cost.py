"""Which engine a stack runs on, and that no bit shows it where the number of samples decides."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient import plan
from mgebm_fast.gradient.graph import cost
from mgebm_fast.gradient.stack import read
from mgebm_fast.ops.conv_chain import has_bfloat


def stack_of(seed: int, curved: bool = False) -> tuple[nn.Module, tuple[int, ...]]:
    """Two to four convolutions with leaky ReLUs or none, now and then none on top, or with SiLU and ELU; a linear
    layer; a sample's shape."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels, size = draw.choice([1, 3]), draw.choice([11, 16, 20])
    shape, modules = (channels, size, size + draw.choice([0, 3])), list[nn.Module]()
    for _ in range(draw.randint(2, 4)):
        wide, kernel, stride = draw.choice([8, 20, 33, 64]), draw.choice([1, 3, 4, 5]), draw.choice([1, 1, 2])
        modules.append(nn.Conv2d(channels, wide, kernel, stride, padding=draw.choice([0, kernel // 2])))
        modules.append(draw.choice([nn.SiLU(), nn.ELU()] if curved else [nn.Identity(), nn.ReLU(), nn.LeakyReLU(0.2)]))
        channels = wide
    net = nn.Sequential(*modules, nn.Flatten())
    features = net(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*net, nn.Linear(features, 1), nn.Flatten(0)).eval().requires_grad_(False), shape


def chain(net: nn.Module, x: Tensor, first_sample: int = 0) -> Tensor:
    return mg.langevin_sample(
        net, x, steps=3, step_size=0.2, precision="bf16", seed=3, first_sample=first_sample, clamp=(-2.0, 2.0)
    )


@pytest.mark.skipif(not has_bfloat(), reason="the CPU multiplies no bfloat16")
@pytest.mark.parametrize("seed", range(12))
def test_no_bit_shows_which_engine_a_batch_runs_on(seed: int) -> None:
    """19 samples in one call, and by calls of few: with AMX by another engine."""
    net, shape = stack_of(seed, curved=seed % 2 == 1)
    x = torch.randn(19, *shape)
    whole = chain(net, x)
    parts = [chain(net, x[first : first + some], first) for first, some in ((0, 1), (1, 3), (4, 8), (12, 7))]
    assert torch.equal(torch.cat(parts), whole)
    if native.isa() == "amx" and not isinstance(net[-4], nn.Identity):
        names = [str(plan(net, x[:n], "bf16", steps=9999).explain()).split(",")[0] for n in (1, 8, 9, 19)]
        assert names == ["graph", "graph", "native", "native"]


@pytest.mark.skipif(native.isa() != "amx", reason="without AMX bits differ")
def test_few_steps_of_a_small_stack_are_not_worth_packing_a_graph() -> None:
    net, x = mg.nets.multigrid_net(16, norm="none", variant="compact").requires_grad_(False), torch.randn(1, 3, 16, 16)
    few, many = plan(net, x, "bf16", steps=1), plan(net, x, "bf16", steps=100)
    assert str(few.explain()).startswith("native") and str(many.explain()).startswith("graph")
    assert torch.equal(few.gradient(x), many.gradient(x))


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_dense_layer_on_a_map_runs_as_a_graph_and_its_reading_is_kept(precision: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 100, 24), nn.ReLU(),
                        nn.Linear(24, 1), nn.Flatten(0)).requires_grad_(False)  # fmt: skip
    x = torch.randn(3, 3, 10, 10)
    assert str(plan(net, x, precision, steps=16).explain()).startswith("graph")
    first = mg.langevin_sample(net, x, steps=16, step_size=0.1, seed=0, precision=precision)
    assert torch.equal(mg.langevin_sample(net, x, steps=16, step_size=0.1, seed=0, precision=precision), first)
    with torch.no_grad():
        net[3].weight += 0.3  # weights may change from call to call
    changed = mg.langevin_sample(net, x, steps=16, step_size=0.1, seed=0, precision=precision)
    again = nn.Sequential(*net)  # read anew
    assert not torch.equal(changed, first)
    assert torch.equal(mg.langevin_sample(again, x, steps=16, step_size=0.1, seed=0, precision=precision), changed)


def test_threads_that_share_out_the_weights_of_a_dense_layer_change_no_bit() -> None:
    """A layer of more weights than caches hold, and fewer groups of samples than would keep threads busy."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 1600, 100), nn.ReLU(),
                        nn.Linear(100, 1), nn.Flatten(0)).requires_grad_(False)  # fmt: skip
    x, before = torch.randn(5, 3, 40, 40), torch.get_num_threads()
    precisions = ["fp32", "bf16"] if has_bfloat() else ["fp32"]
    try:
        for precision in precisions:
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(mg.langevin_sample(net, x, steps=2, step_size=0.2, precision=precision, seed=1))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


def test_a_settled_batch_of_whole_blocks_is_taken_by_the_engine_of_stacks():
    net = mg.nets.multigrid_net(16, 3, variant="compact", norm="none")
    for samples, inside in ((64, "native"), (24, "graph")):
        stack = read(net, torch.zeros(samples, 3, 16, 16))
        assert cost.fastest(stack, samples, "fp32")[0] == "graph"
        with cost.settled_batch():
            assert cost.fastest(stack, samples, "fp32")[0] == inside
        assert cost.fastest(stack, samples, "fp32")[0] == "graph"


def test_an_energy_that_is_another_one_at_each_call_is_left_to_autograd_where_reading_does_not_pay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(288, 1), nn.Flatten(0))
    few, many = torch.randn(2, 3, 8, 8), torch.randn(2000, 3, 8, 8)

    def tempered(t: float) -> Callable[[Tensor], Tensor]:
        return lambda x: (net(x) / t).sin()

    def asked(energy: Callable[[Tensor], Tensor], x: Tensor, steps: int = 16) -> str:
        return str(plan(energy, x, "fp32", steps=steps).explain())

    for t in range(1, 4):
        assert asked(tempered(t), few).startswith("graph")
    report = asked(tempered(4.5), few)
    assert report.startswith("autograd") and "3 readings in turn served one call each" in report
    # Where there is more to gain it is read all the same, and one that is used again counts from anew.
    assert asked(tempered(5.5), many, 100).startswith("graph")
    assert asked(tempered(5.5), many, 100).startswith("graph")
    for t in range(6, 9):
        assert asked(tempered(t), few).startswith("graph")
    assert asked(tempered(9), few).startswith("autograd")
