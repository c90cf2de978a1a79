"""The maths, as pure functions on tensors: no trainer, no config, no device names. Imported when used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from dragdiff.modules import ddim, features, motion, points, tracking, warp

__all__ = ["ddim", "features", "motion", "points", "tracking", "warp"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"module 'dragdiff.modules' has no attribute {name!r}")
    return import_module(f"dragdiff.modules.{name}")
