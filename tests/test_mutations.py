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
    yield module
    del sys.modules["mutations"]


def test_every_mutation_can_be_applied(mutations):
    for mutation in mutations.MUTATIONS:
        path = ROOT / mutation.file.replace("mgebm_fast/kernels/", "kernels/")
        text = path.read_text(encoding="utf-8")
        assert mutations.mutated(text, mutation) != text, mutation.name
        assert all((ROOT / test).is_file() for test in mutation.tests), mutation.name
    names = [mutation.name for mutation in mutations.MUTATIONS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "file, text",
    [
        (
            "a.py",
            '"""Halves: step / 2."""\n\n\ndef f(step):  # step / 2, as the paper\n    return (step /\n        2)\n',
        ),
        ("a.h", "// step / 2\n/* step / 2 */ return (step /\n 2);\n"),
    ],
)
def test_only_code_is_replaced(mutations, file, text):
    """Neither the words of comments and docstrings nor line breaks matter."""
    mutation = mutations.Mutation("half", "python", file, "step / 2", "step", ())
    assert mutations.mutated(text, mutation) == text.replace("step /\n        2", "step").replace("step /\n 2", "step")
