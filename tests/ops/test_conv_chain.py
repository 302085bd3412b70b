"""conv_chain: gradients against float64 autograd, steps against the update op, and what results do not depend on."""

from __future__ import annotations

import concurrent.futures
import importlib
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from helpers.stacks import Stage, images, make, net, place

from mgebm_fast import native, ops
from mgebm_fast.errors import BackendError
from mgebm_fast.ops.update import update

conv_chain = importlib.import_module("mgebm_fast.ops.conv_chain")
windows = importlib.import_module("mgebm_fast.ops.conv_chain.windows")
scratch = importlib.import_module("mgebm_fast.ops.conv_chain.scratch")

ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
NUMBERS = update(step_size=0.3, reference_std=50.0, grad_clamp=0.8, clamp=(0.0, 255.0))


@pytest.fixture(autouse=True)
def restored_isa():
    before = native.isa()
    yield
    assert native.module().set_isa(before)


def use(isa: str, bfloat: bool = False) -> None:
    if not native.module().set_isa(isa):
        pytest.skip(f"this CPU or build has no {isa}")
    if bfloat and not conv_chain.has_bfloat():
        pytest.skip(f"{isa} does not multiply bfloat16")


def error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


SHAPES = {
    "published 4": ((4, 4), 3, [(96, 5, 2, 2), (128, 3, 1, 1), (64, 3, 1, 1)], 18),
    "odd sizes": ((7, 5), 2, [(5, 3, 2, 1), (33, 3, 1, 1)], 17),
    "even kernels": ((12, 12), 3, [(16, 4, 2, 1), (24, 4, 2, 1)], 9),
    "one layer": ((8, 8), 1, [(20, 3, 1, 1)], 4),
    "whole map": ((6, 6), 3, [(8, 3, 1, 1), (10, 6, 1, 0), (12, 1, 1, 0)], 40),
    "unread pixels": ((9, 9), 3, [(6, 2, 3, 0), (7, 2, 1, 0)], 5),
    "many channels": ((5, 8), 7, [(18, 3, 1, 1), (3, 3, 1, 0)], 6),
    "one dimension": ((30,), 2, [(9, 7, 3, 3), (17, 3, 1, 1)], 16),
    "three dimensions": ((5, 6, 4), 3, [(8, 3, 2, 1), (6, 3, 1, 1)], 7),
    "one sample": ((8, 8), 3, [(16, 3, 1, 1), (16, 3, 2, 1)], 1),
    # Of a single channel the outputs of the edge are patches of pixels.
    "whole patches": ((8, 12), 1, [(20, 5, 1, 2), (7, 3, 2, 1)], 19),
    "cut patches": ((7, 9), 1, [(9, 4, 3, 1), (7, 1, 1, 0)], 18),
    "patches of planes": ((3, 6, 5), 1, [(8, 3, 2, 1), (6, 1, 1, 0)], 7),
    "one dimension, one channel": ((22,), 1, [(9, 5, 2, 2)], 5),
}


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch"])
@pytest.mark.parametrize("case", list(SHAPES))
@pytest.mark.parametrize("isa", ISAS)
def test_gradient_equals_float64_autograd(isa, case, norm):
    use(isa)
    size, channels, layers, samples = SHAPES[case]
    stages, head = make(size, channels, layers, norm=norm, activation="silu")
    x = images(samples, channels, size)
    if norm and samples == 1:
        x = images(2, channels, size)
    expected = conv_chain.gradient_reference(stages, head, x)
    assert error(conv_chain.ConvChain(stages, head).gradient(x), expected) < 3e-6
    if conv_chain.has_bfloat():
        assert error(conv_chain.ConvChain(stages, head, bfloat=True).gradient(x), expected) < 0.03


