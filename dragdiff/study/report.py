"""What a study says: Markdown, tables, plots and a gallery, made from the results alone.

The files are the same, byte for byte, in whatever order and by however many workers the edits were done.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dragdiff import methods
from dragdiff.aliases import Report
from dragdiff.config import Config, StudyConfig, load_study, rooted, to_yaml
from dragdiff.errors import UserError
from dragdiff.metrics.statistics import LEVEL, RESAMPLES
from dragdiff.metrics.suite import COLUMNS
from dragdiff.options import as_it_stands, merged
from dragdiff.study import gallery, plots, sheets
from dragdiff.study.plan import SCENES, Plan, Variant, config_of, show
from dragdiff.study.store import Store
from dragdiff.study.table import ALL, Measured, measured, number, summary, title

if TYPE_CHECKING:
    import pandas as pd

Means = Mapping[tuple[str, str, str], Any]  # of (category, column, variant): a row of `table.summary`

PLACE = ("extends", "results", "executor", "workers", "address", "batch", "attempts", "reference_mb", "logger")
LISTED = 8  # samples named for each reason of a failure
HEADINGS = {
    "distances": "Distances",
    "pictures": "Likeness to source and truth",
    "accuracy": "Dragging accuracy",
    "cost": "Cost",
}
CAPTIONS = {
    "distance_by_step.png": (
        "Distance by optimiser step",
        "Distance of the handles to their targets in px of the image, as tracked during the drag; mean over the edits "
        "of each variant. An edit that stopped early counts with its last distance.",
    ),
    "fidelity_by_distance.png": (
        "Fidelity against distance",
        "A point for each variant, baselines in grey; those with an infinite value are left out.",
    ),
    "distance_by_forwards.png": (
        "Distance against cost",
        "A point for each variant. Forwards of the denoiser for one row; a step that trains counts for what it costs, "
        "and a drag for the steps that it took.",
    ),
}


def find_study(study: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """The settings of a study, by its YAML file with overrides, or by its folder in the results.

    Raises:
        UserError: neither is there, overrides with a folder, wrong settings.
    """
    if Path(study).suffix in (".yaml", ".yml") or Path(study).is_file():
        return load_study(study, overrides)
    results, _, name = (study if "://" in study else Path(study).expanduser().absolute().as_posix()).rpartition("/")
    if not name:
        return find_study(results, overrides)
    facts = Store(results).read_json(f"{name}/study.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("settings"), dict):
        raise UserError(f"no study in {study!r}: give its YAML file, or its folder in the results (with study.json)")
    if overrides:
        raise UserError(f"{study!r} has its settings: leave out {overrides[0]!r}, or give the study's YAML file")
    try:
        known = rooted(facts["settings"], Path(results, name, "study.json"))
        settings = merged(StudyConfig, [(as_it_stands(known), f"in {study}/study.json")])
    except UserError as error:  # of another version, or with a method of somebody's own
        raise UserError(f"{error}; give the study's YAML file") from error
    return dataclasses.replace(settings, name=name, results=results)


def write_report(plan: Plan, store: Store, *, brief: bool = False, progress: Report = lambda *_: None) -> list[str]:
    """Write all files of the report below `<study name>/report/`; missing edits are shown as missing.

    Args:
        brief: leave out the large files, gallery and single values: what is left can stand beside the study's file.
        progress: called while the pictures are read, and after each file.

    Returns:
        Where the files are, `report.md` first.

    Raises:
        UserError: nothing is measured yet, or a package is missing.
        StoreError: the results can't be read or written.
    """
    check_packages()
    data = measured(plan, store)
    if data.scores.empty:
        failed = [reason for reason in data.failures["reason"] if reason]
        raise UserError(
            f"nothing of the study {plan.study.name!r} is measured yet"
            + (f" ({len(failed)} edits failed, e.g. {failed[0]})" if failed else "")
            + ": run `dragdiff study` with the same settings first"
        )
    categories = sorted({subject.category for subject in plan.subjects})
    table = summary(data, categories=[ALL, *(categories if len(categories) > 1 else ())])
    ways = plots.ways_of(data)
    pictures = plots.draw(data, table[table["category"] == ALL], ways)
    files = {
        "report.md": _markdown(data, table, list(pictures), _unavailable(plan, store), brief).encode(),
        **_study_files(plan),
        "summary.csv": _csv(table),
        **pictures,
    }
    if not brief:
        files |= {"scores.csv": _csv(data.scores), "scores.parquet": _parquet(data.scores)}
        files["gallery.html"] = gallery.page(data, store, ways, progress=progress).encode()
    for path, content in files.items():
        store.write(f"{plan.study.name}/report/{path}", content)
    return [store.path(plan.study.name, "report", path) for path in files]


def check_packages() -> None:
    """Whether a report can be written here.

    Raises:
        UserError: a package is missing.
    """
    for package in ("matplotlib", "pandas", "pyarrow"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"reports need {package}: pip install 'dragdiff[study]'") from error


def _study_files(plan: Plan) -> dict[str, bytes]:
    """The study's file, and beside it those of methods that are not the package's."""
    yaml, files = to_yaml(_portable(plan.study)), {}
    for method in {config.method for config in _edits(plan) if methods.is_file(config.method)}:
        files[Path(method).name] = methods.find(method).source.encode()
        yaml = yaml.replace(method, Path(method).name)
    return {"study.yaml": yaml.encode(), **files}


def _edits(plan: Plan) -> list[Config]:
    """The settings of each variant that is no baseline."""
    seed = plan.study.seeds[0]
    return [config_of(plan.study, variant, seed) for variant in sheets.edits(plan)]


def _portable(study: StudyConfig) -> StudyConfig:
    """The study without what belongs to the machine that ran it."""
    usual = StudyConfig()
    here = {key: getattr(usual, key) for key in PLACE}
    path = study.data.path
    data = dataclasses.replace(study.data, path=Path(path).name if Path(path).expanduser().is_absolute() else path)
    return dataclasses.replace(study, **here, data=data)


def _unavailable(plan: Plan, store: Store) -> dict[str, str]:
    facts = store.read_json(f"{plan.study.name}/unavailable.json") or {}
    return {name: str(facts[name]) for name in plan.study.metrics.names if name in facts}


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, engine="pyarrow", index=False)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------- Markdown


def _markdown(
    data: Measured, table: pd.DataFrame, pictures: list[str], unavailable: Mapping[str, str], brief: bool
) -> str:
    plan = data.plan
    means: Means = {(row.category, row.column, row.variant): row for row in table.itertuples()}
    reference = text(plan.reference)
    parts = [f"# {text(plan.study.name)}"]
    if plan.study.question:
        parts.append(f"**Question:** {text(plan.study.question)}")
    parts += [
        *_what_was_run(data),
        "## Means",
        f"Mean [{100 * LEVEL:.0f} % interval] of each variant; identity, copy-patch"
        + (" and oracle (the true edit)" if any(variant.name == "oracle" for variant in plan.variants) else "")
        + " are baselines that need no model. ↓ less is better, ↑ more is better. ∞: some picture is exactly that of "
        "the source or the truth there. –: no value. " + _how(data),
    ]
    for name, columns in plots.groups(data).items():
        parts += [f"### {HEADINGS[name]}", _means(plan, means, columns)]
        if f"{name}.png" in pictures:
            parts.append(f"![{HEADINGS[name]} of each variant]({name}.png)")
    parts += [
        f"## Differences to {reference}",
        f"Mean over the images that both have of the variant's value minus that of {reference}, image by image, with "
        "its interval, made in the same way. **Bold** where the interval does not hold 0.",
    ]
    for name, columns in plots.groups(data).items():
        parts += [f"### {HEADINGS[name]}", _differences(plan, means, columns)]
    categories = [category for category in dict.fromkeys(table["category"]) if category != ALL]
    if categories:
        parts += ["## By category", "All metrics by category are in [summary.csv](summary.csv)."]
        for column in plots.trade_off(data) or data.columns[:2]:
            parts += [f"### {title(column)}", _by_category(plan, means, column, categories)]
    for picture, (heading, caption) in CAPTIONS.items():
        if picture in pictures:
            parts += [f"## {heading}", f"![{heading}]({picture})", caption]
    parts += _failures(data)
    if unavailable:
        rows = [(text(name), text(reason)) for name, reason in unavailable.items()]
        parts += ["## Metrics that could not be had", _rows(("metric", "reason"), rows)]
    parts += _files(plan, brief)
    return "\n\n".join(parts) + "\n"


def _how(data: Measured) -> str:
    over = {
        kind: "; ".join(COLUMNS[column].label for column in data.columns if COLUMNS[column].over == kind)
        for kind in ("pairs", "images")
    }
    units = {"pairs": "all pairs of points", "images": "images (each the mean of its pairs)"}
    sentences = [f"The mean is over {units[kind]} for: {labels}." for kind, labels in over.items() if labels]
    if len(data.plan.study.seeds) > 1:
        sentences.append("Values of several seeds count as values of one image.")
    sentences.append(f"Intervals are percentiles of {RESAMPLES} bootstrap draws of the images.")
    return " ".join(sentences)


def _methods(plan: Plan) -> str:
    """Which methods the variants are, with their papers."""
    found = [methods.find(name) for name in dict.fromkeys(edit.method for edit in _edits(plan))]
    papers = ", ".join(f"{method.name} (arXiv {method.paper})" if method.paper else method.name for method in found)
    return f"Method{'s' if len(found) > 1 else ''}: {papers}."


def _what_was_run(data: Measured) -> list[str]:
    plan = data.plan
    categories = Counter(subject.category for subject in plan.subjects)
    seeds = ", ".join(map(str, plan.study.seeds))
    samples = ", ".join(f"{count} {text(name)}" for name, count in sorted(categories.items()))
    source = "procedural scenes" if plan.study.data.path == SCENES else text(Path(plan.study.data.path).name)
    lost = data.failures[data.failures["seed"] != ""]
    failed = Counter(lost["variant"][lost["reason"] != ""])
    missing = Counter(lost["variant"][lost["reason"] == ""])
    named = any(text(variant.name) != _settings(variant) for variant in sheets.edits(plan))
    rows = []
    for variant in plan.variants:
        name, total = variant.name, len(plan.subjects) * len(plan.seeds(variant))
        counts = (total - failed[name] - missing[name], failed[name], missing[name])
        rows.append((text(name), *([_settings(variant)] if named else ()), *counts))
    done, bad, left = (sum(int(row[place]) for row in rows) for place in (-3, -2, -1))
    state = "" if not left else " **The study is not finished.**"
    return [
        f"{len(plan.subjects)} samples of {source} ({samples}), seed{'s' if len(plan.study.seeds) > 1 else ''} "
        f"{seeds}. Of {done + bad + left} edits {done} are measured, {bad} failed, {left} are missing.{state} "
        f"The variants are compared with {text(plan.reference)}. {_methods(plan)}",
        "## What was run",
        _rows(("variant", *(["settings"] if named else ()), "measured", "failed", "missing"), rows),
    ]


def _settings(variant: Variant) -> str:
    if variant.baseline:
        return "baseline"
    return text(", ".join(f"{key}={show(value)}" for key, value in variant.settings.items())) or "default"


def _means(plan: Plan, means: Means, columns: Sequence[str]) -> str:
    published = {column for figures in plan.study.published.values() for column in figures}
    rows = []
    for variant in plan.variants:
        found = [means[ALL, column, variant.name] for column in columns]
        counts = sorted({row.images for row in found})
        images = str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
        cells = []
        for row in found:
            cells.append(_interval(row.column, row.value, row.low, row.high))
            if row.column in published:
                cells.append(text(str(plan.study.published.get(variant.name, {}).get(row.column, "–"))))
        rows.append((text(variant.name), images, *cells))
    headings = [heading for c in columns for heading in [title(c), *(["published"] if c in published else [])]]
    return _rows(("variant", "images", *headings), rows)


def _differences(plan: Plan, means: Means, columns: Sequence[str]) -> str:
    rows = []
    for variant in plan.variants:
        if variant.name == plan.reference:
            continue
        cells = []
        for column in columns:
            row = means[ALL, column, variant.name]
            cell = _interval(column, row.difference, row.difference_low, row.difference_high, "+")
            apart = row.difference_low > 0 or row.difference_high < 0
            cells.append(f"**{cell}**" if apart else cell)
        rows.append((text(variant.name), *cells))
    return _rows(("variant", *map(title, columns)), rows)


def _by_category(plan: Plan, means: Means, column: str, categories: Sequence[str]) -> str:
    rows = []
    for variant in plan.variants:
        found = [means[category, column, variant.name] for category in categories]
        rows.append((text(variant.name), *(_interval(column, row.value, row.low, row.high) for row in found)))
    return _rows(("variant", *map(text, categories)), rows)


def _interval(column: str, value: float, low: float, high: float, sign: str = "-") -> str:
    shown = number(column, value, sign)
    return shown if np.isnan(low) else f"{shown} [{number(column, low, sign)}, {number(column, high, sign)}]"


def _failures(data: Measured) -> list[str]:
    lost = data.failures[data.failures["reason"] != ""]
    if lost.empty:
        return []
    edits = lost[lost["seed"] != ""]
    rows = []
    for (reason, variant), group in edits.groupby(["reason", "variant"], sort=True):
        rows.append((text(reason), text(variant), len(group), _some(sorted(set(group["sample"])))))
    parts = ["## Failures"]
    if rows:
        parts.append(_rows(("reason", "variant", "edits", "samples"), rows))
    if data.plan.broken:
        broken = [(text(name), text(reason)) for name, reason in sorted(data.plan.broken)]
        parts += ["Samples that could not be read:", _rows(("sample", "reason"), broken)]
    return parts


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return text(", ".join(names[:LISTED])) + more


def _files(plan: Plan, brief: bool) -> list[str]:
    folder = "" if plan.study.data.path == SCENES else " data.path=FOLDER_OF_THE_SAMPLES"
    return [
        "## Files, and how to make them again",
        "[summary.csv](summary.csv): all means, intervals and differences, also by category. "
        + ("" if brief else "[scores.csv](scores.csv), [scores.parquet](scores.parquet): every value. ")
        + ("" if brief else "[gallery.html](gallery.html): every picture. ")
        + "[study.yaml](study.yaml): every setting of the study. In this folder:",
        f"```\ndragdiff study study.yaml{folder}\ndragdiff report study.yaml{folder}\n```",
    ]


def _rows(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; numbers stand at the right."""
    ends = ["-:" if all(isinstance(row[place], int) for row in rows) else "-" for place in range(len(head))]
    lines = [head, ends, *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def text(value: str) -> str:
    """Any text as Markdown that shows it as it is, on one line, also in a table."""
    return re.sub(r"([\\`*\[\]<>|~$&#!]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(value.split()))
