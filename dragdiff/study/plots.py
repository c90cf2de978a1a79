"""A study's plots as PNG files in memory: the sheets of its metrics, the way of the drag, fidelity against distance."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dragdiff.study import sheets
from dragdiff.study.plan import Plan, show
from dragdiff.study.table import Measured, group, title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Ways = Mapping[tuple[str, str, int], np.ndarray]  # of (variant, sample, seed): (K, N, 2), (x, y) px of the image

CROWD = 8  # more long names than this do not fit beside their points
FACETS = 8  # panels on a sheet, at most


def draw(data: Measured, table: pd.DataFrame, ways: Ways) -> dict[str, bytes]:
    """All plots of a study.

    Args:
        table: `table.summary` of all categories together.
        ways: of the edits that have one.

    Returns:
        PNG files by name: one sheet for each group of metrics, `distance_by_step.png` where there are ways, and
        `fidelity_by_distance.png` where both are measured.
    """
    from matplotlib import style

    means = {(row.variant, row.column): row for row in table.itertuples()}
    with style.context(["default", sheets.STYLE]):  # whatever the user's own style is
        figures: dict[str, Figure | None] = {
            f"{name}.png": sheets.metric_sheet(data.plan, means, columns) for name, columns in groups(data).items()
        }
        figures["distance_by_step.png"] = _distance_by_step(data.plan, ways)
        figures["fidelity_by_distance.png"] = scatter(data, means, trade_off(data))
        figures["distance_by_forwards.png"] = scatter(data, means, costs(data), logarithmic=True)
        return {name: _png(figure) for name, figure in figures.items() if figure}


def groups(data: Measured) -> dict[str, list[str]]:
    """
    Returns:
        The measured columns that belong on one sheet, by the sheet's name.
    """
    names = dict.fromkeys(group(column) for column in data.columns)
    return {name: [column for column in data.columns if group(column) == name] for name in names}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------- the drag


def ways_of(data: Measured) -> Ways:
    """The ways of those edits of a study that have one."""
    ways = {key: fact["trajectory"] for key, fact in data.results.facts.items() if fact.get("trajectory")}
    return {place: np.array(ways[key], float) for place, key in data.plan.keys.items() if key in ways}


def distance_by_step(plan: Plan, ways: Ways, variant: str) -> np.ndarray:
    """Mean over a variant's edits of the mean distance of their handles to their targets, as tracked, px of the image.

    Returns:
        (K,): before the drag, then after each step, until the last edit stopped; the others stay where they stopped.
        Empty where no edit has a way.
    """
    targets = {subject.name: subject.sample.targets for subject in plan.subjects}
    distances = [
        np.linalg.norm(way - targets[sample], axis=-1).mean(axis=1)
        for (name, sample, _), way in ways.items()
        if name == variant
    ]
    longest = max(map(len, distances), default=0)
    held = [np.pad(distance, (0, longest - len(distance)), mode="edge") for distance in distances]
    return np.mean(held, axis=0) if held else np.zeros(0)


def _distance_by_step(plan: Plan, ways: Ways) -> Figure | None:
    curves = {variant.name: distance_by_step(plan, ways, variant.name) for variant in sheets.edits(plan)}
    if not any(map(len, curves.values())):
        return None
    facets, key = _facets(plan)
    if len(facets) > 1:
        figure, panels = sheets.new_panels(len(facets), 3.2, 2.6, sharex=True, sharey=True)
    else:
        figure, panels = sheets.new_panel(7.5, max(3.8, _height(facets[""])))
    styles = list(itertools.product(sheets.DASHES, sheets.COLOURS))
    for panel, (heading, lines) in zip(panels, facets.items(), strict=True):
        for (label, name), (dashes, colour) in zip(lines.items(), itertools.cycle(styles), strict=False):
            panel.plot(curves[name], label=label, linewidth=1.5, linestyle=dashes, color=colour)
        panel.set_title(heading)
        panel.set_xlabel("optimiser step")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    figure.supylabel("distance to the targets, as tracked, px", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, title=key or None, loc="outside right upper", fontsize=8)
    return figure


def _height(labels: Iterable[str]) -> float:
    """Of a legend, inches."""
    return 0.6 + sum(0.07 + 0.14 * (1 + label.count("\n")) for label in labels)


def _facets(plan: Plan) -> tuple[dict[str, dict[str, str]], str]:
    """Series of variants: heading, then label and variant's name; and the setting that the labels are values of.

    A grid of two parameters has a series for each value of the one with fewer values, anything else a single one.
    """
    varied, variants = sheets.parameters(plan), sheets.edits(plan)
    if len(varied) != 2 or not plan.study.grid or min(map(len, varied.values())) > FACETS:
        names = {sheets.label_of(plan, variant): variant.name for variant in variants}
        return {"": names}, sheets.only_parameter(varied)
    facet, key = sorted(varied, key=lambda key: len(varied[key]))
    series: dict[str, dict[str, str]] = {f"{facet}={show(value)}": {} for value in varied[facet]}
    for variant in variants:
        series[f"{facet}={show(variant.settings[facet])}"][show(variant.settings[key])] = variant.name
    return series, key


# ------------------------------------------------------------------------------------------- fidelity and distance


def trade_off(data: Measured) -> tuple[str, str] | None:
    """
    Returns:
        The columns for distance and fidelity; None where one of them is not measured.
    """
    measured = data.columns
    distance = next((column for column in ("true_distance", "distance") if column in measured), None)
    kinds = ("fidelity", "psnr_inside", "psnr_outside", "ssim_outside")
    fidelity = next((column for column in kinds if column in measured), None)
    return (distance, fidelity) if distance and fidelity else None


def costs(data: Measured) -> tuple[str, str] | None:
    """
    Returns:
        The columns for cost and distance; None where one of them is not measured.
    """
    both = trade_off(data)
    return ("forwards", both[0]) if both and "forwards" in data.columns else None


def scatter(
    data: Measured, means: sheets.Means, columns: tuple[str, str] | None, *, logarithmic: bool = False
) -> Figure | None:
    """A point for each variant with finite means, baselines in grey.

    Args:
        columns: to the right, and upwards.
        logarithmic: the first of them.

    Returns:
        None where there is no such variant, or no columns.
    """
    if not columns:
        return None
    plan = data.plan
    facets, key = _facets(plan)
    numbered = {}
    if len(facets) == 1 and len(facets[""]) > CROWD and max(map(len, facets[""])) > 12:
        numbered = dict(enumerate(facets[""], 1))
        facets = {"": {str(number): facets[""][label] for number, label in numbered.items()}}
    figure, (panel,) = sheets.new_panel(10 if numbered else 7.2, max(4.8, _height(numbered.values())))
    labels: list[Label] = []
    for (heading, points), colour in zip(facets.items(), itertools.cycle(sheets.COLOURS), strict=False):
        labels += _scatter(panel, means, columns, points, colour, heading, joined=bool(key) and len(facets) == 1)
    baselines = {variant.name: variant.name for variant in plan.variants if variant.baseline}
    labels += _scatter(panel, means, columns, baselines, sheets.GREY, "", marker="s")
    if not labels:
        return None
    panel.margins(0.1)
    if logarithmic:
        _logarithmic(panel)
    panel.set_xlabel(title(columns[0]))
    panel.set_ylabel(title(columns[1]))
    panel.set_title(f"labels: {key}" if key else "")
    if len(facets) > 1:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    if numbered:
        from matplotlib.lines import Line2D

        names = [f"{number}: {label}" for number, label in numbered.items()]
        blank = [Line2D([], [], linestyle="") for _ in names]
        figure.legend(blank, names, loc="outside right upper", fontsize=8, handlelength=0, handletextpad=0)
    _annotate(figure, panel, labels)
    return figure


def _logarithmic(panel: Axes) -> None:
    """To the right: plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())


