"""From a study's file to what is to be done: variants, samples, and one task for each edit."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from dragdiff import cache, methods
from dragdiff.aliases import Json
from dragdiff.backbones import lora_file
from dragdiff.backbones.loading import check_model, identity, structure
from dragdiff.checks import check_settings, shared_settings
from dragdiff.config import DEFAULT_METHOD, Config, StudyConfig, StudyDataConfig, load_config
from dragdiff.data import readers
from dragdiff.data.sample import EditSample
from dragdiff.data.scenes import KINDS, UNIT, Scene, make_scene
from dragdiff.errors import UserError
from dragdiff.metrics import baselines
from dragdiff.metrics.suite import COLUMNS, check_metrics
from dragdiff.options import as_it_stands, flat, walk

SCENES = "scenes"  # in place of a folder of samples
TRIES = 100  # draws for each that is wanted, where most were drawn before
LARGE = 1e300  # beyond it a difference overflows
_STUDYS = {"seed": "seeds", "edit.batch": "batch"}  # settings that the study says, beside those of the sample


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
        """The sample's, by which tables and reports name it."""
        return self.sample.name

    @cached_property
    def key(self) -> str:
        """A hash of what the sample is, and what it is measured against."""
        mask = self.sample.mask
        return cache.digest(
            image=self.sample.image,
            prompt=self.sample.prompt,
            points=self.sample.points,
            mask=None if mask is None else np.asarray(mask),
            truth=None if self.scene is None else self.scene.truth,
        )


@dataclass(frozen=True)
class Variant:
    """Settings that a study compares; or, with a baseline's name in place of settings, an edit without a model."""

    name: str
    settings: Json
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

    @cached_property
    def batch_key(self) -> object:
        """Tasks with the same can be edited in one batch; a baseline is by itself."""
        if self.config is None:
            return self.key
        try:
            return shared_settings(self.config), self.subject.sample.resized(self.config.data.max_size).image.shape
        except UserError:  # the edit will say so
            return self.key


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
        """Of all subjects, in the order of the jobs."""
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
    check_metrics(study.metrics)
    _check_published(study.published, names)
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"seeds is {list(study.seeds)}: give at least one, each once, e.g. seeds=[42]")
    configs = {
        (variant.name, seed): config_of(study, variant, seed)
        for variant in variants
        if not variant.baseline
        for seed in study.seeds
    }
    models, structures, inputs = {}, {}, {}
    for place, config in configs.items():
        name = repr(config.model)
        if name not in models:
            check_model(config.model)
            models[name], structures[name] = identity(config.model), structure(config.model)
        check_settings(config, structures[name])
        inputs[place] = {"model": models[name], "settings": determinants(config)}
    subjects, broken = read_subjects(study.data)
    keys: dict[tuple[str, str, int], str] = {}
    jobs = []
    for subject in subjects:
        tasks: dict[str, Task] = {}
        for variant, seed in itertools.product(variants, study.seeds):
            edit = configs.get((variant.name, seed))
            ours = inputs.get((variant.name, seed), {})
            key = cache.digest(subject=subject.key, baseline=variant.baseline, **ours)
            keys[variant.name, subject.name, seed] = key
            tasks.setdefault(key, Task(key, subject, edit, variant.baseline))
        jobs.append(_in_order(list(tasks.values())))
    return Plan(study, variants, subjects, broken, keys, jobs)


def _check_published(published: Json, names: list[str]) -> None:
    for name, figures in published.items():
        if name not in names:
            raise UserError(f"published names {name!r}: there are the variants {'; '.join(names)}")
        if not isinstance(figures, dict) or not figures.keys() <= COLUMNS.keys():
            raise UserError(f"published.{name} is {figures!r}: give figures by column, of {', '.join(COLUMNS)}")


def determinants(config: Config) -> Json:
    """The settings that have a say in an edit's picture, as plain values; the model and the sample apart."""
    method = methods.find(config.method)
    generates, trains = config.generate.enabled, trained_steps(config) > 0
    ignored = []
    if not generates:
        ignored.append("generate.")
    if not config.control.enabled:
        ignored.append("control.")
    if not trains:
        ignored.append("lora.")
        if not (generates or method.draws):
            ignored.append("seed")
    if method.name == DEFAULT_METHOD:  # results of when there was no other
        ignored.append("method")
    values = {
        key: value
        for key, f, value in walk(config)
        if f.metadata["scope"] == "result" and config.reads(key) and not key.startswith(tuple(ignored))
    }
    if method.source:
        values["method"] = cache.digest(source=method.source)
    if config.lora.path and config.reads("lora.path"):
        named = lora_file.load(Path(config.lora.path).expanduser())
        values["lora.path"] = cache.digest(
            **{f"{path}.down": weight.float().numpy() for path, weight in named.down.items()},
            **{f"{path}.up": weight.float().numpy() for path, weight in named.up.items()},
            scale=named.scale,
        )
    return values


