"""The command line: `dragdiff edit | train | convert`, and the top-level `edit.py` and `train.py`.

Only argparse and OmegaConf are imported here: `--help` and most mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dragdiff.config import DEFAULT_OVERLAY, Config, describe, load_config
from dragdiff.errors import UserError

if TYPE_CHECKING:
    from dragdiff.data.sample import EditSample
    from dragdiff.editor import Editor

USAGE = "%(prog)s [CONFIG.yaml ...] [key=value ...]"
DEFAULT_EXAMPLE = "example:sun"
EDIT_HELP = f"""Drag one image, or a folder of samples.

  {{prog}}                                        an embedded example with the embedded model
  {{prog}} configs/sd15.yaml image=cat.jpg prompt="a cat" "points=[[[120,200],[180,200]]]" mask=mask.png
  {{prog}} configs/sd15.yaml sample=DragBench/animals
  {{prog}} outputs/cat/config.yaml                repeat a run

Files are merged in order, then key=value settings. Without a file, configs/{DEFAULT_OVERLAY}.yaml is used."""
TRAIN_HELP = """Fine-tune a LoRA on one image; writes <output.folder>/<name>/pytorch_lora_weights.safetensors.

  {prog} configs/sd15.yaml image=cat.jpg prompt="a cat"
  {prog} configs/sd15.yaml image=cat.jpg prompt="a cat" lora.save_every=20
  {prog} configs/sd15.yaml image=cat.jpg prompt="a cat" lora.resume=outputs/cat/last.ckpt

Files are merged in order, then key=value settings."""


def run(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Exit code of a command: 2 with one line for a user's mistake, 130 after Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    try:
        return command(arguments)
    except UserError as error:
        print(f"dragdiff: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dragdiff: interrupted; what was finished is kept", file=sys.stderr)
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verbs = {"edit": main_edit, "train": main_train, "convert": main_convert}
    if argv and argv[0] in verbs:
        return verbs[argv[0]](argv[1:], prog=f"dragdiff {argv[0]}")
    parser = argparse.ArgumentParser(
        prog="dragdiff",
        description="Point-based (drag) image editing with diffusion models. `dragdiff VERB --help` says more.",
    )
    parser.add_argument(
        "verb",
        choices=sorted(verbs),
        help="edit: drag images; train: fine-tune a LoRA; convert: read data sets",
    )
    parser.parse_args(argv)
    return 2


def main_edit(argv: Sequence[str] | None = None, *, prog: str = "edit.py") -> int:
    return run(edit, _config_parser(prog, EDIT_HELP).parse_args(argv))


def main_train(argv: Sequence[str] | None = None, *, prog: str = "train.py") -> int:
    return run(train, _config_parser(prog, TRAIN_HELP).parse_args(argv))


def main_convert(argv: Sequence[str] | None = None, *, prog: str = "dragdiff convert") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Copy samples of any known format (DragBench, Drag100, ...) into the plain folder format.",
    )
    parser.add_argument("source", type=Path, help="a sample folder, or a folder of many")
    parser.add_argument("destination", type=Path, help="a new folder")
    return run(convert, parser.parse_args(argv))


def _config_parser(prog: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=USAGE,
        description=text.replace("{prog}", prog),
        epilog="all keys, with their defaults:\n\n" + describe().replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value", help="see above and below")
    return parser


def _config(arguments: argparse.Namespace) -> Config:
    files = [argument for argument in arguments.settings if "=" not in argument]
    overrides = [argument for argument in arguments.settings if "=" in argument]
    config = load_config(files or [DEFAULT_OVERLAY], overrides)
    if not (config.sample or config.image or config.generate.enabled):
        if config.model.path != "embedded":
            raise UserError("nothing to edit: give sample=FOLDER, or image=FILE with prompt=... and points=...")
        config.sample = DEFAULT_EXAMPLE
    return config


# ------------------------------------------------------------------------------------------- commands


def edit(arguments: argparse.Namespace) -> int:
    """Everything that can be known to be wrong is said before a model is loaded."""
    config = _config(arguments)
    jobs, failures = _read_all(config)

    from dragdiff import output
    from dragdiff.modules.backbone import check_model

    check_model(config.model)
    _check_writable(config)
    editor = _editor(config)
    for job, sample in jobs:
        done = sample.name
        try:
            if config.generate.enabled:
                picture, _ = editor.generate(sample.prompt)
                if not job.points:
                    return _save_generated(job, picture)
                sample = replace_image(sample, picture)
            editor.config = job
            folder = output.new_folder(job, job.output.name or sample.name)
            _edit_one(editor, sample, folder)
        except UserError as error:
            if len(jobs) == 1:
                raise
            failures.append((done, str(error)))
    return _report_failures(failures, len(jobs) + len(failures))


def _edit_one(editor: Editor, sample: EditSample, folder: Path) -> None:
    from dragdiff import output
    from dragdiff.loggers import log_result, open_logger

    with open_logger(editor.config, name=folder.name, folder=folder) as logger:
        result = editor.edit(sample, folder=folder, logger=logger)
        written = output.save(result, folder)
        log_result(logger, output.comparison(result), output.metrics(result))
    print(f"\nwrote {folder}/: " + ", ".join(path.name for path in [*written, folder / "config.yaml"]))
    reasons = {"reached": "all handles arrived", "steps": "all steps done"}
    print(f"drag: {result.steps} steps, {reasons.get(result.stop_reason, result.stop_reason)}")
    for index, (before, after) in enumerate(zip(result.distance_before, result.distance_after, strict=True)):
        print(f"point {index + 1}: {before:.1f} px from its target before, {after:.1f} px after (as tracked)")


def train(arguments: argparse.Namespace) -> int:
    """Fine-tune and write a LoRA."""
    config = _config(arguments)
    config.lora.path = ""
    if config.lora.steps == 0:
        raise UserError("lora.steps is 0: nothing to train")
    jobs, failures = _read_all(config, need_points=False)

    from dragdiff import output
    from dragdiff.loggers import open_logger
    from dragdiff.modules import lora
    from dragdiff.modules.backbone import check_model

    check_model(config.model)
    if config.lora.resume and not Path(config.lora.resume).is_file():
        raise UserError(f"lora.resume is {config.lora.resume!r}: no such file; give a last.ckpt")
    _check_writable(config)
    editor = _editor(config)
    for job, sample in jobs:
        editor.config = job
        folder = output.new_folder(job, job.output.name or f"{sample.name}-lora")
        with open_logger(job, name=folder.name, folder=folder) as logger:
            trained = editor.finetune(sample.resized(job.data.max_size), folder=folder, logger=logger)
        assert trained is not None
        print(f"\nwrote {lora.save(trained, folder)}; use it with lora.path={folder}")
    return _report_failures(failures, len(jobs) + len(failures))


def convert(arguments: argparse.Namespace) -> int:
    from dragdiff.data import readers

    converted, failures = readers.convert(arguments.source, arguments.destination)
    print(f"converted {len(converted)} samples into {arguments.destination}")
    return _report_failures([(str(path), str(reason)) for path, reason in failures], len(converted) + len(failures))


# ------------------------------------------------------------------------------------------- input


def _read_all(
    config: Config, *, need_points: bool = True
) -> tuple[list[tuple[Config, EditSample]], list[tuple[str, str]]]:
    """Each sample with the config that reproduces its edit alone, and those that can't be read with the reason."""
    from dragdiff.data import readers

    if config.generate.enabled:
        return [(config, _blank(config))], []
    if config.image:
        if config.sample:
            raise UserError("both image and sample are given: leave one out")
        if not config.points and not need_points:
            config = replace(config, points=[[[0, 0], [0, 0]]])
        config = replace(config, image=_absolute(config.image), mask=_absolute(config.mask))
        name = Path(config.image).stem
        return [(config, make_sample(config.image, config.prompt, config.points, config.mask or None, name))], []

    from dragdiff.assets import example_folder

    if config.sample.startswith("example:"):
        root = example_folder(config.sample.removeprefix("example:"))
        return [(config, readers.read_sample(root))], []
    paths = readers.find_samples(config.sample)
    jobs, failures = [], []
    for path in paths:
        try:
            jobs.append((replace(config, sample=_absolute(path)), readers.read_sample(path)))
        except UserError as error:
            if len(paths) == 1:
                raise
            failures.append((str(path), str(error)))
    if not jobs:
        raise UserError(f"none of the {len(paths)} samples in {config.sample} can be read; the first: {failures[0][1]}")
    for path, reason in failures:
        print(f"dragdiff: skipping {path}: {reason}", file=sys.stderr)
    return jobs, failures


