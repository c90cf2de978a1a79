"""From a study's file to what is to be done: variants, samples, and one task for each edit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dragdiff import cache
from dragdiff.config import Config, StudyConfig, StudyDataConfig, load_config, walk
from dragdiff.data import readers
from dragdiff.data.sample import EditSample
from dragdiff.data.scenes import KINDS, UNIT, Scene, make_scene
from dragdiff.errors import UserError
from dragdiff.metrics import baselines
from dragdiff.modules.loading import check_model, identity
from dragdiff.modules.lora import load as load_lora

SCENES = "scenes"  # in place of a folder of samples
_WITHOUT_EFFECT = ("sample", "image", "prompt", "points", "mask", "model.", "output.", "logger.", "cache.")


@dataclass(frozen=True)
class Subject:
    """A sample of a study.

    Attributes:
        category: the folder that it is in, or the scene's kind.
        source: what `edit.py sample=` takes for it; "" where there is nothing.
        scene: with the truth, where it is known.
    """

    sample: EditSample
    category: str
    source: str
    scene: Scene | None = None

    @property
    def name(self) -> str:
        return self.sample.name

    @property
    def key(self) -> str:
        """A hash of what the sample is."""
        mask = self.sample.mask
        return cache.digest(
            image=self.sample.image,
            prompt=self.sample.prompt,
            points=self.sample.points,
            mask=None if mask is None else np.asarray(mask),
        )


@dataclass(frozen=True)
class Variant:
    """Settings that a study compares; or, with a baseline's name in place of settings, an edit without a model."""

    name: str
    settings: dict[str, Any]
    baseline: str = ""


@dataclass(frozen=True)
class Task:
    """One edit.

    Attributes:
        key: names its result: a hash of all that determines the picture.
        config: of the edit; None for a baseline.
        lora_steps: for how many steps the study wants this LoRA; one training gives them all.
    """

    key: str
    subject: Subject
    config: Config | None
    baseline: str = ""
    lora_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A study, expanded.

    Attributes:
        broken: name and reason of each sample that can't be read.
        keys: the result's key of (variant, subject's name, seed).
        jobs: the tasks of each subject, so ordered that those which share a stage follow each other.
    """

    study: StudyConfig
    variants: list[Variant]
    subjects: list[Subject]
    broken: list[tuple[str, str]]
    keys: dict[tuple[str, str, int], str]
    jobs: list[list[Task]]

    @property
    def reference(self) -> str:
        """The name of the variant that the others are compared with."""
        return self.study.reference or self.variants[0].name

    def seeds(self, variant: Variant) -> list[int]:
        """Those with which a variant runs; a baseline draws nothing."""
        return self.study.seeds[:1] if variant.baseline else self.study.seeds

    @property
    def tasks(self) -> list[Task]:
        return [task for job in self.jobs for task in job]


def expand(study: StudyConfig) -> Plan:
    """Everything that the study will do; each variant's settings are checked.

    Raises:
        UserError: settings that are wrong, no variant, no sample.
    """
    variants = [*variants_of(study), *_baselines(study)]
    names = [variant.name for variant in variants]
    if study.reference not in ("", *names):
        raise UserError(f"reference is {study.reference!r}: there are the variants {'; '.join(names)}")
    if not study.seeds:
        raise UserError("seeds is empty: give at least one, e.g. seeds=[42]")
    configs = {
        (variant.name, seed): config_of(study, variant, seed)
        for variant in variants
        if not variant.baseline
        for seed in study.seeds
    }
    models = {}
    for config in configs.values():
        name = repr(config.model)
        if name not in models:
            check_model(config.model)
            models[name] = identity(config.model)
    subjects, broken = read_subjects(study.data)
    keys: dict[tuple[str, str, int], str] = {}
    jobs = []
    for subject in subjects:
        tasks: dict[str, Task] = {}
        for variant, seed in itertools.product(variants, study.seeds):
            edit = configs.get((variant.name, seed))
            inputs: dict[str, Any] = {"subject": subject.key, "baseline": variant.baseline}
            if edit is not None:
                inputs |= {"model": models[repr(edit.model)], "settings": determinants(edit)}
            keys[variant.name, subject.name, seed] = key = cache.digest(**inputs)
            tasks.setdefault(key, Task(key, subject, edit, variant.baseline))
        jobs.append(_in_order(list(tasks.values())))
    return Plan(study, variants, subjects, broken, keys, jobs)


def determinants(config: Config) -> dict[str, Any]:
    """The settings that have a say in an edit's picture, as plain values; the model and the sample apart."""
    values = {key: value for key, _, value in walk(config) if not key.startswith(_WITHOUT_EFFECT)}
    for other in ("lora.save_every", "lora.resume"):
        del values[other]
    generates, trains = config.generate.enabled, not config.lora.path and config.lora.steps > 0
    ignored = []
    if not generates:
        ignored.append("generate.")
    if not config.control.enabled:
        ignored.append("control.")
    if not trains or generates:
        ignored.append("lora.")
        if not generates:
            ignored.append("seed")
    values = {key: value for key, value in values.items() if not key.startswith(tuple(ignored))}
    if config.lora.path:
        named = load_lora(Path(config.lora.path).expanduser())
        values["lora.path"] = cache.digest(
            **{f"{path}.down": weight.float().numpy() for path, weight in named.down.items()},
            **{f"{path}.up": weight.float().numpy() for path, weight in named.up.items()},
            scale=named.scale,
        )
    return values


