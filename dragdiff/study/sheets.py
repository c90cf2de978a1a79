"""What all plots of a study share (matplotlib, without its global state), and the sheets of its metrics."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dragdiff.metrics.statistics import LEVEL
from dragdiff.metrics.suite import COLUMNS
from dragdiff.study.plan import Plan, Variant, show
from dragdiff.study.table import number, title

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Means = Mapping[tuple[str, str], Any]  # of (variant, column): a row of `table.summary`

# Okabe and Ito's colours, which the colour-blind tell apart
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#000000")
DASHES = ("-", "--", ":", "-.")
GREY = "#666666"
BASELINES = {"identity": (RED, "--"), "copy-patch": (PURPLE, ":"), "oracle": (GREEN, "-.")}
MEAN, REFERENCE = f"mean, {100 * LEVEL:.0f} % interval", "reference"
FRAME = np.array([[-0.5, 0.5, 0.5, -0.5, -0.5], [-0.5, -0.5, 0.5, 0.5, -0.5]])  # around a cell, (x, y)
PATCH = {"facecolor": "white", "edgecolor": "none", "pad": 1}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is a $
}


def parameters(plan: Plan) -> dict[str, list[object]]:
    """The settings in which the variants differ.

    Returns:
        By setting, its values; empty where the variants are listed, not of a grid or a draw.
    """
    if plan.study.variants:
        return {}
    values: dict[str, dict[str, object]] = {}
    for variant in edits(plan):
        for key, value in variant.settings.items():
            values.setdefault(key, {})[show(value)] = value
    return {key: list(found.values()) for key, found in values.items() if len(found) > 1}


def edits(plan: Plan) -> list[Variant]:
    """The variants that are no baselines."""
    return [variant for variant in plan.variants if not variant.baseline]


def label_of(plan: Plan, variant: Variant, width: int = 40) -> str:
    """The variant's value where one parameter is studied, else its name, on lines of so many characters."""
    varied = list(parameters(plan))
    text = show(variant.settings[varied[0]]) if len(varied) == 1 else variant.name
    return textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False)


def _heading(column: str) -> str:
    return textwrap.fill(title(column), 38)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=150, layout="constrained")


def only_parameter(varied: Mapping[str, object]) -> str:
    """The one setting of `parameters`, or "" where there are several or none."""
    return next(iter(varied)) if len(varied) == 1 else ""


# ------------------------------------------------------------------------------------------- metrics


