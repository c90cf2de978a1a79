"""What methods are written with: functions of a job, one in each file. Imported when used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dragdiff.stages.adapters import adapted, finetune
    from dragdiff.stages.decoding import decode
    from dragdiff.stages.denoising import controlled_layers, denoise
    from dragdiff.stages.dragging import bottleneck, drag
    from dragdiff.stages.edits import fix_unmasked
    from dragdiff.stages.sources import Level, Source, Step, source

_HOME = {
    "adapted": "adapters",
    "bottleneck": "dragging",
    "controlled_layers": "denoising",
    "decode": "decoding",
    "denoise": "denoising",
    "drag": "dragging",
    "finetune": "adapters",
    "fix_unmasked": "edits",
    "source": "sources",
    **dict.fromkeys(("Level", "Source", "Step"), "sources"),
}
__all__ = [
    "Level",
    "Source",
    "Step",
    "adapted",
    "bottleneck",
    "controlled_layers",
    "decode",
    "denoise",
    "drag",
    "finetune",
    "fix_unmasked",
    "source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dragdiff.stages' has no attribute {name!r}")
    return getattr(import_module(f"dragdiff.stages.{_HOME[name]}"), name)