# ------------------------------------------------------------------------------------------- variants


def variants_of(study: StudyConfig) -> list[Variant]:
    """The study's variants, baselines apart.

    Raises:
        UserError: none, or no way to make them.
    """
    ways = {"grid": study.grid, "variants": study.variants, "random": study.random}
    given = [name for name, value in ways.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are given: a study has one of grid, variants and random")
    if not given:
        return [Variant("default", {})]
    if study.variants:
        return _unique([_listed(number, entry) for number, entry in enumerate(study.variants, 1)])
    combinations = _grid(study.grid) if study.grid else _drawn(study)
    return _unique([Variant(_label(settings), settings) for settings in combinations])


def _grid(grid: dict[str, Any]) -> list[dict[str, Any]]:
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"grid.{key} is {values!r}: give a list of at least one value, e.g. {key}: [1, 2]")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _listed(number: int, entry: Any) -> Variant:
    if not isinstance(entry, dict):
        raise UserError(f"variant {number} is {entry!r}: it must hold key: value lines")
    settings = {key: value for key, value in entry.items() if key != "name"}
    return Variant(str(entry.get("name", _label(settings))), settings)


def _drawn(study: StudyConfig) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(study.random_seed)
    for _ in range(study.random_count):
        yield {key: _draw(key, space, rng) for key, space in study.random.items()}


def _draw(key: str, space: Any, rng: np.random.Generator) -> Any:
    if isinstance(space, list) and space:
        return space[rng.integers(len(space))]
    if not isinstance(space, dict) or not {"low", "high"} <= space.keys() <= {"low", "high", "log"}:
        raise UserError(f"random.{key} is {space!r}: give a list of values, or {{low: 0.01, high: 0.1, log: true}}")
    low, high, log = space["low"], space["high"], space.get("log", False)
    numbers = all(isinstance(end, int | float) and math.isfinite(end) for end in (low, high))
    if not numbers or low >= high or (log and low <= 0):
        raise UserError(f"random.{key} is {space!r}: it must be low < high, with log: true also 0 < low")
    value = float(np.exp(rng.uniform(np.log(low), np.log(high))) if log else rng.uniform(low, high))
    return round(value) if isinstance(low, int) and isinstance(high, int) else float(f"{value:.3g}")


