import copy
import dataclasses
import weakref

import pytest
import torch

import mgebm_fast as mg
from mgebm_fast import ops
from mgebm_fast.errors import BackendError, DivergenceError
from mgebm_fast.nets import multigrid_net
from mgebm_fast.sampling import HMC, Langevin, langevin_sample


def images(n=4, channels=3, size=8, seed=0):
    return 255 * torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def quadratic(x):
    return ((x - 100.0) / 20.0).square().flatten(1).sum(1) / 2.0


def hand_written(energy, x, *, steps, drift, noise_std, std=None, mean=0.0, c=None, clamp=None, mask=None, **where):
    """The loop that `langevin_sample` stands in for, in float64."""
    first_step = where.pop("first_step", 0)
    x = x.double()
    for k in range(steps):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        if c is not None:
            gradient = gradient.clamp(-c, c)
        if std is not None:
            gradient = gradient + (x - mean) / std**2
        noise = ops.noise(x.shape, step=first_step + k, backend="reference", **where).double()
        updated = x - drift * gradient + noise_std * noise
        if clamp is not None:
            updated = updated.clamp(*clamp)
        x = updated if mask is None else torch.where(mask, updated, x)
    return x


def test_it_is_the_hand_written_loop(place):
    device, backend = place
    if device != "cpu":
        pytest.skip("the hand-written loop runs on the CPU")
    x = images()
    mask = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.3
    where = dict(seed=5, first_sample=3, stream=9, first_step=4)
    got = langevin_sample(
        quadratic, x, steps=6, step_size=3.0, noise_scale=0.7, reference_std=40.0, reference_mean=128.0,
        grad_clamp=0.2, clamp=(0.0, 255.0), mask=mask, backend=backend, **where,
    )  # fmt: skip
    expected = hand_written(
        quadratic, x, steps=6, drift=4.5, noise_std=2.1, std=40.0, mean=128.0, c=0.2, clamp=(0, 255), mask=mask, **where
    )
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-4)
    assert torch.equal(got[mask.expand_as(x) == 0], x[mask.expand_as(x) == 0])


def test_decoupled_form_through_a_net_is_the_hand_written_loop():
    net = multigrid_net(8, norm="none", variant="compact", activation="silu")
    x = images() / 127.5 - 1.0
    got = langevin_sample(net, x, steps=5, drift=0.5, noise_std=0.03, clamp=(-1.0, 1.0), seed=2, precision="fp32")
    expected = hand_written(net.double(), x, steps=5, drift=0.5, noise_std=0.03, clamp=(-1, 1), seed=2)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_noise_free_descent_lowers_the_potential_at_every_step():
    potentials = []
    langevin_sample(
        quadratic, images(), steps=10, step_size=5.0, noise_scale=0.0,
        callback=lambda step, x: potentials.append(float(quadratic(x).sum())),
    )  # fmt: skip
    assert all(later < earlier for earlier, later in zip(potentials, potentials[1:], strict=False))


def test_x_is_untouched_and_the_result_is_fresh():
    x = images().requires_grad_()
    before = x.detach().clone()
    out = langevin_sample(quadratic, x, steps=2, step_size=0.3)
    assert torch.equal(x, before) and not out.requires_grad and out.data_ptr() != x.data_ptr()
    assert not torch.equal(out, before)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.flip(0)[[3, 2, 1, 0]],
        lambda x: torch.cat([x, x], dim=1)[:, :3],
    ],
    ids=["transposed", "strided", "channels-last", "gathered", "sliced"],
)
def test_any_layout_of_x_gives_the_same_chain(layout):
    x = images()
    start = layout(x)
    before = start.clone()
    expected = langevin_sample(quadratic, x, steps=3, step_size=2.0, seed=1)
    assert torch.equal(langevin_sample(quadratic, start, steps=3, step_size=2.0, seed=1), expected)
    assert torch.equal(start, before)


def test_channels_last_stays_channels_last():
    out = langevin_sample(quadratic, images().to(memory_format=torch.channels_last), steps=1, step_size=1.0)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 7), (3, 2, 2, 3, 4), (0, 3, 4, 4), (1, 1, 1, 1)])
