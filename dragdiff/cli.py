"""The command line: `dragdiff VERB` with edit, train, methods, ui, study, report, convert; and the top-level `edit.py`
and `train.py`.

Only argparse and OmegaConf are imported here: `--help` and most mistakes answer at once.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dragdiff import methods
from dragdiff.config import DEFAULT_OVERLAY, Config, StudyConfig, UIConfig, load_config, load_study, load_ui
from dragdiff.errors import UserError
from dragdiff.options import describe

if TYPE_CHECKING:
    from dragdiff.data.sample import EditSample
    from dragdiff.editor import Editor
    from dragdiff.job import EditResult, Request

DEFAULT_EXAMPLE = "example:sun"

EDIT_HELP = f"""Drag one image, or each sample of a folder; results go to outputs/NAME/.

  {{prog}}                                  an embedded example with the embedded model
  {{prog}} configs/sd15.yaml image=cat.jpg prompt="a cat" points="[[[120,200],[180,200]]]" mask=mask.png
  {{prog}} configs/sd15.yaml sample=DragBench/animals
  {{prog}} configs/sd15.yaml sample=DragBench/animals method=NAME
                                          by another published method: `dragdiff methods` lists them
  {{prog}} configs/sd15.yaml generate.enabled=true prompt="a cat"
  {{prog}} outputs/cat/config.yaml          repeats a run
  dragdiff convert DragBench plain_samples  pickled samples to plain files

Files are merged in order, then key=value settings. Without a file, configs/{DEFAULT_OVERLAY}.yaml is used."""
STUDY_HELP = """Run variants of the settings over a data set; a second start does only what is missing.

  {prog} experiments/scenes/timestep.yaml
  {prog} experiments/dragbench/timestep.yaml data.path=DragBench results=s3://bucket/studies executor=ray"""
REPORT_HELP = """Tables, plots and a gallery of what a study has found so far; they go to RESULTS/NAME/report/.

  {prog} experiments/scenes/timestep.yaml
  {prog} outputs/studies/timestep"""
UI_HELP = """Draw, drag and watch on a web page of this machine, http://127.0.0.1:7860/.

  {prog}
  {prog} "models=[sd15,my_model.yaml]" "samples=[DragBench]" port=8000
  {prog} host=0.0.0.0                  for other machines too, with a token"""
TRAIN_HELP = """Fine-tune a LoRA on one image, or on each sample of a folder; results go to outputs/NAME-lora/.

  {prog} configs/sd15.yaml image=cat.jpg prompt="a cat"
  {prog} configs/sd15.yaml image=cat.jpg prompt="a cat" lora.save_every=20
  {prog} configs/sd15.yaml image=cat.jpg prompt="a cat" lora.resume=outputs/cat-lora/last.ckpt

Files are merged in order, then key=value settings."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verbs = {
        "edit": (main_edit, "drag one image, or a folder of samples"),
        "train": (main_train, "fine-tune a LoRA on one image"),
        "methods": (main_methods, "list the published methods, or say all of one"),
        "ui": (main_ui, "open the web page: draw, drag, watch"),
        "study": (main_study, "run a study: variants of the settings over a data set"),
        "report": (main_report, "tables, plots and a gallery of what a study has found"),
        "convert": (main_convert, "copy samples of the published data sets into the plain folder format"),
    }
    if argv and argv[0] in verbs:
        return verbs[argv[0]][0](argv[1:], prog=f"dragdiff {argv[0]}")
    parser = argparse.ArgumentParser(
        prog="dragdiff",
        description="Point-based (drag) image editing with diffusion models.",
        epilog="`dragdiff VERB --help` says more.",
    )
    subparsers = parser.add_subparsers(metavar="VERB", required=True)
    for name, (_, text) in verbs.items():
        subparsers.add_parser(name, help=text)
    parser.parse_args(argv)
    return 2


def main_edit(argv: Sequence[str] | None = None, *, prog: str = "python edit.py") -> int:
    """`dragdiff edit`, with these arguments instead of the command line\'s; its exit code."""
    return run(edit, _config_parser(prog, EDIT_HELP), argv)


def main_train(argv: Sequence[str] | None = None, *, prog: str = "python train.py") -> int:
    """`dragdiff train`, with these arguments instead of the command line\'s; its exit code."""
    return run(train, _config_parser(prog, TRAIN_HELP), argv)