def _scatter(
    panel: Axes,
    means: sheets.Means,
    columns: tuple[str, str],
    points: Mapping[str, str],
    colour: str,
    heading: str,
    *,
    marker: str = "o",
    joined: bool = False,
) -> list[Label]:
    """A point for each variant (label: name) with finite means, and its intervals."""
    (x, x_ends), (y, y_ends) = (sheets.values_of(means, column, list(points.values())) for column in columns)
    known = np.isfinite(x) & np.isfinite(y)
    x, y, x_ends, y_ends = x[known], y[known], x_ends[:, known], y_ends[:, known]
    panel.errorbar(x, y, y_ends, x_ends, fmt="none", ecolor=colour, elinewidth=0.9, capsize=2, alpha=0.45)
    if joined:
        panel.plot(x, y, color=colour, linewidth=0.8, linestyle=":")
    panel.plot(x, y, marker, color=colour, markersize=5.5, label=heading or None)
    names = itertools.compress(points, known)
    return [Label(*spot, colour) for spot in zip(x, y, x_ends.T, y_ends.T, names, strict=True)]


@dataclass(frozen=True)
class Label:
    """A text for a point (x, y) with its intervals' reaches to either side."""

    x: float
    y: float
    x_ends: np.ndarray
    y_ends: np.ndarray
    text: str
    colour: str


def _annotate(figure: Figure, panel: Axes, labels: Sequence[Label]) -> None:
    """Write each text near its point, at the nearest place where it covers no point, no other text, and few lines."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # from here on the axes stay where they are
    px = figure.dpi / 72  # of a point (1/72 inch)
    inside = panel.get_window_extent()

    def box(x: tuple[float, float], y: tuple[float, float], pad: float) -> Bbox:
        ends = panel.transData.transform(np.stack([x, y], axis=1))
        return Bbox([ends[0] - pad * px, ends[1] + pad * px])

    taken = [box((label.x, label.x), (label.y, label.y), 4) for label in labels]
    bars = [box((label.x - label.x_ends[0], label.x + label.x_ends[1]), (label.y, label.y), 0.5) for label in labels]
    bars += [box((label.x, label.x), (label.y - label.y_ends[0], label.y + label.y_ends[1]), 0.5) for label in labels]
    circle = np.radians(np.arange(45, 405, 30))
    ways = [
        radius * np.array([math.cos(angle), math.sin(angle)]) for radius in (5, 10, 18, 28, 40, 55) for angle in circle
    ]
    for label in labels:
        note = panel.annotate(
            label.text,
            (label.x, label.y),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            color=0.65 * np.array(to_rgb(label.colour)),
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3},
        )
        note.set_in_layout(False)
        extent = note.get_window_extent()
        half = np.array([extent.width, extent.height]) / 2 / px + 1
        best: tuple[float, np.ndarray, Bbox] = (math.inf, np.zeros(2), taken[0])
        for way in ways:
            offset = way + np.sign(way) * half
            centre = panel.transData.transform((label.x, label.y)) + offset * px
            place = Bbox([centre - half * px, centre + half * px])
            outside = not (inside.contains(*place.min) and inside.contains(*place.max))
            cost = (
                float(np.linalg.norm(way))
                + 100 * outside
                + 50 * place.count_overlaps(taken)
                + 8 * place.count_overlaps(bars)
            )
            if cost < best[0]:
                best = cost, offset, place
        note.set_position((float(best[1][0]), float(best[1][1])))
        taken.append(best[2])
