"""Tables, as Markdown, of what scripts/gpu_check.sh left in a folder: `python scripts/gpu_tables.py FOLDER`.

Of each file the columns that one compares; all of them are in the files. `gpu_tables.py FOLDER bench/results` keeps the
benches too, as bench/results/<device>/chains.csv and so on, from which scripts/gpu_model.py takes what was measured.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgebm_fast.tables import csv_text, markdown

CHAINS = ("case", "batch", "contender", "precision", "ms", "low_ms", "high_ms", "vs_plain_loop", "percent_of_ceiling",
          "gradient_error", "gpu_busy_percent", "status")  # fmt: skip
OPS = ("op", "case", "ours_us", "gb_per_s", "percent_of_copy", "baseline", "ratio")
EVALUATION = ("name", "num", "kid", "kid_real", "fid", "fid_real", "precision", "recall", "nearest_distance",
              "nearest_distance_real", "confident_share", "confident_share_real")  # fmt: skip
SMOKE = ("group", "check", "ok", "cases", "seconds", "share_of_bound", "said", "noted")


def cell(value: Any) -> str:
    """A number in four digits; text on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return "; ".join(str("" if value is None else value).splitlines())
    return f"{number:.0f}" if number.is_integer() or 1e4 <= abs(number) < 1e9 else f"{number:.4g}"


def table(title: str, rows: Sequence[dict], columns: Sequence[str] = ()) -> str:
    """Rows of one kind, by the columns that any of them has a value of; without `columns`, all."""
    if not rows:
        return f"## {title}\n\nnot measured\n"
    known = columns or list(dict.fromkeys(key for row in rows for key in row))
    shown = [name for name in known if any(row.get(name) not in (None, "") for row in rows)]
    body = markdown(shown, ([cell(row.get(name)) for name in shown] for row in rows))
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


def benches(path: Path) -> dict[tuple[str, str], list[dict]]:
    """The tables of bench.csv by (name, file), each after a line `# name file`."""
    parts: dict[tuple[str, str], list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line.startswith("# "):
            name, file = line[2:].split()
            parts[name, file] = lines = []
        elif parts:
            lines.append(line)
    return {names: list(csv.DictReader(f"{line}\n" for line in lines)) for names, lines in parts.items()}


def keep(tables: dict[tuple[str, str], list[dict]], results: Path) -> list[Path]:
    """One file a device and kind of table, `results`/<device>/<file>; what was there is replaced."""
    found: dict[Path, list[dict]] = {}
    for (_, file), rows in tables.items():
        for row in rows:
            folder = re.sub("[^a-z0-9]+", "-", row["device"].lower()).strip("-")
            found.setdefault(results / folder / file, []).append(row)
    for path, rows in found.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(csv_text(list(rows[0]), rows), encoding="utf-8", newline="")
    return list(found)


def longest(rows: Sequence[dict]) -> list[dict]:
    """Of the kernels of each chain: how many, how long together, and the longest three."""
    chains: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for row in rows:
        chains.setdefault((row["case"], row["batch"]), []).append((float(row["us"]), row["kernel"]))
    return [
        {"case": case, "batch": batch, "kernels a step": len(found), "us a step": sum(time for time, _ in found),
         "the longest": ", ".join(f"{name} {time:.1f}" for time, name in sorted(found, reverse=True)[:3])}
        for (case, batch), found in chains.items()
    ]  # fmt: skip


def machine(tables: dict[tuple[str, str], list[dict]]) -> list[dict]:
    """What was measured on, and the matrix rate that it reached in each precision."""
    found: dict[tuple[str, str], dict] = {}
    for row in (row for rows in tables.values() for row in rows if row.get("torch")):
        one = found.setdefault((row["device"], row["torch"]), {"device": row["device"], "torch": row["torch"]})
        if row.get("ceiling_gflops"):
            one[f"{row['precision']}, GFLOP/s"] = row["ceiling_gflops"]
        if row.get("op") and float(row["percent_of_copy"]):
            one["copy, GB/s"] = 100 * float(row["gb_per_s"]) / float(row["percent_of_copy"])
    return list(found.values())


def plans(rows: Sequence[dict]) -> str:
    """What the package's own chains ran, a line a case."""
    lines = []
    for row in rows:
        if row.get("contender") == "mgebm_auto" and row.get("explain"):
            said = [line for line in row["explain"].splitlines() if line.startswith(("gradient:", "graph:"))]
            lines.append(f"- {row['case']}: {'; '.join(said)}\n")
    return "".join([*lines, "\n"]) if lines else ""


def training(name: str, lines: Sequence[dict], batch: int | None) -> str:
    """The last record of a run's metrics: how fast it is, and a row for each size."""
    if not lines:
        return f"## Training {name}\n\nnot measured\n"
    last = lines[-1]
    sizes: dict[str, dict] = {}
    for key, value in last.items():
        if key.startswith("size_"):
            size, what = key.removeprefix("size_").split("/", 1)
            sizes.setdefault(size, {"size": size})[what] = value
    seconds = last.get("seconds_per_update")
    pace = f", {1e3 * seconds:.3g} ms an update" if seconds else ""
    if seconds and batch:
        pace += f", {batch / seconds:,.0f} images a second"
    return table(f"Training {name}: {last.get('step', '?')} updates{pace}", list(sizes.values()) or [last])


def main(folder: Path) -> None:
    lines, tables = records(folder / "results.jsonl"), benches(folder / "bench.csv")
    kinds = {kind: [{k: v for k, v in line.items() if k != "part"} for line in lines if line.get("part") == kind]
             for kind in ("run", "smoke", "evaluate", "train")}  # fmt: skip
    print(table("Machine", machine(tables)))
    print(table("Parts", kinds["run"]))
    failures = sum(not row["ok"] for row in kinds["smoke"])
    found = f": {failures or 'no'} failures" if kinds["smoke"] else ""
    print(table(f"Smoke test{found}", sorted(kinds["smoke"], key=lambda row: row["ok"]), SMOKE))
    for (name, file), rows in (tables or {("Benches", ""): []}).items():
        columns = {"ops.csv": OPS, "kernels.csv": ()}.get(file, CHAINS)
        print(table(name, longest(rows) if file == "kernels.csv" else rows, columns))
        print(plans(rows), end="")
    print(table("Evaluation", kinds["evaluate"], EVALUATION))
    batches = {row["name"]: row["batch_size"] for row in kinds["train"]}
    for run in ("digits", "grid64"):
        print(training(run, records(folder / f"{run}.jsonl"), batches.get(run)))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: gpu_tables.py FOLDER [RESULTS] (FOLDER: what gpu_check.sh wrote)")
    main(Path(sys.argv[1]))
    for kept in keep(benches(Path(sys.argv[1], "bench.csv")), Path(sys.argv[2])) if sys.argv[2:] else ():
        print(f"kept: {kept}")
