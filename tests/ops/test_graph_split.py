"""graph_chain's dense layers as sums of three products of bfloat16, and the last function before a known gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.graph_functions import DOMAIN, NUMBERS, float32_error
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient.graph import plan, read_graph
from mgebm_fast.ops.graph_chain import GraphChain, forward, gradient_reference, layers
from mgebm_fast.ops.graph_chain.graph import Graph
from mgebm_fast.ops.graph_chain.layers import FUNCTIONS, Map

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills no tile is split too."""
    monkeypatch.setattr(forward, "MIN_SPLIT", 32)


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(3)
    parts = [part for pair in zip(widths, widths[1:]) for part in (nn.Linear(*pair), nn.SiLU())]
    return nn.Sequential(*parts, nn.Linear(widths[-1], 1), nn.Flatten(0)).requires_grad_(False)


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16", "amx"])
def test_split_dense_layers(isa: str) -> None:
    """Within 2⁻¹⁴ of float64, where one product of bfloat16 is off by 2⁻⁹, whatever is left over of tiles."""
    module, before = native.module(), native.isa()
    if not module.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    try:
        for widths in ((2, 64, 64), (2, 40, 33, 47), (70, 96, 130)):
            net = mlp(*widths)
            for samples in (1, 17, 100):
                x = 2 * torch.randn(samples, widths[0])
                graph = read_graph(net, x)
                split, exact = GraphChain(graph, split=True), gradient_reference(graph, x)
                assert split.split and relative(split.gradient(x), exact) < 2**-14
    finally:
        assert module.set_isa(before)


def test_no_bit_of_a_split_product_depends_on_threads_or_batch() -> None:
    net, x, before = mlp(3, 48, 80), torch.randn(77, 3), torch.get_num_threads()
    packed = GraphChain(read_graph(net, x), split=True)
    assert packed.split
    try:
        torch.set_num_threads(1)
        whole = packed.gradient(x)
        torch.set_num_threads(3)
        assert torch.equal(packed.gradient(x), whole)
        assert torch.equal(packed.gradient(x[70:]), whole[70:]) and torch.equal(packed.gradient(x[:1]), whole[:1])
    finally:
        torch.set_num_threads(before)


def test_auto_splits_on_amx_and_follows_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.native, "isa", lambda: "amx")
    net = mlp(2, 64, 64)
    x = torch.randn(40, 2)
    for step in range(3):
        made = plan.plan_of(net, x, "test", "auto")
        assert not isinstance(made, str)
        graph = read_graph(net, x)
        assert torch.equal(made.gradient(x), GraphChain(graph, split=True).gradient(x))
        assert made.explain().precision == "fp32" and "three products of bfloat16" in str(made.explain())
        exactly = plan.plan_of(net, x, "test", "fp32")
        assert torch.equal(exactly.gradient(x), GraphChain(graph).gradient(x))
        assert not torch.equal(exactly.gradient(x), made.gradient(x))
        for parameter in net.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1 * (step + 1))


def test_weights_of_split_products_lie_side_by_side() -> None:
    """Also where a dense layer is left out, as is the way back of one behind which nothing is needed: there is room for
    no others'."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    net, x = net.requires_grad_(False), torch.randn(40, 64)
    graph = read_graph(lambda x: net(x).squeeze(1), x)
    split = GraphChain(graph, split=True)
    assert [step.split for step in split._program.steps if step.split >= 0] == [2 * 64 * 64 * i for i in range(4)]
    assert relative(split.gradient(x), gradient_reference(graph, x)) < 2**-14


def test_narrow_layers_are_not_split() -> None:
    net, x = mlp(2, 16, 16), torch.randn(5, 2)
    graph = read_graph(net, x)
    split = GraphChain(graph, split=True)
    assert not split.split and torch.equal(split.gradient(x), GraphChain(graph).gradient(x))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_last_function_before_a_known_gradient(name: str, isa: str) -> None:
    """A number a channel (features, and a mean over pixels) and one an element."""
    module, before = native.module(), native.isa()
    if not module.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    a, b = NUMBERS.get(name, (0.0, 0.0))
    draw = torch.Generator().manual_seed(7)
    one, none = (1, 1), (0, 0)
    weight = torch.randn(21, 3, 3, 3, generator=draw)
    bias = torch.full((21,), 60.0) if name in DOMAIN else torch.randn(21, generator=draw)
    first = layers.Convolution((0,), Map(21, (5, 4)), "conv", weight / 5, bias, one, one, one)
    act = layers.Pointwise((1,), Map(21, (5, 4)), "f", name, a, b)
    even = torch.randn(1, 21, 1, 1, generator=draw).expand(1, 21, 5, 4).contiguous()
    uneven = torch.randn(1, 21, 5, 4, generator=draw)
    try:
        for head in (even, uneven):
            top = layers.Convolution((2,), Map(1, ()), "sum", head, None, one, none, one)
            graph = Graph(Map(3, (5, 4)), (first, act, top))
            chain, x = GraphChain(graph), torch.randn(6, 3, 5, 4, generator=draw)
            assert [step.kind for step in chain._program.steps].count("fill") == 0
            exact = gradient_reference(graph, x)
            error = float((chain.gradient(x).double() - exact).norm())
            assert error <= 2 * float32_error(graph, x, exact) + 3e-6 * float(exact.norm()) + 1e-7
    finally:
        assert module.set_isa(before)


def test_a_value_that_others_read_is_made() -> None:
    """The last function's value also enters a product: its slope times a known gradient is not all that is needed."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first, self.head = nn.Linear(4, 40), nn.Linear(40, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(self.first(x))
            return self.head(h)[:, 0] + (h * h).sum(1)

    net, x = Twice().requires_grad_(False), torch.randn(9, 4)
    graph = read_graph(net, x)
    exact = gradient_reference(graph, x)
    assert float((GraphChain(graph).gradient(x).double() - exact).norm()) <= 2 * float32_error(graph, x, exact)


def test_chains_of_points_have_their_law_by_split_products() -> None:
    """E = |x|²/2 + a small net: K steps by split products stay within rounding of those in float32."""
    net, x = mlp(2, 64, 64), torch.randn(256, 2)
    graph = read_graph(lambda x: net(x) + x.square().sum(1) / 2, x)
    runs = []
    for split in (False, True):
        numbers = mg.ops.update.prepare(
            "test", x, None, steps=200, step_size=0.1, noise_scale=1.0, drift=None, noise_std=None, reference_std=None,
            reference_mean=0.0, grad_clamp=None, clamp=None, seed=5, first_sample=0, step=0, stream=0,
        )  # fmt: skip
        state = x.clone()
        GraphChain(graph, split=split).advance_(state, 200, numbers[0], numbers[2])
        runs.append(state)
    assert 0 < float((runs[0] - runs[1]).norm() / runs[0].norm()) < 1e-4
