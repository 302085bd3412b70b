"""Readings that would be nearly right, or leave something behind: what is refused, and what is read as torch has it."""

from __future__ import annotations

import collections
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient.autograd import AutogradPlan
from mgebm_fast.gradient.base import GradientPlan
from mgebm_fast.gradient.graph import MIN_STEPS
from mgebm_fast.gradient.plan import plan

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")

Energy = Callable[[Tensor], Tensor]


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * x.flatten(1).pow(2).sum(1)


def plan_of(energy: Energy, x: Tensor) -> GradientPlan:
    return plan(energy, x, steps=MIN_STEPS)


def points(n: int = 5, d: int = 6) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


_normed = torch.nn.InstanceNorm2d(1, affine=True, track_running_stats=True)
_normed(2 + 3 * torch.randn(16, 1, 2, 3))
_normed.eval()
_outside = torch.nn.Parameter(torch.eye(6) / 2)


@pytest.mark.parametrize(
    "energy",
    [
        lambda x: quadratic(x) + 0.004 * (x.detach() * x).sum(1),
        lambda x: quadratic(x) + 0.004 * (x.data * x).sum(1),
        lambda x: quadratic(x) + 0.004 * ((x @ _outside).sigmoid().detach() * x).sum(1),
        lambda x: quadratic(x) * (1 + 0.003 * float(x.detach().numpy().mean() > 0)),
        lambda x: quadratic(x) * (1 + 0.003 * len(x)),
        lambda x: quadratic(x) * (3 if len(x) == 5 else 1),
        lambda x: quadratic(x) + 0.005 * (x * x.flip(0)).sum(1),
        lambda x: _normed(x.reshape(-1, 1, 2, 3)).pow(3).sum((1, 2, 3)),
    ],
    ids="detach data outside_weight numpy samples one_size coupled running_instance_norm".split(),
)
def test_a_reading_that_is_nearly_right_is_none(energy: Energy) -> None:
    assert plan_of(energy, points()).explain().plan == "autograd"


def test_an_energy_that_catches_the_refusal_is_not_read() -> None:
    def energy(x: Tensor) -> Tensor:
        try:
            return quadratic(x) + 1e-5 * torch.where(x != 0, x, 0).sum(1)
        except Exception:
            return quadratic(x)

    report = plan_of(energy, points()).explain()
    assert report.plan == "autograd" and "ne " in report.why_not_faster[-1]


def test_what_was_trusted_without_a_gradient_is_compared_again() -> None:
    head = torch.nn.Linear(6, 1, bias=False)
    torch.nn.init.zeros_(head.weight)
    apart = 1.0

    def energy(x: Tensor) -> Tensor:
        return head(x)[:, 0] * (apart if len(x) > 3 else 1.0)

    assert plan_of(energy, points()).explain().plan == "graph"
    torch.nn.init.ones_(head.weight)
    apart = 3.0
    assert plan_of(energy, points()).explain().plan == "autograd"


@pytest.mark.parametrize(
    "hook",
    [
        lambda h: h.register_hook(lambda g: 3 * g),
        lambda h: h.grad_fn.register_hook(lambda inputs, outputs: (3 * inputs[0],)),
        lambda h: torch.autograd.graph.register_multi_grad_hook((h,), lambda gradients: None),
    ],
    ids="tensor node several".split(),
)
def test_code_with_hooks_is_run_at_every_step(hook: Callable[[Tensor], object]) -> None:
    hooks = False

    def hooked(x: Tensor) -> Tensor:
        h = x.tanh()
        if hooks and h.requires_grad:
            hook(h)
        return h.sum(1) + quadratic(x)

    assert plan_of(hooked, points()).explain().plan == "graph"
    hooks = True
    report = plan_of(hooked, points()).explain()
    assert report.plan == "autograd" and "a hook may change a gradient" in report.why_not_faster[-1]


@pytest.mark.parametrize(
    "greatest",
    [
        lambda x: max(map(max, x.tolist())),
        lambda x: x.numpy(force=True).max(),
        lambda x: x.requires_grad and x.detach().abs().max(),
        lambda x: 9.0 if any(word.startswith("7") for word in str(x).split()) else 1.0,
    ],
    ids="tolist numpy guarded text".split(),
)
def test_code_whose_path_depends_on_numbers_of_x_is_run_at_every_step(greatest: Callable[[Tensor], float]) -> None:
    """They are far from those that the path turns at, on all that is compared."""
    x = points().clamp(-1, 1)
    assert plan_of(lambda x: quadratic(x) * (0.1 if greatest(x) > 6 else 1.0), x).explain().plan == "autograd"


@pytest.mark.parametrize(
    "stop",
    [
        lambda h: h.detach_(),
        lambda h: h.detach().clone(),
        lambda h: h.data * 1,
        lambda h: torch.Tensor._make_subclass(torch.Tensor, h),
        lambda h: Tensor.requires_grad_(h.detach()),
    ],
    ids="detach_ detach data subclass requires_grad_".split(),
)
def test_a_gradient_that_stops_once_a_flag_is_set(stop: Energy) -> None:
    """The form of the graph is the one that was trusted before."""
    stops = False

    def energy(x: Tensor) -> Tensor:
        h = x.tanh()
        g = h.clone()
        return (h * (stop(g) if stops else g)).sum(1)

    assert plan_of(energy, points()).explain().plan == "graph"
    stops = True
    report = plan_of(energy, points()).explain()
    assert report.plan == "autograd" and "gradient stops there" in report.why_not_faster[-1]


