"""Seeds that nobody gives: every call has noise of its own, which torch's generator governs."""

import math
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mgebm_fast as mg
from mgebm_fast import noise
from mgebm_fast.noise import resolve_seed
from mgebm_fast.sampling.cascade import cascade
from mgebm_fast.sampling.diagnostics import Recorder


def half_square(x):
    return x.square().flatten(1).sum(1) / 2


CHAINS = {
    "langevin_sample": lambda x, **seeded: mg.langevin_sample(half_square, x, steps=2, step_size=0.3, **seeded),
    "trajectory": lambda x, **seeded: list(mg.Langevin(2, step_size=0.3).trajectory(half_square, x, **seeded))[-1][1],
    "MALA": lambda x, **seeded: mg.MALA(2, 0.3)(half_square, x, **seeded).x,
    "HMC": lambda x, **seeded: list(mg.HMC(2, 2, 0.3).trajectory(half_square, x, **seeded))[-1][1],
    "cascade": lambda x, **seeded: cascade(
        [half_square], (1, 2), [mg.Langevin(2, step_size=0.3)], x[..., :1, :1], **seeded
    )[-1],
}


def test_one_step_a_call_has_the_law_of_one_chain():
    """Replay buffers and persistent chains: 1,500 calls of one step on N(0, 1).

    With step 0.5 the chain has variance 1/(1 − δ²/4) and autocorrelation 0.875 a step: 256 chains of 1,500 steps, the
    first 60 left out, estimate the deviation with a standard error below 0.1 %; a false alarm needs 10 of them.
    """
    torch.manual_seed(0)
    x, squares = torch.zeros(4, 64), 0.0
    for call in range(1500):
        x = mg.langevin_sample(half_square, x, steps=1, step_size=0.5)
        squares += 0.0 if call < 60 else float(x.double().square().mean())
    assert math.sqrt(squares / 1440) == pytest.approx(1 / math.sqrt(1 - 0.25 / 4), rel=0.01)


@pytest.mark.parametrize("name", CHAINS)
def test_calls_without_a_seed_differ_and_torch_s_seed_repeats_them(name):
    run, x = CHAINS[name], torch.zeros(3, 1, 2, 2)
    torch.manual_seed(5)
    first, second = run(x), run(x)
    torch.manual_seed(5)
    assert torch.equal(run(x), first) and torch.equal(run(x), second) and not torch.equal(first, second)
    own = torch.Generator().manual_seed(5)
    assert torch.equal(run(x, generator=own), first) and torch.equal(run(x, generator=own), second)
    state = torch.get_rng_state()
    assert torch.equal(run(x, seed=7), run(x, seed=7)) and torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="seed and generator exclude each other"):
        run(x, seed=1, generator=own)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got int"):
        run(x, generator=3)


def test_drawn_seeds_are_the_numbers_of_randint():
    cpu, own, other = torch.device("cpu"), torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
    torch.manual_seed(3)
    expected = [int(torch.randint(2**63 - 1, ())) for _ in range(3)]
    torch.manual_seed(3)
    assert [resolve_seed(None, None, cpu, "x") for _ in range(3)] == expected
    assert resolve_seed(None, own, cpu, "x") == int(torch.randint(2**63 - 1, (), generator=other))


def test_a_seed_can_be_drawn_in_any_thread_and_mode():
    cpu, places, seeds = torch.device("cpu"), {noise._scratch.number.data_ptr()}, []

    def draw():
        with torch.inference_mode():  # the first draw of this thread
            seeds.append(resolve_seed(None, None, cpu, "x"))
        seeds.append(resolve_seed(None, None, cpu, "x"))
        places.add(noise._scratch.number.data_ptr())

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert len(places) == 2 and len(set(seeds)) == 2  # no thread writes the number of another
    with FakeTensorMode():
        assert isinstance(resolve_seed(None, None, cpu, "x"), FakeTensor)
    with FlopCounterMode(display=False):
        assert isinstance(resolve_seed(None, None, cpu, "x"), int)


def test_explain_draws_nothing_and_a_recorder_draws_its_own():
    state = torch.get_rng_state()
    mg.Langevin(2, step_size=0.3).explain(half_square, torch.zeros(2, 3))
    assert torch.equal(state, torch.get_rng_state())
    chain, x, traces = mg.Langevin(2, step_size=0.9), torch.ones(2, 3), []
    for seed in (None, None, 3, 3):
        recorder = Recorder(half_square, chain, seed=seed)
        chain(half_square, x, seed=1, callback=recorder)
        traces.append(recorder.trace().log_acceptance)
    assert not np.array_equal(traces[0], traces[1]) and np.array_equal(traces[2], traces[3])


@pytest.mark.parametrize("ids", [[4, 9], np.array([4, 9], np.int32), torch.tensor([4, 9], dtype=torch.int32)])
def test_numbers_of_numpy_and_torch_are_numbers(ids):
    x = torch.zeros(2, 3)
    expected = mg.langevin_sample(
        half_square, x, steps=2, step_size=0.5, clamp=(-1.0, 1.0), seed=3, first_sample=torch.tensor([4, 9]),
        first_step=2,
    )  # fmt: skip
    got = mg.langevin_sample(
        half_square, x, steps=np.int64(2), step_size=np.float32(0.5), noise_scale=torch.tensor(1.0),
        clamp=np.array([-1.0, 1.0]), seed=np.int64(3), first_sample=ids, first_step=np.int32(2),
    )  # fmt: skip
    assert torch.equal(got, expected)
    exact = mg.MALA(np.int64(2), torch.tensor(0.5), temperature=np.float32(1))
    a = exact(half_square, x, seed=np.uint8(3), first_sample=ids)
    b = mg.MALA(2, 0.5)(half_square, x, seed=3, first_sample=torch.tensor([4, 9]))
    assert torch.equal(a.x, b.x)


@pytest.mark.parametrize(
    "wrong", [{"steps": 2.0}, {"steps": True}, {"step_size": "1"}, {"first_sample": [0.5, 1.0]}, {"seed": 1.0}]
)
def test_what_is_no_number_of_the_kind_is_refused_by_name(wrong):
    arguments = {"steps": 1, "step_size": 0.5, **wrong}
    with pytest.raises((TypeError, ValueError), match=rf"{next(iter(wrong))} must be"):
        mg.langevin_sample(half_square, torch.zeros(2, 3), **arguments)
