"""A run, or several side by side, as one HTML page that needs nothing beside it: pictures, curves, facts."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import files
from ..data import ImageData
from ..data.foreign import reading
from ..errors import DataError
from ..learning import METHODS, Run
from ..learning.run.folder import SAMPLES
from ..models import Model
from ..pictures import image_grid
from .distances import nearest

MOST_BYTES = 4_500_000  # of all pictures of a page
MOST_PICTURES = 16  # of a run, evenly spread over its updates
NEIGHBOURS = 12  # samples that are set beside their nearest training images
_MOST_PICTURE = 64 << 20  # bytes of a picture's file
_PICTURE = re.compile(r"step_[0-9]{1,18}\.png")
_POINTS = 400  # of a curve
_DOTTED = 12  # points at most of a curve that are marked
_LARGEST = 1e100  # of a number on a curve
_COLOURS = ("#1f4e8c", "#b5512b", "#1f7a4c", "#7a4ca0", "#b08a00", "#3a8fb7", "#c2408a", "#666666")
_NO_CURVE = {"step", "seconds_per_update", "rollbacks", "diverged_at", "num"}
_TITLES = {  # in the order of the charts
    "kid": "KID, lower is nearer", "fid": "FID, of as many images", "precision": "precision", "recall": "recall",
    "confident_share": "share recognised", "class_kid": "KID by class, lower is nearer",
    "class_agreement": "share taken for its class",
    "nearest_distance": "distance to the nearest training image",
    "gap": "energy gap: data minus samples", "energy_observed": "energy of data",
    "energy_synthesised": "energy of samples", "gradient_to_noise": "gradient to noise of a step",
    "stiffness": "drift times the largest curvature",
    "gradient_norm": "gradient norm", "noise_factor": "factor of the noise", "lr_factor": "factor of the learning rate",
    "data_noise_factor": "factor of the noise on observed images",
    "energy_distance": "energy distance of samples to held-out images",
    "gradient_clamped": "share of gradients at the clamp", "saturated": "saturated pixels: samples minus data",
    "spread": "spread of pixels: samples over data", "mean_square": "mean square",
}  # fmt: skip

_STYLE = """
:root { color: #222; background: #fff; font: 15px/1.45 system-ui, sans-serif }
body { margin: 0 auto; padding: 1rem; max-width: 1600px } h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin: 0 }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem } table { border-collapse: collapse }
.runs { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)) }
section { min-width: 0 } td { padding: .1rem .6rem .1rem 0; vertical-align: top; overflow-wrap: anywhere }
td:first-child { color: #666; white-space: nowrap } img { max-width: 100% }
.curves { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)) }
figure { margin: 0 } figcaption { font-size: .85rem } svg { width: 100%; height: auto; display: block }
input[type=range] { width: 100% }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .6rem; font-size: .85rem }
.note { color: #666; font-size: .9rem } .key { white-space: nowrap; margin-right: .7rem }
"""

_SCRIPT = """
for (const box of document.querySelectorAll('.slider')) {
  const range = box.querySelector('input'), images = box.querySelectorAll('img'), label = box.querySelector('output');
  const show = () => images.forEach((image, i) => {
    image.hidden = i != range.value;
    if (i == range.value) label.textContent = image.alt;
  });
  range.addEventListener('input', show); show();
}
"""


def page(runs: Sequence[Run], *, seed: int = 0, source: str | None = None) -> str:
    """The HTML of a page on `runs`: facts, samples of every grid as training went, curves, samples beside their nearest
    training images, the configuration, and what to do next.

    Pictures are spread over training so that all of them take at most `MOST_BYTES`. What a run lacks is said in its
    place: a model, records, pictures, or data that are not there any more; `source` where they lie now.
    """
    budget = MOST_BYTES // len(runs)
    sections = "\n".join(_section(run, budget, (seed, source), named=len(runs) > 1) for run in runs)
    title = escape(", ".join(run.path.resolve().name for run in runs))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<style>{_STYLE}</style>\n<h1>{title}</h1>\n<div class="runs">\n{sections}\n</div>\n'
        f"<script>{_SCRIPT}</script>\n"
    )


def _section(run: Run, budget: int, drawn: tuple[int, str | None], *, named: bool) -> str:
    records = run.metrics()
    parts = [
        "<section>",
        f"<h2>{escape(run.path.resolve().name)}</h2>" if named else "",
        f'<p class="note">{escape(run.config.description)}</p>',
        _table(_facts(run, records)),
        "<h3>Samples as training went</h3>",
        _slider(run, budget),
        "<h3>Curves</h3>",
        _curves([*records, *run.evaluations()]) or f'<p class="note">{_missing(run, "records")}</p>',
        "<h3>Samples, and the training image nearest to each</h3>",
        _neighbours(run, *drawn),
        f"<details><summary>Configuration</summary><pre>{escape(run.config.to_toml())}</pre></details>",
        f"<h3>Next</h3>\n<pre>{escape(_next(run))}</pre>\n</section>",
    ]
    return "\n".join(parts)


def _facts(run: Run, records: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    config, made = run.config, int(records[-1]["step"]) if records else _updates(run)
    sizes = METHODS[config.method].narrow(config).sizes
    paces = [record["seconds_per_update"] for record in records if "seconds_per_update" in record]
    facts: dict[str, Any] = {
        "method": config.method,
        "data": Path(config.data).name + (f", {', '.join(map(str, config.classes))}" if config.classes else ""),
        "size": " → ".join(map(str, sizes if len(sizes) > 2 else sizes[-1:])),
        "updates": f"{made} of {config.steps}" + ("" if _ended(run) or _is_part(run) else ", not finished"),
        "batch, seed": f"{config.batch_size}, {config.seed}",
    }
    if _recorded(run):
        del facts["size"]  # a recording has lengths of its own
    if run.collapse:
        facts["collapse"] = run.collapse
    if paces:
        pace, seconds = np.mean(paces), np.mean(paces) * made
        facts["time"] = f"{seconds:.3g} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"
        facts["time"] += f", {pace:.3g} s an update"
    for record in run.evaluations()[-1:]:
        shown = [f"{key.rpartition('/')[2]} {value:.3g}" for key, value in record.items() if key.startswith("samples")]
        facts[f"measured at {record['step']}"] = ", ".join(shown).replace("_", " ")
    if rollbacks := max((int(record.get("rollbacks", 0)) for record in records), default=0):
        facts["rollbacks"] = rollbacks
    if config.start_from is not None:
        facts["started from"] = Path(config.start_from).name
    return facts


def _recorded(run: Run) -> bool:
    return run.config.method == "spatial-temporal"


def _ended(run: Run) -> bool:
    """Whether there is nothing to train any more: the model is the last, or the best from before a collapse."""
    return run.finished or bool(run.collapse)


def _is_part(run: Run) -> bool:
    """Whether this is a checkpoint, or a model that was taken out of its run."""
    return run.checkpoints() in ([], [run.path]) and (_ended(run) or bool(run.checkpoints()))


def _updates(run: Run) -> int:
    """The updates of a run that has no records."""
    return run.update_of(run.find_model()[0]) if _ended(run) or run.checkpoints() else 0


def _missing(run: Run, what: str) -> str:
    return f"None here: {what} are in the folder of the run." if _is_part(run) else f"No {what} yet."


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    return f"<table>{cells}</table>"


def _slider(run: Run, budget: int) -> str:
    """The pictures of the run, one shown at a time; fewer where they are large."""
    folder = run.path / SAMPLES
    named = [path for path in folder.iterdir() if _PICTURE.fullmatch(path.name)] if files.is_folder(folder) else []
    sizes = {path: path.stat().st_size for path in named if files.is_regular(path)}
    pictures = sorted((path for path, size in sizes.items() if 0 < size <= _MOST_PICTURE), key=_update)
    left_out = [path.name for path in named if path not in pictures]
    shown = []
    if pictures:
        count = max(1, min(MOST_PICTURES, len(pictures), int(budget * 0.7) // max(sizes[path] for path in pictures)))
        for i in np.linspace(len(pictures) - 1, 0, count).round().astype(int)[::-1]:
            try:
                shown.append((_update(pictures[i]), _uri(_bounded(pictures[i], budget))))
            except DataError:
                left_out.append(pictures[i].name)
    note = f'<p class="note">Left out, no pictures: {escape(", ".join(sorted(left_out)[:3]))}</p>' if left_out else ""
    if not shown:
        return note or f'<p class="note">{_missing(run, "pictures")}</p>'
    last = len(shown) - 1
    images = "".join(
        f'<img alt="update {update}" src="{uri}"{"" if i == last else " hidden"}>'
        for i, (update, uri) in enumerate(shown)
    )
    return (
        f'<div class="slider"><label><output>update {shown[last][0]}</output>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="update"></label>{images}</div>{note}'
    )


def _update(picture: Path) -> int:
    return int(picture.stem.removeprefix("step_"))


def _bounded(path: Path, budget: int) -> bytes:
    """A picture's file, or where it is larger than the budget a smaller version of it; DataError where it is none."""
    from PIL import Image

    with reading(path, "a PNG picture", what="report"):
        data = files.read_regular(path, _MOST_PICTURE)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()
        while len(data) * 4 / 3 > budget:
            with Image.open(io.BytesIO(data)) as image:
                half = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.BOX)
            buffer = io.BytesIO()
            half.save(buffer, "PNG", optimize=True)
            data = buffer.getvalue()
    return data


