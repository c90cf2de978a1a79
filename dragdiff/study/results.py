"""A study's results as they are in the store, where anything may have happened to them since they were written."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dragdiff.aliases import Json
from dragdiff.errors import UserError
from dragdiff.reading import parsed
from dragdiff.study.store import RESULT, SCORES, Store

if TYPE_CHECKING:
    from dragdiff.metrics.suite import Values
    from dragdiff.study.plan import Subject, Task

PICTURE = "edited.png"
TOGETHER = 64  # results whose pictures are in memory at once


@dataclass(frozen=True)
class Results:
    """What there is of some tasks, by key.

    Attributes:
        facts: what `edit.json` says of each edit whose picture and facts are whole; the others count as missing.
        scores: of these, by metric; what is damaged among them is left out.
        faults: which file is damaged and how, of a result, or of its scores alone.
    """

    facts: dict[str, Json] = field(default_factory=dict)
    scores: dict[str, dict[str, Values]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def read_results(store: Store, tasks: Sequence[Task]) -> Results:
    """Read the results of tasks; each picture is decoded once, since only that tells whether it is whole.

    Raises:
        StoreError: the place can't be read.
    """
    results = Results()
    for start in range(0, len(tasks), TOGETHER):
        some = tasks[start : start + TOGETHER]
        contents = store.read_many(
            [f"results/{task.key}/{name}" for task in some for name in (RESULT, PICTURE, SCORES)]
        )
        for task in some:
            place = f"results/{task.key}"
            edit, picture, scores = (contents.get(f"{place}/{name}") for name in (RESULT, PICTURE, SCORES))
            if edit is None and picture is None:
                continue
            name = PICTURE
            try:
                picture_of(picture, task.subject)
                name = RESULT
                results.facts[task.key] = _facts(edit, task)
                name = SCORES
                known = results.scores[task.key] = scores_of(_object(scores)) if scores is not None else {}
                if scores is not None and known.keys() != _object(scores).keys():
                    raise UserError("some scores are no numbers")
            except ValueError as error:
                results.faults[task.key] = f"{store.path(place, name)} is damaged: it can't be read as JSON ({error})"
            except UserError as error:
                results.faults[task.key] = f"{store.path(place, name)} is damaged: {error}"
    return results


def picture_of(png: bytes | None, subject: Subject) -> np.ndarray:
    """The picture (H, W, 3) uint8 of a result.

    Raises:
        UserError: it is missing, damaged, or of another size than the sample.
    """
    if png is None:
        raise UserError("it is missing")
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            size = image.size
            if size == (subject.sample.width, subject.sample.height):
                return np.asarray(image.convert("RGB"))
    except Exception as error:  # damaged data make decoders raise nearly anything
        raise UserError("it can't be read as a picture") from error
    raise UserError(f"it is {size[0]}x{size[1]} px, unlike the sample")


def scores_of(value: object) -> dict[str, Values]:
    """Of what should be scores by metric, or sample, and column, those that are."""
    entries = value.items() if isinstance(value, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, dict) and all(map(_numbers, entry.values()))}


def _facts(content: bytes | None, task: Task) -> Json:
    """
    Raises:
        UserError, ValueError: not what the worker wrote.
    """
    if content is None:
        raise UserError("it is missing")
    facts = _object(content)
    if task.config is None:
        return facts
    seconds, way = facts.get("seconds"), facts.get("trajectory") or []
    if not isinstance(facts.get("steps"), int) or not isinstance(seconds, dict) or not _numbers(list(seconds.values())):
        raise UserError("it does not say the edit's steps and seconds")
    try:
        positions = np.array(way, float)
    except (TypeError, ValueError, OverflowError):
        positions = np.array(np.nan)
    pairs = task.subject.sample.handles.shape
    if way and (positions.shape[1:] != pairs or not np.isfinite(positions).all()):
        raise UserError("its trajectory is none")
    return facts


def _object(content: bytes | None) -> Json:
    value = parsed(content or b"")
    if not isinstance(value, dict):
        raise UserError("it holds no JSON object")
    return value


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(number, int | float) for number in value)
