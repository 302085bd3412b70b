"""Notebooks of the examples that are written in cells, executed: docs/notebooks/*.ipynb.

    pip install nbclient nbformat ipykernel
    python scripts/make_notebooks.py

A cell of examples/X.py begins at `# %%`, one of text at `# %% [markdown]`. A cell's last expression is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("first_steps", "energy_of_your_own")


def cells(source: str) -> list[tuple[str, str]]:
    """(markdown or code, its text) of every cell."""
    found = []
    for part in source.split("# %%")[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip()))
    return found


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    for name in NAMES:
        notebook: Any = nbformat.v4.new_notebook()
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        for number, (kind, text) in enumerate(cells((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8"))):
            make = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
            notebook.cells.append(make(text, id=f"cell-{number}"))
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
        for cell in notebook.cells:
            cell.metadata.clear()  # when a cell ran
        path = ROOT / "docs" / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