def main_methods(argv: Sequence[str] | None = None, *, prog: str = "dragdiff methods") -> int:
    """`dragdiff methods`, with these arguments instead of the command line\'s; its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="The published methods; `method=NAME` has one edit.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="say all of this one; without it, list them")
    return run(list_methods, parser, argv)


def main_study(argv: Sequence[str] | None = None, *, prog: str = "dragdiff study") -> int:
    """`dragdiff study`, with these arguments instead of the command line\'s; its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s STUDY.yaml [key=value ...] [--plan] [--retry-failed] [--wandb-sweep FILE]",
        description=STUDY_HELP.replace("{prog}", prog),
        epilog="all keys of a study, with their defaults:\n\n" + describe(StudyConfig()).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="in place of what the file says")
    parser.add_argument("--plan", action="store_true", help="only say what would be done")
    parser.add_argument("--retry-failed", action="store_true", help="also what failed before")
    parser.add_argument(
        "--wandb-sweep", metavar="FILE", help="only write the study as a W&B sweep, whose agents call edit.py"
    )
    return run(study, parser, argv)


def main_report(argv: Sequence[str] | None = None, *, prog: str = "dragdiff report") -> int:
    """`dragdiff report`, with these arguments instead of the command line\'s; its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s STUDY [key=value ...] [--brief]",
        description=REPORT_HELP.replace("{prog}", prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY", help="its YAML file, or its folder in the results")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for `dragdiff study`, with a YAML file")
    parser.add_argument("--brief", action="store_true", help="without the gallery and the single values")
    return run(report, parser, argv)


def main_ui(argv: Sequence[str] | None = None, *, prog: str = "dragdiff ui") -> int:
    """`dragdiff ui`, with these arguments instead of the command line\'s; its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [PAGE.yaml ...] [key=value ...]",
        description=UI_HELP.replace("{prog}", prog),
        epilog="all keys of the page, with their defaults:\n\n" + describe(UIConfig()).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="PAGE.yaml | key=value", help="see above and below")
    return run(ui, parser, argv)


def main_convert(argv: Sequence[str] | None = None, *, prog: str = "dragdiff convert") -> int:
    """`dragdiff convert`, with these arguments instead of the command line\'s; its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Copy samples of any known format (DragBench, Drag100, ...) into the plain folder format.",
    )
    parser.add_argument("source", type=Path, help="a sample folder, or a folder of many")
    parser.add_argument("destination", type=Path, help="a new folder")
    return run(convert, parser, argv)


def _config_parser(prog: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [CONFIG.yaml ...] [key=value ...]",
        description=text.replace("{prog}", prog),
        epilog="all keys, with their defaults:\n\n" + describe(Config()).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value", help="see above and below")
    return parser


def run(
    command: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Exit code of a command: 2 with one line for a user's mistake, 1 where the system failed, 130 after Ctrl-C."""
    arguments, unknown = parser.parse_known_intermixed_args(argv)  # options may come before settings
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module="dragdiff")  # not other libraries' notes
        warnings.showwarning = _note
        try:
            if unknown:
                raise UserError(f"unknown option {unknown[0]}: settings are written key=value (--help lists them)")
            return command(arguments)
        except UserError as error:
            print(f"dragdiff: {error}", file=sys.stderr)
            return 2
        except OSError as error:  # a full disk, a folder taken away under way
            print(f"dragdiff: {error}; what was finished before is kept", file=sys.stderr)
            return 1
        except KeyboardInterrupt as interrupt:
            print(f"dragdiff: interrupted {interrupt}".rstrip(), file=sys.stderr)
            return 130


def _note(message: Warning | str, *_: object, **__: object) -> None:
    from tqdm import tqdm

    tqdm.write(f"note: {message}", file=sys.stderr)  # a bar that is shown stays whole


# ------------------------------------------------------------------------------------------- commands


def edit(arguments: argparse.Namespace) -> int:
    """Drag what the settings name."""
    config = _config(arguments)
    if config.generate.enabled and not config.points:
        return _each_sample(config, _generate_one, edits=False)
    return _each_sample(config, _edit_batch, batch=config.edit.batch)


def _edit_batch(editor: Editor, requests: Sequence[Request]) -> list[str | UserError]:
    if len(requests) == 1:
        (request,) = requests
        assert request.folder is not None
        result = editor.edit_and_save(request.sample, request.folder, config=request.config)
        return [_said(result, request.folder)]
    results = editor.edit_and_save_batch(requests)
    return [
        result if isinstance(result, UserError) else _said(result, request.folder)
        for request, result in zip(requests, results, strict=True)
    ]


def _said(result: EditResult, folder: Path | None) -> str:
    lines = [f"wrote {folder}/: edited.png, comparison.png, trajectory.gif, metrics.json, config.yaml"]
    if result.distance_after is None:
        return "\n".join([*lines, f"{result.config.method}: done, without tracking"])
    reasons = {"reached": "all handles arrived", "steps": "all steps done"}
    lines.append(f"drag: {result.steps} steps, {reasons.get(result.stop_reason, result.stop_reason)}")
    for number, (before, after) in enumerate(zip(result.distance_before, result.distance_after, strict=True), 1):
        lines.append(f"point {number}: {before:.1f} px from its target before, {after:.1f} px after (as tracked)")
    return "\n".join(lines)


