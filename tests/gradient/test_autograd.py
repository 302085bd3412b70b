import copy

import pytest
import torch
from torch import nn

import mgebm_fast as mg
from mgebm_fast.errors import BackendError
from mgebm_fast.gradient import energy_gradient, frozen_parameters, plan
from mgebm_fast.gradient.autograd import AutogradPlan
from mgebm_fast.nets import multigrid_net


def images(n, channels, size, seed=0):
    return 255 * torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "size, variant, norm, width",
    [(4, "B", "batch", 1.0), (4, "B", "none", 1.0), (16, "B", "batch", 0.25), (64, "A", "none", 0.25)]
    + [(64, "B", "batch", 0.25), (24, "compact", "none", 1.0)],
)
def test_gradient_of_the_published_nets_against_float64(size, variant, norm, width):
    net = multigrid_net(size, width=width, norm=norm, variant=variant, activation="silu")
    x = images(4, 3, size)
    exact_x = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(copy.deepcopy(net).double()(exact_x).sum(), exact_x)
    got = AutogradPlan(net, "test").gradient(x)
    assert got.dtype == torch.float32
    # Silu has no kink whose side float32 could get wrong, so float32 rounding is all the difference.
    assert (got.double() - exact).norm() < 2e-5 * exact.norm()


def test_gradient_of_a_net_with_kinks_is_near_float64():
    net = multigrid_net(16, width=0.25)
    x = images(4, 3, 16)
    exact_x = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(copy.deepcopy(net).double()(exact_x).sum(), exact_x)
    # One flipped sign of a pre-activation near zero moves the gradient by up to 4e-3.
    assert (AutogradPlan(net, "test").gradient(x).double() - exact).norm() < 1e-2 * exact.norm()


def test_any_callable_and_a_bound_method():
    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def energy(self, x):
            assert not self.scale.requires_grad
            return self.scale * x.square().flatten(1).sum(1)

    model = Quadratic()
    x = images(3, 1, 2)
    torch.testing.assert_close(energy_gradient(model.energy, x), 4 * x)
    torch.testing.assert_close(energy_gradient(lambda x: x.square().flatten(1).sum(1), x), 2 * x)
    assert model.scale.requires_grad and model.scale.grad is None


def test_a_chain_searches_its_energy_once_and_checks_its_numbers_once(monkeypatch):
    """What a call costs beside the energy's own code: a chain of few steps is to be as fast as a loop by hand."""
    from mgebm_fast.gradient import holding
    from mgebm_fast.sampling import langevin

    net, x = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 1), nn.Flatten(0)), torch.randn(5, 3)
    searched, search = [], holding.modules_of
    monkeypatch.setattr(holding, "modules_of", lambda energy: searched.append(energy) or search(energy))
    mg.langevin_sample(net, x, steps=3, step_size=0.1)
    assert searched == [net]
    checked = langevin._described.cache_info().misses
    mg.langevin_sample(net, x, steps=3, step_size=0.1)
    assert langevin._described.cache_info().misses == checked
    with pytest.raises(TypeError, match="clamp must be a pair of numbers"):
        mg.langevin_sample(net, x, steps=3, step_size=0.1, clamp=(False, True))
    with pytest.raises(ValueError, match="steps must be a positive int, got True"):
        mg.langevin_sample(net, x, steps=True, step_size=0.1)


def test_the_backward_pass_goes_past_checks_but_not_past_listeners():
    """Energies of another class than torch's, and modes that listen to its functions, see `torch.autograd.grad`."""
    from torch.overrides import TorchFunctionMode

    class Listens(TorchFunctionMode):
        heard = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.heard += function is torch.autograd.grad
            return function(*args, **(kwargs or {}))

    x = torch.randn(3, 2)
    with Listens() as mode:
        torch.testing.assert_close(AutogradPlan(lambda x: x.square().sum(1), "test").gradient(x), 2 * x)
    assert mode.heard == 1


