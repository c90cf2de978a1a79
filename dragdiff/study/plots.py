"""A study's plots (matplotlib, without its global state), as PNG files in memory."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dragdiff.metrics.statistics import LEVEL
from dragdiff.metrics.suite import COLUMNS
from dragdiff.study.plan import Plan, Variant, show
from dragdiff.study.table import Measured, group, number, title

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Ways = Mapping[tuple[str, str, int], np.ndarray]  # of (variant, sample, seed): (K, N, 2), (x, y) px of the image
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
CROWD = 8  # more long names than this do not fit beside their points
FACETS = 8  # panels on a sheet, at most
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
    with style.context(["default", STYLE]):  # whatever the user's own style is
        figures: dict[str, Figure | None] = {
            f"{name}.png": metric_sheet(data.plan, means, columns) for name, columns in groups(data).items()
        }
        figures["distance_by_step.png"] = _distance_by_step(data.plan, ways)
        figures["fidelity_by_distance.png"] = fidelity_by_distance(data, means)
        return {name: _png(figure) for name, figure in figures.items() if figure}


def groups(data: Measured) -> dict[str, list[str]]:
    """The measured columns that belong on one sheet, by the sheet's name."""
    names = dict.fromkeys(group(column) for column in data.columns)
    return {name: [column for column in data.columns if group(column) == name] for name in names}


def parameters(plan: Plan) -> dict[str, list[Any]]:
    """The settings in which the variants of a grid or a draw differ, with their values; empty for listed variants."""
    if plan.study.variants:
        return {}
    values: dict[str, dict[str, Any]] = {}
    for variant in _edits(plan):
        for key, value in variant.settings.items():
            values.setdefault(key, {})[show(value)] = value
    return {key: list(found.values()) for key, found in values.items() if len(found) > 1}


def _edits(plan: Plan) -> list[Variant]:
    return [variant for variant in plan.variants if not variant.baseline]


def _label(plan: Plan, variant: Variant, width: int = 40) -> str:
    """The variant's value where one parameter is studied, else its name, on lines of so many characters."""
    varied = list(parameters(plan))
    text = show(variant.settings[varied[0]]) if len(varied) == 1 else variant.name
    return textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False)


def _heading(column: str) -> str:
    return textwrap.fill(title(column), 38)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=150, layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------- metrics


