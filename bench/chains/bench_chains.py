"""Whole chains and the cascade, as `mgebm bench chains` measures them: `pytest bench/chains`."""

from __future__ import annotations

import pytest

from mgebm_fast.benchmarks import cases


@pytest.mark.parametrize("index", range(len(cases(("chains",)))))
def bench_chain(whole, device, index):
    whole(cases(("chains",), device=device)[index])