@pytest.mark.parametrize("activation, slope", [("none", 1.0), ("relu", 0.0), ("leaky_relu", 0.2),
                                               ("leaky_relu", -0.5), ("elu", 1.0), ("silu", 1.0)])  # fmt: skip
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch"])
@pytest.mark.parametrize("isa", ISAS)
def test_gradient_of_every_activation(isa, norm, activation, slope):
    use(isa)
    stages, head = make((8, 8), 3, [(16, 3, 1, 1), (32, 3, 2, 1)], norm=norm, activation=activation, slope=slope)
    # Signs that a rounding error turns would change the gradient by far more: none of these is that close to zero.
    for stage in stages:
        if stage.bias is not None:
            stage.bias += 0.05
    x = images(12, 3, (8, 8))
    expected = conv_chain.gradient_reference(stages, head, x)
    assert error(conv_chain.ConvChain(stages, head).gradient(x), expected) < 1e-5


def test_dilation():
    stages, head = make((10, 10), 3, [(8, 3, 1, 2), (8, 3, 1, 2)], activation="silu", dilation=2)
    x = images(6, 3, (10, 10))
    found = conv_chain.ConvChain(stages, head).gradient(x)
    assert error(found, conv_chain.gradient_reference(stages, head, x)) < 3e-6


