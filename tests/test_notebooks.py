"""Notebooks are their examples, executed: each runs, and the stored cells are those of its source."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "make_notebooks.py"))


@pytest.mark.parametrize("name", SCRIPT["NAMES"])
def test_a_notebook_is_its_example_and_runs(name, capsys):
    source = ROOT / "examples" / f"{name}.py"
    notebook = json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    stored = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert stored == SCRIPT["cells"](source.read_text(encoding="utf-8")), "run scripts/make_notebooks.py"
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output["output_type"] != "error" for output in outputs)
    runpy.run_path(str(source))
    assert capsys.readouterr().out.count("\n") >= 3
