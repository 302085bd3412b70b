"""The list of mutations keeps up with the sources: every one can be applied, and names tests that exist."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mutations():
    path = ROOT / "scripts/mutations.py"
    if not path.is_file():  # an installed copy of the tests
        pytest.skip("scripts/ is not here")
    spec = importlib.util.spec_from_file_location("mutations", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["mutations"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.MUTATIONS
    del sys.modules["mutations"]


def test_every_mutation_can_be_applied(mutations):
    for mutation in mutations:
        path = ROOT / mutation.file.replace("mgebm_fast/kernels/", "kernels/")
        assert path.read_text(encoding="utf-8").count(mutation.old) == 1, f"{mutation.name}: {mutation.file}"
        assert mutation.old != mutation.new, mutation.name
        assert all((ROOT / test).is_file() for test in mutation.tests), mutation.name
    names = [mutation.name for mutation in mutations]
    assert len(names) == len(set(names))