def make_sample(image: Any, prompt: str, points: Any, mask: Any, name: str) -> EditSample:
    from dragdiff.data.sample import EditSample

    return EditSample(image, prompt, points, mask, name)


def replace_image(sample: EditSample, picture: Any) -> EditSample:
    return make_sample(picture, sample.prompt, sample.points, sample.mask, sample.name)


def _blank(config: Config) -> EditSample:
    """Stands in for the picture that will be generated, so that points and mask are checked before it is."""
    import numpy as np

    blank = np.zeros((config.generate.height, config.generate.width, 3), np.uint8)
    points = config.points or [[[0, 0], [0, 0]]]
    return make_sample(blank, config.prompt, points, _absolute(config.mask) or None, f"generated-{config.seed}")


def _save_generated(config: Config, picture: Any) -> int:
    from PIL import Image

    from dragdiff import output

    folder = output.new_folder(config, config.output.name or f"generated-{config.seed}")
    Image.fromarray(picture).save(folder / "generated.png")
    print(f"\nwrote {folder}/generated.png; drag it by adding points=[[[x,y],[x,y]],...] to the same command")
    return 0


def _absolute(path: str | Path) -> str:
    """The resolved config must work from any folder."""
    return str(Path(path).expanduser().absolute()) if str(path) else ""


# ------------------------------------------------------------------------------------------- running


def _editor(config: Config) -> Editor:
    from dragdiff.editor import Editor
    from dragdiff.progress import Bars

    return Editor(config, report=Bars())


def _check_writable(config: Config) -> None:
    folder = Path(config.output.folder).expanduser()
    nearest = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"cannot write to output.folder {str(folder)!r}: {nearest} is not a writable folder")


def _report_failures(failures: list[tuple[str, str]], total: int) -> int:
    if not failures:
        return 0
    print(f"dragdiff: {len(failures)} of {total} samples failed:", file=sys.stderr)
    for name, reason in failures:
        print(f"  {name}: {reason}", file=sys.stderr)
    return 2
