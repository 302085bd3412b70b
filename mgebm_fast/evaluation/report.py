"""The figures of `evaluate` as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..tables import console_table, note, number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_ROWS = (
    ("fid", "FID", "{:.3f}", "lower is better; has a bias that grows as images get fewer"),
    ("kid", "KID", "{:.5f}", "lower is better; unbiased, near 0 for the data's own distribution"),
    ("precision", "precision", "{:.3f}", "share of samples that training images surround; as near to real as possible"),
    (
        "recall",
        "recall",
        "{:.3f}",
        "share of training images that samples surround; low: a part of the data is missing",
    ),
    (
        "nearest_distance",
        "nearest distance",
        "{:.1f}",
        "to the nearest training image; far below real: memorised",
    ),
    ("confident_share", "confident share", "{:.3f}", "recognised as some class; as near to real as possible"),
    ("class_kid", "KID by class", "{:.4f}", "of each class's samples to its training images, the mean over classes"),
    ("class_agreement", "class agreement", "{:.3f}", "taken for the class that it was drawn for; of real, its own"),
)


def format_report(result: dict[str, Any]) -> RenderableType:
    """Tables of the figures beside those of real images, for a rich console's `print`."""
    from rich.console import Group

    rows = []
    for key, name, form, reading in _ROWS:
        if key not in result:
            continue
        real = number(result[f"{key}_real"], form)
        fewer = key == "fid" and result["num_real"] < result["num"]  # the real value belongs to the matched row then
        rows.append((name, number(result[key], form), "" if fewer else real, reading))
        if fewer:
            words = f"of {result['num_real']} samples, as many as real ones: compare these"
            rows.append(("FID, matched", number(result["fid_matched"], form), real, words))
    title = f"{result['num']} samples beside {result['num_real']} held-out real images"
    headings = ("figure", "samples", "real", "reading")
    parts: list[RenderableType] = [console_table(title, headings, rows, styles=("bold", "", "", "dim"), left=(0, 3))]
    if "class_shares" in result:
        parts.append(_class_table(result))
    lines = [("features", result["feature_space"])]
    if result.get("class_accuracy") is not None:
        words = f"{result['class_accuracy']:.3f} of the held-out images have the lowest energy with their own class"
        lines.append(("class accuracy", words))
    if "recogniser" in result:
        lines.append(("recogniser", f"{result['recogniser']} (uniform noise: {result['confident_share_noise']:.3f})"))
    lines += [("note", words) for words in result["notes"]]
    lines.append(("seconds", ", ".join(f"{key} {value:g}" for key, value in result["seconds"].items())))
    return Group(*parts, *(note(*line) for line in lines))


def _class_table(result: dict[str, Any]) -> Table:
    """One line a class, in the order of the data's labels, with a bar as long as its share: a whole one is the largest,
    or the share of a class among as many equal ones, so that next to nothing looks like it."""
    real = result["class_shares_real"]
    top = max([*result["class_shares"].values(), *(real or {}).values(), 1 / len(result["class_shares"])])
    rows = [
        (label, f"{share:.3f}", number(real and real[label], "{:.3f}"), "█" * round(30 * share / top))
        for label, share in result["class_shares"].items()
    ]
    headings = ("class", "samples", "real", "")
    return console_table("share of samples recognised as", headings, rows, styles=("bold",), left=(0, 3))
