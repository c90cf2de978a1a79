"""The embedded model and its example samples."""

from __future__ import annotations

from pathlib import Path

from dragdiff.errors import UserError

EXAMPLES = Path(__file__).parent / "examples"


def example_folder(name: str) -> Path:
    """The folder of a shipped example sample.

    Raises:
        UserError: there is none of that name; lists those there are.
    """
    folder = EXAMPLES / name
    if not name or not folder.is_dir():
        names = ", ".join(sorted(path.name for path in EXAMPLES.glob("*") if path.is_dir()))
        raise UserError(f"no example {name!r}: there are {names}")
    return folder
