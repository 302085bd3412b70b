"""The picture of `mgebm score`: histograms of energies, and the lowest and highest images of every set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data import ImageData
from ..pictures import image_grid
from .plots import BAND, FAINT, as_png, new_figure
from .scoring import SUM, Scores

SHOWN = 12  # images at each end
_BINS = 60
_TRIM = 0.005  # share of the values at each end that the axis may leave out
_COLOURS = ("#b5512b", "#1f7a4c", "#7a4ca0", "#b08a00", "#c2408a", "#3a8fb7")


def plot_scores(
    sets: Sequence[tuple[Scores, ImageData]], training: Scores | None, against: Scores | None, *, letter: str = "E"
) -> bytes:
    """A PNG: a histogram for every size and the sum, and below it the `SHOWN` lowest and highest images of each set.

    `letter` names the energy, U where the reference is part of it.
    """
    keys = list(sets[0][0].energies)
    columns = 2 * -(-len(keys) // 2)
    figure = new_figure(max(9.0, 3.2 * len(keys)), 3.2 + 1.15 * len(sets))
    from matplotlib.ticker import MaxNLocator

    layout = figure.add_gridspec(1 + len(sets), columns, height_ratios=[3.0, *[1.0] * len(sets)])
    curves = [(scores, _COLOURS[i % len(_COLOURS)]) for i, (scores, _) in enumerate(sets)]
    curves += [] if against is None else [(against, "#1f4e8c")]
    for column, key in enumerate(keys):
        axes = figure.add_subplot(layout[0, column])
        every = [scores.energies[key] for scores in (training, *(one for one, _ in curves)) if scores is not None]
        low = min(float(np.quantile(values, _TRIM)) for values in every)
        high = max(float(np.quantile(values, 1 - _TRIM)) for values in every)
        bins = np.linspace(low, high if high > low else low + 1e-6 + abs(low) * 1e-6, _BINS)
        if training is not None:
            axes.hist(training.energies[key], bins, density=True, color=BAND, label=f"training, {len(training)}")
        for scores, colour in curves:
            name = f"{scores.name}, {len(scores)}"
            label = f"{name} (AUROC against)" if scores is against else name
            axes.hist(scores.energies[key], bins, density=True, histtype="step", color=colour, label=label)
        axes.set(title=f"{letter} {key}" if key == SUM else f"{letter} {key}×{key}", yticks=[])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", frameon=False, ncols=4)
    for row, (scores, images) in enumerate(sets, start=1):
        order = np.argsort(scores.energies[SUM], kind="stable")
        for half, (index, end) in enumerate(((order[:SHOWN], "lowest"), (order[-SHOWN:], "highest"))):
            axes = figure.add_subplot(layout[row, half * columns // 2 : (half + 1) * columns // 2])
            axes.imshow(image_grid(images.batch(index), columns=SHOWN, scale=max(1, 40 // images.size)))
            ends = scores.energies[SUM][index]
            words = f"{scores.name}: {end}, {ends[0]:.3g} … {ends[-1]:.3g}"
            axes.set_title(words, fontsize=9, color="black", loc="left")
            axes.set_axis_off()
    figure.supxlabel("energy (lower: likelier under the model)", color=FAINT, fontsize=9)
    return as_png(figure)