def _generate_one(editor: Editor, requests: Sequence[Request]) -> list[str | UserError]:
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
    config = _config(arguments)
    if config.generate.enabled:
        raise UserError("generate.enabled is true: a generated picture needs no LoRA, give image=FILE or sample=FOLDER")
    if config.lora.path:
        raise UserError(f"lora.path is {config.lora.path!r}: leave it empty to train a new LoRA")
    if config.lora.steps == 0:
        raise UserError("lora.steps is 0, so there is nothing to train: set e.g. lora.steps=80")
    return _each_sample(config, _train_one, suffix="-lora", edits=False)


def _train_one(editor: Editor, requests: Sequence[Request]) -> list[str | UserError]:
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

    print(catalogue.details(arguments.name) if arguments.name else catalogue.overview())
    return 0


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
    return 1 if summary.failed or plan.broken else 0


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
    config: Config,
    work: Callable[[Editor, Sequence[Request]], list[str | UserError]],
    *,
    suffix: str = "",
    edits: bool = True,
    batch: int = 1,
) -> int:
    """Do the work for each sample, in a folder of its own, and print what it says.

    Whatever can be known to be wrong is said before a model is loaded. One failed sample of many is passed over.
    """
    from dragdiff import output
    from dragdiff.loggers import check_login
    from dragdiff.progress import Bars

    jobs, failures = _read(config, suffix=suffix, edits=edits)
    total = len(jobs) + len(failures)
    output.check_writable(jobs[0][0])
    check_login(config.logger)

    from dragdiff.backbones.loading import check_model

    check_model(config.model)
    if config.image and config.model.path == "embedded":
        warnings.warn(
            "the embedded model knows only its own drawn scenes; for photographs name a model, e.g. configs/sd15.yaml",
            stacklevel=2,
        )

    from dragdiff.editor import Editor, enough_memory
    from dragdiff.job import Request

    with closing(Bars()) as bars:
        editor, done = Editor(config, report=bars), 0
        for group in _batches(jobs, batch, editor):
            requests = [Request(sample, job, output.new_folder(job)) for job, sample in group]
            outcomes: list[str | UserError]
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
                if isinstance(outcome, UserError):
                    failures.append(_failed(request.sample.name, outcome))
                else:
                    print(outcome)
            done += len(requests)
    return _report_failures(failures, total)


def _batches(
    jobs: Sequence[tuple[Config, EditSample]], size: int, editor: Editor
) -> list[Sequence[tuple[Config, EditSample]]]:
    """The jobs in groups of at most `size` that can run together, as far as possible in their order."""
    if size == 1:
        return [[job] for job in jobs]
    classes: dict[Any, list[tuple[Config, EditSample]]] = {}
    for job in jobs:
        classes.setdefault(editor.size_class(job[1]), []).append(job)
    return [group[start : start + size] for group in classes.values() for start in range(0, len(group), size)]


def _kept(folder: Path) -> str:
    return f"{folder}/ keeps {', '.join(sorted(path.name for path in folder.iterdir()))}"


def _failed(name: str, error: UserError) -> tuple[str, str]:
    print(f"dragdiff: passing over {name}: {error}", file=sys.stderr)
    return name, str(error)


def _report_failures(failures: list[tuple[str, str]], total: int) -> int:
    if not failures:
        return 0
    print(f"dragdiff: {len(failures)} of {total} samples failed:", file=sys.stderr)
    for name, reason in failures:
        print(f"  {name}: {reason}", file=sys.stderr)
    return 2


# ------------------------------------------------------------------------------------------- input


def _config(arguments: argparse.Namespace) -> Config:
    files = [argument for argument in arguments.settings if "=" not in argument]
    overrides = [argument for argument in arguments.settings if "=" in argument]
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


def _read(config: Config, *, suffix: str, edits: bool) -> tuple[list[tuple[Config, EditSample]], list[tuple[str, str]]]:
    """Each sample, with the config that alone reproduces its run; and those that can't be read."""
    import numpy as np

    from dragdiff.assets import example_folder
    from dragdiff.data import readers
    from dragdiff.data.sample import EditSample

    def job(sample: EditSample, *, folder: str = "", many: bool = False) -> tuple[Config, EditSample]:
        name = f"{sample.name}{suffix}"
        if config.output.name:
            name = f"{config.output.name}-{name}" if many else config.output.name
        if not config.generate.enabled:
            sample.resized(config.data.max_size)  # may get too small
        if edits:
            methods.find(config.method).check(sample)
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
    jobs, failures = [], []
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
