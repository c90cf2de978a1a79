"""A study's pictures on one page that needs nothing else: a row for each sample, a column for each variant."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from dragdiff import output
from dragdiff.metrics.suite import COLUMNS
from dragdiff.study.plan import Subject, Variant
from dragdiff.study.store import Store
from dragdiff.study.table import Measured, decimals, title

SIDE = 256  # px: the longer side of a picture
LOSSLESS = 128  # px: smaller pictures are kept exactly
QUALITY = 80  # of the others
NOT_RUN = "not run yet"


@dataclass
class Pictures:
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


def page(
    data: Measured,
    store: Store,
    ways: Mapping[tuple[str, str, int], np.ndarray],
    *,
    progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> str:
    """The page's HTML.

    Args:
        ways: of (variant, sample, seed): (K, N, 2), (x, y) px of the image.
        progress: called after each sample.

    Raises:
        StoreError: the results can't be read.
    """
    plan, pictures = data.plan, Pictures()
    lost = {(row.variant, row.sample, row.seed): row.reason for row in data.failures.itertuples()}
    means = data.scores.groupby(["variant", "sample", "seed", "column"], sort=False)["value"].mean().to_dict()
    scores: list[list[float | None]] = []

    def shots(variant: Variant, subject: Subject) -> list[dict[str, Any]]:
        """The pictures of a cell: one for each seed, where they differ."""
        by_key: dict[str, dict[str, Any]] = {}
        for seed in plan.study.seeds[:1] if variant.baseline else plan.study.seeds:
            place = (variant.name, subject.name, seed)
            key = plan.keys[place]
            if key in by_key:
                by_key[key]["seeds"].append(seed)
                continue
            kept = store.read(f"results/{key}/edited.png")
            by_key[key] = {
                "seeds": [seed],
                "picture": None if kept is None else pictures.add(Image.open(io.BytesIO(kept))),
                "ways": [] if kept is None or place not in ways else _polylines(ways[place]),
                "failure": lost.get(place) or (NOT_RUN if kept is None else ""),
                "number": len(scores),
            }
            scores.append([_rounded(means.get((*place, column))) for column in data.columns])
        return list(by_key.values())

    rows = []
    progress("gallery", 0, len(plan.subjects), "")
    for done, subject in enumerate(plan.subjects, 1):
        sample = subject.sample
        side = max(sample.width, sample.height)
        rows.append(
            {
                "name": subject.name,
                "category": subject.category,
                "width": sample.width,
                "height": sample.height,
                "side": side,
                "points": sample.points.tolist(),
                "source": pictures.add(output.annotated(sample, scale=SIDE / side)),
                "truth": None if subject.scene is None else pictures.add(Image.fromarray(subject.scene.truth)),
                "cells": [(variant, shots(variant, subject)) for variant in plan.variants],
            }
        )
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
        columns=[
            {
                "title": title(column),
                "label": COLUMNS[column].label,
                "decimals": decimals(column),
                "higher": COLUMNS[column].higher,
            }
            for column in data.columns
        ],
        scores=_literal(scores),
        pictures=list(pictures.uris),
        has_truth=any(row["truth"] is not None for row in rows),
    )


def _literal(values: Any) -> str:
    """Numbers as JavaScript, which knows Infinity and NaN."""
    return json.dumps(values, separators=(",", ":"))


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else float(f"{value:.5g}")


def _polylines(way: np.ndarray) -> list[list[list[float]]]:
    """Each handle's way (K, N, 2) as the points where it moved, to 0.1 px."""
    lines = []
    for positions in np.round(way, 1).swapaxes(0, 1):
        moved = np.append(True, (np.diff(positions, axis=0) != 0).any(axis=1))
        lines.append(positions[moved].tolist())
    return lines