def trained_steps(config: Config) -> int:
    """Steps for which an edit trains a LoRA."""
    trains = any(stage.name == "LoRA" for stage in methods.find(config.method).stages(config))
    return config.lora.steps if trains else 0


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


def _grid(grid: Json) -> list[Json]:
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"grid.{key} is {values!r}: give a list of at least one value, e.g. {key}: [1, 2]")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _listed(number: int, entry: object) -> Variant:
    if not isinstance(entry, dict):
        raise UserError(f"variant {number} is {entry!r}: it must hold key: value lines")
    settings = {key: value for key, value in entry.items() if key != "name"}
    name = entry.get("name", _label(settings))
    if not isinstance(name, str | int | float):
        raise UserError(f"the name of variant {number} is {name!r}: it must be text")
    return Variant(str(name), settings)


def _drawn(study: StudyConfig) -> list[Json]:
    """Different draws: as many as wanted, or as there are."""
    rng = np.random.default_rng(study.random_seed)
    drawn: dict[str, Json] = {}
    for _ in range(TRIES * study.random_count):
        settings = {key: _draw(key, space, rng) for key, space in study.random.items()}
        drawn.setdefault(repr(settings), settings)
        if len(drawn) == study.random_count:
            break
    return list(drawn.values())


def _draw(key: str, space: Any, rng: np.random.Generator) -> Any:
    if isinstance(space, list) and space:
        return space[rng.integers(len(space))]
    if not isinstance(space, dict) or not {"low", "high"} <= space.keys() <= {"low", "high", "log"}:
        raise UserError(f"random.{key} is {space!r}: give a list of values, or {{low: 0.01, high: 0.1, log: true}}")
    low, high, log = space["low"], space["high"], space.get("log", False)
    numbers = all(isinstance(end, int | float) and abs(end) < LARGE for end in (low, high))
    if not numbers or low >= high or (log and low <= 0):
        raise UserError(f"random.{key} is {space!r}: it must be low < high, with log: true also 0 < low")
    whole = isinstance(low, int) and isinstance(high, int)
    try:
        if whole and not log:
            return int(rng.integers(low, high, endpoint=True))
        value = float(np.exp(rng.uniform(np.log(low), np.log(high))) if log else rng.uniform(low, high))
    except (OverflowError, ValueError) as error:
        raise UserError(f"random.{key} is {space!r}: these numbers are too large") from error
    return round(value) if whole else float(f"{value:.3g}")


def _label(settings: Json) -> str:
    return ", ".join(f"{key}={show(value)}" for key, value in settings.items()) or "default"


def show(value: object) -> str:
    """A setting's value as it is written on the command line; of a method's file its name."""
    if isinstance(value, str) and methods.is_file(value):
        return Path(value).name
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
    chosen = variant.settings.get("method", study.settings.get("method", ""))
    others = {methods.find(name).name for name in _named_methods(study) if name != chosen}
    shared = {key: value for key, value in study.settings.items() if key.partition(".")[0] not in others}
    # their references were followed when the study was read
    config = load_config(study.base, [as_it_stands(shared), as_it_stands(variant.settings)])
    scopes = {key: f.metadata["scope"] for key, f, _ in walk(config)}
    for key, _ in flat(shared | variant.settings):
        if key in _STUDYS or scopes[key] == "sample":
            raise UserError(f"variant {variant.name!r} sets {key}: {_STUDYS.get(key, 'data')} of the study does that")
    for key, _ in flat(variant.settings):
        if scopes[key] == "machine" and not key.startswith("model."):
            raise UserError(f"variant {variant.name!r} sets {key}, which changes no picture: put it under settings")
        if not config.reads(key):
            reader = methods.find(config.method).name
            raise UserError(f"variant {variant.name!r} sets {key}, which {reader} does not read")
    if config.generate.enabled:
        raise UserError(f"variant {variant.name!r} sets generate.enabled: a study edits the pictures of its data")
    here: Json = {key: _absolute(getattr(config.model, key)) for key in ("path", "vae", "unet")}
    return dataclasses.replace(
        config,
        seed=seed,
        model=dataclasses.replace(config.model, **here),
        lora=dataclasses.replace(config.lora, path=_absolute(config.lora.path)),
        output=dataclasses.replace(config.output, frames_every=0),
        cache=dataclasses.replace(config.cache, reference_mb=study.reference_mb),
    )


