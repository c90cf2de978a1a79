"""Results of stages kept between runs, under a hash of exactly what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dragdiff.errors import UserError, one_line

VERSION = 1  # raised when a stage computes something else from the same inputs
TENSOR = "tensor.safetensors"


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
    """Folders named by a key; an entry appears whole or not at all, also with several writers."""

    def __init__(self, folder: Path | None) -> None:
        """
        Args:
            folder: where entries live; None keeps nothing.
        """
        self.folder = folder

    def find(self, key: str, *, load: Callable[[Path], Any]) -> Any:
        """The entry of that key, loaded; None if there is none, or none that can be loaded."""
        if self.folder is None or not (entry := self.folder / key).is_dir():
            return None
        try:
            return load(entry)
        except UserError as error:
            warnings.warn(f"cache entry {entry} is broken and is made again: {error}", stacklevel=2)
            shutil.rmtree(entry, ignore_errors=True)
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
        """Keep a value for the next time. A cache that can't be written only costs time: a warning says so."""
        if self.folder is None:
            return
        entry = self.folder / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=self.folder))
            try:
                save(value, partial)
                partial.replace(entry)
            except OSError:
                if not entry.is_dir():  # else another writer was first, with the same content
                    raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except OSError as error:
            warnings.warn(
                f"cannot write the cache {self.folder}: {error}; the result is used but not kept",
                stacklevel=2,
            )

    def __contains__(self, key: str) -> bool:
        return self.folder is not None and (self.folder / key).is_dir()


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
