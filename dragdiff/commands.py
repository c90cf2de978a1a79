"""What the verbs of the command line do, once their arguments are parsed; each returns an exit code.

What takes seconds to import is imported when it is used.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dragdiff import methods
from dragdiff.config import DEFAULT_OVERLAY, Config, check_fit, load_config, load_study, load_ui
from dragdiff.errors import UserError

if TYPE_CHECKING:
    from dragdiff.data.sample import EditSample
    from dragdiff.editor import Editor
    from dragdiff.job import EditResult, Request

    Outcome = EditResult | UserError | str  # of one sample: what is said of it, or from which that is made

Jobs = list[tuple["Config", "EditSample"]]  # samples, each with the config that alone reproduces its run
Failures = list[tuple[str, str]]  # names, with reasons
DEFAULT_EXAMPLE = "example:sun"


def edit(arguments: argparse.Namespace) -> int:
    """Drag what the settings name, by one method or several."""
    names = _several_methods(arguments.settings)
    configs = [_config(arguments.settings, name, others=names) for name in names] or [_config(arguments.settings)]
    (config, *_) = configs
    if config.generate.enabled and not config.points:
        return _each_sample([config], _generate_one, edits=False)
    seen = _Sheets(len(configs)).add if len(configs) > 1 else None
    return _each_sample(configs, _edit_batch, batch=config.edit.batch, seen=seen)


def _several_methods(settings: Sequence[str]) -> list[str]:
    """The methods of `method=[a,b]`; none where it names one."""
    chosen = next((text for text in reversed(settings) if text.startswith("method=")), "")
    if not chosen.startswith("method=["):
        return []
    names = [name.strip().strip("\"'") for name in chosen.removeprefix("method=[").removesuffix("]").split(",")]
    found = [methods.find(name).name for name in names]
    if len(set(found)) < len(found):
        raise UserError(f"{chosen} names a method twice: name each once")
    return names


class _Sheets:
    """The comparison of several methods on each sample, as soon as all are through."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.outcomes: dict[Path, list[Outcome]] = {}

    def add(self, folder: Path, outcome: Outcome) -> None:
        """Take note of what has become of one edit, in a folder of its own beside those of the sample's others."""
        from dragdiff import output
        from dragdiff.job import EditResult

        outcomes = self.outcomes.setdefault(folder.parent, [])
        outcomes.append(outcome)
        if len(outcomes) < self.count:
            return
        del self.outcomes[folder.parent]
        if results := [outcome for outcome in outcomes if isinstance(outcome, EditResult)]:
            with output.written(folder.parent / "comparison.png") as file:
                output.side_by_side(results).save(file)
            print(f"wrote {folder.parent}/comparison.png: {len(results)} of {self.count} methods side by side")


def _edit_batch(editor: Editor, requests: Sequence[Request]) -> Sequence[Outcome]:
    if len(requests) > 1:
        return editor.edit_and_save_batch(requests)
    (request,) = requests
    assert request.folder is not None
    return [editor.edit_and_save(request.sample, request.folder, config=request.config)]


def _said(result: EditResult, folder: Path | None) -> str:
    lines = [f"wrote {folder}/: edited.png, comparison.png, trajectory.gif, metrics.json, config.yaml"]
    if result.distance_after is None:
        return "\n".join([*lines, f"{methods.find(result.config.method).name}: done, without tracking"])
    reasons = {"reached": "all handles arrived", "steps": "all steps done"}
    if result.steps == 0 and result.stop_reason == "reached":
        distance = f"drag.stop_distance={result.config.drag.stop_distance:g}"
        reasons["reached"] = f"all handles are nearer to their targets than {distance} grid px: lower it to drag"
    lines.append(f"drag: {result.steps} steps, {reasons.get(result.stop_reason, result.stop_reason)}")
    for number, (before, after) in enumerate(zip(result.distance_before, result.distance_after, strict=True), 1):
        lines.append(f"point {number}: {before:.1f} px from its target before, {after:.1f} px after (as tracked)")
    return "\n".join(lines)


def _generate_one(editor: Editor, requests: Sequence[Request]) -> Sequence[Outcome]:
    from PIL import Image

    from dragdiff import output

    ((sample, folder),) = [(request.sample, request.folder) for request in requests]
    assert folder is not None
    picture, _ = editor.generate(sample.prompt)
    path = folder / "generated.png"
    with output.written(path) as file:
        Image.fromarray(picture).save(file)
    return [f"wrote {path}; to drag it, add points=[[[x,y],[x,y]],...] to the same command"]


