"""Progress bars for the stages of an edit."""

from __future__ import annotations

import sys

from tqdm import tqdm


class Bars:
    """One tqdm bar after the other: stage, step, and a note such as the distance left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.stage = ""

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        """Show that `done` of `total` steps of a stage are done; 0 begins it."""
        if done == 0 or self.bar is None or stage != self.stage:
            self.close()
            self.stage = stage
            self.bar = tqdm(total=total, desc=f"{stage:>9}", unit="step", file=sys.stderr, dynamic_ncols=True)
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