def metric_sheet(plan: Plan, means: Means, columns: Sequence[str]) -> Figure:
    """One panel for each column: curves over a number, heat maps of a grid of two parameters, or points by name."""
    varied = parameters(plan)
    if len(varied) == 2 and plan.study.grid:
        return _heat_maps(plan, means, columns, *varied)
    if len(varied) == 1 and all(_is_number(value) for value in next(iter(varied.values()))):
        return _curves(plan, means, columns, *varied)
    return _points(plan, means, columns)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def new_panel(width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of (width, height) inches with a single panel, as `new_panels` gives several."""
    figure = _figure(width, height)
    return figure, [figure.subplots()]


def new_panels(
    count: int, width: float, height: float, *, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of several panels in rows.

    Args:
        width, height: of a panel, inches.
    """
    across = min(count, 4) if height > 4 or count < 3 else math.ceil(count / 2) if count < 8 else 4
    down = math.ceil(count / across)
    figure = _figure(width * across, height * down + 0.5)
    panels = list(figure.subplots(down, across, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def _curves(plan: Plan, means: Means, columns: Sequence[str], key: str) -> Figure:
    variants = sorted(edits(plan), key=lambda variant: variant.settings[key])
    places = np.array([variant.settings[key] for variant in variants], float)
    figure, panels = new_panels(len(columns), 3.7, 2.9)
    for panel, column in zip(panels, columns, strict=True):
        _series(panel, plan, means, column, variants, places)
        panel.set_title(_heading(column))
        panel.set_xlabel(key)
        if _is_geometric(places):
            panel.set_xscale("log")
        _tick_values(panel, places, [label_of(plan, variant) for variant in variants])
    _legend(figure, panels, plan)
    return figure


def _points(plan: Plan, means: Means, columns: Sequence[str]) -> Figure:
    """The variants below each other: names need the room."""
    variants = edits(plan)
    labels = [label_of(plan, variant) for variant in variants]
    lines = sum(1 + label.count("\n") for label in labels)
    figure, panels = new_panels(len(columns), 3.7, max(1.6, 0.9 + 0.16 * lines + 0.14 * len(labels)), sharey=True)
    places = np.arange(len(variants), dtype=float)
    for panel, column in zip(panels, columns, strict=True):
        _series(panel, plan, means, column, variants, places, upright=True)
        panel.set_title(_heading(column))
        panel.set_yticks(places, labels)
        panel.set_ylim(len(variants) - 0.4, -0.6)
    figure.supylabel(only_parameter(parameters(plan)), fontsize=9)
    _legend(figure, panels, plan)
    return figure


def _series(
    panel: Axes,
    plan: Plan,
    means: Means,
    column: str,
    variants: Sequence[Variant],
    places: np.ndarray,
    *,
    upright: bool = False,
) -> None:
    """Means with their intervals at the variants' places, and a line for each baseline; along y if `upright`."""
    values, ends = values_of(means, column, [variant.name for variant in variants])
    known = np.isfinite(values)
    marks: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 4.5, "capsize": 2.5, "linewidth": 1.2}
    if upright:
        marks["linestyle"] = ""
        panel.errorbar(values[known], places[known], xerr=ends[:, known], label=MEAN, **marks)
    else:
        panel.errorbar(places[known], values[known], yerr=ends[:, known], label=MEAN, **marks)
    for variant, place, value in zip(variants, places, values, strict=True):
        if not np.isfinite(value):
            x, y, edge = (
                (0.97, place, panel.get_yaxis_transform()) if upright else (place, 0.97, panel.get_xaxis_transform())
            )
            panel.text(x, y, number(column, value), transform=edge, ha="center", va="center", color=BLUE, bbox=PATCH)
        elif variant.name == plan.reference:
            x, y = (value, place) if upright else (place, value)
            panel.plot(x, y, "o", color=BLUE, markerfacecolor="white", markersize=7, zorder=3, label=REFERENCE)
    for variant in plan.variants:
        value = means[variant.name, column].value
        if variant.baseline and np.isfinite(value):
            colour, dashes = BASELINES[variant.baseline]
            line = panel.axvline if upright else panel.axhline
            line(value, color=colour, linestyle=dashes, linewidth=1.2, label=variant.name)


def values_of(means: Means, column: str, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The means of a column, for variants by name.

    Returns:
        (n,), and how far their intervals reach below and above, (2, n), 0 where there is none.
    """
    rows = [means[name, column] for name in names]
    values = np.array([row.value for row in rows], float)
    with np.errstate(invalid="ignore"):
        ends = np.array([values - [row.low for row in rows], [row.high for row in rows] - values], float)
    return values, np.clip(np.nan_to_num(ends, posinf=0), 0, None)


def _is_geometric(places: np.ndarray) -> bool:
    """Whether values span over a decade and are spaced more evenly by their ratios than by their differences."""
    if places.min() <= 0 or places.max() <= 10 * places.min():
        return False
    steps, ratios = np.diff(np.unique(places)), np.diff(np.log(np.unique(places)))
    return bool(np.std(ratios) / np.mean(ratios) < np.std(steps) / np.mean(steps))


def _tick_values(panel: Axes, places: np.ndarray, labels: Sequence[str]) -> None:
    """Ticks at the values themselves, unless they would touch each other."""
    scale = np.log(places) if panel.get_xscale() == "log" else places
    room = max(map(len, labels)) * 0.025 + 0.01
    if np.diff(scale).min() / np.ptp(scale) >= room:
        panel.set_xticks(places, labels)
        panel.set_xticks([], minor=True)


def _legend(figure: Figure, panels: Sequence[Axes], plan: Plan) -> None:
    """One for all panels; a baseline's line is in some of them."""
    found: dict[str, Artist] = {}
    for panel in panels:
        found |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    wanted = [MEAN, REFERENCE, *(variant.name for variant in plan.variants if variant.baseline)]
    entries = {label: found[label] for label in wanted if label in found}
    across = len(entries) if len(panels) > 1 else 2
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=across)


def _heat_maps(plan: Plan, means: Means, columns: Sequence[str], down: str, across: str) -> Figure:
    varied = parameters(plan)
    if len(varied[across]) < len(varied[down]):
        down, across = across, down
    rows, names = [[show(value) for value in varied[key]] for key in (down, across)]
    places = {
        variant.name: (rows.index(show(variant.settings[down])), names.index(show(variant.settings[across])))
        for variant in edits(plan)
    }
    left = max(map(len, rows)) * 0.075
    width = 1.6 + left + 0.55 * len(names)
    figure, panels = new_panels(len(columns), width, 1.5 + 0.36 * len(rows))
    for panel, column in zip(panels, columns, strict=True):
        values = np.full((len(rows), len(names)), np.nan)
        for name, place in places.items():
            values[place] = means[name, column].value
        _heat_map(figure, panel, values, column)
        panel.set_xticks(range(len(names)), names)
        _lean(panel, names)
        panel.set_yticks(range(len(rows)), rows)
        panel.set_xlabel(across)
        panel.set_ylabel(down)
        if plan.reference in places:
            y, x = places[plan.reference]
            panel.plot(x + FRAME[0], y + FRAME[1], color=RED)
        baselines = [
            f"{variant.name} {number(column, means[variant.name, column].value)}"
            for variant in plan.variants
            if variant.baseline
        ]
        panel.set_title(
            f"{_heading(column)}\n{textwrap.fill(', '.join(baselines), round(width / 0.075))}", fontsize=8.5
        )
    return figure


def _heat_map(figure: Figure, panel: Axes, values: np.ndarray, column: str) -> None:
    """Light is better; each cell says its value."""
    from matplotlib import colormaps

    known = np.where(np.isfinite(values), values, np.nan)
    colours = colormaps["cividis" if COLUMNS[column].higher else "cividis_r"].with_extremes(bad="#dddddd")
    if np.isfinite(known).any():
        low, high = float(np.nanmin(known)), float(np.nanmax(known))
        drawn = panel.imshow(known, cmap=colours, aspect="auto", vmin=low, vmax=high if high > low else low + 1)
        figure.colorbar(drawn, ax=panel, pad=0.02, aspect=15)
    else:
        drawn = panel.imshow(known, cmap=colours, aspect="auto", vmin=0, vmax=1)
    panel.grid(False)
    for (y, x), value in np.ndenumerate(values):
        red, green, blue, _ = drawn.to_rgba(known[y, x]) if np.isfinite(value) else (1, 1, 1, 1)
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.42
        panel.text(x, y, number(column, value), ha="center", va="center", fontsize=8, color="black" if bright else "w")


def _lean(panel: Axes, labels: Sequence[str]) -> None:
    if max(map(len, labels)) > 6:
        panel.tick_params("x", labelrotation=30)
        for label in panel.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
