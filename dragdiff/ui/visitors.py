"""Who is who on the web page: each visitor has their own pictures and runs, in a folder that goes with them."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dragdiff.aliases import Json
from dragdiff.errors import UserError

if TYPE_CHECKING:
    from dragdiff.ui.runs import Run

PICTURES_EACH = 20  # opened pictures of a visitor that are kept; runs have copies of theirs
MOST_VISITORS = 1000
PREFIX = "visitor-"  # of their folders


@dataclass(frozen=True)
class Picture:
    """A picture that a visitor has opened or generated.

    Attributes:
        name: of results made from it.
        file: PNG, RGB.
        generated: the settings that made it, by key, with the prompt; None for a real one.
    """

    id: str
    name: str
    file: Path
    width: int
    height: int
    generated: Json | None = None


@dataclass
class Visitor:
    """Somebody's browser."""

    folder: Path
    seen: float
    pictures: dict[str, Picture] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Whether one of their runs waits or is in hand."""
        return any(not run.ended for run in list(self.runs.values()))

    def add_picture(self, pixels: np.ndarray, name: str, generated: Json | None = None) -> Picture:
        """Keep a picture as PNG; the oldest goes where there are too many.

        Args:
            pixels: (H, W, 3) uint8.
            generated: as of `Picture`.
        """
        id = secrets.token_urlsafe(9)
        file = self.folder / "pictures" / f"{id}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        picture = self.pictures[id] = Picture(id, name, file, pixels.shape[1], pixels.shape[0], generated)
        while len(self.pictures) > PICTURES_EACH:
            if oldest := self.pictures.pop(next(iter(self.pictures)), None):  # None: another upload was quicker
                oldest.file.unlink(missing_ok=True)
        return picture

    def picture(self, id: object) -> Picture:
        """
        Raises:
            UserError: there is none of that id among this visitor's.
        """
        if not isinstance(id, str) or id not in self.pictures:
            raise UserError("this picture is not here any more: open it again")
        return self.pictures[id]

    def run(self, id: str) -> Run:
        """
        Raises:
            UserError: as `picture`.
        """
        if id not in self.runs:
            raise UserError("this run is not here any more")
        return self.runs[id]

    def new_folder(self) -> Path:
        """Make one for a run, empty."""
        folder = self.folder / "runs" / secrets.token_hex(8)
        folder.mkdir(parents=True)
        return folder

    def remove_run(self, run: Run) -> None:
        """Forget a run that has ended, with its files."""
        self.runs.pop(run.id, None)
        shutil.rmtree(run.folder, ignore_errors=True)


class Visitors:
    """All of them, by the secret in their cookie."""

    def __init__(self, folder: Path, keep_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.keep_seconds, self.clock = folder, keep_seconds, clock
        self._visitors: dict[str, Visitor] = {}

    def get(self, secret: str) -> Visitor | None:
        """The visitor whose secret a cookie holds, who is now seen; None where nobody has it."""
        visitor = self._visitors.get(secret)
        if visitor:
            visitor.seen = self.clock()
        return visitor

    def new(self) -> tuple[str, Visitor]:
        """A new visitor with their secret; where there are very many, one of them goes."""
        if len(self._visitors) >= MOST_VISITORS:
            known = self._visitors
            self._remove(min(known, key=lambda one: (known[one].busy, bool(known[one].pictures), known[one].seen)))
        secret = secrets.token_urlsafe(24)
        visitor = self._visitors[secret] = Visitor(self.folder / f"{PREFIX}{secrets.token_hex(8)}", self.clock())
        return secret, visitor

    def forget_the_gone(self) -> None:
        """Delete all that belongs to those who have not been seen for so long, and what an earlier server left."""
        for secret, visitor in list(self._visitors.items()):
            if not visitor.busy and self.clock() - visitor.seen > self.keep_seconds:
                self._remove(secret)
            elif visitor.folder.is_dir():
                os.utime(visitor.folder)  # another server may share the place: it is not an earlier one's
        for folder in self.folder.glob(f"{PREFIX}*"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > self.keep_seconds:
                    shutil.rmtree(folder, ignore_errors=True)

    def _remove(self, secret: str) -> None:
        shutil.rmtree(self._visitors.pop(secret).folder, ignore_errors=True)

    def __iter__(self) -> Iterator[Visitor]:
        return iter(list(self._visitors.values()))
