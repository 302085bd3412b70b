"""Put a trained run into the package, as float16 weights with a card of what they measure.

  python scripts/ship_model.py runs/digits digits --command "mgebm train digits" --time "2 minutes on one CPU core"

The run must have learnt from a built-in set. The figures of the card are those of the weights as they are stored, by
`evaluate` with 1,000 samples of seed 0.
"""

from __future__ import annotations

import argparse

import mgebm_fast as mg
from mgebm_fast.data.builtin import is_builtin
from mgebm_fast.learning.run.stored_run import SHIPPED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run's folder")
    parser.add_argument("name", help="of the shipped model")
    parser.add_argument("--command", required=True, help="what was typed to train it")
    parser.add_argument("--time", required=True, help="how long that took, and on what")
    given = parser.parse_args()
    model = mg.load(given.run, device="cpu")
    config = model.origin.config
    if not is_builtin(config.data):
        parser.error(f"run: must have learnt from a built-in set, got {config.data}")
    folder = SHIPPED / given.name
    (folder / "README.md").unlink(missing_ok=True)
    model.save_pretrained(folder, samples=0, half=True)
    stored = mg.load(folder, device="cpu")
    measured = mg.evaluation.evaluate(
        stored, model.origin.data("train"), model.origin.data("held_out"), num=1000, seed=0
    )
    kept = ("num", "kid", "kid_real", "fid_matched", "fid_real", "nearest_distance", "nearest_distance_real",
            "confident_share", "confident_share_real", "class_agreement", "class_agreement_real",
            "class_accuracy")  # fmt: skip
    figures = {key: measured[key] for key in kept if measured.get(key) is not None}
    (folder / "README.md").unlink()
    stored.save_pretrained(
        folder, samples=0, half=True, figures={"command": given.command, "time": given.time, **figures}
    )
    print(*(f"{key} {value}" for key, value in figures.items()), sep="\n")


if __name__ == "__main__":
    main()