@pytest.mark.parametrize("size", [(8, 8), (8, 6), (5, 3)], ids=["quads", "rows of 6", "odd"])
@pytest.mark.parametrize("masked, channels", [(False, 3), (True, 3), (True, 1)])
@pytest.mark.parametrize("isa", ISAS)
def test_a_step_is_the_update_op_on_the_engines_gradient(isa, size, masked, channels):
    use(isa)
    stages, head = net(size=size, channels=channels)
    x = images(20, channels, size) * 60 + 100
    mask = torch.rand(20, 1, *size, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    for bfloat in {False, conv_chain.has_bfloat()}:
        chain = conv_chain.ConvChain(stages, head, bfloat=bfloat)
        expected = x.clone()
        for k in range(3):
            gradient = chain.gradient(expected)
            ops.langevin_step_(expected, gradient, step_size=0.3, reference_std=50.0, grad_clamp=0.8,
                               clamp=(0.0, 255.0), mask=mask, seed=7, first_sample=5, step=11 + k,
                               stream=3)  # fmt: skip
        found = x.clone()
        chain.advance_(found, 3, NUMBERS, place(first_sample=5, step=11), mask)
        assert torch.equal(found, expected)


def test_steps_agree_with_the_float64_reference():
    stages, head = make((8, 8), 3, [(16, 3, 1, 1), (16, 3, 2, 1)], activation="silu")
    x = images(20, 3, (8, 8)) * 60 + 100
    arguments = dict(steps=4, step_size=0.3, reference_std=50.0, grad_clamp=0.8, clamp=(0.0, 255.0), seed=7, stream=3)
    arguments |= dict(
        first_step=torch.tensor(5), mask=torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.8
    )
    expected = conv_chain.conv_chain(stages, head, x, backend="reference", **arguments)
    torch.testing.assert_close(conv_chain.conv_chain(stages, head, x, **arguments), expected, rtol=0, atol=1e-4)


def test_a_relu_has_no_slope_in_any_backend():
    stages, head = make((8, 8), 3, [(16, 3, 1, 1), (16, 3, 2, 1)], activation="relu", slope=0.7)
    x = images(3, 3, (8, 8))
    gradient = conv_chain.ConvChain(stages, head).gradient(x)
    expected = conv_chain.gradient_reference(stages, head, x).float()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("bfloat", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("isa", ISAS)
def test_results_do_not_depend_on_threads_split_or_layout(isa, bfloat, channels):
    use(isa, bfloat)
    stages, head = net(channels=channels)
    chain = conv_chain.ConvChain(stages, head, bfloat=bfloat)
    x = images(37, channels, (8, 8)) * 60 + 100
    threads = torch.get_num_threads()

    def run(part, first, steps=5, step=0, layout=torch.contiguous_format):
        out = part.clone(memory_format=layout)
        chain.advance_(out, steps, NUMBERS, place(first_sample=first, step=step))
        return out

    try:
        torch.set_num_threads(1)
        whole = run(x, 0)
        for count in (2, 3, 5):  # whole chains shared out; at 5 threads, more than blocks, passes
            torch.set_num_threads(count)
            assert torch.equal(run(x, 0), whole)
        assert torch.equal(run(x, 0, layout=torch.channels_last), whole)
        assert torch.equal(torch.cat([run(part, 5 * i) for i, part in enumerate(x.split(5))]), whole)
        assert torch.equal(run(run(x, 0, steps=2), 0, steps=3, step=2), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bfloat", [False, True], ids=["fp32", "bf16"])
def test_batch_statistics_do_not_depend_on_threads(bfloat):
    if bfloat and not conv_chain.has_bfloat():
        pytest.skip("no bfloat16 here")
    stages, head = net(norm=True)
    chain = conv_chain.ConvChain(stages, head, bfloat=bfloat)
    x = images(37, 3, (8, 8))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = chain.gradient(x)
        for count in (2, 3, 5):  # passes shared out, a block a thread, passes
            torch.set_num_threads(count)
            assert torch.equal(chain.gradient(x), one)
    finally:
        torch.set_num_threads(threads)


def test_statistics_survive_a_mean_far_above_the_deviation():
    stages, head = make((8, 8), 1, [(8, 1, 1, 0)], norm=True, activation="silu")
    x = 1000 + images(16, 1, (8, 8))
    expected = conv_chain.gradient_reference(stages, head, x)
    plain = x.clone().requires_grad_()
    stage = stages[0]
    z = F.batch_norm(F.conv2d(plain, stage.weight), None, None, stage.norm.weight, stage.norm.bias, True, 0.0, 1e-5)
    (torch_gradient,) = torch.autograd.grad((F.silu(z) * head).sum(), plain)
    found = error(conv_chain.ConvChain(stages, head).gradient(x), expected)
    assert found < 2 * error(torch_gradient, expected) + 1e-5


@pytest.mark.parametrize("activation", ["silu", "elu"])
def test_nan_stays_with_its_sample(activation):
    stages, head = make((8, 8), 3, [(24, 5, 2, 2), (40, 3, 1, 1)], activation=activation)
    x = images(20, 3, (8, 8))
    x[3, 0, 0, 0] = float("nan")
    gradient = conv_chain.ConvChain(stages, head).gradient(x)
    bad = ~torch.isfinite(gradient).flatten(1).all(1)
    assert bad.nonzero().flatten().tolist() == [3]


def test_ids_of_its_own_for_each_sample():
    stages, head = net()
    x = images(20, 3, (8, 8))
    ids = torch.arange(40, 20, -1)
    chain = conv_chain.ConvChain(stages, head)
    found = x.clone()
    chain.advance_(found, 2, NUMBERS, place(first_sample=ids))
    turned = x.flip(0).contiguous()
    chain.advance_(turned, 2, NUMBERS, place(first_sample=21))
    assert torch.equal(found, turned.flip(0))


@pytest.mark.parametrize("kind", ["forward", "backward", "edge"])
def test_windows_cover_each_output_once(kind):
    geometry = ((9, 10), (5, 4), (3, 4), (2, 3), (1, 2), (1, 1))
    tables = getattr(windows, f"{kind}_windows")(*geometry)
    outputs = {"forward": 20, "backward": 90, "edge": 9 * 3}[kind]
    assert sorted(tables.output.tolist()) == list(range(outputs))
    assert tables.first_tap[-1] == len(tables.tap_pixel) == len(tables.tap_weight)


def test_threads_of_the_caller_do_not_meet_in_a_buffer():
    stages, head = net()
    batches = [images(16 + i, 3, (8, 8), seed=i) for i in range(4)]
    chain = conv_chain.ConvChain(stages, head)
    expected = [chain.gradient(x) for x in batches]

    def work(i):
        return all(torch.equal(conv_chain.ConvChain(stages, head).gradient(batches[i]), expected[i]) for _ in range(20))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_what_cannot_be_run_is_refused_before_an_address_is_taken():
    stages, head = net()
    x = images(20, 3, (8, 8))
    chain = conv_chain.ConvChain(stages, head)
    for wrong, error_type in [
        (x.half(), TypeError), (x.double(), TypeError), (x[:, :2], ValueError), (x[..., :7], ValueError),
        (x[0], ValueError), (x.to("meta"), ValueError),
    ]:  # fmt: skip
        with pytest.raises(error_type, match="x must"):
            chain.gradient(wrong)
        with pytest.raises(error_type, match="x must"):
            chain.advance_(wrong, 1, NUMBERS, place())
    with pytest.raises(ValueError, match="steps must be an int >= 0, got -1"):
        chain.advance_(x, -1, NUMBERS, place())
    with pytest.raises(TypeError, match="mask must be a bool"):
        chain.advance_(x, 1, NUMBERS, place(), torch.ones_like(x))
    with pytest.raises(ValueError, match="one id a sample, 5, got 20"):
        chain.advance_(x[:5].clone(), 1, NUMBERS, place(first_sample=torch.arange(20)))
    for backend in ("triton", "bogus"):
        with pytest.raises((ValueError, BackendError), match=backend):
            conv_chain.conv_chain(stages, head, x, steps=1, step_size=0.1, backend=backend)
    with pytest.raises(ValueError, match="more than one value a channel"):
        conv_chain.ConvChain(*make((8, 8), 3, [(4, 8, 1, 0)], norm=True)).gradient(x[:1])


def test_a_counter_past_32_bits_is_not_wrapped():
    stages, head = net()
    x = images(4, 3, (8, 8))
    conv_chain.ConvChain(stages, head).advance_(x, 3, NUMBERS, place(step=2**32 - 2))
    assert torch.isnan(x).all()


def test_weights_are_those_of_the_packing():
    stages, head = net(norm=True)
    x = images(20, 3, (8, 8))
    chain = conv_chain.ConvChain(stages, head)
    before = chain.gradient(x)
    for stage in stages:
        stage.weight.mul_(3)
        stage.norm.weight.mul_(3)
        stage.norm.bias.add_(1)
    assert torch.equal(chain.gradient(x), before)


def test_weights_in_bfloat_are_not_read_by_a_set_without_it():
    use("amx", bfloat=True) if native.module().set_isa("amx") else use("avx512bf16", bfloat=True)
    stages, head = net()
    chain = conv_chain.ConvChain(stages, head, bfloat=True)
    assert native.module().set_isa("portable")
    with pytest.raises(RuntimeError, match="weights are bfloat16"):
        chain.gradient(images(4, 3, (8, 8)))


def test_torchs_defaults_change_nothing():
    stages, head = net()
    x = images(20, 3, (8, 8))
    expected = conv_chain.ConvChain(stages, head).gradient(x)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        scratch._kept.clear()
        found = conv_chain.ConvChain(stages, head).gradient(x)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_too_many_stages():
    stages, head = make((2, 2), 1, [(1, 1, 1, 0)] * 33)
    with pytest.raises(ValueError, match="stages must be 1 to 32, got 33"):
        conv_chain.ConvChain(stages, head)


@pytest.mark.parametrize("first", [2**32 - 1, torch.tensor(2**32 - 1)], ids=["int", "tensor"])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_last_step_past_thirty_two_bits_is_refused(name, first):
    stages, head = make((4, 4), 1, [(4, 3, 1, 1)])
    x = images(2, 1, (4, 4))
    run = dict(step_size=0.1, backend=name)
    assert torch.isfinite(ops.conv_chain(stages, head, x, steps=1, first_step=first, **run)).all()
    with pytest.raises(ValueError, match=r"conv_chain: first_step must stay in \[0, 2\*\*32\), got .*4294967296"):
        ops.conv_chain(stages, head, x, steps=2, first_step=first, **run)
    with pytest.raises(ValueError, match="conv_chain: steps must be an int >= 0, got 1.5"):
        ops.conv_chain(stages, head, x, steps=1.5, **run)


class Asked(Exception):
    """Raised by the handler of a signal."""


@pytest.fixture
def alarm():
    """A function that lets SIGALRM call `handler` after some seconds."""

    def start(handler, seconds=0.05):
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.getsignal(signal.SIGALRM)
    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("norm, samples, count", [(False, 4, 1), (False, 70, 2), (True, 20, 1), (True, 20, 2)])
def test_a_signal_ends_a_chain_and_x_is_as_it_was(alarm, threads, norm, samples, count):
    """The chain would take minutes; whole chains, shared passes and threads with blocks of their own."""
    threads(count)
    stages, head = net(norm=norm)
    chain = conv_chain.ConvChain(stages, head)
    x = images(samples, 3, (8, 8))
    before = x.clone()

    def handler(*_):
        raise Asked

    alarm(handler)
    started = time.process_time()  # of all threads, so that other processes do not count
    with pytest.raises(Asked):
        chain.advance_(x, 10**6, NUMBERS, place())
    assert torch.equal(x, before)
    assert time.process_time() - started < 2 * count  # 0.1 s a thread; the chain would take minutes


def test_a_chain_with_batch_statistics_on_many_images_answers_within_a_step(alarm, threads):
    """One step takes a second here: the work of its passes is cut. On one thread, whose CPU time is its own."""
    threads(1)
    stages, head = make((64, 64), 3, [(48, 5, 1, 2), (48, 5, 1, 2), (48, 5, 1, 2)], norm=True)
    chain = conv_chain.ConvChain(stages, head)

    def handler(*_):
        raise Asked

    x = images(48, 3, (64, 64))
    started = time.process_time()
    chain.advance_(x, 1, NUMBERS, place())
    whole = time.process_time() - started
    with pytest.raises(Asked):
        alarm(handler, 0.01)
        chain.advance_(x, 3, NUMBERS, place())
    cut = time.process_time() - started - whole
    assert cut < whole / 2, (cut, whole)  # a tenth of a second, and one or more


def test_a_handler_that_returns_changes_no_bit(alarm):
    stages, head = net()
    chain = conv_chain.ConvChain(stages, head)
    x, quiet, seen = images(40, 3, (8, 8)), images(40, 3, (8, 8)), []
    steps = 200
    chain.advance_(quiet, steps, NUMBERS, place())
    alarm(lambda *_: seen.append(1), 0.002)
    while not seen:
        x = images(40, 3, (8, 8))
        chain.advance_(x, steps, NUMBERS, place())
    assert torch.equal(x, quiet)


def test_pixels_past_an_int_are_refused_before_a_table_is_made():
    wide = Stage(torch.zeros(1, 1, 1, 1), None, (1, 1), (0, 0), (1, 1), None, "none", 1.0, (2**16, 2**15), (1, 1))
    with pytest.raises(ValueError, match=r"maps of fewer than 2\*\*31 pixels, got 65536×32768"):
        conv_chain.ConvChain([wide], torch.zeros(1, 1, 1))


def test_a_shortcut_is_refused():
    stages, head = net()
    stages[1].shortcut = 0
    with pytest.raises(ValueError, match="stages must have no shortcut but on a GPU"):
        conv_chain.ConvChain(stages, head)


@pytest.mark.parametrize("norm", [False, True])
def test_flushed_subnormals_change_nothing(threads, norm):
    stages, head = net(norm=norm)
    head = head * 1e-38
    x = images(40, 3, (8, 8))
    threads(1)
    expected = conv_chain.ConvChain(stages, head).gradient(x)
    assert ((expected != 0) & (expected.abs() < 1e-38)).any()
    assert torch.set_flush_denormal(True)
    try:
        for count in (1, 2):
            threads(count)
            assert torch.equal(conv_chain.ConvChain(stages, head).gradient(x), expected)
        assert torch.tensor([1e-39]).mul(0.5).item() == 0  # the caller's setting is back
    finally:
        torch.set_flush_denormal(False)


def test_tables_of_many_sizes_do_not_fill_memory(monkeypatch):
    monkeypatch.setattr(windows, "_KEPT_BYTES", 200_000)
    made = [windows.forward_windows((n, n), (n, n), (3, 3), (1, 1), (1, 1), (1, 1)) for n in range(20, 60)]
    kept = list(windows._kept.values())
    assert sum(tables.nbytes for tables in kept) <= 200_000 < sum(tables.nbytes for tables in made)
    assert windows.forward_windows((59, 59), (59, 59), (3, 3), (1, 1), (1, 1), (1, 1)) is made[-1] is kept[-1]