def _label(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={show(value)}" for key, value in settings.items()) or "default"


def show(value: Any) -> str:
    """A setting's value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(show(entry) for entry in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unique(variants: list[Variant]) -> list[Variant]:
    seen: dict[str, Variant] = {}
    for variant in variants:
        if variant.name in seen:
            raise UserError(f"two variants are called {variant.name!r}: they must differ")
        if variant.name in BASELINES:
            raise UserError(f"a variant is called {variant.name!r}: that is a baseline's name")
        seen[variant.name] = variant
    return variants


BASELINES = {"identity": baselines.identity, "copy-patch": baselines.copy_patch}
ORACLE = "oracle"  # the true edit


def _baselines(study: StudyConfig) -> list[Variant]:
    names = [*BASELINES, ORACLE] if study.data.path == SCENES else list(BASELINES)
    return [Variant(name, {}, name) for name in names]


def baseline_picture(name: str, subject: Subject) -> np.ndarray:
    """What a baseline makes of a sample, (H, W, 3) uint8."""
    if name == ORACLE:
        assert subject.scene is not None
        return subject.scene.truth
    return BASELINES[name](subject.sample)


def config_of(study: StudyConfig, variant: Variant, seed: int) -> Config:
    """A variant's settings with a seed.

    Raises:
        UserError: wrong ones, or those that are the study's to say.
    """
    config = load_config([*study.base, study.settings, variant.settings])
    if config.sample or config.image:
        raise UserError(f"variant {variant.name!r} names a sample or an image: the study's data does that")
    if config.generate.enabled:
        raise UserError(f"variant {variant.name!r} sets generate.enabled: a study edits the pictures of its data")
    return dataclasses.replace(
        config,
        seed=seed,
        output=dataclasses.replace(config.output, frames_every=0),
        cache=dataclasses.replace(config.cache, reference_mb=study.reference_mb),
    )


def _in_order(tasks: list[Task]) -> list[Task]:
    """Neighbours share what they can: the LoRA, the inverted latent, the source's branch of the denoising."""

    def lora_inputs(task: Task) -> str:
        assert task.config is not None
        return repr((task.config.seed, dataclasses.replace(task.config.lora, steps=0), task.config.model))

    def shared(task: Task) -> tuple[Any, ...]:
        config = task.config
        if config is None:
            return (0,)
        return (1, lora_inputs(task), config.lora.steps, repr(config.ddim), repr(config.control))

    steps: dict[str, set[int]] = {}
    for task in tasks:
        if task.config and task.config.lora.steps and not task.config.lora.path:
            steps.setdefault(lora_inputs(task), set()).add(task.config.lora.steps)
    wanted = [
        dataclasses.replace(task, lora_steps=tuple(sorted(steps.get(lora_inputs(task), ())))) if task.config else task
        for task in tasks
    ]
    return sorted(wanted, key=shared)


# ------------------------------------------------------------------------------------------- samples


def read_subjects(data: StudyDataConfig) -> tuple[list[Subject], list[tuple[str, str]]]:
    """The samples in the order of their names, and name and reason of those that can't be read.

    Raises:
        UserError: no such folder or category, or no sample at all.
    """
    subjects, broken = _scenes(data) if data.path == SCENES else _folder(data)
    names = sorted([subject.name for subject in subjects] + [name for name, _ in broken])
    if data.subset:
        if data.subset > len(names):
            raise UserError(f"data.subset is {data.subset}: there are only {len(names)} samples")
        names = sorted(np.random.default_rng(data.subset_seed).choice(names, data.subset, replace=False).tolist())
    wanted = set(names[: data.limit] if data.limit else names)
    broken = [(name, reason) for name, reason in broken if name in wanted]
    subjects = sorted((s for s in subjects if s.name in wanted), key=lambda subject: subject.name)
    if not subjects:
        reason = f", e.g. {broken[0][1]}" if broken else ""
        raise UserError(f"none of the {len(broken)} samples in {data.path} can be used{reason}")
    return subjects, broken


def _scenes(data: StudyDataConfig) -> tuple[list[Subject], list[tuple[str, str]]]:
    _check_categories(data.categories, set(KINDS))
    seeds = range(data.first_seed, data.first_seed + data.scenes)
    scenes = [make_scene(kind, seed, data.size) for kind in data.categories or KINDS for seed in seeds]
    named = data.size == UNIT
    return [Subject(s.sample, s.kind, f"scene:{s.sample.name}" if named else "", s) for s in scenes], []


def _folder(data: StudyDataConfig) -> tuple[list[Subject], list[tuple[str, str]]]:
    root = Path(data.path).expanduser()
    folders = readers.find_samples(root)
    names = readers.sample_names(folders, root)
    categories = [folder.relative_to(root).parent.name or root.absolute().name for folder in folders]
    _check_categories(data.categories, set(categories))
    subjects, broken = [], []
    for folder, name, category in zip(folders, names, categories, strict=True):
        if data.categories and category not in data.categories:
            continue
        try:
            subjects.append(Subject(readers.read_sample(folder, name), category, str(folder.absolute())))
        except UserError as error:
            broken.append((name, str(error)))
    return subjects, broken


def _check_categories(wanted: list[str], known: set[str]) -> None:
    for name in wanted:
        if name not in known:
            raise UserError(f"data.categories names {name!r}: there are {', '.join(sorted(known))}")