def train(arguments: argparse.Namespace) -> int:
    """Fine-tune and write a LoRA."""
    config = _config(arguments.settings)
    if config.generate.enabled:
        raise UserError("generate.enabled is true: a generated picture needs no LoRA, give image=FILE or sample=FOLDER")
    if config.lora.path:
        raise UserError(f"lora.path is {config.lora.path!r}: leave it empty to train a new LoRA")
    if config.lora.steps == 0:
        raise UserError("lora.steps is 0, so there is nothing to train: set e.g. lora.steps=80")
    return _each_sample([config], _train_one, suffix="-lora", edits=False)


def _train_one(editor: Editor, requests: Sequence[Request]) -> Sequence[Outcome]:
    from dragdiff.backbones import lora_file
    from dragdiff.loggers import open_logger

    ((sample, folder),) = [(request.sample, request.folder) for request in requests]
    assert folder is not None
    with open_logger(editor.config, name=folder.name, folder=folder) as logger:
        trained = editor.finetune(sample, folder=folder, logger=logger)
    assert trained is not None
    return [f"wrote {lora_file.save(trained, folder)}; use it with lora.path={folder}"]


def list_methods(arguments: argparse.Namespace) -> int:
    """Say which methods there are, or what one is."""
    from dragdiff import catalogue

    match arguments.settings:
        case []:
            print(catalogue.overview())
        case [name] if "=" not in name and not name.endswith((".yaml", ".yml")):
            print(catalogue.details(name))
        case _:
            named = [text for text in arguments.settings if methods.is_file(text) or methods.is_known(text)]
            settings, chosen = [text for text in arguments.settings if text not in named], named or catalogue.names()
            print(catalogue.suitable(partial(_fitting, settings, chosen), chosen))
    return 0


def _fitting(settings: Sequence[str], chosen: Sequence[str], name: str) -> Config:
    """The settings by which one of the chosen methods would edit what is named.

    Raises:
        UserError: it can't, and why.
    """
    from dragdiff.backbones.loading import structure
    from dragdiff.checks import check_settings

    with warnings.catch_warnings(action="ignore"):
        config = _config(settings, name, others=chosen)
        _read(config, suffix="", edits=True)
        check_settings(config, structure(config.model))
    return config


def study(arguments: argparse.Namespace) -> int:
    """Run what is missing of a study."""
    settings = load_study(arguments.study, arguments.settings)
    if arguments.wandb_sweep:
        from dragdiff.study.sweep import write_sweep

        write_sweep(settings, arguments.wandb_sweep)
        print(f"wrote {arguments.wandb_sweep}; next, where edit.py is: wandb sweep {arguments.wandb_sweep}")
        return 0

    from dragdiff.progress import Bars
    from dragdiff.study import runner
    from dragdiff.study.plan import expand

    plan = expand(settings)
    for name, reason in plan.broken:
        print(f"dragdiff: passing over {name}: {reason}", file=sys.stderr)
    print(runner.describe(plan))
    if arguments.plan:
        return 0
    if settings.logger.kind != "none":
        from dragdiff.study.report import check_packages
        from dragdiff.study.wandb_runs import check_tracking

        check_tracking(settings)
        check_packages()
    with closing(Bars("task")) as bars:
        summary = runner.run(plan, retry_failed=arguments.retry_failed, report=bars)
    print(runner.outcome(plan, summary))
    if settings.logger.kind != "none":
        from dragdiff.study.report import write_report
        from dragdiff.study.store import Store
        from dragdiff.study.wandb_runs import track

        store = Store(settings.results)
        pictures = [path for path in write_report(plan, store, brief=True) if path.endswith(".png")]
        track(plan, store, {Path(path).name: store.files.cat_file(path) for path in pictures})
    else:
        print(f"next: {shlex.join(['dragdiff', 'report', arguments.study, *arguments.settings])}")
    return 1 if (summary.failed or plan.broken) and not arguments.allow_failures else 0


def ui(arguments: argparse.Namespace) -> int:
    """Serve the web page until Ctrl-C."""
    files = [argument for argument in arguments.settings if "=" not in argument]
    settings = load_ui(files, [argument for argument in arguments.settings if "=" in argument])
    try:
        from dragdiff.ui.app import serve
    except ImportError as error:
        raise UserError(f'{error.name} is missing, which the page needs: pip install "dragdiff[ui]"') from error
    serve(settings)
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Say what a study has found so far."""
    from dragdiff.progress import Bars
    from dragdiff.study.plan import expand
    from dragdiff.study.report import find_study, write_report
    from dragdiff.study.store import Store

    plan = expand(find_study(arguments.study, arguments.settings))
    with closing(Bars("sample")) as bars:
        paths = write_report(plan, Store(plan.study.results), brief=arguments.brief, progress=bars)
    print("wrote", *paths, sep="\n  ")
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Copy samples into the plain format."""
    from dragdiff.data import readers

    converted, failures = readers.convert(arguments.source, arguments.destination)
    print(f"converted {len(converted)} samples into {arguments.destination}")
    return _report_failures([(str(path), reason) for path, reason in failures], len(converted) + len(failures))


