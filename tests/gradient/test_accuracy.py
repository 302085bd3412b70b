"""How near ∇E of every plan, precision and norm mode that this machine has is to float64: Xavier weights, pixels 0–255.

`plan()` chooses, so that a plan added there is tested here. A bound method is a callable like any other, which gives
the autograd plan its turn.
"""

import copy
import statistics

import pytest
import torch
from helpers.cases import covering

from mgebm_fast.errors import BackendError
from mgebm_fast.gradient import PRECISIONS, plan
from mgebm_fast.nets import ConvSpec, EnergyNet, multigrid_net
from mgebm_fast.sampling import Langevin

NORMS = ("none", "frozen", "batch")
SHAPES = {"4": 4, "16": 3, "64": 2, "1d": 4, "3d": 3}  # and how many images: few, where no sign may flip by chance
WIDTHS = {"4": 1.0, "16": 0.25, "64": 0.125}
BOUNDS = {"bf16": 0.15, "fp16": 0.05}
# A pre-activation this far from 0, relative to its layer's root mean square, keeps its sign in float32.
MARGIN = 1e-5
# DESIGN §2 on the 0–255 scale; docs/reproducibility.md has what was measured.
SPLIT_TOLERANCE = 1e-3
CHAIN = dict(step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def images(net, n, seed):
    return 255 * torch.rand(n, net.channels, *net.size, generator=torch.Generator().manual_seed(seed))


def build(shape, norm, seed=0):
    trained = "none" if norm == "none" else "batch"
    if shape in WIDTHS:
        net = multigrid_net(int(shape), width=WIDTHS[shape], norm=trained, seed=seed)
    else:
        layers = [ConvSpec(12, 5, 2), ConvSpec(16, 3), ConvSpec(16, 3, 2)]
        net = EnergyNet(12 if shape == "1d" else 6, 2, layers, norm=trained, ndim=int(shape[0]), seed=seed)
    if norm != "frozen":
        return net
    with torch.no_grad(), net.observing():
        net(images(net, 32, seed + 1000))
    return net.freeze_norm()


def exact(net, x):
    """∇E in float64, and for each sample how near 0 its nearest pre-activation comes."""
    net, margins = copy.deepcopy(net).double(), []

    def look(module, inputs, h):
        y = torch.where(h > 0, h, h / net.negative_slope).detach()
        margins.append(y.abs().flatten(1).amin(1) / y.square().mean().sqrt())

    for layer in net.convolutions:
        layer.register_forward_hook(look)
    leaf = x.double().requires_grad_()
    return torch.autograd.grad(net(leaf).sum(), leaf)[0], torch.stack(margins).amin(0)


def error(got, expected):
    """Relative L2 over the batch."""
    assert got.shape == expected.shape
    return float((got.cpu().double() - expected).norm() / expected.norm())


def by_plan(energy, x, precision, device="cpu"):
    try:
        return plan(energy, x.to(device), precision)
    except BackendError as reason:
        pytest.skip(str(reason))


def as_energy(net, route):
    """The net itself, or a callable that only autograd can take."""
    return net if route == "module" else net.forward


def plain_torch(net, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(net(leaf).sum(), leaf)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("route", ["module", "callable"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_where_no_activation_changes_its_sign(shape, norm, route, device):
    if route == "callable" and device == "cuda":
        pytest.skip("autograd runs as torch is set, which is TF32 for convolutions on CUDA")
    # Batch statistics couple the samples: one sign too near 0 anywhere spoils the whole batch.
    for seed in range(20):
        net = build(shape, norm, seed)
        x = images(net, SHAPES[shape], seed)
        expected, margin = exact(net, x)
        if bool((margin > MARGIN).all()):
            break
    else:
        pytest.fail("no batch with clear signs in 20 seeds")
    net.to(device)
    got = by_plan(as_energy(net, route), x, "fp32", device).gradient(x.to(device))
    assert got.dtype == torch.float32
    assert error(got, expected) <= 1e-5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape, n", [("4", 32), ("16", 12)])  # enough for signs that flip in many of the batches
def test_fp32_is_as_near_as_plain_torch(shape, n, norm):
    ours, plain = [], []
    for seed in range(8):
        net = build(shape, norm, seed)
        x = images(net, n, seed)
        expected, _ = exact(net, x)
        ours.append(error(by_plan(net, x, "fp32").gradient(x), expected))
        plain.append(error(plain_torch(net, x), expected))
    assert statistics.median(ours) <= 2 * statistics.median(plain), (ours, plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sixteen_bits(shape, norm, precision, device):
    net = build(shape, norm)
    x = images(net, 16, 0)
    expected, _ = exact(net, x)
    got = by_plan(net.to(device), x, precision, device).gradient(x.to(device))
    assert error(got, expected) <= BOUNDS[precision]


@pytest.mark.parametrize("norm", NORMS)
def test_auto_is_one_of_the_named_precisions(norm):
    net = build("4", norm)
    x = images(net, 8, 0)
    auto = plan(net, x, "auto").gradient(x)
    named = [by_plan(net, x, precision).gradient(x) for precision in PRECISIONS if precision != "auto"]
    assert any(torch.equal(auto, got) for got in named)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def chain(energy, x, precision, steps=12, *, first_step=0, first_sample=0):
    try:
        return Langevin(steps, **CHAIN)(
            energy, x, seed=1, first_step=first_step, first_sample=first_sample, precision=precision
        )
    except BackendError as reason:
        pytest.skip(str(reason))


CASES = [("module", p) for p in ("fp32", "bf16", "fp16")] + [("callable", "fp32")]


@pytest.mark.parametrize(("shape", "norm", "case"), covering(list(SHAPES), NORMS, CASES))
def test_steps_in_one_call_are_single_calls_bit_for_bit(shape, norm, case):
    route, precision = case
    net = build(shape, norm)
    energy, x = as_energy(net, route), images(net, 5, 0)
    together = chain(energy, x, precision, 5)
    one_by_one = x
    for k in range(5):
        one_by_one = chain(energy, one_by_one, precision, 1, first_step=k)
    assert torch.equal(together, one_by_one)
    assert not torch.equal(together, x)


# The engine at every shape, autograd in two and in three dimensions, and both 16-bit types.
SPLITS = [(shape, "module", "fp32") for shape in SHAPES] + [(shape, "callable", "fp32") for shape in ("4", "3d")]
SPLITS += [("4", "module", "bf16"), ("1d", "module", "fp16")]


@pytest.mark.parametrize(("shape", "route", "precision"), SPLITS)
def test_split_threads_and_layout_change_a_chain_by_the_library_s_rounding_alone(shape, route, precision, threads):
    net = build(shape, "none")
    energy, x = as_energy(net, route), images(net, 5, 0)
    threads(1)
    whole = chain(energy, x, precision)
    others = {
        f"split {n}": torch.cat([chain(energy, x[i : i + n], precision, first_sample=i) for i in range(0, 5, n)])
        for n in (3, 1)
    }
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if layout is not None:
        others["layout"] = chain(energy, x.to(memory_format=layout), precision)
    threads(2)
    others["threads"] = chain(energy, x, precision)
    tolerance = SPLIT_TOLERANCE
    if precision != "fp32":
        # Sums that round to another 16-bit number move a chain by no more than the 16 bits themselves do.
        tolerance = max(tolerance, float((whole - chain(energy, x, "fp32")).abs().max()))
    moved = {what: float((other - whole).abs().max()) for what, other in others.items()}
    assert all(value <= tolerance for value in moved.values()), (moved, tolerance)
