"""Where modules and names went that once were elsewhere: an import of the old one says so."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import NoReturn

MODULES = {
    "dragdiff.callbacks.tracking": "dragdiff.callbacks.point_tracking",
    "dragdiff.edits": "dragdiff.job",
    "dragdiff.metrics.scenes": "dragdiff.metrics.truth",
    "dragdiff.models.drag": "dragdiff.models.point_drag",
    "dragdiff.models.lora": "dragdiff.models.lora_finetune",
    "dragdiff.modules.attention": "dragdiff.backbones.attention",
    "dragdiff.modules.backbone": "dragdiff.backbones.diffusion and dragdiff.backbones.stable_diffusion",
    "dragdiff.modules.compilation": "dragdiff.backbones.compilation",
    "dragdiff.modules.loading": "dragdiff.backbones.loading",
    "dragdiff.modules.single_file": "dragdiff.backbones.single_file",
    "dragdiff.study.tracking": "dragdiff.study.wandb_runs",
    "dragdiff.ui.worker": "dragdiff.ui.process",
}

NAMES = {  # by the module that they have left
    "dragdiff.config": ("dragdiff.options", ("Check", "describe", "nearest_key", "walk")),
    "dragdiff.modules.lora": ("dragdiff.backbones.lora_file", ("FILE_NAME", "file_of", "load", "save")),
}


def tell_moved(module: str) -> None:
    """From now on an import of a name of `NAMES` from this module says where it is."""
    home, names = NAMES[module]

    def missing(name: str) -> NoReturn:
        if name in names:  # no AttributeError, in whose place Python would say less
            raise ImportError(f"{module}.{name} has moved: it is {home}.{name} now", name=name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    vars(sys.modules[module])["__getattr__"] = missing


class Moved(MetaPathFinder):
    """The last place where Python looks for a module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> None:
        """
        Raises:
            ModuleNotFoundError: of one that has moved, with its new name.
        """
        if name in MODULES:
            raise ModuleNotFoundError(f"{name} has moved: it is {MODULES[name]} now", name=name)
