"""Where modules and names went that once were elsewhere: an import of the old one says so."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.abc import MetaPathFinder

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


class Moved(MetaPathFinder):
    """The last place where Python looks for a module."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> None:
        """
        Raises:
            ModuleNotFoundError: of one that has moved, with its new name.
        """
        if name in MODULES:
            raise ModuleNotFoundError(f"{name} has moved: it is {MODULES[name]} now", name=name)
