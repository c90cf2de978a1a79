"""dragdiff: point-based ("drag") image editing with diffusion models, on PyTorch Lightning."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from dragdiff.moved import Moved

if TYPE_CHECKING:
    from dragdiff.config import load_config
    from dragdiff.data.sample import EditSample
    from dragdiff.editor import Editor
    from dragdiff.errors import UserError
    from dragdiff.job import EditResult, Request

__all__ = ["EditResult", "EditSample", "Editor", "Request", "UserError", "load_config"]

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is first imported, by whichever library

sys.meta_path.append(Moved())

_HOME = {
    "EditResult": "dragdiff.job",
    "EditSample": "dragdiff.data.sample",
    "Editor": "dragdiff.editor",
    "Request": "dragdiff.job",
    "UserError": "dragdiff.errors",
    "load_config": "dragdiff.config",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: `import dragdiff` and `--help` stay quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'dragdiff' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