def test_parameters_are_frozen_inside_and_restored_even_by_an_exception():
    net = multigrid_net(4)
    fixed = net.head.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="stop"), frozen_parameters(net):
        assert not any(p.requires_grad for p in net.parameters())
        raise RuntimeError("stop")
    assert not fixed.requires_grad
    assert all(p.requires_grad for p in net.parameters() if p is not fixed)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_switched_off(context):
    x = images(3, 1, 2)
    with context():
        got = energy_gradient(lambda x: x.square().flatten(1).sum(1), x)
    torch.testing.assert_close(got, 2 * x)
    assert not x.requires_grad and not got.requires_grad


def test_a_double_energy_of_a_float_image_gives_a_float_gradient():
    got = energy_gradient(lambda x: x.double().square().flatten(1).sum(1), images(3, 1, 2))
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    "energy, error, message",
    [
        (
            lambda x: x.flatten(1).sum(1, keepdim=True),
            ValueError,
            r"must return shape \(4,\).*got \(4, 1\); flatten it",
        ),
        (lambda x: x.sum(), ValueError, r"got \(\); return one energy a sample"),
        (lambda x: x, ValueError, r"got \(4, 1, 2, 2\)"),
        (lambda x: x.flatten(1).sum(1)[:2], ValueError, r"got \(2,\)"),
        (lambda x: x.flatten(1).sum(1).tolist(), TypeError, "must return a tensor, got list"),
        (lambda x: x.flatten(1).sum(1).to("meta"), ValueError, "must return values on cpu, as x, got meta"),
        (lambda x: x.flatten(1).sum(1).long(), TypeError, "must return floating-point values, got torch.int64"),
        (lambda x: x.detach().flatten(1).sum(1), ValueError, "must be differentiable in x"),
        (lambda x: torch.ones(4, requires_grad=True) * 2, ValueError, "must depend on x"),
        (3.0, TypeError, "must be a module or a callable"),
    ],
)
def test_what_is_no_energy_is_refused(energy, error, message):
    with pytest.raises(error, match=message):
        energy_gradient(energy, images(4, 1, 2))


def test_weights_without_values_are_refused():
    net = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    net[0].weight = nn.Parameter(net[0].weight.to("meta"))
    with pytest.raises(ValueError, match="energy must have its weights on cpu, as x is, got 0.weight on meta; load"):
        energy_gradient(net, torch.zeros(2, 4))


def test_unknown_precision_names_the_choices():
    with pytest.raises(
        ValueError, match=r"precision must be one of auto, fp32, bf16, fp16, got 'fp23' \(did you mean 'fp32'\?\)"
    ):
        plan(lambda x: x, torch.zeros(1, 1), "fp23")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_are_refused_by_name(precision):
    def energy(x):  # no engine reads a Fourier transform
        return torch.fft.rfft(x.flatten(1)).abs().sum(1)

    with pytest.raises(BackendError, match=f"in precision '{precision}' here.*function is not an EnergyNet"):
        plan(energy, torch.ones(1, 3, 4, 4), precision)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_explain_names_plan_precision_and_reason(precision):
    chosen = plan(lambda x: x.flatten(1).sum(1), torch.zeros(1, 3, 4, 4), precision)
    assert str(chosen.explain()) == (
        "autograd, fp32, because function is not an EnergyNet or nn.Sequential, because it is read as a graph from 16 "
        "steps a call on, got 1"
    )


def test_refresh_has_nothing_to_do():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Tanh(), nn.Flatten(0))
    x = images(3, 1, 2)
    chosen = plan(net, x)
    with torch.no_grad():
        net[1].weight.mul_(2)
    chosen.refresh()
    torch.testing.assert_close(chosen.gradient(x), energy_gradient(net, x))


# compile=True. torch.compile itself takes seconds: its part is played here, and it runs in the last test.