def _each_sample(
    configs: Sequence[Config],
    work: Callable[[Editor, Sequence[Request]], Sequence[Outcome]],
    *,
    suffix: str = "",
    edits: bool = True,
    batch: int = 1,
    seen: Callable[[Path, Outcome], None] | None = None,
) -> int:
    """Do the work for each sample, in a folder of its own, and print what it says.

    Whatever can be known to be wrong is said before a model is loaded. One failed sample of many is passed over.

    Args:
        configs: settings, one for each method, that agree in all but what methods have of their own.
        seen: told of each folder and what has become of its edit.
    """
    config = configs[0]
    jobs, failures = _by_each_method(configs) if len(configs) > 1 else _read(config, suffix=suffix, edits=edits)
    total = len(jobs) + len(failures)
    _check_place_and_model(jobs[0][0])

    from dragdiff import output
    from dragdiff.editor import Editor, enough_memory
    from dragdiff.job import Request
    from dragdiff.progress import Bars

    with closing(Bars()) as bars:
        editor, done = Editor(config, report=bars), 0
        for group in _batches(jobs, batch, editor):
            requests = [Request(sample, job, output.new_folder(job)) for job, sample in group]
            if group[0][0].method != editor.config.method:
                editor = editor.reconfigured(group[0][0])
            outcomes: Sequence[Outcome]
            try:
                with enough_memory():
                    outcomes = work(editor, requests)
            except UserError as error:
                if total == 1:
                    raise
                # without the traceback, which would keep the failed edit's tensors through the next one
                outcomes = [UserError(str(error))] * len(requests)
            except KeyboardInterrupt:
                kept = "; ".join(_kept(request.folder) for request in requests if request.folder)
                finished = f"; {done} of {total} samples are finished" if total > 1 else ""
                raise KeyboardInterrupt(f"{bars}; {kept}{finished}") from None
            bars.close()
            for request, outcome in zip(requests, outcomes, strict=True):
                assert request.folder is not None
                if isinstance(outcome, UserError):
                    failures.append(_failed(request.folder.name, outcome))
                else:
                    print(outcome if isinstance(outcome, str) else _said(outcome, request.folder))
                if seen is not None:
                    seen(request.folder, outcome)
            done += len(requests)
    return _report_failures(failures, total)


def _check_place_and_model(config: Config) -> None:
    """
    Raises:
        UserError: results can't be written or logged, or there is no such model.
    """
    from dragdiff import output
    from dragdiff.backbones.loading import structure
    from dragdiff.checks import check_settings
    from dragdiff.loggers import check_login

    output.check_writable(config)
    check_login(config.logger)
    check_settings(config, structure(config.model))
    if config.image and config.model.path == "embedded":
        warnings.warn(
            "the embedded model knows only its own drawn scenes; for photographs name a model, e.g. configs/sd15.yaml",
            stacklevel=2,
        )


def _batches(jobs: Jobs, size: int, editor: Editor) -> list[Jobs]:
    """The jobs in groups of at most `size` that can run together, as far as possible in their order."""
    if size == 1:
        return [[job] for job in jobs]
    classes: dict[Any, Jobs] = {}
    for config, sample in jobs:
        classes.setdefault((config.method, editor.size_class(sample)), []).append((config, sample))
    return [group[start : start + size] for group in classes.values() for start in range(0, len(group), size)]


def _kept(folder: Path) -> str:
    return f"{folder}/ keeps {', '.join(sorted(path.name for path in folder.iterdir()))}"


def _failed(name: str, error: UserError) -> tuple[str, str]:
    print(f"dragdiff: passing over {name}: {error}", file=sys.stderr)
    return name, str(error)


def _report_failures(failures: Failures, total: int) -> int:
    if not failures:
        return 0
    print(f"dragdiff: {len(failures)} of {total} samples failed:", file=sys.stderr)
    for name, reason in failures:
        print(f"  {name}: {reason}", file=sys.stderr)
    return 2


# ------------------------------------------------------------------------------------------- input


