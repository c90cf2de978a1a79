"""What a study has measured, as tables (pandas). They depend on the results alone, not on order or workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dragdiff import methods
from dragdiff.cache import digest
from dragdiff.methods.method import done_forwards
from dragdiff.metrics.statistics import Mean, mean_over_images, mean_over_pairs, paired_difference
from dragdiff.metrics.suite import COLUMNS, COST, metric_key
from dragdiff.study.results import Results, read_results, scores_of
from dragdiff.study.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from dragdiff.study.plan import Plan

ALL = "all"  # in place of a category


@dataclass(frozen=True)
class Measured:
    """Everything that was measured, and what was not.

    Attributes:
        scores: one row for each value: variant, category, sample, seed, pair (0 for values of the whole picture),
            column (a key of `COLUMNS`), value. In the order of the variants, then by sample and seed.
        failures: one row for each edit that failed, is damaged or has no scores yet: variant, category, sample, seed,
            reason ("" = not run yet).
        results: what they are made of.
    """

    plan: Plan
    scores: pd.DataFrame
    failures: pd.DataFrame
    results: Results

    @property
    def columns(self) -> list[str]:
        """The columns that have values, in their order."""
        measured = set(self.scores["column"])
        return [column for column in COLUMNS if column in measured]

    def values(self, variant: str, column: str, category: str = ALL) -> dict[str, np.ndarray]:
        """The values of a column for a variant.

        Returns:
            By sample, those of its pairs for all seeds, (seeds * pairs,).
        """
        rows = self._parts.get((variant, column), self.scores[:0])
        if category != ALL:
            rows = rows[rows["category"] == category]
        return {name: group["value"].to_numpy() for name, group in rows.groupby("sample", sort=True)}

    @cached_property
    def _parts(self) -> dict[tuple[str, str], pd.DataFrame]:
        return dict(list(self.scores.groupby(["variant", "column"], sort=False)))


def measured(plan: Plan, store: Store) -> Measured:
    """Read the scores of a study.

    Raises:
        StoreError: the results can't be read.
    """
    import pandas as pd

    wanted = [metric_key(name, plan.study.metrics) for name in plan.study.metrics.names if name != COST]
    results = read_results(store, plan.tasks)
    reasons = store.read_jsons([f"failures/{key}.json" for key in set(plan.keys.values())])
    costs = _costs(plan, results) if COST in plan.study.metrics.names else {}
    scores, failures = [], []
    for variant in plan.variants:
        in_order = {
            seed: scores_of((store.read_json(ordered_path(plan, variant.name, seed)) or {}).get("distances"))
            for seed in (plan.seeds(variant) if plan.study.metrics.ordered else ())
        }
        for subject in plan.subjects:
            for seed in plan.seeds(variant):
                key = plan.keys[variant.name, subject.name, seed]
                place = {"variant": variant.name, "category": subject.category, "sample": subject.name, "seed": seed}
                kept = results.scores.get(key, {})
                found = [kept[name] for name in wanted if name in kept]
                if key in results.facts and subject.name in in_order.get(seed, {}):
                    found.append(in_order[seed][subject.name])
                reason = reasons.get(f"failures/{key}.json", {}).get("reason") if len(found) < len(wanted) else None
                reason = reason if isinstance(reason, str) else ""
                if fault := results.faults.get(key):
                    reason = f"{fault}; `dragdiff study` makes it again"
                if reason or not found:
                    failures.append(place | {"reason": reason})
                if key in costs:
                    found.append(costs[key])
                values = {column: numbers for entry in found for column, numbers in entry.items()}
                for column in COLUMNS:
                    scores += [
                        place | {"pair": pair, "column": column, "value": value}
                        for pair, value in enumerate(values.get(column, []))
                    ]
    for name, reason in plan.broken:
        failures.append({"variant": ALL, "category": "", "sample": name, "seed": "", "reason": reason})
    columns = ["variant", "category", "sample", "seed"]
    return Measured(
        plan,
        pd.DataFrame(scores, columns=[*columns, "pair", "column", "value"]),
        pd.DataFrame(failures, columns=[*columns, "reason"]),
        results,
    )


def _costs(plan: Plan, results: Results) -> dict[str, dict[str, list[float]]]:
    """Forwards and seconds of each edit by a model, by its key. What came from a cache took no time."""
    tasks = {task.key: task.config for task in plan.tasks if task.config}
    costs = {}
    for key, config in tasks.items():
        if fact := results.facts.get(key):
            forwards = done_forwards(methods.find(config.method).stages(config), fact["steps"])
            costs[key] = {"forwards": [forwards], "seconds": [sum(fact["seconds"].values())]}
    return costs


def ordered_path(plan: Plan, variant: str, seed: int) -> str:
    """Where the distances of a variant are that depend on the order of the samples."""
    which = digest(variant=variant, seed=seed, metric=metric_key("distance", plan.study.metrics))
    return f"{plan.study.name}/ordered/{which}.json"


def summary(data: Measured, *, categories: Sequence[str] = (ALL,)) -> pd.DataFrame:
    """Means with 95 % intervals, and paired differences to the study's reference variant.

    Args:
        categories: `ALL`, or names of some.

    Returns:
        One row for each variant, category and column: variant, category, column, value, low, high (the published mean:
        over pairs or images, see `COLUMNS`), images, pairs, difference, difference_low, difference_high (mean over the
        images that both have of ours - the reference's; NaN for the reference itself).
    """
    import pandas as pd

    names, reference = [variant.name for variant in data.plan.variants], data.plan.reference
    rows = []
    for category in categories:
        for column in data.columns:
            over_pairs = COLUMNS[column].over == "pairs"
            theirs = data.values(reference, column, category)
            for name in names:
                ours = data.values(name, column, category)
                mean = (mean_over_pairs if over_pairs else mean_over_images)(list(ours.values()))
                both = sorted(ours.keys() & theirs.keys()) if name != reference else []
                difference = paired_difference([ours[key] for key in both], [theirs[key] for key in both])
                rows.append(
                    {"variant": name, "category": category, "column": column}
                    | asdict(mean)
                    | {"difference": difference.value}
                    | {"difference_low": difference.low, "difference_high": difference.high}
                )
    order = ["variant", "category", "column", *Mean.__dataclass_fields__]
    return pd.DataFrame(rows, columns=[*order, "difference", "difference_low", "difference_high"])


def group(column: str) -> str:
    """The columns that belong on one sheet: distances, pictures (likeness to source or truth), accuracy (DAI), cost."""
    if column in ("forwards", "seconds"):
        return COST
    return "accuracy" if column.startswith("dai") else "distances" if "distance" in column else "pictures"


def title(column: str) -> str:
    """A column's name with an arrow towards better, and its unit."""
    about = COLUMNS[column]
    return f"{about.label} {'↑' if about.higher else '↓'}{f', {about.unit}' if about.unit else ''}"


def decimals(column: str) -> int:
    """With how many decimals a column is written."""
    if group(column) == COST:
        return 1 if column == "seconds" else 0
    return 2 if COLUMNS[column].unit.startswith(("px", "dB", "%")) else 3


def number(column: str, value: float, sign: str = "-") -> str:
    """A value of a column as reports write it; `–` for NaN.

    Args:
        sign: as in format specifications: "+" gives positive values one, too.
    """
    if np.isnan(value):
        return "–"
    if np.isinf(value):
        return f"{'-' if value < 0 else sign.strip('-')}∞"
    places = decimals(column)
    return f"{round(value, places) + 0.0:{sign}.{places}f}"  # + 0.0: no -0.00
