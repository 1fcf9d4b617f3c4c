"""The picture of one estimand: before and after, and its change beside the controls', layer by layer."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dean_interp.information.shifts import MutualInformation, Shift
from dean_interp.report.figures import label_layers
from dean_interp.report.look import EDIT, FAINT, GREY, INK
from dean_interp.report.pictures import Picture, range_of, styled

_CAPTION = (
    "Above: circles and the solid line are before, diamonds and dashes after{null}. "
    "Below: the change of the excess over the null, with its 95 % interval; the band is the range of the controls."
)


def information_per_layer(information: MutualInformation, variant: str | None = None) -> Picture:
    """One number of an estimand per layer before and after, and its change beside the controls'.

    Raises `InputError` where the estimand has no such variant.
    """
    variant = information.variants[0] if variant is None else variant
    layers = [shift for shift in information.of(variant) if not shift.is_joint]
    has_null = bool(information.config.n_null)
    null = ", dots the null of shuffled pairings" if has_null else ""
    name = f"{information.estimand}\n{variant}".rstrip()
    with styled():
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        _draw_levels(above, layers, has_null=has_null)
        above.set_ylabel(f"{name} ({information.units})")
        _draw_changes(below, layers)
        label_layers(below)
        below.set_ylabel(f"change of the excess\nover the null ({information.units})")
        for axes in (above, below):
            axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    n_controls = range_of(len(shift.control_changes) for shift in layers)
    n_halves = information.config.n_subsamples
    return Picture(
        figure,
        data=_data(layers, information.units, has_null=has_null),
        n=f"{information.n_prompts} prompts, {n_controls} controls, {n_halves} halves of the topics",
        caption=_CAPTION.format(null=null),
    )


def _draw_levels(axes: Axes, layers: Sequence[Shift], *, has_null: bool) -> None:
    x = [shift.layers[0] for shift in layers]
    before = [shift.before.value for shift in layers]
    after = [shift.after.value for shift in layers]
    axes.plot(x, before, "o-", color=INK, label="before")
    axes.plot(x, after, "D--", color=EDIT, label="after")
    if has_null:
        null = [shift.before.null_mean for shift in layers]
        axes.plot(x, null, ":", color="0.5", label="null (shuffled pairing)")


def _draw_changes(axes: Axes, layers: Sequence[Shift]) -> None:
    x = [shift.layers[0] for shift in layers]
    axes.axhline(0, color=FAINT, linewidth=1)
    controls = [shift.control_changes for shift in layers]
    if controls and all(controls):
        lowest = [min(changes) for changes in controls]
        highest = [max(changes) for changes in controls]
        label = f"range of {range_of(map(len, controls))} controls"
        axes.fill_between(
            x,
            lowest,
            highest,
            color=GREY,
            alpha=0.35,
            linewidth=0,
            label=label,
        )
    change = [shift.change for shift in layers]
    below = [shift.change - shift.low for shift in layers]
    above = [shift.high - shift.change for shift in layers]
    axes.errorbar(
        x,
        change,
        yerr=[below, above],
        fmt="D-",
        color=EDIT,
        capsize=2,
        label="this ablation (95 %)",
    )


def _data(layers: Sequence[Shift], units: str, *, has_null: bool) -> pd.DataFrame:
    rows = []
    for shift in layers:
        controls = shift.control_changes
        rows.append(
            {
                "layer": shift.layers[0],
                f"before_{units}": shift.before.value,
                f"null_{units}": shift.before.null_mean if has_null else None,
                f"after_{units}": shift.after.value,
                f"change_of_excess_{units}": shift.change,
                f"low_{units}": shift.low,
                f"high_{units}": shift.high,
                f"lowest_control_{units}": min(controls, default=None),
                f"highest_control_{units}": max(controls, default=None),
                "n_controls": len(controls),
                "n_rows": shift.n,
            }
        )
    return pd.DataFrame(rows)
