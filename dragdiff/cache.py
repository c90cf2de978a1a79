"""Results of stages kept between runs, under a hash of exactly what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dragdiff.errors import UserError, one_line

VERSION = 1  # raised when a stage computes something else from the same inputs
STAGES = ("lora", "inversion", "text")  # folders that share the limit
TENSOR = "tensor.safetensors"
PARTIAL = ".partial-"  # in the name of what is being written, or removed
ABANDONED = 3600.0  # s after which its writer is dead: a write takes seconds


def default_folder() -> Path:
    """$XDG_CACHE_HOME/dragdiff, or ~/.cache/dragdiff."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dragdiff"


def digest(**inputs: Any) -> str:
    """A hash of named inputs: numbers, strings, None, lists, dicts and numpy arrays."""
    summary = hashlib.sha256()
    for name, value in sorted(({"version": VERSION} | inputs).items()):
        if isinstance(value, np.ndarray):
            summary.update(f"{name}:{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
        else:
            summary.update(f"{name}:{json.dumps(value, sort_keys=True)}".encode())
    return summary.hexdigest()[:32]


def fingerprint(*modules: nn.Module) -> str:
    """A hash of the modules' weights: whole sums of their bits, so neither thread count nor device matters."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        (
            name,
            list(weight.shape),
            int(weight.detach().contiguous().view(bits[weight.element_size()]).sum(dtype=torch.int64)),
        )
        for module in modules
        for name, weight in module.named_parameters()
    ]
    return digest(weights=sums)


class StageCache:
    """Folders named by a key; an entry appears whole or not at all, also with several writers.

    Nothing is locked: two processes that need the same entry at once both make it, and the first one's is kept. A lock
    would outlive a killed holder, and not every network file system has one.
    """

    def __init__(self, folder: Path | None, *, limit_mb: float = 0) -> None:
        """
        Args:
            folder: where entries live; None keeps nothing.
            limit_mb: of all entries of the folder and of those beside it, of the other stages; 0 = no limit.
        """
        self.folder, self.limit = folder, limit_mb * 2**20

    def find(self, key: str, *, load: Callable[[Path], Any]) -> Any:
        """The entry of that key, loaded; None if there is none, or none that can be loaded."""
        if self.folder is None or not (entry := self.folder / key).is_dir():
            return None
        try:
            with suppress(OSError):  # a cache of somebody else's can be read all the same
                os.utime(entry)  # used just now
            return load(entry)
        except UserError as error:
            if entry.is_dir():  # else somebody has just made room
                warnings.warn(f"cache entry {entry} is broken and is made again: {error}", stacklevel=2)
                _remove(entry)
            return None

    def get(
        self, key: str, *, make: Callable[[], Any], save: Callable[[Any, Path], Any], load: Callable[[Path], Any]
    ) -> Any:
        """The entry of that key, loaded; or what `make` gives, saved for the next time."""
        value = self.find(key, load=load)
        if value is None:
            value = make()
            self.put(key, value, save=save)
        return value

    def put(self, key: str, value: Any, *, save: Callable[[Any, Path], Any]) -> None:
        """Keep a value for the next time, and give up those that were not used for longest where there is no room.

        A cache that can't be written only costs time: a warning says so.
        """
        if self.folder is None:
            return
        entry = self.folder / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{key}{PARTIAL}", dir=self.folder))
            try:
                save(value, partial)
                size, now = _size(partial), partial.stat().st_mtime  # the file system's clock
                if self.limit and size > self.limit:
                    warnings.warn(
                        f"{size / 2**20:.0f} MB are more than cache.limit_mb={self.limit / 2**20:g}: used but not kept",
                        stacklevel=2,
                    )
                    return
                partial.replace(entry)
            except OSError:
                if not entry.is_dir():  # else another writer was first, with the same content
                    raise
                return
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            warnings.warn(
                f"cannot write the cache {self.folder}: {error}; the result is used but not kept",
                stacklevel=2,
            )
            return
        self._make_room(entry, now)

    def _make_room(self, newest: Path, now: float) -> None:
        """Remove the entries of all stages that were not used for longest, and what killed writers left behind.

        Entries may go while this looks at them: others make room as well.
        """
        assert self.folder is not None
        entries = []
        for stage in self._stages():
            for entry in _folders(stage):
                with suppress(OSError):
                    used = entry.stat().st_mtime
                    if PARTIAL in entry.name:
                        if now - used > ABANDONED:
                            _remove(entry)
                    elif self.limit and entry != newest:
                        entries.append((used, entry))
        if not self.limit:
            return
        room = self.limit - _size(newest)
        for _, entry in sorted(entries, reverse=True):
            room -= _size(entry)
            if room < 0:
                _remove(entry)

    def _stages(self) -> list[Path]:
        assert self.folder is not None
        return [self.folder] if self.folder.name not in STAGES else [self.folder.parent / name for name in STAGES]

    def __contains__(self, key: str) -> bool:
        return self.folder is not None and (self.folder / key).is_dir()


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return [folder / entry.name for entry in found if entry.is_dir(follow_symlinks=False)]
    except OSError:  # no such stage yet
        return []


def _size(entry: Path) -> int:
    """Bytes of the files of an entry; 0 where it has gone."""
    try:
        with os.scandir(entry) as found:
            return sum(file.stat().st_size for file in found)
    except OSError:
        return 0


def _remove(entry: Path) -> None:
    """Take an entry away: at once for all who look for it, then file by file."""
    gone = entry.with_name(f"{entry.name.split('.')[0]}{PARTIAL}{uuid.uuid4().hex}")
    with suppress(OSError):
        entry.replace(gone)
        shutil.rmtree(gone, ignore_errors=True)


def save_tensor(tensor: Tensor, folder: Path) -> None:
    """Write one tensor into an entry."""
    save_file({"tensor": tensor.contiguous().cpu()}, folder / TENSOR)


def load_tensor(folder: Path) -> Tensor:
    """Read what `save_tensor` wrote.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return load_file(folder / TENSOR)["tensor"]
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"cannot read {folder / TENSOR}: {one_line(error)}") from error
