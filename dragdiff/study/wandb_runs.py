"""A study in Weights & Biases: a group of runs, one for each variant and one for the whole."""

from __future__ import annotations

import io
import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from dragdiff import cache
from dragdiff.aliases import Json
from dragdiff.config import LoggerConfig, StudyConfig
from dragdiff.errors import UserError, one_line
from dragdiff.loggers import check_login, environment, wandb_run, wandb_tags
from dragdiff.output import SHOWN_SIDE, annotated
from dragdiff.study.plan import Plan, Subject, Variant, config_of
from dragdiff.study.plots import distance_by_step, ways_of
from dragdiff.study.results import PICTURE
from dragdiff.study.store import Store
from dragdiff.study.table import Measured, measured, summary

if TYPE_CHECKING:
    import pandas as pd

PICTURED = 50  # edits of a variant whose pictures are sent
TIMEOUTS = {"init_timeout": 30.0, "finish_timeout": 300.0}  # seconds to start a run, and to send the rest of it
NAME = 128  # characters that W&B allows


@dataclass(frozen=True)
class WandbPage:
    """What a W&B run shows.

    Attributes:
        id: the same whenever the study is tracked.
        summary: numbers, by name.
        tables: whose cells may be pictures.
        distances: (K,), as of `plots.distance_by_step`.
    """

    id: str
    name: str
    kind: str
    config: Json
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    summary: dict[str, float] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    distances: np.ndarray = field(default_factory=lambda: np.zeros(0))
    pictures: dict[str, Image.Image] = field(default_factory=dict)


def check_tracking(study: StudyConfig) -> None:
    """Say before any long work what will become of the tracking. Takes some seconds where W&B does not answer.

    Raises:
        UserError: logger.kind is csv.
    """
    _check_kind(study.logger)
    if reason := _out_of_reach(study.logger):
        warnings.warn(f"{reason}; otherwise the study's runs are kept for `wandb sync`", stacklevel=2)


def track(plan: Plan, store: Store, report_files: Mapping[str, bytes]) -> None:
    """Send what a study has measured to W&B; a study that was tracked before updates its runs.

    What W&B does not take is kept offline, with a note.

    Args:
        report_files: by name; the pictures (.png) among them are shown.

    Raises:
        UserError: logger.kind is csv.
        StoreError: the results can't be read.
    """
    settings = plan.study.logger
    _check_kind(settings)
    if settings.kind == "none":
        return
    folder = Path(store.path(plan.study.name)) if isinstance(store.files, LocalFileSystem) else Path.cwd()
    problem, lost = _out_of_reach(settings), []
    for page in pages(plan, store, report_files):
        for offline in [True] if settings.offline or problem else [False, True]:
            try:
                _send(page, replace(settings, offline=offline), plan.study, folder)
                break
            except Exception as error:  # W&B's own, the network's, a full disk
                problem = one_line(error)
                if not offline:
                    _end_service()
        else:
            lost.append(page.name)
    if lost:
        warnings.warn(f"W&B did not take {'; '.join(lost)}: {problem}. All results are in {store.url}", stacklevel=2)
    elif problem:
        runs = f"{shlex.quote(str(folder / 'wandb'))}/offline-run-*"
        warnings.warn(f"{problem}. The study's runs are kept: `wandb sync {runs}` sends them", stacklevel=2)


def _check_kind(settings: LoggerConfig) -> None:
    if settings.kind == "csv":
        raise UserError("logger.kind is 'csv': a study's report has its numbers as CSV anyway; set logger.kind=none")


def _out_of_reach(settings: LoggerConfig) -> str:
    """Why W&B can't be had, where it should be."""
    try:
        check_login(settings)
    except UserError as error:
        return str(error)
    return ""


