"""Notebooks are their examples, executed: each runs, and the stored cells are those of its source. The site has a page
of each, as of every document."""

from __future__ import annotations

import json
import re
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


def test_the_site_has_every_page_and_a_warning_ends_its_build():
    nav = re.findall(r": (\S+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).as_posix() for kind in ("*.md", "notebooks/*.ipynb") for path in docs.glob(kind)}
    assert sorted(nav) == sorted(pages - {"README.md"})
    (build,) = re.findall(r"mkdocs build.*", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert "--strict" in build and "quiet" not in build  # with --quiet mkdocs drops warnings before it counts them