def test_any_shape_after_the_batch(shape):
    def energy(x):
        return x.square().reshape(len(x), -1).sum(1) if len(x) else x.sum(tuple(range(1, x.dim())))

    out = langevin_sample(energy, torch.ones(shape), steps=2, step_size=0.5)
    assert out.shape == shape and bool(torch.isfinite(out).all())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_runs_where_gradients_are_switched_off(context):
    x = images()
    expected = langevin_sample(quadratic, x, steps=3, step_size=2.0, seed=0)
    with context():
        assert torch.equal(langevin_sample(quadratic, x, steps=3, step_size=2.0, seed=0), expected)
        assert torch.equal(langevin_sample(quadratic, x.clone(), steps=3, step_size=2.0, seed=0), expected)


def test_parameters_are_frozen_in_the_chain_and_restored_and_the_mode_is_left_alone():
    net = multigrid_net(4).train()
    net.head.bias.requires_grad_(False)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    seen = []

    def watch(step, x):
        seen.append(any(p.requires_grad for p in net.parameters()))

    langevin_sample(net, images(size=4), steps=3, step_size=0.3, callback=watch)
    assert seen == [False] * 3 and net.training
    assert not net.head.bias.requires_grad and net.head.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())

    def stop(step, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        langevin_sample(net.eval(), images(size=4), steps=3, step_size=0.3, callback=stop)
    assert net.head.weight.requires_grad and not net.training


def test_callback_sees_every_step_by_its_noise_counter():
    seen = []
    out = langevin_sample(
        quadratic,
        images(),
        steps=4,
        step_size=1.0,
        first_step=7,
        callback=lambda step, x: seen.append((step, x.clone())),
    )
    assert [step for step, _ in seen] == [7, 8, 9, 10]
    assert torch.equal(seen[-1][1], out)


@pytest.mark.parametrize("every, steps", [(1, [5, 6, 7, 8, 9]), (2, [6, 8, 9]), (5, [9]), (100, [9])])
def test_trajectory_yields_the_states_of_the_chain(every, steps):
    chain = Langevin(5, step_size=2.0, clamp=(0.0, 255.0))
    states = {}
    out = chain(quadratic, images(), first_step=5, seed=3, callback=lambda step, x: states.update({step: x.clone()}))
    got = list(chain.trajectory(quadratic, images(), every=every, first_step=5, seed=3))
    assert [step for step, _ in got] == steps
    assert all(torch.equal(x, states[step]) for step, x in got)
    assert torch.equal(got[-1][1], out)


def test_trajectory_streams_and_hoards_nothing():
    calls = 0

    def energy(x):
        nonlocal calls
        calls += 1
        return quadratic(x)

    stream = Langevin(1000, step_size=0.3).trajectory(energy, images())
    references = []
    for step, x in stream:
        references.append(weakref.ref(x))
        if step == 9:
            break
    assert calls == 10
    del x
    assert sum(reference() is not None for reference in references) == 0


def test_a_snapshot_is_the_caller_s_to_change():
    expected = [x for _, x in Langevin(4, step_size=1.0).trajectory(quadratic, images(), seed=0)]
    for (_, x), same in zip(Langevin(4, step_size=1.0).trajectory(quadratic, images(), seed=0), expected, strict=True):
        assert torch.equal(x, same)
        x.zero_()


def test_parameters_are_the_caller_s_between_snapshots():
    net = multigrid_net(4, norm="none")
    for _ in Langevin(3, step_size=0.3).trajectory(net, images(size=4)):
        assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_weights_that_change_between_snapshots_count_from_then_on(spectral_norm):
    net = multigrid_net(4, norm="none", variant="compact", spectral_norm=spectral_norm)
    stream = Langevin(4, drift=5.0, noise_std=0.1).trajectory(net, images(size=4), every=2, seed=0)
    _, halfway = next(stream)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(-1.5)
    (_, end), *_ = stream
    rest = Langevin(2, drift=5.0, noise_std=0.1)
    assert torch.equal(end, rest(net, halfway, first_step=2, seed=0))


def test_a_diverged_chain_names_its_first_bad_step():
    def explosive(x):
        return -((x / 10.0) ** 4).flatten(1).sum(1)

    states = {}
    with pytest.raises(DivergenceError, match="langevin_sample: the chain became non-finite at step (\\d+)") as caught:
        langevin_sample(
            explosive, images(), steps=200, step_size=1.0, first_step=100,
            callback=lambda step, x: states.update({step: bool(torch.isfinite(x).all())}),
        )  # fmt: skip
    first_bad = min(step for step, fine in states.items() if not fine)
    assert first_bad > 100 and f"at step {first_bad};" in str(caught.value)
    with pytest.raises(DivergenceError, match=f"at step {first_bad};"):
        list(Langevin(200, step_size=1.0).trajectory(explosive, images(), every=7, first_step=100))


def test_a_gradient_that_turns_nan_is_a_divergence_in_spite_of_the_clamp():
    with pytest.raises(DivergenceError, match="at step 0"):
        langevin_sample(
            lambda x: (x - 300.0).sqrt().flatten(1).sum(1), images(), steps=3, step_size=1.0, clamp=(0.0, 255.0)
        )


@pytest.mark.parametrize("entries", [2, 0])
def test_large_finite_states_are_no_divergence(entries):
    x = torch.full((2, entries), 3e38)  # whose sum is no float32
    assert torch.equal(langevin_sample(lambda x: 0 * x.sum(1), x, steps=1, drift=0.1, noise_std=0.0), x)


def test_a_start_that_is_not_finite_is_named_as_such():
    x = images()
    x[1, 2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="x must be finite, got NaN"):
        langevin_sample(quadratic, x, steps=2, step_size=1.0)


def test_explain_says_numbers_plan_and_backend():
    dynamics = Langevin(30, step_size=0.3, reference_std=50.0, grad_clamp=0.1, clamp=(0.0, 255.0))
    text = str(dynamics.explain(multigrid_net(4), images(size=4)))
    for part in (
        "30 steps",
        "drift 0.045",
        "noise_std 0.3",
        "N(0, 50²)",
        "±0.1",
        "[0, 255]",
        "gradient: ",
        "graph: no, because CUDA graphs are not for cpu tensors",
        "samples: coupled, norm='batch' normalises by the statistics of the batch",
    ):
        assert part in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "gradient: graph, fp32 (" in str(dynamics.explain(quadratic, images(size=4)))
    few = str(Langevin(3, step_size=0.1).explain(quadratic, images(size=4)))
    assert "autograd, fp32, because function is not" in few and "from 16 steps a call on, got 3" in few
    assert str(dynamics.explain(multigrid_net(4, norm="none"), images(size=4))).endswith("samples: independent")
    assert "reference backend, named" in dynamics.explain(multigrid_net(4), images(size=4), backend="reference").update


def test_explain_takes_energies_of_a_fixed_batch():
    labels = torch.arange(6.0)
    said = Langevin(3, step_size=0.1).explain(lambda x: x.square().sum(1) * labels, torch.rand(6, 2))
    assert said.plan == "autograd"


@torch.inference_mode()
def test_explain_in_inference_mode():
    assert Langevin(3, step_size=0.1).explain(lambda x: x.square().sum(1), torch.rand(6, 2)).plan == "autograd"


def test_what_explain_says_is_true_and_what_a_run_refuses_it_refuses():
    dynamics, x = Langevin(3, step_size=0.1), torch.rand(4, 3)
    linear = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.5), torch.nn.Flatten(0))
    said = dynamics.explain(linear, x)
    assert (said.plan, said.precision, said.device, said.coupling) == ("autograd", "fp32", "cpu", "")
    assert "a Dropout is random in train mode" in said.randomness and "\nenergy: random, a Dropout" in str(said)
    assert said.why_not_faster[0] == "x must have 1, 2 or 3 spatial dimensions, got shape (4, 3)"
    with torch.autocast("cpu", torch.bfloat16):
        assert dynamics.explain(linear, x).precision == "bf16 by autocast"
    low = linear.eval().bfloat16()
    said = dynamics.explain(lambda x: low(x.bfloat16()), x)
    assert (said.precision, said.randomness) == ("bf16", "")
    assert torch.isfinite(dynamics(lambda x: low(x.bfloat16()), x)).all()
    lazy = torch.nn.Sequential(torch.nn.LazyLinear(1), torch.nn.Flatten(0))
    nowhere = copy.deepcopy(linear).to("meta")
    for wrong, message in (
        (low, "energy must take float32 x, got one with bfloat16 weights"),
        (torch.sum, "shape"),
        (nowhere, "energy must have its weights on cpu, as x is, got 0.weight on meta"),
        (lambda x: nowhere(x), "energy must have its weights on cpu, as x is, got Sequential.0.weight on meta"),
        (lazy, "energy must be called on x once before, which makes its weights, got a LazyLinear"),
    ):
        for call in (dynamics.explain, dynamics, mg.MALA(2, 0.1), mg.MALA(2, 0.1).explain):
            with pytest.raises((TypeError, ValueError), match=message):
                call(wrong, x)
    for call in (dynamics, dynamics.explain, mg.HMC(2, 2, 0.1), mg.gradient.energy_gradient):
        with pytest.raises(TypeError, match=r"x must be .*float.*, got (torch\.)?uint8"):
            call(quadratic, torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(steps=0), ValueError, "steps must be a positive int, got 0"),
        (dict(steps=-3), ValueError, "steps must be a positive int, got -3"),
        (dict(steps=2.0), ValueError, "steps must be a positive int, got 2.0"),
        (dict(step_size=-0.3), ValueError, "step_size must be finite and > 0, got -0.3"),
        (dict(step_size=0.0), ValueError, "step_size must be finite and > 0"),
        (dict(step_size=float("nan")), ValueError, "step_size must be finite"),
        (dict(step_size=None), ValueError, "got neither"),
        (dict(drift=0.1, noise_std=0.1), ValueError, "got both"),
        (dict(step_size=None, drift=0.1), ValueError, "drift and noise_std go together"),
        (dict(step_size=None, drift=0.0, noise_std=0.1), ValueError, "drift must be > 0, got 0.0"),
        (dict(step_size=None, drift=-1.0, noise_std=0.1), ValueError, "drift must be finite and >= 0, got -1.0"),
        (dict(step_size=None, drift=1.0, noise_std=-0.1), ValueError, "noise_std must be"),
        (dict(noise_std=0.1), ValueError, "noise_std goes with drift"),
        (dict(noise_scale=-1.0), ValueError, "noise_scale must be"),
        (dict(reference_std=0.0), ValueError, "reference_std must be"),
        (dict(reference_mean=float("inf")), ValueError, "reference_mean must be"),
        (dict(reference_mean=1.0), ValueError, "reference_mean must be given with reference_std, got 1.0 alone"),
        (dict(grad_clamp=-0.1), ValueError, "grad_clamp must be"),
        (dict(clamp=(1.0, 1.0)), ValueError, r"low < high, got \(1.0, 1.0\)"),
        (dict(clamp=(1.0, 0.0)), ValueError, "low < high"),
        (dict(clamp=3.0), ValueError, "clamp must be a pair"),
    ],
)
def test_wrong_dynamics_are_named(arguments, error, message):
    with pytest.raises(error, match=f"Langevin: .*{message}|{message}"):
        langevin_sample(quadratic, images(), **{"steps": 3, "step_size": 0.3, **arguments})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(x=images().double()), TypeError, "x must be float32, got torch.float64"),
        (dict(x=images().byte()), TypeError, "x must be float32, got torch.uint8"),
        (dict(x=images().tolist()), TypeError, "x must be a tensor, got list"),
        (dict(x=torch.tensor(1.0)), ValueError, r"x must have shape \(N, ...\)"),
        (
            dict(energy=lambda x: x.flatten(1).sum(1, keepdim=True)),
            ValueError,
            r"energy must return shape \(4,\).*\(4, 1\)",
        ),
        (dict(energy=lambda x: x.sum()), ValueError, "energy must return shape"),
        (dict(energy=None), TypeError, "energy must be a module or a callable"),
        (dict(mask=torch.ones(8, 8)), TypeError, "mask must be a bool tensor"),
        (dict(mask=torch.ones(7, 8, dtype=torch.bool)), ValueError, r"mask must broadcast to x's shape \(4, 3, 8, 8\)"),
        (dict(mask=torch.ones(2, 4, 3, 8, 8, dtype=torch.bool)), ValueError, "mask must broadcast"),
        (dict(precision="bf61"), ValueError, "precision must be one of auto, fp32.*, got 'bf61'"),
        (dict(backend="natve"), ValueError, r"backend must be one of .* \(did you mean 'native'\?\)"),
        (dict(seed=-1), ValueError, "seed must be"),
        (dict(seed=1.5), TypeError, "seed must be"),
        (dict(first_step=-1), ValueError, "first_step|step"),
        (dict(first_step=2**32 - 2), ValueError, "first_step"),
        (dict(first_sample=2**32 - 3), ValueError, "first_sample"),
        (dict(first_sample=torch.arange(3)), ValueError, "first_sample"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    arguments = {"energy": quadratic, "x": images(), **arguments}
    energy, x = arguments.pop("energy"), arguments.pop("x")
    with pytest.raises(error, match=f"langevin_sample.*({message})"):
        langevin_sample(energy, x, steps=3, step_size=0.3, **arguments)
    if "energy" in message:
        return
    with pytest.raises(error, match=message):  # before the first snapshot is asked for
        Langevin(3, step_size=0.3).trajectory(energy, x, **arguments)


def test_trajectory_refuses_a_stride_of_nothing():
    with pytest.raises(ValueError, match="every must be a positive int, got 0"):
        Langevin(3, step_size=0.3).trajectory(quadratic, images(), every=0)


def test_a_named_backend_that_is_missing_raises():
    missing = [b for b in ops.BACKENDS[1:] if ops.unavailable("langevin_step", b, torch.device("cpu"))]
    if not missing:
        pytest.skip("every backend is usable here")
    with pytest.raises(BackendError, match="langevin_sample: backend.*not available"):
        langevin_sample(quadratic, images(), steps=1, step_size=0.3, backend=missing[0])


def test_a_callback_that_cannot_be_called_is_refused_before_any_step():
    steps = []

    def energy(x):
        steps.append(1)
        return quadratic(x)

    with pytest.raises(TypeError, match="langevin_sample: callback must be callable, got int"):
        langevin_sample(energy, images(), steps=1, step_size=0.3, callback=3)
    with pytest.raises(TypeError, match="HMC: callback must be callable, got str"):
        HMC(steps=1, step_size=0.3, leapfrog_steps=2)(energy, images(), callback="x")
    assert not steps


def test_the_description_is_a_value():
    dynamics = Langevin(3, step_size=0.3, clamp=[0.0, 1.0])
    assert dynamics == Langevin(3, step_size=0.3, clamp=(0.0, 1.0)) and hash(dynamics)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dynamics.steps = 4
    assert dataclasses.replace(dynamics, steps=4).steps == 4


def test_counters_may_be_device_tensors():
    expected = langevin_sample(quadratic, images(), steps=3, step_size=1.0, seed=5, first_step=6, first_sample=2)
    got = langevin_sample(
        quadratic, images(), steps=3, step_size=1.0, seed=torch.tensor(5), first_step=torch.tensor(6),
        first_sample=torch.arange(2, 6),
    )  # fmt: skip
    assert torch.equal(got, expected)


def test_numbers_that_are_equal_and_no_numbers_are_refused_after_those_that_are():
    Langevin(3, step_size=0.1, clamp=(0, 1))
    with pytest.raises(TypeError, match="clamp must be a pair of numbers"):
        Langevin(3, step_size=0.1, clamp=(False, True))