def metric_sheet(plan: Plan, means: Means, columns: Sequence[str]) -> Figure:
    """One panel for each column: curves over a number, heat maps of a grid of two parameters, or points by name."""
    varied = parameters(plan)
    if len(varied) == 2 and plan.study.grid:
        return _heat_maps(plan, means, columns, *varied)
    if len(varied) == 1 and all(_is_number(value) for value in next(iter(varied.values()))):
        return _curves(plan, means, columns, *varied)
    return _points(plan, means, columns)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _panel(width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = _figure(width, height)
    return figure, [figure.subplots()]


def _panels(count: int, width: float, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Axes for so many panels of (width, height) inches."""
    across = min(count, 4) if height > 4 or count < 3 else math.ceil(count / 2) if count < 8 else 4
    down = math.ceil(count / across)
    figure = _figure(width * across, height * down + 0.5)
    panels = list(figure.subplots(down, across, squeeze=False, **shared).flat)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def _curves(plan: Plan, means: Means, columns: Sequence[str], key: str) -> Figure:
    variants = sorted(_edits(plan), key=lambda variant: variant.settings[key])
    places = np.array([variant.settings[key] for variant in variants], float)
    figure, panels = _panels(len(columns), 3.7, 2.9)
    for panel, column in zip(panels, columns, strict=True):
        _series(panel, plan, means, column, variants, places)
        panel.set_title(_heading(column))
        panel.set_xlabel(key)
        if _is_geometric(places):
            panel.set_xscale("log")
        _tick_values(panel, places, [_label(plan, variant) for variant in variants])
    _legend(figure, panels, plan)
    return figure


def _points(plan: Plan, means: Means, columns: Sequence[str]) -> Figure:
    """The variants below each other: names need the room."""
    variants = _edits(plan)
    labels = [_label(plan, variant) for variant in variants]
    lines = sum(1 + label.count("\n") for label in labels)
    figure, panels = _panels(len(columns), 3.7, max(1.6, 0.9 + 0.16 * lines + 0.14 * len(labels)), sharey=True)
    places = np.arange(len(variants), dtype=float)
    for panel, column in zip(panels, columns, strict=True):
        _series(panel, plan, means, column, variants, places, upright=True)
        panel.set_title(_heading(column))
        panel.set_yticks(places, labels)
        panel.set_ylim(len(variants) - 0.4, -0.6)
    figure.supylabel(_only(parameters(plan)), fontsize=9)
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
    values, ends = _values(means, column, [variant.name for variant in variants])
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


def _values(means: Means, column: str, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Of a column the means (n,), and how far their intervals reach (2, n), 0 where there is none."""
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
    found: dict[str, Any] = {}
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
        for variant in _edits(plan)
    }
    left = max(map(len, rows)) * 0.075
    width = 1.6 + left + 0.55 * len(names)
    figure, panels = _panels(len(columns), width, 1.5 + 0.36 * len(rows))
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


# ------------------------------------------------------------------------------------------- the drag


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
    curves = {variant.name: distance_by_step(plan, ways, variant.name) for variant in _edits(plan)}
    if not any(map(len, curves.values())):
        return None
    facets, key = _facets(plan)
    if len(facets) > 1:
        figure, panels = _panels(len(facets), 3.2, 2.6, sharex=True, sharey=True)
    else:
        figure, panels = _panel(7.5, max(3.8, _height(facets[""])))
    for panel, (heading, lines) in zip(panels, facets.items(), strict=True):
        for (label, name), style in zip(lines.items(), _line_styles(), strict=False):
            panel.plot(curves[name], label=label, linewidth=1.5, **style)
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
    varied, variants = parameters(plan), _edits(plan)
    if len(varied) != 2 or not plan.study.grid or min(map(len, varied.values())) > FACETS:
        return {"": {_label(plan, variant): variant.name for variant in variants}}, _only(varied)
    facet, key = sorted(varied, key=lambda key: len(varied[key]))
    series: dict[str, dict[str, str]] = {f"{facet}={show(value)}": {} for value in varied[facet]}
    for variant in variants:
        series[f"{facet}={show(variant.settings[facet])}"][show(variant.settings[key])] = variant.name
    return series, key


def _only(varied: Mapping[str, Any]) -> str:
    return next(iter(varied)) if len(varied) == 1 else ""


def _line_styles() -> Iterator[dict[str, Any]]:
    styles = itertools.product(DASHES, COLOURS)
    return ({"linestyle": dashes, "color": colour} for dashes, colour in itertools.cycle(styles))


# ------------------------------------------------------------------------------------------- fidelity and distance


def trade_off(data: Measured) -> tuple[str, str] | None:
    """The columns for distance and fidelity; None where one of them is not measured."""
    measured = data.columns
    distance = next((column for column in ("true_distance", "distance") if column in measured), None)
    kinds = ("fidelity", "psnr_inside", "psnr_outside", "ssim_outside")
    fidelity = next((column for column in kinds if column in measured), None)
    return (distance, fidelity) if distance and fidelity else None


def fidelity_by_distance(data: Measured, means: Means) -> Figure | None:
    columns = trade_off(data)
    if not columns:
        return None
    plan = data.plan
    facets, key = _facets(plan)
    numbered = {}
    if len(facets) == 1 and len(facets[""]) > CROWD and max(map(len, facets[""])) > 12:
        numbered = dict(enumerate(facets[""], 1))
        facets = {"": {str(number): facets[""][label] for number, label in numbered.items()}}
    figure, (panel,) = _panel(10 if numbered else 7.2, max(4.8, _height(numbered.values())))
    labels: list[Label] = []
    for (heading, points), colour in zip(facets.items(), itertools.cycle(COLOURS), strict=False):
        labels += _scatter(panel, means, columns, points, colour, heading, joined=bool(key) and len(facets) == 1)
    baselines = {variant.name: variant.name for variant in plan.variants if variant.baseline}
    labels += _scatter(panel, means, columns, baselines, GREY, "", marker="s")
    if not labels:
        return None
    panel.margins(0.1)
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


def _scatter(
    panel: Axes,
    means: Means,
    columns: tuple[str, str],
    points: Mapping[str, str],
    colour: str,
    heading: str,
    *,
    marker: str = "o",
    joined: bool = False,
) -> list[Label]:
    """A point for each variant (label: name) with finite means, and its intervals."""
    (x, x_ends), (y, y_ends) = (_values(means, column, list(points.values())) for column in columns)
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
