"""Progress of an edit's stages on the console."""

from __future__ import annotations

import shutil
import sys
import time

from tqdm import tqdm

BAR = "{desc:>9}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
WIDEST = 100  # characters
LINE_EVERY = 30.0  # s between lines of one stage where no bar can be drawn


class Bars:
    """One bar after the other on a terminal; elsewhere (a file, a pipe) a line at each stage's end and now and then."""

    def __init__(self, unit: str = "step") -> None:
        self.unit = unit
        self.stage, self.done, self.total, self.note = "", 0, 0, ""
        self._terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._open = False
        self._began = self._now = self._said = 0.0

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        """Show that `done` of `total` steps of a stage are done, with a note such as the distance left; 0 begins it."""
        if done == 0 or not self._open or stage != self.stage:
            self.close()
            self._open = True
            self._began = self._said = time.monotonic()
            if self._terminal:
                width = min(shutil.get_terminal_size().columns, WIDEST)
                self._bar = tqdm(total=total, desc=stage, unit=self.unit, bar_format=BAR, ncols=width)
        self.stage, self.done, self.total, self.note = stage, done, total, note
        self._now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._now - self._said > LINE_EVERY:
            self._line()
        if done == total:
            self.close()

    def __str__(self) -> str:
        """Where the run is, in words."""
        return f"in {self.stage}, step {self.done} of {self.total}" if self.stage else "before the first stage"

    def close(self) -> None:
        """End the stage that is shown, if any."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._open:
            self._line()
        self._open = False

    def _line(self) -> None:
        self._said = self._now
        line = f"{self.stage:>9}: {self.done}/{self.total} {self.unit}s" + (f", {self.note}" if self.note else "")
        print(f"{line} ({self._now - self._began:.1f} s)", file=sys.stderr)
