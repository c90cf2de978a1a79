"""Results of stages kept between runs, under a hash of exactly what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dragdiff.errors import UserError, one_line
from dragdiff.reading import NotAFile, check_file, read_file, take_away

T = TypeVar("T")
VERSION = 1  # raised when a stage computes something else from the same inputs; results of studies bear it, too
TENSORS = "tensors.safetensors"
STAGES = ("lora", "inversion", "prompt")  # folders of the cache
NAME = re.compile(r"[0-9a-f]{32}(\.partial-.*)?$")  # of what is ours in them
PARTIAL = ".partial-"
CHECKSUM = "sha256"
LOCK = "lock"
TOTAL = "bytes"
DAMAGED = (UserError, FileNotFoundError, NotADirectoryError, NotAFile)  # what reading an entry raises then
ROOM = 0.9  # of the limit that eviction leaves in use, so that not each write has to evict
LOCK_SECONDS = 60  # a writer holds it while it writes one result to disk


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


def fingerprint(*modules: nn.Module, state: Sequence[str] = ()) -> str:
    """A hash of the modules' weights, as whole sums of their bits, so that neither thread count nor device matters, of
    their configurations and the kinds of their attention processors. Hooks are not seen.

    Args:
        state: names of attributes that change an output and are no weights.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    weights = [(name, weight.detach()) for module in modules for name, weight in module.named_parameters()]
    totals = [w.contiguous().view(bits[w.element_size()]).sum(dtype=torch.int64) for _, w in weights]
    numbers = torch.stack([total.to(totals[0].device) for total in totals]).tolist() if totals else []  # one transfer
    sums = [(name, list(w.shape), number) for (name, w), number in zip(weights, numbers, strict=True)]
    configs = [_settings(getattr(module, "config", None)) for module in modules]
    found = [
        (name, key, value)
        for module in modules
        for name, part in module.named_modules()
        for key, value in [("processor", _kind(part)), *((key, vars(part).get(key)) for key in state)]
        if value is not None and value is not False  # what is switched off is as what never was
    ]
    return digest(weights=sums, configs=json.dumps(configs, default=str), state=json.dumps(found, default=str))


def _settings(config: object) -> dict[str, object]:
    """Of a model of diffusers or transformers, without where it is from and what saving it adds."""
    plain = config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
    added = ("architectures", "dtype", "torch_dtype", "transformers_version")
    return {name: value for name, value in plain.items() if not name.startswith("_") and name not in added}


def _kind(part: nn.Module) -> str | None:
    """Of an attention layer's processor."""
    processor = getattr(part, "processor", None)
    return None if processor is None else type(processor).__qualname__


