"""The picture of where edits are: the share of each layer, in one model or several."""

import math
from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from dean_interp.arms.composition import Spread
from dean_interp.arms.composition_results import Composition
from dean_interp.report.figures import draw_line
from dean_interp.report.look import FAINT, with_looks
from dean_interp.report.pictures import Picture, styled

_COLUMNS = 3
_CAPTION = (
    "A point a layer: its share, times the number of layers, so that 1 is an even share. The first layer is at the "
    "left. Of sets it is the share of their neurons, of gates that of the rise that they predict, or of the size of "
    "their changes."
)


def shares_by_depth(models: Mapping[str, Composition]) -> Picture:
    """One panel an edit or set, one line a model: each layer's share, in units of an even share, by relative depth."""
    names: list[str] = []
    for found in models.values():
        names += [name for name in found.spreads if name not in names]
    n_rows = math.ceil(len(names) / _COLUMNS)
    height = 0.5 + 2.7 * n_rows
    with styled():
        figure = Figure(figsize=(3.9 * _COLUMNS, height), layout="constrained")
        grid = figure.subplots(n_rows, _COLUMNS, squeeze=False, sharex=True, sharey=True)
        panels = list(grid.flat)
        for axes, name in zip(panels, names, strict=False):
            axes.axhline(1, color=FAINT, linewidth=1)
            for model, found, look in with_looks(models):
                if name in found.spreads:
                    depths, shares = _curve(found.spreads[name])
                    draw_line(axes, depths, shares, look, model)
            axes.set_title(name)
            axes.set_xlim(0, 1)
        # All panels share an axis, which has to see all lines before it is cut at 0.
        panels[0].set_ylim(bottom=0)
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        # The last of each column, below which there may be an empty place.
        for axes in panels[max(0, len(names) - _COLUMNS) : len(names)]:
            axes.set_xlabel("relative depth (0: first layer)")
            axes.tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel("share (1: even)")
        if len(models) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=2)
    counts = []
    for model, found in models.items():
        counts.append(f"{found.n_neurons:,} neurons in {found.n_layers} layers ({model})")
    return Picture(figure, _data(models), ", ".join(counts), _CAPTION)


def _curve(spread: Spread) -> tuple[list[float], list[float]]:
    """The relative depth of each layer, and its share in even shares."""
    n_layers = len(spread.by_layer)
    depths = [(layer + 0.5) / n_layers for layer in range(n_layers)]
    shares = [share * n_layers for share in spread.by_layer]
    return depths, shares


def _data(models: Mapping[str, Composition]) -> pd.DataFrame:
    """One row a model, set and layer."""
    rows = []
    for model, found in models.items():
        for name, spread in found.spreads.items():
            depths, shares = _curve(spread)
            for layer, share in enumerate(spread.by_layer):
                rows.append(
                    {
                        "model": model,
                        "set": name,
                        "layer": layer,
                        "relative_depth": depths[layer],
                        "share": share,
                        "share_in_even_shares": shares[layer],
                    }
                )
    return pd.DataFrame(rows)
