"""What the page's server and the process that has the model say to each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dragdiff.config import Config

if TYPE_CHECKING:
    from dragdiff.data.sample import EditSample


@dataclass(frozen=True)
class PageTask:
    """What the process is to do.

    Attributes:
        kind: "load" (the model only), "generate" or "edit".
        sample: with its picture, points and mask; None for the other kinds.
        folder: where results go.
        cache: where this visitor's LoRAs and inverted latents are kept.
        minutes: after which it is ended; 0 = never.
    """

    kind: str
    config: Config
    sample: EditSample | None = None
    folder: Path = Path()
    cache: Path = Path()
    minutes: float = 0.0


class Cancelled(Exception):
    """The person does not want it any more."""


def too_long(minutes: float) -> str:
    """What a run is told that has taken so many minutes."""
    return f"the run took longer than {minutes:g} minutes and was ended: ask for fewer steps"