def _named_methods(study: StudyConfig) -> list[str]:
    """The methods that variants choose."""
    grid = study.grid.get("method", []) if isinstance(study.grid, dict) else []
    listed = [entry.get("method", "") for entry in study.variants if isinstance(entry, dict)]
    return [name for name in [*(grid if isinstance(grid, list) else []), *listed] if isinstance(name, str) and name]


def _absolute(path: str) -> str:
    """A local path that a worker in another folder finds, too; anything else as it is."""
    local = Path(path).expanduser()
    return str(local.absolute()) if path and path != "embedded" and local.exists() else path


def _in_order(tasks: list[Task]) -> list[Task]:
    """Neighbours share what they can: the LoRA, the inverted latent, the source's branch of the denoising."""

    def lora_inputs(task: Task) -> str:
        assert task.config is not None
        return repr((task.config.model, task.config.seed, dataclasses.replace(task.config.lora, steps=0)))

    def shared(task: Task) -> tuple[object, ...]:
        config = task.config
        if config is None:
            return (0,)
        return (1, lora_inputs(task), config.lora.steps, repr(config.ddim), repr(config.control), config.method)

    steps: dict[str, set[int]] = {}
    for task in tasks:
        if task.config and (count := trained_steps(task.config)):
            steps.setdefault(lora_inputs(task), set()).add(count)
    wanted = [
        dataclasses.replace(task, lora_steps=tuple(sorted(steps[lora_inputs(task)])))
        if task.config and trained_steps(task.config)
        else task
        for task in tasks
    ]
    return sorted(wanted, key=shared)


# ------------------------------------------------------------------------------------------- samples


def read_subjects(data: StudyDataConfig) -> tuple[list[Subject], list[tuple[str, str]]]:
    """The samples in the order of their names, and name and reason of those that can't be read.

    Raises:
        UserError: no such folder or category, or no sample at all.
    """
    readable = _scenes(data) if data.path == SCENES else _folder(data)
    names = sorted(readable)
    if data.subset:
        if data.subset > len(names):
            raise UserError(f"data.subset is {data.subset}: there are only {len(names)} samples")
        names = np.random.default_rng(data.subset_seed).choice(names, data.subset, replace=False).tolist()
    names.sort(key=_natural)
    subjects, broken = [], []
    for name in names[: data.limit] if data.limit else names:
        try:
            subjects.append(readable[name]())
        except UserError as error:
            broken.append((name, str(error)))
    if not subjects:
        reason = f", e.g. {broken[0][1]}" if broken else ""
        raise UserError(f"none of the {len(broken)} samples in {data.path} can be used{reason}")
    return subjects, broken


def _natural(name: str) -> list[Any]:
    """To sort by: numbers in names by their value, sun-2 before sun-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _scenes(data: StudyDataConfig) -> dict[str, Callable[[], Subject]]:
    """What makes each scene, by its name."""
    _check_categories(data.categories, set(KINDS))

    def make(kind: str, seed: int) -> Subject:
        scene = make_scene(kind, seed, data.size)
        return Subject(scene.sample, kind, f"scene:{scene.sample.name}" if data.size == UNIT else "", scene)

    seeds = range(data.first_seed, data.first_seed + data.scenes)
    places = itertools.product(data.categories or KINDS, seeds)
    return {f"{kind}-{seed}": partial(make, kind, seed) for kind, seed in places}


def _folder(data: StudyDataConfig) -> dict[str, Callable[[], Subject]]:
    """What reads each sample, by its name."""
    root = Path(data.path).expanduser()
    folders = readers.find_samples(root)
    categories = [folder.relative_to(root).parent.name or root.absolute().name for folder in folders]
    _check_categories(data.categories, set(categories))

    def read(folder: Path, name: str, category: str) -> Subject:
        return Subject(readers.read_sample(folder, name), category, str(folder.absolute()))

    samples = zip(folders, readers.sample_names(folders, root), categories, strict=True)
    return {
        name: partial(read, folder, name, category)
        for folder, name, category in samples
        if not data.categories or category in data.categories
    }


def _check_categories(wanted: list[str], known: set[str]) -> None:
    for name in wanted:
        if name not in known:
            raise UserError(f"data.categories names {name!r}: there are {', '.join(sorted(known))}")
