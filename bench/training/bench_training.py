"""Whole training iterations, as `mgebm bench training` measures them: `pytest bench/training`."""

from __future__ import annotations

import pytest

from mgebm_fast.benchmarks import cases


@pytest.mark.parametrize("index", range(len(cases(("training",)))))
def bench_iteration(whole, device, index):
    whole(cases(("training",), device=device)[index])
