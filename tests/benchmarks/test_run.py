"""Gate, timing, rows, files and pictures."""

from __future__ import annotations

import dataclasses

import pytest

from mgebm_fast.benchmarks import cases, contenders, run_case, timing
from mgebm_fast.benchmarks.busy import covered
from mgebm_fast.benchmarks.contenders import CONTENDERS, Contender
from mgebm_fast.benchmarks.report import Row, console_table, read_csv, write_csv
from mgebm_fast.benchmarks.run import choose
from mgebm_fast.benchmarks.timing import device_slug, matrix_rate, measure

(TINY,) = cases(("chains",), only=["4"], tiny=True)


def named(*names):
    return [CONTENDERS[name] for name in names]


@pytest.fixture(scope="module")
def rows():
    return run_case(TINY, contenders=named("mgebm_fp32", "plain_loop", "seed_loop"), rounds=3)


def test_a_row_has_every_figure(rows):
    assert [row.contender for row in rows] == ["mgebm_fp32", "plain_loop", "seed_loop"]
    for row in rows:
        assert row.ok and row.precision == "fp32" and row.rounds == 3
        assert 0 < row.low_ms <= row.ms <= row.high_ms
        assert row.gradient_error < 1e-5
        assert row.percent_of_ceiling == pytest.approx(100 * row.gflops / row.ceiling_gflops)
    ours, plain, seed = rows
    assert plain.vs_plain_loop == seed.vs_seed_loop == 1.0
    assert ours.vs_plain_loop == pytest.approx(plain.ms / ours.ms)
    assert ours.vs_seed_loop == pytest.approx(seed.ms / ours.ms)


def broken(net, plain):
    return lambda x, dynamics: x + 1.0


def missing(net, plain):
    raise ModuleNotFoundError("No module named 'torchebm'", name="torchebm.core")


def crashing(net, plain):
    calls = []

    def loop(x, dynamics):
        calls.append(dynamics)
        if len(calls) > 1:  # past the gate
            raise RuntimeError("out of memory")
        return CONTENDERS["plain_loop"].loop(net, plain)(x, dynamics)

    return loop


def test_who_is_wrong_or_missing_or_fails_gets_no_figure():
    odd = [Contender(f.__name__, "", "fp32", f) for f in (broken, missing, crashing)]
    with pytest.MonkeyPatch.context() as patch:
        for contender in odd:
            patch.setitem(contenders.CONTENDERS, contender.name, contender)
        found = {row.contender: row for row in run_case(TINY, contenders=[*odd, *named("plain_loop")], rounds=1)}
    assert found["plain_loop"].ok
    assert "float64" in found["broken"].status and found["broken"].gradient_error > 0.1
    assert found["missing"].status == "not measured: pip install torchebm==0.8.9"
    assert "out of memory" in found["crashing"].status
    for name in ("broken", "missing", "crashing"):
        assert found[name].ms is None and found[name].gflops is None


def test_contenders_take_turns_and_rounds_end_with_the_time():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = measure(runs, "cpu", rounds=4)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 5  # the warm-up and four rounds
    assert all(timing.rounds == 4 and timing.low <= timing.median <= timing.high for timing in timings.values())
    assert measure(runs, "cpu", rounds=50, seconds=0.0)["a"].rounds == 3
    assert measure(runs, "cpu", rounds=50, seconds=0.0, least=1)["a"].rounds == 1


def test_a_long_call_is_its_own_first_round(monkeypatch):
    monkeypatch.setattr(timing, "BATCH_SECONDS", 0.0)  # every call is long
    calls = []
    found = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, "cpu", rounds=2)
    assert found["a"].rounds == found["b"].rounds == 2 and calls == ["a", "a", "b", "b", "a", "b"]


def test_a_contender_that_raises_is_left_out():
    failures = {}
    timings = measure({"bad": lambda: 1 / 0, "good": list}, "cpu", rounds=1, failed=failures.__setitem__)
    assert list(timings) == ["good"] and isinstance(failures["bad"], ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        measure({"bad": lambda: 1 / 0}, "cpu", rounds=1)


def test_rows_survive_a_file(rows, tmp_path):
    failed = Row("chains", "4", "jax_scan", "fp32", 'failed: RuntimeError: a "comma", here')
    path = write_csv(tmp_path / "new" / "chains.csv", [*rows, failed])
    back = read_csv(path)
    assert back[-1] == failed
    for before, after in zip(rows, back, strict=False):
        assert after.ms == pytest.approx(before.ms, rel=1e-4)
        assert dataclasses.replace(after, ms=None).explain == before.explain
        assert (after.batch, after.rounds, after.case) == (before.batch, before.rounds, before.case)
    assert console_table(back).row_count == 4


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_table_is_drawn(rows, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    from mgebm_fast.benchmarks.picture import draw, draw_ops

    assert draw(rows, tmp_path / f"chains.{suffix}").stat().st_size > 1000
    op = {"op": "noise", "case": "8", "device": "cpu", "gb_per_s": "1", "percent_of_copy": "9", "torch": "2"}
    assert draw_ops([{**op, "baseline": "torch", "ratio": "2"}], tmp_path / f"ops.{suffix}").stat().st_size > 1000
    with pytest.raises(ValueError, match="at least one figure"):
        draw([], tmp_path / "none.svg")


def test_names_are_checked_and_the_default_needs_nothing_else():
    with pytest.raises(ValueError, match="did you mean 'cascade'"):
        cases(only=["cascad"])
    with pytest.raises(ValueError, match="did you mean 'plain_loop'"):
        choose(["plain_lop"])
    assert [c.name for c in choose(["jax_scan"])] == ["plain_loop", "jax_scan"]
    assert not any(c.slow for c in choose())
    assert len(choose(full=True)) == len(CONTENDERS)
    for device in ("cpu", "cuda"):
        quick, full = cases(device=device), cases(device=device, full=True)
        assert len({case.name for case in full}) == len(full) > len(quick)


def test_ceilings_are_rates():
    assert matrix_rate("cpu", "fp32") > 1e6 and matrix_rate("cpu", "bf16") > 1e6
    assert device_slug("cpu").replace("-", "").isalnum()


@pytest.mark.parametrize(
    ("intervals", "length"),
    [([], 0), ([(0, 2), (5, 6)], 3), ([(5, 6), (0, 3), (1, 2)], 4), ([(0, 2), (1, 4)], 4), ([(0, 0), (0, 1)], 1)],
)
def test_busy_time_is_the_union_of_the_kernels(intervals, length):
    assert covered(intervals) == length
