"""The figures of `evaluate` as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

_ROWS = (
    ("fid", "FID", "{:.3f}", "lower is better; has a bias that grows as images get fewer"),
    ("kid", "KID", "{:.5f}", "lower is better; unbiased, near 0 for the data's own distribution"),
    (
        "nearest_distance",
        "nearest distance",
        "{:.1f}",
        "to the nearest training image; far below real: memorised",
    ),
    ("confident_share", "confident share", "{:.3f}", "recognised as some class; as near to real as possible"),
)


def format_report(result: dict[str, Any]) -> RenderableType:
    """Tables of the figures beside those of real images, for a rich console's `print`."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    figures = Table(
        title=f"{result['num']} samples beside {result['num_real']} held-out real images",
        title_justify="left",
    )
    figures.add_column("figure", style="bold")
    figures.add_column("samples", justify="right")
    figures.add_column("real", justify="right")
    figures.add_column("reading", style="dim")
    for key, name, form, reading in _ROWS:
        if key not in result:
            continue
        real = _number(form, result[f"{key}_real"])
        fewer = key == "fid" and result["num_real"] < result["num"]  # real images are then beside as many samples
        figures.add_row(name, _number(form, result[key]), "" if fewer else real, reading)
        if fewer:
            words = f"of {result['num_real']} samples, as many as real ones: compare these"
            figures.add_row("FID, matched", _number(form, result["fid_matched"]), real, words)
    parts: list[RenderableType] = [figures]
    if "class_shares" in result:
        parts.append(_class_table(result))
    lines = [("features", result["feature_space"])]
    if "recogniser" in result:
        lines.append(("recogniser", f"{result['recogniser']} (uniform noise: {result['confident_share_noise']:.3f})"))
    lines += [("note", note) for note in result["notes"]]
    lines.append(("seconds", ", ".join(f"{key} {value:g}" for key, value in result["seconds"].items())))
    parts += [Text.from_markup(f"[bold]{name}[/bold]  [dim]{escape(words)}[/dim]") for name, words in lines]
    return Group(*parts)


def _class_table(result: dict[str, Any]) -> RenderableType:
    """One line a class, in the order of the data's labels, with a bar as long as its share."""
    from rich.table import Table
    from rich.text import Text

    real = result["class_shares_real"]
    top = max([*result["class_shares"].values(), *(real or {}).values(), 1e-9])
    table = Table(title="share of samples recognised as", title_justify="left")
    table.add_column("class", style="bold")
    table.add_column("samples", justify="right")
    table.add_column("real", justify="right")
    table.add_column("")
    for label, share in result["class_shares"].items():
        table.add_row(
            Text(label),
            f"{share:.3f}",
            _number("{:.3f}", real and real[label]),
            "█" * round(30 * share / top),
        )
    return table


def _number(form: str, value: float | None) -> str:
    return "–" if value is None else form.format(value)