def test_code_that_asks_for_a_gradient_takes_the_way_that_it_takes_with_one() -> None:
    agrees(lambda x: quadratic(x) * (3.0 if x.requires_grad else 1.0), points())


def test_code_that_takes_more_from_tensors_than_ops_show_is_compared_each_time() -> None:
    """Two energies of one code and one form."""

    def wrapped(inner: Energy) -> Energy:
        return lambda x: inner(x) * (1.0 if x.requires_grad else 2.0)

    agrees(wrapped(quadratic), points())
    other = wrapped(lambda x: quadratic(x) * (2.0 if len(x) > 3 else 1.0))
    assert plan_of(other, points()).explain().plan == "autograd"


def test_functions_by_torchscript_are_read() -> None:
    @torch.jit.script
    def energy(x: Tensor) -> Tensor:
        return x.tanh().pow(2).sum(1)

    agrees(energy, points())


def test_weights_outside_of_modules_are_read() -> None:
    made = plan_of(lambda x: (x @ _outside).sigmoid().sum(1), points())
    assert made.explain().plan == "graph"


@pytest.mark.parametrize("shape", [(4, 6), (3, 3, 8, 8)])
def test_energies_that_would_make_a_graph_that_does_not_fit_run_by_autograd(shape: tuple[int, ...]) -> None:
    """x as one sample of a batch of one: pairs of all samples."""
    x = torch.randn(shape)

    def energy(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return (flat[:, None] - flat[None]).pow(2).sum((1, 2))

    assert plan_of(energy, x).explain().plan == "autograd"
    assert mg.langevin_sample(energy, x, steps=MIN_STEPS, step_size=0.01, seed=0).isfinite().all()


def test_a_refused_reading_draws_no_random_numbers_and_writes_into_no_tensor() -> None:
    seen = torch.zeros(())

    def noisy(x: Tensor) -> Tensor:
        return quadratic(x + torch.randn(6))

    def counting(x: Tensor) -> Tensor:
        seen.add_(1)
        return quadratic(x)

    before = torch.get_rng_state()
    assert plan_of(noisy, points()).explain().plan == "autograd"
    assert torch.equal(torch.get_rng_state(), before)
    assert plan_of(counting, points()).explain().plan == "autograd"
    assert seen == 0


def agrees(energy: Energy, x: Tensor) -> None:
    made = plan_of(energy, x)
    assert made.explain().plan == "graph", made.explain()
    torch.testing.assert_close(made.gradient(x), AutogradPlan(energy, "test").gradient(x), rtol=1e-5, atol=1e-6)


def test_the_slope_of_a_norm_is_zero_at_zero() -> None:
    x = torch.cat([torch.zeros(2, 6), points()])
    agrees(lambda x: (x.norm(dim=1) - 2) ** 2, x)
    agrees(lambda x: F.relu(x).norm(dim=1) + quadratic(x), -x.abs())


@pytest.mark.parametrize(
    "energy",
    [
        lambda x: torch.maximum(x, torch.zeros(3, 8, 8)).sum((1, 2, 3)),
        lambda x: torch.minimum(x, 1 - x.flip(3)).pow(2).sum((1, 2, 3)),
        lambda x: x.amax((2, 3)).sum(1),
        lambda x: x.amin(2).pow(2).sum((1, 2)) + x.amax(3).exp().sum((1, 2)),
        lambda x: x.mean(1, keepdim=True).amax((1, 2, 3)) - x[:, :1].flatten(1).amin(1),
    ],
    ids="maximum minimum amax rows one_channel".split(),
)
def test_equal_values_share_the_gradient_as_in_torch(energy: Energy) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    agrees(energy, x)
    agrees(energy, x.clamp(0, 1))


def test_shared_gradients_of_features_are_not_read() -> None:
    report = plan_of(lambda x: x.amax(1), points()).explain()
    assert report.plan == "autograd" and "amax 1 shares its gradient among equal features" in report.why_not_faster[-1]


def test_functions_keep_their_precision_near_zero() -> None:
    x = points() * 1e-5
    for function in (torch.tanh, F.elu):
        made = plan_of(lambda x, function=function: function(x).pow(2).sum(1), x)
        torch.testing.assert_close(made.gradient(x), 2 * x, rtol=1e-4, atol=0)


_conv1d = torch.nn.Conv1d(3, 4, 5, stride=2)


@pytest.mark.parametrize(
    "energy",
    [
        lambda x: F.silu(x).flatten(2).mean(-1).pow(2).sum(1),
        lambda x: _conv1d(x.flatten(2)).pow(2).sum((1, 2)),
        lambda x: F.max_pool2d(x, 2).flatten(2).sum(2).pow(2).sum(1),
        lambda x: x.pow(2).mean(-1).mean(-1).mean(-1),
        lambda x: F.interpolate(x, size=13, mode="nearest-exact").pow(2).sum((1, 2, 3)),
        lambda x: sum((quadratic(x - i) for i in range(3)), torch.zeros(len(x))),
        lambda x: torch.zeros(len(x)).add_(quadratic(x)),
    ],
    ids="pixels conv1d pooled one_by_one exact zeros accumulated".split(),
)
def test_other_shapes_of_the_same_numbers(energy: Energy) -> None:
    agrees(energy, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_defaults_of_torch_do_not_matter() -> None:
    x, image = points(), points(5, 12).reshape(5, 3, 2, 2)
    try:
        torch.set_default_dtype(torch.float64)
        agrees(lambda x: x[:, 1].sin() + quadratic(x), x)
        agrees(lambda x: x.flip(1).tanh().mul(x.mean(1, keepdim=True)).sum((1, 2, 3)), image)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        agrees(lambda x: x[:, 1].sin() + quadratic(x), x)
        agrees(lambda x: (x.flatten(1).tanh() * x.flatten(1).flip(1)).sum(1), image)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


class Counting(torch.nn.Module):
    """Anneals with its calls, and takes the mean of the first batch that it sees."""

    calls, mean = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.mean is None:
            self.mean = x.mean(0)
        return quadratic(x - self.mean) * self.calls


def test_what_python_code_counts_or_caches_is_as_before() -> None:
    module, calls = Counting(), 0

    def energy(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return quadratic(x) * calls

    assert plan_of(module, points()).explain().plan == "autograd"
    assert "calls" not in vars(module) and module.mean is None
    assert plan_of(energy, points()).explain().plan == "autograd"
    assert calls == 0
    assert plan_of(module.forward, points()).explain().plan == "autograd"
    assert module.calls == 0


class Recording(torch.nn.Module):
    """Keeps what it met in containers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last, self.seen, self.by_name = [0], collections.deque([1], maxlen=3), {0}, {"a": 1}

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(self.calls))
        self.last.append(len(self.calls))
        self.seen.add(len(self.calls))
        self.by_name["a"] = 1000 + len(self.calls)
        return quadratic(x) * len(self.calls)


def test_what_containers_hold_is_as_before() -> None:
    module = Recording()
    kept: list[list[int]] = [[]]

    def energy(x: Tensor) -> Tensor:
        kept[0] = [*kept[0], 1]
        return quadratic(x) * len(kept[0])

    parameters = module._parameters
    assert plan_of(module, points()).explain().plan == plan_of(energy, points()).explain().plan == "autograd"
    assert (module.calls, list(module.last), module.seen, module.by_name) == ([0], [1], {0}, {"a": 1})
    assert kept == [[]] and module._parameters is parameters


class Blocks(torch.nn.Module):
    """A residual net of enough channels to gain by bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 16, 3, padding=1)
        self.last, self.power = torch.nn.Linear(16, 1), 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = F.avg_pool2d(h + self.second(F.silu(h)), 2)
        return self.last(F.silu(h).mean((2, 3))).squeeze(1) ** self.power


@pytest.fixture
def multiplies_bfloat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is said to multiply bfloat16, faster than float32; the engine computes it all the same, slowly."""
    for name in ("has_bfloat", "prefers_bfloat"):
        monkeypatch.setattr(f"mgebm_fast.gradient.graph.plan.{name}", lambda: True)


def test_bfloat16_is_taken_where_it_is_fast_and_checked(multiplies_bfloat: None) -> None:
    net, x = Blocks(), torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = plan_of(net, x)
    assert (made.explain().plan, made.precision) == ("graph", "bf16")
    assert "first convolution, functions and sums in fp32" in str(made.explain())
    exact = AutogradPlan(net, "plan").gradient(x)
    assert 1e-4 < float((made.gradient(x) - exact).norm() / exact.norm()) < 0.02
    assert plan(net, x, "bf16").precision == "bf16"  # asked for by name: whatever the number of steps is
    assert plan(net, x, "fp32", steps=MIN_STEPS).precision == "fp32"
    assert plan_of(lambda x: quadratic(x), points()).precision == "fp32"  # nothing in it would gain
    got = mg.langevin_sample(net, x, steps=20, step_size=0.1, seed=3, precision="bf16")
    far = got - mg.langevin_sample(net, x, steps=20, step_size=0.1, seed=3, precision="fp32")
    assert 0 < float(far.abs().max()) < 0.01


def test_a_wrong_reading_does_not_hide_in_the_rounding_of_bfloat16(multiplies_bfloat: None) -> None:
    net = Blocks()
    energy = lambda x: net(x) * (1.03 if len(x) > 3 else 1)  # noqa: E731
    x = torch.randn(5, 3, 8, 8)
    assert plan_of(energy, x).explain().plan == "autograd"
    with pytest.raises(mg.BackendError, match="no engine computes this energy in precision 'bf16' here"):
        plan(energy, x, "bf16")
