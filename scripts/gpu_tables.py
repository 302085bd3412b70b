"""Tables, as Markdown, of what scripts/gpu_check.sh left in a folder: `python scripts/gpu_tables.py FOLDER`."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from mgebm_fast.tables import markdown


def table(title: str, rows: list[dict]) -> str:
    """Rows of one kind; a column is a key of any of them."""
    if not rows:
        return f"## {title}\n\nnot measured\n"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    body = markdown(columns, (["; ".join(str(row.get(column, "")).splitlines()) for column in columns] for row in rows))
    return f"## {title}\n\n{body}\n"


def records(path: Path) -> list[dict]:
    """The lines of a JSON-lines file; one cut short, by a part that was stopped, is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def benches(path: Path) -> dict[str, list[dict]]:
    """The tables of bench.csv, each after a line `# name file`."""
    parts: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line.startswith("# "):
            parts[line[2:].split()[0]] = lines = []
        elif parts:
            lines.append(line)
    return {name: list(csv.DictReader(f"{line}\n" for line in lines)) for name, lines in parts.items()}


def progress(path: Path) -> list[dict]:
    """The last record of a run's metrics."""
    return records(path)[-1:]


def main(folder: Path) -> None:
    lines = records(folder / "results.jsonl")
    kinds = {kind: [{k: v for k, v in line.items() if k != "part"} for line in lines if line.get("part") == kind]
             for kind in ("run", "smoke", "evaluate")}  # fmt: skip
    print(table("Parts", kinds["run"]))
    print(table("Smoke test: failures", [row for row in kinds["smoke"] if not row["ok"]] or [{"failures": "none"}])
          if kinds["smoke"] else table("Smoke test", []))  # fmt: skip
    print(table("Smoke test", kinds["smoke"]))
    for name, rows in (benches(folder / "bench.csv") or {"Benches": []}).items():
        print(table(name, rows))
    print(table("Evaluation", kinds["evaluate"]))
    for run in ("digits", "grid64"):
        print(table(f"Training {run}, the last record", progress(folder / f"{run}.jsonl")))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: gpu_tables.py FOLDER (what gpu_check.sh wrote)")
    main(Path(sys.argv[1]))
