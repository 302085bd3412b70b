"""graph_chain against its float64 reference on random graphs, and what it promises: no bit depends on threads, the
split of a batch or of the steps."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.graph_functions import DOMAIN, NUMBERS, float32_error
from torch import Tensor

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.ops.graph_chain import GraphChain, gradient_reference, graph_chain, layers
from mgebm_fast.ops.graph_chain.graph import Graph
from mgebm_fast.ops.graph_chain.layers import FUNCTIONS, Map

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")

MILD = [name for name in FUNCTIONS if name not in {"exp", "log", "sqrt", "root", "power"}]


class Maker:
    """A random graph, layer by layer."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        dims = self.draw.choice([0, 1, 2, 2, 2, 3])
        size = tuple(self.draw.randint(3, {1: 20, 2: 9, 3: 5}[dims]) for _ in range(dims))
        self.x = Map(self.draw.choice([1, 2, 3, 17]), size)
        self.layers: list[layers.Layer] = []
        self.shapes = [self.x]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def add(self, kind: type, inputs: tuple[int, ...], out: Map, *fields: object) -> int:
        self.layers.append(kind(inputs, out, kind.__name__, *fields))
        self.shapes.append(out)
        return len(self.layers)

    def convolve(self, at: int, channels: int, *, same: bool = False, depthwise: bool = False) -> int:
        shape = self.shapes[at]
        dims = len(shape.size)
        if same:
            kernel, stride, padding, dilation = (3,) * dims, (1,) * dims, (1,) * dims, (1,) * dims
        else:
            kernel = tuple(self.draw.randint(1, min(4, n)) for n in shape.size)
            stride = tuple(self.draw.choice([1, 1, 2]) for _ in kernel)
            padding = tuple(self.draw.randint(0, k - 1) for k in kernel)
            dilation = tuple(self.draw.choice([1, 1, 2]) if (k - 1) * 2 < n else 1 for k, n in zip(kernel, shape.size))
        size = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(shape.size, kernel, stride, padding, dilation)
        )
        read = 1 if depthwise else shape.channels
        weight = self.normal(channels, read, *kernel) / max(1, weight_fan(read, kernel)) ** 0.5
        bias = self.normal(channels) if self.draw.random() < 0.7 else None
        kind = layers.Depthwise if depthwise else layers.Convolution
        return self.add(kind, (at,), Map(channels, size), weight, bias, stride, padding, dilation)

    def function(self, at: int) -> int:
        name = self.draw.choice([name for name in FUNCTIONS if name != "step"])  # whose jumps show rounding
        if name in DOMAIN:
            at = self.add(layers.Pointwise, (at,), self.shapes[at], "softplus", 1.0, 20.0)
        if name in ("exp", "power"):
            at = self.add(layers.Pointwise, (at,), self.shapes[at], "tanh")
        return self.add(layers.Pointwise, (at,), self.shapes[at], name, *NUMBERS.get(name, (0.0, 0.0)))

    def more(self, at: int) -> int:
        shape = self.shapes[at]
        kind = self.draw.choice(
            [
                "conv",
                "conv",
                "each",
                "move",
                "act",
                "act",
                "res",
                "pool",
                "max",
                "norm",
                "affine",
                "mul",
                "cut",
                "cat",
                "up",
            ]
        )
        if kind == "each" and shape.size:
            return self.convolve(at, shape.channels, depthwise=True)
        if kind == "move":
            elements = shape.channels * shape.pixels
            channels = self.draw.choice([1, shape.channels, shape.pixels])
            size = self.draw.choice([(), (3,), (2, 2)])
            count = channels * Map(channels, size).pixels
            places = tuple(self.draw.randrange(elements) for _ in range(count))
            return self.add(layers.Rearrange, (at,), Map(channels, size), places)
        if kind == "conv":
            return self.convolve(at, self.draw.choice([1, 5, 16, 20, 33]))
        if kind == "act":
            return self.function(at)
        if kind == "res":  # a block with a skip, the function before the convolutions
            inner = self.convolve(self.function(at), shape.channels, same=True)
            inner = self.convolve(self.function(inner), shape.channels, same=True)
            return self.add(layers.Add, (inner, at), shape, self.draw.choice([1.0, 1.0, -0.5]))
        if kind == "up" and shape.size and shape.pixels < 40:
            kernel, stride = (tuple(self.draw.randint(1, 3) for _ in shape.size) for _ in range(2))
            padding, dilation = (tuple(self.draw.randint(0, 1) for _ in shape.size), (1,) * len(shape.size))
            more = tuple(self.draw.randint(0, s - 1) for s in stride)
            numbers = zip(shape.size, kernel, stride, padding, more)
            size = tuple((n - 1) * s + k - 2 * p + m for n, k, s, p, m in numbers)
            if min(size) < 1:
                return at
            fields = self.normal(shape.channels, 5, *kernel) / 3, self.normal(5), stride, padding, dilation
            return self.add(layers.Transposed, (at,), Map(5, size), *fields)
        if kind == "pool" and shape.size:
            axes = []
            for n in shape.size:
                axis = []
                for _ in range(self.draw.randint(1, n)):
                    start = self.draw.randint(0, n - 1)
                    taps = range(start, min(n, start + self.draw.randint(0, 3)))
                    axis.append(tuple((at_, self.draw.uniform(-1, 1)) for at_ in taps))
                axes.append(tuple(axis))
            return self.add(layers.Gather, (at,), Map(shape.channels, tuple(map(len, axes))), tuple(axes))
        if kind == "max" and shape.size and min(shape.size) >= 3:
            kernel = (2,) * len(shape.size)
            pad = self.draw.choice([0, 1])
            size = tuple((n + 2 * pad - 2) // 2 + 1 for n in shape.size)
            return self.add(
                layers.MaxPool,
                (at,),
                Map(shape.channels, size),
                kernel,
                kernel,
                (pad,) * len(kernel),
                (1,) * len(kernel),
            )
        if kind == "norm" and shape.pixels * shape.channels > 3:
            groups = self.draw.choice([g for g in (1, shape.channels) if g * 2 <= shape.channels * shape.pixels])
            parts = (
                (None, None) if self.draw.random() < 0.3 else (self.normal(shape.channels), self.normal(shape.channels))
            )
            return self.add(layers.GroupNorm, (at,), shape, groups, 1e-2, *parts)
        if kind == "affine":
            whole = self.draw.random() < 0.5
            form = (shape.channels, *shape.size) if whole else (shape.channels,)
            return self.add(
                layers.Affine, (at,), shape, self.normal(*form), self.draw.choice([None, self.normal(*form)])
            )
        if kind == "mul":
            return self.add(layers.Multiply, (at, self.add(layers.Pointwise, (at,), shape, "sigmoid")), shape)
        if kind == "cut" and shape.channels > 2:
            start = self.draw.randint(0, shape.channels - 2)
            return self.add(layers.Slice, (at,), Map(self.draw.randint(1, shape.channels - start), shape.size), start)
        if kind == "cat":
            other = self.convolve(at, 3, same=True)
            return self.add(layers.Concat, (other, at, at), Map(3 + 2 * shape.channels, shape.size))
        return at

    def graph(self) -> Graph:
        at = 0
        for _ in range(self.draw.randint(1, 7)):
            at = self.more(at)
        shape = self.shapes[at]
        ones = (1,) * len(shape.size)
        features = self.draw.choice([1, 6])
        weight = self.normal(features, shape.channels, *shape.size) / (shape.channels * shape.pixels) ** 0.5
        at = self.add(layers.Convolution, (at,), Map(features, ()), weight, None, ones, (0,) * len(ones), ones)
        if features > 1:
            self.add(layers.LogSumExp, (at,), Map(1, ()))
        return Graph(self.x, tuple(self.layers))


def weight_fan(channels: int, kernel: tuple[int, ...]) -> int:
    fan = channels
    for k in kernel:
        fan *= k
    return fan


def state_of(graph: Graph, samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, graph.x.channels, *graph.x.size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(60))
def test_gradient_of_random_graphs(seed: int) -> None:
    graph = Maker(seed).graph()
    x = state_of(graph, 1 + seed % 5, seed)
    exact = gradient_reference(graph, x)
    got = GraphChain(graph).gradient(x)
    error = float((got.double() - exact).norm())
    # Twice torch's own rounding, or that of a few operations where torch's happens to be smaller.
    assert error <= 2 * float32_error(graph, x, exact) + 3e-6 * float(exact.norm()) + 1e-7, graph


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_gradient_by_each_instruction_set(isa: str) -> None:
    module, before = native.module(), native.isa()
    if not module.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    try:
        for seed in range(100, 106):
            graph = Maker(seed).graph()
            x = state_of(graph, 3, seed)
            exact = gradient_reference(graph, x)
            error = float((GraphChain(graph).gradient(x).double() - exact).norm())
            assert error <= 2 * float32_error(graph, x, exact) + 3e-6 * float(exact.norm()) + 1e-7
    finally:
        assert module.set_isa(before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_their_slopes(name: str) -> None:
    """On a grid from −30 to 30, against float64; what float32 cannot hold (e³⁰ is fine) is not asked."""
    a, b = NUMBERS.get(name, (0.0, 0.0))
    points = torch.linspace(-30, 30, 2403)[None]
    points = points[points != 0][None]
    if name in DOMAIN:
        points = points.abs()
    flat = Map(points.shape[1], ())
    once = layers.Pointwise((0,), flat, "f", name, a, b)
    # E = Σ f(x)²/2 has the gradient f(x) f′(x); Σ f(x) has f′(x).
    ones = layers.Convolution((1,), Map(1, ()), "sum", torch.ones(1, points.shape[1]), None, (), (), ())
    slope = Graph(flat, (once, ones))
    both = Graph(flat, (once, layers.Pointwise((1,), flat, "square", "power", 2.0), ones_from(2, points.shape[1])))
    for graph in (slope, both):
        exact = gradient_reference(graph, points)
        scale = exact.abs().clamp_min(1.0)
        assert float(((GraphChain(graph).gradient(points).double() - exact).abs() / scale).max()) < 2e-6


EDGES = {
    "exp": (-103.0, -90.0, -87.4, 0.0, 1e-6, 50.0, 88.7),
    "log": (1e-44, 1e-39, 1.2e-38, 1e-20, 0.999999, 1.000001, 3.4e38),
    "sin": (0.0, 1e-30, 3.1415927, -1e3, 8e3, -8.1e3),
    "cos": (0.0, 1e-30, 1.5707964, -1e3, 8e3, -8.1e3),
    "sin far out": (0.5, -8.3e3, 1e6),
    "cos far out": (0.5, -8.3e3, 1e6),
}


@pytest.mark.parametrize("case", EDGES)
def test_functions_at_the_ends_of_their_range(case: str) -> None:
    """Of E = Σ f(x) y the gradient in y is f(x), and at y = 1 the one in x is f′(x)."""
    name, points = case.split()[0], torch.tensor(EDGES[case])
    half = Map(len(points), ())
    graph = Graph(Map(2 * len(points), ()), (
        layers.Slice((0,), half, "x", 0), layers.Slice((0,), half, "y", len(points)),
        layers.Pointwise((1,), half, "f", name), layers.Multiply((3, 2), half, "product"), ones_from(4, len(points)),
    ))  # fmt: skip
    x = torch.cat([points, torch.ones(len(points))])[None]
    exact, got = gradient_reference(graph, x)[0], GraphChain(graph).gradient(x)[0].double()
    held = exact.abs() < torch.finfo(torch.float32).max  # 1 / x of a subnormal x is not
    least = 2e-7 if name in ("sin", "cos") else 3e-45  # ulps of subnormals are 1.4e-45
    torch.testing.assert_close(got[held], exact[held], rtol=3e-7, atol=least)
    assert got[~held].isinf().all()


def of_rows(n: int, generator: torch.Generator) -> Graph:
    """Scales and shifts of each of n samples, of channels and of elements, and constants beside channels."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, pair, four = Map(3, (4, 3)), Map(5, (4, 3)), Map(17, (4, 3))
    rows = (
        layers.Affine((0,), x, "elements", normal(n, 3, 4, 3), normal(n, 3, 1, 1)),
        layers.Constant((), Map(2, (4, 3)), "planes", normal(n, 2, 4, 3)),
        layers.Concat((2, 1), pair, "joined"),
        layers.Convolution((3,), four, "conv", normal(17, 5, 3, 3) / 7, None, (1, 1), (1, 1), (1, 1)),
        layers.Affine((4,), four, "channels", normal(n, 17, 1, 1), normal(17)),
        layers.Pointwise((5,), four, "act", "silu"),
        layers.Convolution((6,), Map(6, ()), "dense", normal(6, 17, 4, 3) / 14, normal(6), (1, 1), (0, 0), (1, 1)),
        layers.Affine((7,), Map(6, ()), "features", normal(n, 6), None),
        layers.LogSumExp((8,), Map(1, ()), "top"),
        layers.Affine((9,), Map(1, ()), "temperatures", normal(n, 1).exp(), None),
    )
    return Graph(x, rows)


def rows_of(graph: Graph, which: slice) -> Graph:
    """The same of some of its samples."""
    parts = {
        name: {field: value[which] for field, value in vars(layer).items() if isinstance(value, Tensor) and layer.rows
               and value.dim() == len(layer.out.size) + 2}
        for name, layer in enumerate(graph.layers)
    }  # fmt: skip
    return Graph(graph.x, tuple(dataclasses.replace(layer, **parts[i]) for i, layer in enumerate(graph.layers)))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_constants_of_each_sample(isa: str) -> None:
    """Whatever group or thread takes a sample, and whatever samples are beside it, one of its own alone as well."""
    graph = of_rows(75, torch.Generator().manual_seed(0))
    module, before, threads = native.module(), native.isa(), torch.get_num_threads()
    if not module.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    x = state_of(graph, 75)
    exact = gradient_reference(graph, x)
    try:
        assert float((GraphChain(graph).gradient(x).double() - exact).norm()) <= 2 * float32_error(graph, x, exact)
        whole = chain(graph, x)
        torch.set_num_threads(3)
        assert torch.equal(chain(graph, x), whole)
        for first, last in ((0, 1), (1, 33), (33, 75)):
            some = rows_of(graph, slice(first, last))
            assert some.samples == (last - first if last - first > 1 else None)
            assert torch.equal(chain(some, x[first:last], first_sample=first), whole[first:last])
    finally:
        torch.set_num_threads(threads)
        assert module.set_isa(before)
    with pytest.raises(ValueError, match="75 samples of the graph's constants, got 74"):
        GraphChain(graph).gradient(x[:74])


def ones_from(value: int, features: int) -> layers.Convolution:
    return layers.Convolution((value,), Map(1, ()), "sum", torch.ones(1, features), None, (), (), ())


def chain(graph: Graph, x: Tensor, steps: int = 3, **more: object) -> Tensor:
    numbers = {"step_size": 0.05, "reference_std": 1.5, "grad_clamp": 5.0, "clamp": (-3.0, 3.0), "seed": 7, **more}
    return graph_chain(graph, x, steps=steps, **numbers)  # type: ignore[arg-type]


class Rounded(torch.autograd.Function):
    """A convolution's products by bfloat16 operands, forward and backward, in float64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: layers.Convolution, backward_only: bool) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return exactly(layer, x if backward_only else bfloat(x), weight if backward_only else bfloat(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            x = torch.zeros(ctx.shape, dtype=torch.float64, requires_grad=True)
            out = exactly(ctx.layer, x, bfloat(ctx.layer.weight.double()))
            return torch.autograd.grad(out, x, bfloat(grad))[0], None, None, None


def bfloat(t: Tensor) -> Tensor:
    return t.bfloat16().double()


def exactly(layer: layers.Convolution, x: Tensor, weight: Tensor) -> Tensor:
    return layers.Convolution.reference(dataclasses.replace(layer, weight=weight, bias=None), x)


def two_products() -> Graph:
    """A strided convolution with padding and one over all of its map, curved between and after."""
    draw = torch.Generator().manual_seed(5)
    normal = functools.partial(torch.randn, generator=draw)
    ones, none = (1, 1), (0, 0)
    return Graph(Map(3, (9, 7)), (
        layers.Convolution((0,), Map(20, (9, 7)), "a", normal(20, 3, 3, 3) / 5, normal(20), ones, ones, ones),
        layers.Pointwise((1,), Map(20, (9, 7)), "f", "silu"),
        layers.Convolution((2,), Map(50, (5, 4)), "b", normal(50, 20, 3, 3) / 13, normal(50), (2, 2), ones, ones),
        layers.Pointwise((3,), Map(50, (5, 4)), "f", "tanh"),
        layers.Convolution((4,), Map(40, ()), "c", normal(40, 50, 5, 4) / 31, normal(40), ones, none, ones),
        layers.LogSumExp((5,), Map(1, ()), "e"),
    ))  # fmt: skip


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512bf16", "amx"])
def test_products_in_bfloat16(isa: str) -> None:
    """Against the same graph in float64 with operands rounded where the engine rounds them: all products but the one
    that reads x."""
    module, before = native.module(), native.isa()
    if not module.set_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    try:
        graph = two_products()
        for samples in (1, 3, 40):
            x = state_of(graph, samples)
            exact = gradient_reference(graph, x)
            at = x.double().requires_grad_()
            values = [at]
            for i, layer in enumerate(graph.layers):
                inputs = [values[v] for v in layer.inputs]
                if isinstance(layer, layers.Convolution):
                    value = Rounded.apply(*inputs, layer.weight.double(), layer, i == 0)
                    bias = layer.bias.double().reshape(-1, *[1] * len(layer.out.size))
                    values.append(value.reshape(samples, layer.out.channels, *layer.out.size) + bias)
                else:
                    values.append(layer.reference(*inputs))
            rounded = torch.autograd.grad(values[-1].sum(), at)[0]
            got = GraphChain(graph, bfloat=True).gradient(x).double()
            # A float32 that falls to the other side of a bfloat16's middle moves by a whole unit: a few do.
            assert float((got - rounded).norm()) < 0.1 * float((rounded - exact).norm())
            assert 1e-4 < float((got - exact).norm() / exact.norm()) < 0.02
    finally:
        assert module.set_isa(before)


def test_no_bit_of_bfloat16_depends_on_threads_or_batch() -> None:
    graph = two_products()
    x, packed, before = state_of(graph, 37), GraphChain(graph, bfloat=True), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = packed.gradient(x)
        torch.set_num_threads(3)
        assert torch.equal(packed.gradient(x), whole)
        assert torch.equal(packed.gradient(x[30:]), whole[30:]) and torch.equal(packed.gradient(x[:1]), whole[:1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", [3, 4, 8, 11, 17, 200])
def test_no_bit_depends_on_threads_batch_or_split(seed: int) -> None:
    graph = Maker(seed).graph()
    x = state_of(graph, 21, seed)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = chain(graph, x)
        torch.set_num_threads(3)
        assert torch.equal(chain(graph, x), whole)
        assert torch.equal(chain(graph, x[:2]), whole[:2])  # fewer samples than threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([chain(graph, x[:5]), chain(graph, x[5:], first_sample=5)]), whole)
    state = x
    for k in range(3):
        state = chain(graph, state, 1, first_step=k)
    assert torch.equal(state, whole)
    ids = torch.arange(21).flip(0)
    assert torch.equal(chain(graph, x.flip(0), first_sample=ids), whole.flip(0))


@pytest.mark.parametrize("width", [3, 33, 130])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_few_outputs_are_summed_as_many_are(channels: int, width: int) -> None:
    """The gradient in an image of few channels has rows for lanes; with channels that nothing reads it has not."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(width, channels, 3, 3, generator=generator), torch.randn(5, channels, 7, 7)
    head = torch.randn(1, width, 7, 7, generator=generator)

    def gradient(unread: int) -> Tensor:
        more, ones = (0, 0, 0, 0, 0, unread), (1, 1)
        graph = Graph(Map(channels + unread, (7, 7)), (
            layers.Convolution((0,), Map(width, (7, 7)), "a", F.pad(weight, more), None, ones, ones, ones),
            layers.Pointwise((1,), Map(width, (7, 7)), "f", "tanh"),
            layers.Convolution((2,), Map(1, ()), "s", head, None, ones, (0, 0), ones),
        ))  # fmt: skip
        return GraphChain(graph).gradient(F.pad(x, more))[:, :channels]

    assert torch.equal(gradient(0), gradient(4))


def test_large_maps_are_shared_by_threads() -> None:
    """A few samples of a large map: every step is shared out, with the same bits."""
    weight = torch.randn(48, 3, 3, 3) / 5
    second = torch.randn(48, 48, 3, 3) / 20
    size, ones = (40, 40), (1, 1)
    graph = Graph(Map(3, size), (
        layers.Convolution((0,), Map(48, size), "a", weight, torch.randn(48), ones, ones, ones),
        layers.Pointwise((1,), Map(48, size), "f", "silu"),
        layers.Convolution((2,), Map(48, size), "b", second, None, ones, ones, ones),
        layers.GroupNorm((3,), Map(48, size), "n", 4, 1e-5, None, None),
        layers.Pointwise((4,), Map(48, size), "f", "gelu"),
        layers.Convolution((5,), Map(1, ()), "s", torch.randn(1, 48, *size), None, ones, (0, 0), ones),
    ))  # fmt: skip
    x = torch.randn(1, 3, *size)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = chain(graph, x, grad_clamp=None)
        torch.set_num_threads(2)
        assert torch.equal(chain(graph, x, grad_clamp=None), one)
    finally:
        torch.set_num_threads(before)
    exact = chain(graph, x, grad_clamp=None, backend="reference")
    assert float((one - exact).norm()) < 1e-5 * float(exact.norm())


@pytest.mark.parametrize("seed", [1, 2, 5, 9])
def test_chain_against_the_reference(seed: int) -> None:
    graph = Maker(seed).graph()
    x = state_of(graph, 4, seed)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    got, exact = (chain(graph, x, mask=mask, backend=backend) for backend in ("native", "reference"))
    assert torch.equal(got[~mask], x[~mask])
    assert float((got - exact).norm()) < 1e-4 * float(exact.norm())


def test_layouts_and_views() -> None:
    graph = next(g for g in (Maker(s).graph() for s in range(50)) if len(g.x.size) == 2 and g.x.channels > 1)
    x = state_of(graph, 4)
    plain = chain(graph, x)
    assert torch.equal(chain(graph, x.to(memory_format=torch.channels_last)), plain)
    assert torch.equal(chain(graph, torch.cat([x, x], 1)[:, : x.shape[1]]), plain)
    packed = GraphChain(graph)
    assert torch.equal(packed.gradient(x.to(memory_format=torch.channels_last)), packed.gradient(x))
    assert packed.gradient(x[:0]).shape == x[:0].shape


def test_refusals() -> None:
    graph = Maker(1).graph()
    packed = GraphChain(graph)
    with pytest.raises(TypeError, match="float32"):
        packed.gradient(state_of(graph, 2).double())
    with pytest.raises(ValueError, match="elements a sample"):
        packed.gradient(torch.zeros(2, 1 + graph.x.channels * graph.x.pixels))
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copier(packed)
    lost = Graph(
        Map(2, ()), (layers.Convolution((0,), Map(1, ()), "w", torch.tensor([[1.0, torch.nan]]), None, (), (), ()),)
    )
    assert torch.isnan(GraphChain(lost).gradient(torch.zeros(3, 2))).all()


def test_law_of_a_gaussian() -> None:
    """E = ‖x‖²/2σ² by graph: the discretised chain's own variance, δ²/(1 − (1 − δ²/2σ²)²), within five deviations."""
    sigma, delta = 0.7, 0.4
    graph = Graph(Map(2, ()), (
        layers.Pointwise((0,), Map(2, ()), "square", "power", 2.0),
        layers.Convolution((1,), Map(1, ()), "sum", torch.full((1, 2), 0.5 / sigma**2), None, (), (), ()),
    ))  # fmt: skip
    x = graph_chain(graph, torch.zeros(20_000, 2), steps=200, step_size=delta, seed=3)
    expected = delta**2 / (1 - (1 - delta**2 / (2 * sigma**2)) ** 2)
    assert abs(float(x.var()) / expected - 1) < 5 * (2 / x.numel()) ** 0.5
    assert abs(float(x.mean())) < 5 * (expected / x.numel()) ** 0.5


def test_public_name() -> None:
    assert mg.ops.graph_chain is graph_chain
