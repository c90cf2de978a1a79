"""Files that nobody vouches for: others' samples, results and cache entries, and what may stand in their place."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

MOST_JSON = 64 * 2**20  # bytes; a drag of 100,000 steps has some 10 MB


class NotAFile(OSError):
    """What stands at a path is a folder, a pipe, a device or the like, or has no end: it can't be read as a file."""


def check_file(path: str | os.PathLike[str], *, most: int | None = None) -> None:
    """Whether a path is a regular file, links followed: opening a pipe waits, and a device may never end.

    Args:
        most: bytes that it may have.

    Raises:
        NotAFile: it is something else, or larger.
        OSError: missing, or it can't be looked at.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotAFile(errno.ELOOP, "a link that leads back to itself", os.fspath(path)) from error
        raise
    if not stat.S_ISREG(found.st_mode):
        raise NotAFile(errno.EINVAL, "not a regular file but a folder, a pipe or a device", os.fspath(path))
    if most is not None and found.st_size > most:
        raise NotAFile(errno.EFBIG, f"larger than {most / 2**20:.0f} MiB", os.fspath(path))


def read_file(path: str | os.PathLike[str], *, most: int | None = None) -> bytes:
    """The content of a regular file.

    Args, Raises: as `check_file`.
    """
    check_file(path, most=most)
    return Path(path).read_bytes()


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        NotAFile, OSError: as `check_file`.
        ValueError: no JSON, or nested too deeply.
    """
    return parsed(read_file(path, most=MOST_JSON))


def parsed(content: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(content.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def take_away(path: str | os.PathLike[str]) -> None:
    """Delete what stands at a path, if anything does: a file, a link, or a folder with all that is in it."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)