class Attention(torch.nn.Module):
    """No graph of the engine's: attention over points, whose weights have sum 1 over the points that ask."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)

    def forward(self, x):
        h = self.inner(x)
        return self.outer(torch.softmax(h @ h.mT, 1) @ h).sum((1, 2))


def points(n=5):
    return torch.randn(n, 6, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def compilations(monkeypatch):
    """Energies as they are compiled; what is in `wrong` replaces them."""
    made, wrong = [], []

    def compiled(energy, backend):
        made.append((energy, backend))
        return wrong[0] if wrong else lambda x: energy(x)

    monkeypatch.setattr(torch, "compile", compiled)
    return made, wrong


def test_what_only_autograd_takes_is_compiled_and_compared_once(compilations, monkeypatch):
    net, chain = Attention(), mg.Langevin(20, drift=0.1, noise_std=0.1)
    expected = chain(net, points(), seed=3)
    assert torch.equal(chain(net, points(), seed=3, compile=True), expected)
    assert compilations[0] == [(net, "inductor")]
    compared = []
    plain = AutogradPlan.gradient
    monkeypatch.setattr(AutogradPlan, "gradient", lambda self, x: compared.append(len(x)) or plain(self, x))
    chain(net, points(), seed=3, compile=True)
    assert compared == []
    chain(net, points(4), seed=3, compile=True)
    assert compared == [4, 4]
    explained = chain.explain(net, points(), compile=True)
    assert (explained.plan, explained.precision) == ("compiled", "fp32") and "torch.compile, inductor" in str(explained)
    states = list(chain.trajectory(net, points(), seed=3, every=10, compile=True))
    assert torch.equal(states[-1][1], expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_compiled_chains_run_in_16_bits_by_autocast(compilations, precision):
    net, chain = Attention(), mg.Langevin(4, drift=0.1, noise_std=0.1)
    with pytest.raises(BackendError, match="no engine computes this energy"):
        chain(net, points(), seed=3, precision=precision)
    expected, got = chain(net, points(), seed=3), chain(net, points(), seed=3, precision=precision, compile=True)
    assert 0 < float((got - expected).abs().max()) < 0.1 and got.dtype is torch.float32
    assert chain.explain(net, points(), precision=precision, compile=True).precision == precision


def test_what_the_engine_reads_is_not_compiled(compilations):
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1), torch.nn.Flatten(0))
    x = points()[:, 0]
    assert mg.Langevin(20, step_size=0.1).explain(net, x, compile=True).plan == "graph"
    assert mg.Langevin(2, step_size=0.1).explain(net, x, compile=True).plan == "compiled"
    assert [energy for energy, _ in compilations[0]] == [net]


def test_compiled_code_that_is_wrong_or_cannot_be_had_is_an_error(compilations):
    def cannot(x):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

    cases = [
        (lambda x: 1.05 * Attention()(x), "the compiled gradient must be the energy's own, got one that is .* away"),
        (cannot, "compile='inductor' needs an energy that torch.compile takes, .* a C.. compiler .*InvalidCxxCompiler"),
    ]
    for wrong, words in cases:
        compilations[1][:] = [wrong]
        with pytest.raises(BackendError, match=words):
            mg.langevin_sample(Attention(), points(), steps=2, step_size=0.1, compile=True)
    compilations[1].clear()
    with pytest.raises(BackendError, match="this one is random"):
        mg.langevin_sample(lambda x: torch.rand(len(x)) * x.sum((1, 2)), points(), steps=2, step_size=0.1, compile=True)
    with pytest.raises(ValueError, match="return one energy a sample"):  # the energy's own fault
        mg.langevin_sample(lambda x: x.sum(), points(), steps=2, step_size=0.1, compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_itself(backend):
    net, chain = Attention(), mg.Langevin(3, drift=0.1, noise_std=0.1)
    got = chain(net, points(), seed=3, compile=backend)
    torch.testing.assert_close(got, chain(net, points(), seed=3), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="compile must be True, False or a backend of torch.compile, got 'inductr'"):
        chain(net, points(), compile="inductr")