def _uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _curves(records: Sequence[Mapping[str, float]]) -> str:
    """One chart for each kind of figure, a line for each size (or other part) that has it; "" without any."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for record in records:
        for key, value in record.items():
            if key not in _NO_CURVE and abs(value) < _LARGEST:
                part, _, kind = key.rpartition("/")
                charts.setdefault(kind, {}).setdefault(part.replace("_", " "), []).append((record["step"], value))
    if not charts:
        return ""
    order = [kind for kind in _TITLES if kind in charts] + sorted(charts.keys() - _TITLES.keys())
    return f'<div class="curves">{"".join(_chart(kind, charts[kind]) for kind in order)}</div>'


def _chart(kind: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    wide, high, left, bottom = 300, 150, 52, 18
    every = np.array([point for line in lines.values() for point in line])
    (first, low), (last, top) = every.min(0), every.max(0)
    marks = sorted({low, top})
    low, top = (low, top) if top > low else (low - 0.5, top + 0.5)
    across = (wide - left - 6) / max(last - first, 1e-9)
    down = (high - bottom - 8) / (top - low)
    drawn, keys = [], []
    for i, (part, line) in enumerate(lines.items()):
        thinned = [line[j] for j in np.unique(np.linspace(0, len(line) - 1, min(len(line), _POINTS)).astype(int))]
        points = " ".join(f"{left + (x - first) * across:.1f},{8 + (top - y) * down:.1f}" for x, y in thinned)
        colour = _COLOURS[i % len(_COLOURS)]
        drawn.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.4" points="{points}"/>')
        if len(line) <= _DOTTED:  # a line of one point has no length
            dots = (f'<circle cx="{x}" cy="{y}" r="2.2"/>' for x, y in (point.split(",") for point in points.split()))
            drawn.append(f'<g fill="{colour}">{"".join(dots)}</g>')
        if part:
            keys.append(f'<span class="key" style="color:{colour}">{escape(part)}</span>')
    ticks = "".join(
        f'<text x="{left - 4}" y="{8 + (top - y) * down + 3:.1f}" text-anchor="end">{y:.3g}</text>' for y in marks
    )
    if low < 0 < top:
        zero = 8 + top * down
        ticks += f'<line x1="{left}" x2="{wide}" y1="{zero:.1f}" y2="{zero:.1f}" stroke="#bbb" stroke-dasharray="3 3"/>'
    ends = f'<text x="{left}" y="{high - 4}">{first:g}</text>'
    if last > first:
        ends += f'<text x="{wide - 4}" y="{high - 4}" text-anchor="end">{last:g}</text>'
    title = escape(_TITLES.get(kind, kind.replace("_", " ")))
    return (
        f'<figure><figcaption>{title}<br>{"".join(keys)}</figcaption><svg viewBox="0 0 {wide} {high}" role="img" '
        f'aria-label="{title}" font-size="10" fill="#666"><path d="M{left} 4V{high - bottom}H{wide}" fill="none" '
        f'stroke="#999"/>{"".join(drawn)}{ticks}{ends}</svg></figure>'
    )


def _neighbours(run: Run, seed: int, source: str | None) -> str:
    """`neighbours` as a figure, or why there is none."""
    if _recorded(run):
        return '<p class="note">None: the run learnt from one recording.</p>'
    try:
        picture = neighbours(run, NEIGHBOURS, seed=seed, source=source)
    except (DataError, OSError, ValueError, ImportError) as error:
        return f'<p class="note">None: {escape(str(error))}</p>'
    buffer = io.BytesIO()
    from PIL import Image

    Image.fromarray(picture).save(buffer, "PNG")
    words = f"samples of seed {seed} above, training images below"
    return f'<figure><img alt="{words}" src="{_uri(buffer.getvalue())}"><figcaption>{words}</figcaption></figure>'


def neighbours(run: Run, num: int, *, rows: int = 1, seed: int = 0, source: str | None = None) -> np.ndarray:
    """A picture (H, W, 3) uint8 of `num` samples, not chosen, in `rows` rows, each over a row of the training images
    that are nearest to them by pixel distance. ValueError of a run whose data are one recording."""
    model, data = Model.load(run.find_model()[0]), run.data("train", source)
    if not isinstance(data, ImageData):
        raise ValueError("run: must have learnt from images, got one of recordings, whose data are one clip")
    drawn = model.sample(num, seed=seed)
    assert isinstance(drawn, torch.Tensor)
    samples = model.to_uint8(drawn).cpu().numpy()
    _, which = nearest(samples, data.images)
    found = data.images[which]
    columns = -(-num // rows)
    parts = [part[i : i + columns] for i in range(0, num, columns) for part in (samples, found)]
    return image_grid(np.concatenate(parts), columns=columns, scale=max(1, -(-40 // samples.shape[-1])))


def _next(run: Run) -> str:
    import shlex

    where = shlex.quote(str(run.path))
    if not _ended(run) and not _is_part(run):
        return f"mgebm train --out {where} --resume"
    lines = [f"mgebm sample {where} --out samples.png"]
    if not _recorded(run):
        record = " --record" if run.checkpoints() else ""
        lines.append(f"mgebm evaluate {where}{record}    # KID and FID")
    if run.config.method != "abp":  # a generator alone has no chains
        lines.append(f"mgebm diagnose {where}    # do the chains mix?")
    return "\n".join(lines)