class StageCache:
    """Folders named by a key; an entry appears whole or not at all, also with several writers.

    All that writes or deletes holds one lock on the folder of all stages, which the system takes back from a process
    that is killed. Whoever holds it knows that a partial entry is what such a process left. Making a value needs no
    lock: two processes that want the same one both make it. A wait for another machine's training has no sure end,
    and what both get is the same.
    """

    def __init__(self, folder: Path | None, *, limit: int = 0) -> None:
        """
        Args:
            folder: where entries live, named for the stage; None keeps nothing.
            limit: of this folder and the other stages' beside it together, bytes; what was used longest ago goes
                first. 0 = none.
        """
        self.folder, self.limit = folder, limit

    def find(self, key: str, *, load: Callable[[Path], T]) -> T | None:
        """The entry of that key.

        Returns:
            It, loaded; None if there is none, also where it is evicted meanwhile, one that can't be read, or a damaged
            one, which is removed.
        """
        if self.folder is None:
            return None
        entry = self.folder / key
        try:
            value = _read(entry, load)
        except DAMAGED as error:
            if not os.path.lexists(entry):
                return None
            again = self._once_more(entry, load)
            if again is None:
                warnings.warn(f"cache entry {entry} is broken and is made again: {one_line(error)}", stacklevel=2)
                return None
            value = again
        except OSError as error:
            if _exists(entry):
                warnings.warn(f"cannot read the cache entry {entry}: {one_line(error)}; it is made again", stacklevel=2)
            return None
        with suppress(OSError):  # a cache that can only be read
            os.utime(entry)  # used now, by the clock of the file system
        return value

    def get(
        self, key: str, *, make: Callable[[], T], save: Callable[[T, Path], object], load: Callable[[Path], T]
    ) -> T:
        """The entry of that key, loaded; or what `make` gives, saved for the next time."""
        value = self.find(key, load=load)
        if value is None:
            value = make()
            self.put(key, value, save=save)
        return value

    def put(self, key: str, value: T, *, save: Callable[[T, Path], object]) -> None:
        """Keep a value for the next time. A cache that can't be written only costs time: a warning says so."""
        if self.folder is None:
            return
        entry = self.folder / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder.parent / LOCK, timeout=LOCK_SECONDS):
                self._sweep()
                partial = entry.with_name(f"{key}{PARTIAL}new")
                partial.mkdir()
                try:
                    save(value, partial)
                    (partial / CHECKSUM).write_bytes(_checksum(partial))
                    for file in partial.iterdir():  # safetensors' are for the owner alone, whatever the umask
                        file.chmod((partial / CHECKSUM).stat().st_mode)
                    size = _size(partial)
                    if self.limit and size > self.limit:
                        warnings.warn(
                            f"a result of {size / 1e6:.1f} MB is used but not kept: it is larger than the whole cache "
                            f"may be, {self.limit / 1e6:.1f} MB (cache.limit_gb)",
                            stacklevel=2,
                        )
                        return
                    crowded = self._crowded_by(size)
                    if not entry.is_dir():  # a file, or a link that leads nowhere
                        take_away(entry)
                    partial.replace(entry)
                except OSError:
                    if not entry.is_dir():  # else another writer was first, with the same content
                        raise
                    return
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                if crowded:
                    self._evict(spare=entry)
        except (
            OSError,
            NotImplementedError,
            SafetensorError,
        ) as error:  # a lock that can't be had in time is an OSError
            warnings.warn(
                f"cannot write the cache {self.folder}: {one_line(error)}; the result is used but not kept",
                stacklevel=2,
            )

    def __contains__(self, key: str) -> bool:
        return self.folder is not None and _exists(self.folder / key)

    def _once_more(self, entry: Path, load: Callable[[Path], T]) -> T | None:
        """What was damaged, if another process has made it anew by now; else None, and it is deleted.

        In a cache that can only be read, or where no lock can be had, it stays.
        """
        assert self.folder is not None
        with suppress(OSError, NotImplementedError), FileLock(self.folder.parent / LOCK, timeout=LOCK_SECONDS):
            try:
                return _read(entry, load)
            except DAMAGED:
                self._sweep()
                gone = entry.with_name(f"{entry.name}{PARTIAL}damaged")
                entry.replace(gone)
                take_away(gone)
        return None

    def _sweep(self) -> None:
        """Delete what killed writers left. Needs the lock."""
        for path in self._paths():
            if PARTIAL in path.name:
                with suppress(OSError):
                    take_away(path)

    def _crowded_by(self, size: int) -> bool:
        """Whether the limit may not hold with so many bytes more. Needs the lock.

        Looking at each of 10,000 entries takes most of a second: their sum is kept in a file. It errs upwards, as it
        does not see what people and readers delete; where it can't be read, all are looked at.
        """
        assert self.folder is not None
        total = self.folder.parent / TOTAL
        try:
            used = int(read_file(total)) + size
        except (OSError, ValueError):
            used = self.limit + 1
        if used > self.limit:
            take_away(total)  # until the eviction has counted
            return self.limit > 0
        total.write_text(str(used))
        return False

    def _evict(self, *, spare: Path) -> None:
        """Delete what was used longest ago until a tenth of the limit is free. Needs the lock."""
        assert self.folder is not None
        entries = []
        for path in self._paths():
            with suppress(OSError):
                entries.append((path.stat().st_mtime_ns, _size(path), path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= ROOM * self.limit:
                break
            if path != spare:
                gone = path.with_name(f"{path.name}{PARTIAL}evicted")
                with suppress(OSError):  # one that stays takes its room, and others go for it
                    path.replace(gone)  # at once, for who reads it
                    shutil.rmtree(gone)
                    total -= size
        (self.folder.parent / TOTAL).write_text(str(total))

    def _paths(self) -> Iterator[Path]:
        """Entries and partial ones of all stages, and nothing else that the folder may hold."""
        assert self.folder is not None
        for stage in STAGES:
            with suppress(OSError), os.scandir(self.folder.parent / stage) as found:
                yield from (Path(entry.path) for entry in found if NAME.match(entry.name))


def _read(entry: Path, load: Callable[[Path], T]) -> T:
    if read_file(entry / CHECKSUM) != _checksum(entry):
        raise UserError("its checksum differs")
    return load(entry)


def _exists(entry: Path) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # may not be looked at
        return False


def _checksum(entry: Path) -> bytes:
    summary = hashlib.sha256()
    for path in sorted(entry.iterdir()):
        if path.name != CHECKSUM:
            check_file(path)
            with path.open("rb") as file:
                summary.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return summary.hexdigest().encode()


def _size(entry: Path) -> int:
    """Bytes."""
    with os.scandir(entry) as files:
        return sum(file.stat().st_size for file in files)


def save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write named tensors into an entry."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / TENSORS)


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {folder / TENSORS}: {one_line(error)}") from error