def _end_service() -> None:
    """W&B's process of its own would not give up a run that it can't start or send, nor its id."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


def _send(page: WandbPage, settings: LoggerConfig, study: StudyConfig, folder: Path) -> None:
    import wandb

    def cell(value: object) -> object:
        return wandb.Image(value) if isinstance(value, Image.Image) else value

    def table(rows: pd.DataFrame) -> wandb.Table:
        data = [[cell(value) for value in row] for row in rows.itertuples(index=False, name=None)]
        return wandb.Table(columns=list(rows.columns), data=data)

    folder.mkdir(parents=True, exist_ok=True)
    with wandb_run(
        settings,
        folder,
        timeouts=TIMEOUTS,
        id=page.id,
        resume="allow",
        name=page.name[:NAME],
        group=(settings.group or study.name)[:NAME],
        job_type=page.kind,
        tags=[*page.tags, *settings.tags],
        notes=page.notes,
        config=page.config,
    ) as run:
        kept = Path(run.settings.sync_dir)
        with environment(WANDB_DATA_DIR=str(kept)):  # else the tables' pictures are kept in the home folder
            logged: dict[str, object] = {name: table(rows) for name, rows in page.tables.items()}
            logged |= {name: wandb.Image(picture) for name, picture in page.pictures.items()}
            if len(page.distances):
                # a chart of its own: a run's history only grows, and would show what was tracked before as well
                steps = wandb.Table(columns=["step", "distance"], data=list(enumerate(page.distances.tolist())))
                logged["trajectory"] = wandb.plot.line(
                    steps, "step", "distance", title="distance of the handles to their targets, as tracked, px"
                )
            run.log(logged)
            run.summary.update(page.summary)
    for other in kept.parent.glob(f"offline-run-*-{page.id}*"):  # of an earlier call, and outdated
        if other != kept:
            shutil.rmtree(other, ignore_errors=True)


# ------------------------------------------------------------------------------------------- what is shown


def pages(plan: Plan, store: Store, report_files: Mapping[str, bytes]) -> Iterator[WandbPage]:
    """What is sent of a study: a run for each variant, and one for the whole at the end.

    Args:
        report_files: as for `track`.

    Raises:
        StoreError: the results can't be read.
    """
    study, data = plan.study, measured(plan, store)
    means, ways = summary(data), ways_of(data)

    def identity(variant: str | None) -> str:
        return cache.digest(project=study.logger.project, results=store.url, study=study.name, variant=variant)

    for variant in plan.variants:
        config: Json = {"study": study.name, "variant": variant.name}
        tags: list[str] = []
        if not variant.baseline:
            edit = config_of(study, variant, study.seeds[0])
            config, tags = asdict(edit) | {"seeds": list(study.seeds)} | config, wandb_tags(edit)
            del config["seed"]
        samples, notes = _samples(data, store, variant)
        yield WandbPage(
            identity(variant.name),
            variant.name,
            "baseline" if variant.baseline else "variant",
            config,
            tags,
            notes,
            summary=_numbers(data, means, variant),
            tables={"samples": samples},
            distances=distance_by_step(plan, ways, variant.name),
        )
    yield WandbPage(
        identity(None),
        "summary",
        "summary",
        {"study": study.name} | asdict(study),
        notes=study.question,
        tables={"means": means},
        pictures={
            f"plots/{Path(name).stem}": Image.open(io.BytesIO(content))
            for name, content in report_files.items()
            if name.endswith(".png")
        },
    )


def _numbers(data: Measured, means: pd.DataFrame, variant: Variant) -> dict[str, float]:
    """Means with their intervals, by column, and how many edits there are and failed."""
    ours = data.scores[data.scores["variant"] == variant.name]
    numbers: dict[str, float] = {
        "edits": len(ours[["sample", "seed"]].drop_duplicates()),
        "without result": int((data.failures["variant"] == variant.name).sum()),
    }
    for row in means[means["variant"] == variant.name].itertuples():
        numbers |= {row.column: row.value, f"{row.column}/low": row.low, f"{row.column}/high": row.high}
    return {name: number for name, number in numbers.items() if not np.isnan(number)}


def _samples(data: Measured, store: Store, variant: Variant) -> tuple[pd.DataFrame, str]:
    """A row for each measured edit, with the pictures of `PICTURED` of them evenly spread; and a note on these."""
    import pandas as pd

    ours = data.scores[data.scores["variant"] == variant.name]
    rows = ours.pivot_table(index=["sample", "category", "seed"], columns="column", values="value", sort=True)
    rows = rows.reindex(columns=data.columns).reset_index()
    chosen = set(np.linspace(0, len(rows) - 1, min(len(rows), PICTURED)).round().astype(int).tolist())
    subjects = {subject.name: subject for subject in data.plan.subjects}
    sources, edits = [], []
    for number, (sample, seed) in enumerate(zip(rows["sample"], rows["seed"], strict=True)):
        edited = None
        if number in chosen:
            edited = store.read(f"results/{data.plan.keys[variant.name, sample, seed]}/{PICTURE}")
        sources.append(None if edited is None else _source(subjects[sample]))
        edits.append(None if edited is None else Image.open(io.BytesIO(edited)))
    pictures = pd.DataFrame({"source": sources, "edited": edits}, dtype=object)
    rows = pd.concat([rows[["sample", "category", "seed"]], pictures, rows[data.columns]], axis=1)
    note = f"Pictures of {len(chosen)} of the {len(rows)} edits." if len(chosen) < len(rows) else ""
    return rows, note


def _source(subject: Subject) -> Image.Image:
    """With its arrows; small ones are enlarged, so that one sees them."""
    sample = subject.sample
    return annotated(sample, scale=max(1.0, SHOWN_SIDE / max(sample.width, sample.height)))
