"""Energies that torch compiled: by TorchScript, whose modules have no attributes of Python's, and by torch.compile."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mgebm_fast as mg
from mgebm_fast import native
from mgebm_fast.gradient.graph import MIN_STEPS
from mgebm_fast.gradient.plan import plan

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled module is not built")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0)).eval()


def points() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def loaded(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


class Holding(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


MADE: dict[str, Callable[[nn.Module], Any]] = {
    "scripted": torch.jit.script,
    "traced": lambda module: torch.jit.trace(module, points()),
    "frozen": lambda module: torch.jit.freeze(torch.jit.script(module)),
    "loaded": loaded,
}
HELD: dict[str, Callable[[Any], Any]] = {
    "itself": lambda module: module,
    "a function": lambda module: lambda x: module(x),
    "a module": Holding,
    "negative": lambda module: mg.negative(mg.negative(module)),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("made", MADE)
def test_modules_by_torchscript_run(made: str, held: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        energy, x = HELD[held](MADE[made](net())), points()
    assert mg.Langevin(4, step_size=0.1).explain(energy, x).plan == "autograd"
    for steps in (1, MIN_STEPS, MIN_STEPS):  # which it optimises at the second call
        got = mg.langevin_sample(energy, x, steps=steps, step_size=0.1, seed=1)
        torch.testing.assert_close(got, mg.langevin_sample(net(), x, steps=steps, step_size=0.1, seed=1))


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 compiles whatever it meets")
@pytest.mark.parametrize("held", HELD)
def test_what_torch_compiles_is_read_as_it_was_written(held: str) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    inner, x = net(), points()
    energy = HELD[held](torch.compile(inner, backend=backend))
    found = plan(energy, x, steps=MIN_STEPS)
    assert found.explain().plan == "graph" and not compiled
    torch.testing.assert_close(found.gradient(x), plan(inner, x).gradient(x))
    energy(x)
    assert compiled  # it compiles as before
