"""The command line: `dragdiff VERB` with edit, train, methods, ui, study, report, convert; and the top-level `edit.py`
and `train.py`.

Only argparse and OmegaConf are imported here: `--help` and most mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from dragdiff import commands
from dragdiff.config import DEFAULT_OVERLAY, Config, StudyConfig, UIConfig
from dragdiff.errors import UserError
from dragdiff.options import describe

EDIT_HELP = f"""Drag one image, or each sample of a folder; results go to outputs/NAME/.

  {{prog}}                                  an embedded example with the embedded model
  {{prog}} configs/sd15.yaml image=cat.jpg prompt="a cat" points="[[[120,200],[180,200]]]" mask=mask.png
  {{prog}} configs/sd15.yaml sample=DragBench/animals
  {{prog}} configs/sd15.yaml sample=DragBench/animals method=NAME
                                          by another method: `dragdiff methods` lists them; or a file my_method.py
  {{prog}} "method=[dragdiffusion,gooddrag,fastdrag]"
                                          by several, side by side in one picture
  {{prog}} sample=outputs/cat "points=[[[180,200],[200,260]]]"
                                          drags on from a result
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
    parser.add_argument("--version", action="version", version=f"dragdiff {version('dragdiff')}")
    parser.parse_args(argv)
    return 2


def main_edit(argv: Sequence[str] | None = None, *, prog: str = "python edit.py") -> int:
    """`dragdiff edit`, with these arguments instead of the command line\'s; its exit code."""
    return run(commands.edit, _config_parser(prog, EDIT_HELP), argv)


def main_train(argv: Sequence[str] | None = None, *, prog: str = "python train.py") -> int:
    """`dragdiff train`, with these arguments instead of the command line\'s; its exit code."""
    return run(commands.train, _config_parser(prog, TRAIN_HELP), argv)


def main_methods(argv: Sequence[str] | None = None, *, prog: str = "dragdiff methods") -> int:
    """`dragdiff methods`, with these arguments instead of the command line\'s; its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [NAME | OVERLAY.yaml ... key=value ...]",
        description="The published methods; `method=NAME` has one edit. With a sample or a model it says which can run "
        "there, and what the others lack, e.g. `%(prog)s configs/sd15.yaml sample=DragBench/animals/cat`.",
    )
    parser.add_argument("settings", nargs="*", metavar="NAME", help="say all of this one; without it, list them")
    return run(commands.list_methods, parser, argv)


def main_study(argv: Sequence[str] | None = None, *, prog: str = "dragdiff study") -> int:
    """`dragdiff study`, with these arguments instead of the command line\'s; its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s STUDY.yaml [key=value ...] [--plan] [--retry-failed] [--allow-failures] [--wandb-sweep FILE]",
        description=STUDY_HELP.replace("{prog}", prog),
        epilog="all keys of a study, with their defaults:\n\n" + describe(StudyConfig()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="in place of what the file says")
    parser.add_argument("--plan", action="store_true", help="only say what would be done")
    parser.add_argument("--retry-failed", action="store_true", help="also what failed before")
    parser.add_argument("--allow-failures", action="store_true", help="exit with 0 although edits have failed")
    parser.add_argument(
        "--wandb-sweep", metavar="FILE", help="only write the study as a W&B sweep, whose agents call edit.py"
    )
    return run(commands.study, parser, argv)


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
    return run(commands.report, parser, argv)


def main_ui(argv: Sequence[str] | None = None, *, prog: str = "dragdiff ui") -> int:
    """`dragdiff ui`, with these arguments instead of the command line\'s; its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [PAGE.yaml ...] [key=value ...]",
        description=UI_HELP.replace("{prog}", prog),
        epilog="all keys of the page, with their defaults:\n\n" + describe(UIConfig()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="PAGE.yaml | key=value", help="see above and below")
    return run(commands.ui, parser, argv)


def main_convert(argv: Sequence[str] | None = None, *, prog: str = "dragdiff convert") -> int:
    """`dragdiff convert`, with these arguments instead of the command line\'s; its exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Copy samples of any known format (DragBench, Drag100, ...) into the plain folder format.",
    )
    parser.add_argument("source", type=Path, help="a sample folder, or a folder of many")
    parser.add_argument("destination", type=Path, help="a new folder")
    return run(commands.convert, parser, argv)


def _config_parser(prog: str, text: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [CONFIG.yaml ...] [key=value ...]",
        description=text.replace("{prog}", prog),
        epilog="all keys, with their defaults:\n\n" + describe(Config()),
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
        warnings.showwarning = _notes()
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


def _notes() -> Callable[..., None]:
    """Shows each warning once, which Python forgets whenever a library changes the filters."""
    shown: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        from tqdm import tqdm

        if str(message) not in shown:
            shown.add(str(message))
            tqdm.write(f"note: {message}", file=sys.stderr)  # a bar that is shown stays whole

    return show