def _config(settings: Sequence[str], method: str = "", *, others: Sequence[str] = ()) -> Config:
    """What the command line says.

    Args:
        settings: its overlays and `key=value`.
        method: in place of what they name.
        others: methods whose own settings may be among them, which this one passes over.
    """
    files = [argument for argument in settings if "=" not in argument]
    overrides = [argument for argument in settings if "=" in argument]
    if method:
        own = f"{methods.find(method).name}."
        theirs = tuple(f"{methods.find(other).name}." for other in others)
        kept = [text for text in overrides if text.startswith(own) or not text.startswith(("method=", *theirs))]
        overrides = [*kept, f"method={method}"]
    config = load_config(files or [DEFAULT_OVERLAY], overrides)
    if not (config.sample or config.image or config.generate.enabled):
        if config.model.path != "embedded":
            raise UserError("nothing to edit: give sample=FOLDER, or image=FILE with prompt=... and points=...")
        config.sample = DEFAULT_EXAMPLE
    # the resolved config must mean the same in any working directory
    config.image, config.mask = _absolute(config.image), _absolute(config.mask)
    for key in ("path", "resume"):
        path = _absolute(getattr(config.lora, key))
        if path and not os.path.exists(path):
            raise UserError(f"lora.{key} is {path!r}: no such file or folder")
        setattr(config.lora, key, path)
    for section, key in [(config, "sample"), *((config.model, part) for part in ("path", "vae", "unet"))]:
        path = _absolute(getattr(section, key))
        if path and os.path.exists(path):  # else a hub id, example:NAME or scene:NAME
            setattr(section, key, path)
    return config


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute()) if path else ""


def _by_each_method(configs: Sequence[Config]) -> tuple[Jobs, Failures]:
    """Each sample with each method's settings, in folders beside each other; and the samples that can't be read.

    Raises:
        UserError: of a sample that is alone; or one of the methods can't have any.
    """
    from dragdiff import output

    read, (*_, failures) = zip(*(_read(config, suffix="", edits=True) for config in configs), strict=True)
    jobs: Jobs = []
    for several in zip(*read, strict=True):
        parent = output.unused(several[0][0])
        for config, sample in several:
            name = f"{parent}/{methods.find(config.method).name}"
            jobs.append((replace(config, output=replace(config.output, name=name)), sample))
    return jobs, failures


def _read(config: Config, *, suffix: str, edits: bool) -> tuple[Jobs, Failures]:
    """Each sample, with the config that alone reproduces its run; and those that can't be read."""
    import numpy as np

    from dragdiff.assets import example_folder
    from dragdiff.data import readers
    from dragdiff.data.sample import EditSample

    def job(sample: EditSample, *, folder: str = "", many: bool = False) -> tuple[Config, EditSample]:
        name = f"{sample.name}{suffix}"
        if config.output.name:
            name = f"{config.output.name}-{name}" if many else config.output.name
        # may get too small
        working = sample if config.generate.enabled else sample.resized(config.data.max_size)
        if edits:
            methods.find(config.method).check(sample)
            check_fit(config, working.height, working.width)
        return replace(config, sample=folder, output=replace(config.output, name=name)), sample

    points, mask = config.points, config.mask or None
    if config.generate.enabled:  # its picture does not exist yet, but its size and so points and mask can be checked
        blank = np.zeros((config.generate.height, config.generate.width, 3), np.uint8)
        return [job(EditSample(blank, config.prompt, points, mask, f"generated-{config.seed}"))], []
    if config.image:
        return [job(EditSample(config.image, config.prompt, points, mask, Path(config.image).stem))], []

    given: dict[str, Any] = {"prompt": config.prompt, "points": config.points, "mask": config.mask}
    given = {key: value for key, value in given.items() if value}
    if config.sample.startswith("scene:"):
        from dragdiff.data.scenes import named_scene

        scene = named_scene(config.sample.removeprefix("scene:"))
        return [job(replace(scene.sample, **given), folder=config.sample)], []
    is_example = config.sample.startswith("example:")
    root = example_folder(config.sample.removeprefix("example:")) if is_example else Path(config.sample)
    folders = readers.find_samples(root)
    jobs: Jobs = []
    failures: Failures = []
    for folder, name in zip(folders, readers.sample_names(folders, root), strict=True):
        try:
            sample = replace(readers.read_sample(folder, name), **given)
            jobs.append(job(sample, folder=config.sample if is_example else str(folder), many=len(folders) > 1))
        except UserError as error:
            if len(folders) == 1:
                raise
            failures.append(_failed(name, error))
    if not jobs:
        raise UserError(f"none of the {len(folders)} samples in {config.sample} can be used")
    return jobs, failures
