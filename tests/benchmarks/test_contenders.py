"""The baselines do what this package does: the same energy, the same chain, the same training step."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch

import mgebm_fast as mg
from mgebm_fast.benchmarks import cases
from mgebm_fast.benchmarks.chains import ChainBench
from mgebm_fast.benchmarks.contenders import CONTENDERS, PEERS, QUICK, precision_of
from mgebm_fast.benchmarks.gate import WrongGradientError, check, gradient64, gradient_of, relative_error
from mgebm_fast.benchmarks.loops import plain_loop, plain_net, seed_loop
from mgebm_fast.benchmarks.peers import PACKAGES, version
from mgebm_fast.benchmarks.run import run_case
from mgebm_fast.benchmarks.training import TrainingBench
from mgebm_fast.benchmarks.work import macs_inside
from mgebm_fast.gradient import PlanReport
from mgebm_fast.sampling.explanation import Explanation


def energy_net(norm="batch", size=4):
    return mg.nets.multigrid_net(size, width=0.25, norm=norm, seed=3)


def images(n=6, size=4, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 255


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("size", [4, 16])
def test_a_plain_net_is_the_same_energy(norm, size):
    net = energy_net(norm, size).double()
    x = images(size=size).double()
    torch.testing.assert_close(plain_net(net).double()(x), net(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["relu", "silu", "elu", "none"])
def test_a_plain_net_has_the_activation(activation):
    net = mg.nets.multigrid_net(4, width=0.25, norm="none", activation=activation, seed=3)
    torch.testing.assert_close(plain_net(net)(images()), net(images()))


@pytest.mark.parametrize("loop", [plain_loop, seed_loop])
@pytest.mark.parametrize(
    "numbers",
    [
        {"drift": 300.0, "noise_std": 0.0, "clamp": (0.0, 255.0)},
        {"drift": 300.0, "noise_std": 0.0, "reference_std": 30.0, "reference_mean": 100.0},
        {"drift": 300.0, "noise_std": 0.0, "grad_clamp": 0.001},
        {"drift": mg.Schedule(500.0, 50.0), "noise_std": 0.0},
    ],
)
def test_a_loop_without_noise_is_this_packages_chain(loop, numbers):
    net, x = energy_net("none"), images()
    dynamics = mg.Langevin(steps=5, **numbers)
    expected = dynamics(net, x, precision="fp32")
    assert (expected - x).abs().max() > 1.0  # the chain went somewhere
    torch.testing.assert_close(loop(plain_net(net), x, dynamics).detach(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("loop", [plain_loop, seed_loop])
def test_a_loop_adds_noise_of_the_right_size(loop):
    dynamics = mg.Langevin(steps=4, drift=1e-12, noise_std=0.5)
    moved = loop(plain_net(energy_net()), images(500), dynamics).detach() - images(500)
    assert float(moved.std()) == pytest.approx(1.0, rel=0.02)  # 24,000 draws: 4 standard errors


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_the_gradient_is_read_off_a_chain(name, norm):
    net, x = energy_net(norm), images()
    expected = gradient64(plain_net(net).double(), x)
    got = gradient_of(CONTENDERS[name].loop(net, plain_net(net)), x)
    limit = 0.15 if name in ("bf16_cast_loop", "mgebm_auto") else 1e-5
    assert relative_error([got], [expected]) < limit


@pytest.mark.parametrize("name", ["torchebm", "ebmkit", "posteriors", "jax_scan"])
def test_another_package_runs_the_same_chain(name):
    contender = CONTENDERS[name]
    pytest.importorskip(contender.package)
    net, x = energy_net(), images()
    loop = contender.loop(net, plain_net(net))
    assert relative_error([gradient_of(loop, x)], [gradient64(plain_net(net).double(), x)]) < 1e-5
    dynamics = mg.Langevin(steps=4, drift=1e-9, noise_std=0.5)
    many = images(500)
    assert float((loop(many, dynamics) - many).std()) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("name", ["residual", "toy"])
def test_an_energy_that_every_package_takes(name):
    (case,) = cases(("peers",), only=[name], tiny=True)
    rows = {row.contender: row for row in run_case(case, rounds=1)}
    assert tuple(rows) == PEERS and rows["plain_loop"].ok and rows["mgebm_fp32"].ok
    assert rows["mgebm_fp32"].gradient_error < 1e-5 and rows["plain_loop"].gflops > 0
    for row in rows.values():  # of a package that is there its version, of another how to get it
        package = CONTENDERS[row.contender].package
        there = package and importlib.util.find_spec(package)
        assert not package or (version(package) in row.explain if there else PACKAGES[package] in row.status)


def test_the_work_of_a_step_is_the_published_one():
    for name, megaflop in (("64", 649), ("16", 408), ("4", 6.6)):
        (case,) = cases(("chains",), only=[name])
        net = mg.nets.multigrid_net(case.sizes[0])
        assert 4 * net.macs() / 1e6 == pytest.approx(megaflop, rel=0.01)
    bench = ChainBench(cases(("chains",), only=["cascade"], tiny=True)[0], "cpu")
    assert bench.flops == 4 * 8 * sum(macs_inside(net) for net in bench.nets)


def test_work_leaves_out_the_padding():
    net = mg.EnergyNet(5, 1, [mg.nets.ConvSpec(2, 3), mg.nets.ConvSpec(3, 5, 2)], norm="none")
    ones = torch.nn.functional.conv2d(torch.ones(1, 1, 5, 5), torch.ones(1, 1, 3, 3), padding=1)
    second = torch.nn.functional.conv2d(torch.ones(1, 1, 5, 5), torch.ones(1, 1, 5, 5), stride=2, padding=2)
    assert macs_inside(net) == 2 * int(ones.sum()) + 2 * 3 * int(second.sum()) + net.head.weight.numel()


def test_plain_training_has_this_packages_weight_gradients():
    for name in ("digits", "published"):
        bench = TrainingBench(cases(("training",), only=[name], tiny=True)[0], "cpu")
        for contender in ("mgebm_fp32", "plain_loop", "seed_loop"):
            learned = bench._learn(CONTENDERS[contender])
            assert relative_error(learned, bench.learning) < 1e-4, (name, contender)


def test_a_training_iteration_changes_every_weight():
    bench = TrainingBench(cases(("training",), only=["digits"], tiny=True)[0], "cpu")
    for name in ("mgebm_auto", "plain_loop"):
        run, *_ = bench.prepare(CONTENDERS[name])
        run()
    from mgebm_fast.benchmarks.loops import PlainTrainer

    trainer = PlainTrainer(bench.config)
    before = copy.deepcopy(trainer.nets)
    trainer.step(bench.batch)
    for old, new in zip(before, trainer.nets, strict=True):
        assert all(not torch.equal(a, b) for a, b in zip(old[:-2].parameters(), new[:-2].parameters(), strict=True))


def test_a_wrong_gradient_is_refused():
    check(1e-4, "fp32")
    for error in (0.2, math.nan, math.inf):
        with pytest.raises(WrongGradientError, match="float64"):
            check(error, "bf16")


def test_precision_is_what_explain_says():
    auto = CONTENDERS["mgebm_auto"]
    for report in (PlanReport("conv", "bf16", "first convolution in fp32"), PlanReport("autograd", "fp32")):
        explained = Explanation("3 steps", report, "cpu", update="", graph="", coupling="", randomness="")
        assert precision_of(auto, explained, "cpu") == report.precision
    assert precision_of(CONTENDERS["bf16_cast_loop"], None, "cpu") == "bf16"
