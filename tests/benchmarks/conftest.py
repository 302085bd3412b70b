"""No test here waits for a large matrix product."""

from __future__ import annotations

import pytest

from mgebm_fast.benchmarks import timing


@pytest.fixture(autouse=True, scope="module")
def small_ceilings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.MATRIX_SIZE, "cpu", 64)
        timing.matrix_rate.cache_clear()
        yield
    timing.matrix_rate.cache_clear()
