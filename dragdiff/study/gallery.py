"""A study's pictures on one page that needs nothing else: a row for each sample, a column for each variant."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field

import jinja2
import numpy as np
from PIL import Image

from dragdiff import output
from dragdiff.aliases import Json, Report
from dragdiff.metrics.suite import COLUMNS
from dragdiff.study.plan import Subject, Variant
from dragdiff.study.plots import Ways
from dragdiff.study.results import PICTURE
from dragdiff.study.store import Store
from dragdiff.study.table import Measured, decimals, title

SIDE = 256  # px: the longer side of a picture
LOSSLESS = 128  # px: smaller pictures are kept exactly
QUALITY = 80  # of the others
NOT_RUN = "not run yet"


@dataclass
class _Pictures:
    """Data URIs, each once however often it is shown."""

    uris: dict[str, int] = field(default_factory=dict)

    def add(self, picture: Image.Image) -> int:
        """The number of a picture, made smaller where it is large."""
        shown = picture.convert("RGB")
        shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        shown.save(buffer, "WEBP", lossless=max(picture.size) <= LOSSLESS, quality=QUALITY)
        uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return self.uris.setdefault(uri, len(self.uris))


def page(data: Measured, store: Store, ways: Ways, *, progress: Report = lambda *_: None) -> str:
    """The page's HTML.

    Args:
        ways: of the edits that have one.
        progress: called after each sample.

    Raises:
        StoreError: the results can't be read.
    """
    plan, pictures = data.plan, _Pictures()
    cells = _Cells(data, store, ways, pictures)
    rows = []
    progress("gallery", 0, len(plan.subjects), "")
    for done, subject in enumerate(plan.subjects, 1):
        shots = [(variant, cells.shots(variant, subject)) for variant in plan.variants]
        rows.append(_sources(subject, pictures) | {"cells": shots})
        progress("gallery", done, len(plan.subjects), "")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dragdiff", "study"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("gallery.html.jinja").render(
        study=plan.study,
        reference=plan.reference,
        variants=plan.variants,
        rows=rows,
        side=SIDE,
        broken=plan.broken,
        not_run=NOT_RUN,
        categories=sorted({subject.category for subject in plan.subjects}),
        columns=[_column(column) for column in data.columns],
        scores=json.dumps(cells.scores, separators=(",", ":")),  # JavaScript knows Infinity and NaN
        pictures=list(pictures.uris),
        has_truth=any(row["truth"] is not None for row in rows),
    )


class _Cells:
    """What stands in the page's cells; `scores` are those of all shots by their number, by column."""

    def __init__(self, data: Measured, store: Store, ways: Ways, pictures: _Pictures) -> None:
        self.data, self.store, self.ways, self.pictures = data, store, ways, pictures
        self.lost = {(row.variant, row.sample, row.seed): row.reason for row in data.failures.itertuples()}
        means = data.scores.groupby(["variant", "sample", "seed", "column"], sort=False)["value"].mean()
        self.means = means.to_dict()
        self.scores: list[list[float | None]] = []

    def shots(self, variant: Variant, subject: Subject) -> list[Json]:
        """The pictures of a cell: one for each seed, where they differ."""
        plan = self.data.plan
        by_key: dict[str, Json] = {}
        for seed in plan.seeds(variant):
            place = (variant.name, subject.name, seed)
            key = plan.keys[place]
            if key in by_key:
                by_key[key]["seeds"].append(seed)
                continue
            kept = self.store.read(f"results/{key}/{PICTURE}") if key in self.data.results.facts else None
            by_key[key] = {
                "seeds": [seed],
                "picture": None if kept is None else self.pictures.add(Image.open(io.BytesIO(kept))),
                "ways": [] if kept is None or place not in self.ways else _polylines(self.ways[place]),
                "failure": self.lost.get(place) or (NOT_RUN if kept is None else ""),
                "number": len(self.scores),
            }
            self.scores.append([_rounded(self.means.get((*place, column))) for column in self.data.columns])
        return list(by_key.values())


def _sources(subject: Subject, pictures: _Pictures) -> Json:
    """A row's head, and the truth where it is known."""
    sample = subject.sample
    side = max(sample.width, sample.height)
    return {
        "name": subject.name,
        "category": subject.category,
        "width": sample.width,
        "height": sample.height,
        "side": side,
        "points": sample.points.tolist(),
        "source": pictures.add(output.annotated(sample, scale=SIDE / side)),
        "truth": None if subject.scene is None else pictures.add(Image.fromarray(subject.scene.truth)),
    }


def _column(name: str) -> Json:
    about = COLUMNS[name]
    return {"title": title(name), "label": about.label, "decimals": decimals(name), "higher": about.higher}


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(f"{value:.5g}")


def _polylines(way: np.ndarray) -> list[list[list[float]]]:
    """Each handle's way (K, N, 2) as the points where it moved, to 0.1 px."""
    lines = []
    for positions in np.round(way, 1).swapaxes(0, 1):
        moved = np.append(True, (np.diff(positions, axis=0) != 0).any(axis=1))
        lines.append(positions[moved].tolist())
    return lines
