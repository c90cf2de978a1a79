"""A study as a W&B sweep, whose agents call `edit.py` on any number of machines."""

from __future__ import annotations

import itertools
from pathlib import Path

from dragdiff.aliases import Json
from dragdiff.config import Config, StudyConfig, StudyDataConfig, config_folder, find_overlay, load_config
from dragdiff.data.scenes import UNIT
from dragdiff.errors import UserError
from dragdiff.options import flat, walk
from dragdiff.study.plan import Variant, config_of, read_subjects, show, variants_of

_OWN = ("sample", "output.", "logger.", "cache.")  # where an agent's edit may differ from the study's


def sweep(study: StudyConfig) -> Json:
    """The definition that `wandb sweep` takes: a run for each variant, sample and seed.

    It compares the distance as tracked, all that `edit.py` measures; baselines and a study's other metrics are not in
    it. With `random`, W&B draws for each run the sample and the seed anew as well: random_count is the number of runs.

    Raises:
        UserError: variants or samples that a sweep can't have, or what `expand` refuses.
    """
    variants = variants_of(study)
    parameters = (
        {key: _distribution(space) for key, space in study.random.items()} if study.random else _categorical(variants)
    )
    parameters["seed"] = {"values": list(study.seeds)}
    parameters["sample"] = {"values": _samples(study.data)}
    shared = _shared(study)
    for variant, seed in itertools.product(variants, study.seeds):
        _check_arrives(config_of(study, variant, seed), shared, variant, seed)
    definition = {
        "name": study.name,
        "description": study.question,
        "project": study.logger.project,
        "program": "edit.py",
        "command": ["${env}", "${interpreter}", "${program}", *shared, "${args_no_hyphens}"],
        "method": "random" if study.random else "grid",
        "metric": {"name": "distance_px", "goal": "minimize"},
        "parameters": parameters,
    }
    return definition | ({"run_cap": study.random_count} if study.random else {})


def write_sweep(study: StudyConfig, path: str | Path) -> None:
    """The definition as a YAML file.

    Raises:
        UserError: as `sweep`, or the file can't be written.
    """
    import yaml

    definition = sweep(study)
    try:
        Path(path).write_text(yaml.safe_dump(definition, sort_keys=False, allow_unicode=True, width=120), "utf-8")
    except OSError as error:
        raise UserError(f"cannot write the sweep to {str(path)!r}: {error.strerror or error}") from error


def _categorical(variants: list[Variant]) -> Json:
    """The values of each setting whose combinations are the variants."""
    settings = [dict(flat(variant.settings)) for variant in variants]
    values: dict[str, list[object]] = {key: [] for key in settings[0]}
    for entry in settings:
        for key, value in entry.items():
            if key in values and _argument(value) not in values[key]:
                values[key].append(_argument(value))
    combinations = list(itertools.product(*values.values()))
    given = [tuple(_argument(value) for value in entry.values()) for entry in settings]
    if any(list(entry) != list(values) for entry in settings) or given != combinations:
        raise UserError(
            f"the variants {'; '.join(variant.name for variant in variants)} are not all combinations of some values, "
            "and a W&B sweep knows nothing else: give a grid, variants that each set the same single key, or run the "
            "study without --wandb-sweep"
        )
    return {key: {"values": choices} for key, choices in values.items()}


def _distribution(space: list[object] | Json) -> Json:
    if isinstance(space, list):
        return {"values": [_argument(value) for value in space]}
    low, high, log = space["low"], space["high"], space.get("log", False)
    if isinstance(low, int) and isinstance(high, int):
        kind = {"distribution": "q_log_uniform_values", "q": 1} if log else {"distribution": "int_uniform"}
        return kind | {"min": low, "max": high}
    return {"distribution": "log_uniform_values" if log else "uniform", "min": float(low), "max": float(high)}


def _samples(data: StudyDataConfig) -> list[str]:
    """What `sample=` takes for each of the study's samples."""
    sources = [subject.source for subject in read_subjects(data)[0]]
    if not all(sources):
        raise UserError(
            f"data.size is {data.size}: edit.py makes scenes of {UNIT} px only; set data.size={UNIT}, or run the study "
            "without --wandb-sweep"
        )
    return sources


def _shared(study: StudyConfig) -> list[str]:
    """The arguments of `edit.py` that all runs have."""
    logger = {
        "logger.kind": "wandb",
        "logger.project": study.logger.project,
        "logger.group": study.logger.group or study.name,
    }
    if study.logger.tags:
        logger["logger.tags"] = show(study.logger.tags)
    settings = dict(flat(study.settings)) | logger
    arguments = [f"{key}={value if key == 'method' else show(value)}" for key, value in settings.items()]
    return [*(_overlay(name) for name in study.base), *arguments]


def _overlay(name: str) -> str:
    """An overlay's name that holds in any folder."""
    path = find_overlay(name)
    return path.stem if path.parent.absolute() == config_folder().absolute() else str(path.absolute())


def _argument(value: object) -> object:
    """A value so that the agent's `key=value`, made by Python's str(), is what `edit.py` reads."""
    return show(value) if isinstance(value, list) else value


def _check_arrives(wanted: Config, shared: list[str], variant: Variant, seed: int) -> None:
    """
    Raises:
        UserError: the command line of an agent would not say what the variant does.
    """
    given = [*shared, *(f"{key}={_argument(value)}" for key, value in flat(variant.settings)), f"seed={seed}"]
    files, overrides = [text for text in given if "=" not in text], [text for text in given if "=" in text]
    found = load_config(files, overrides)
    for (key, _, ours), (_, _, theirs) in zip(walk(wanted), walk(found), strict=True):
        if ours != theirs and not key.startswith(_OWN):
            raise UserError(
                f"variant {variant.name!r}: {key}={ours!r} would arrive in edit.py as {theirs!r}, so a W&B sweep can't "
                "have it: write the value without quotes and commas, or run the study without --wandb-sweep"
            )
