"""Where results are kept: a folder, or any place that fsspec can reach, shared by all workers."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dragdiff.errors import UserError, one_line

RESULT, SCORES = "edit.json", "scores.json"
PARTIAL = ".partial"


class StoreError(UserError):
    """The place of the results can't be read or written: no sample's fault, so that a study stops."""


class Store:
    """Results under their keys. A result is there as a whole or not at all, whatever happens to its writer.

    | path                  | what                                                                             |
    |-----------------------|----------------------------------------------------------------------------------|
    | `results/KEY/`        | `edited.png`, `edit.json`, `config.yaml`, and `scores.json` once it is scored    |
    | `failures/KEY.json`   | why an edit failed                                                               |
    | `STUDY/`              | `study.json`, `report/`                                                          |
    """

    def __init__(self, url: str) -> None:
        """
        Args:
            url: a folder, or an fsspec URL (s3://bucket/folder, ...).

        Raises:
            StoreError: no such file system, or a package for it is missing.
        """
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except Exception as error:  # whatever a file system's package raises
            raise StoreError(f"results is {url!r}: {one_line(error)}") from error
        self.url = self.files.unstrip_protocol(self.root)
        self._local = isinstance(self.files, LocalFileSystem)
        if self._local:
            self.files.auto_mkdir = True

    def path(self, *parts: str) -> str:
        """Where something is in the file system, by its path here."""
        return "/".join([self.root.rstrip("/"), *parts])

    def write(self, path: str, content: bytes) -> None:
        """Write one file, whole or not at all.

        Raises:
            StoreError: it can't be written.
        """
        with _storing(path):
            if not self._local:  # there an object appears when it is complete
                self.files.pipe_file(self.path(path), content)
                return
            partial = f"{self.path(path)}.{uuid.uuid4().hex}{PARTIAL}"
            try:
                self.files.pipe_file(partial, content)
                os.replace(partial, self.path(path))
            finally:
                Path(partial).unlink(missing_ok=True)

    def write_result(self, key: str, files: dict[str, bytes]) -> None:
        """Write the files of a result; one that is there already stays, unless it is damaged.

        Args:
            files: contents by name.

        Raises:
            StoreError: they can't be written.
        """
        if not self._local:  # what is not marked by RESULT, which comes last, does not count
            for name in sorted(files, key=lambda name: name == RESULT):
                self.write(f"results/{key}/{name}", files[name])
            return
        partial = Path(self.path("results", f"{key}.{uuid.uuid4().hex}{PARTIAL}"))
        with _storing(f"results/{key}"):
            try:
                for name, content in files.items():
                    self.files.pipe_file(str(partial / name), content)
                try:
                    partial.rename(self.path("results", key))
                except OSError:
                    if not self.has_result(key):  # else another writer was first, with the same content
                        self.discard(key)
                        partial.rename(self.path("results", key))
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def discard(self, key: str) -> None:
        """Take away a damaged result.

        Raises:
            StoreError: it can't be deleted.
        """
        with _storing(f"results/{key}"):
            if self.files.exists(self.path("results", key)):
                self.files.rm(self.path("results", key), recursive=True)

    def has_result(self, key: str) -> bool:
        """Whether there is one, which may be damaged."""
        with _storing(key):
            return self.files.exists(self.path("results", key, RESULT))

    def read(self, path: str) -> bytes | None:
        """
        Returns:
            A file's content; None where there is none.

        Raises:
            StoreError: the place can't be read.
        """
        try:
            return self.files.cat_file(self.path(path))
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a file system raises
            raise StoreError(f"cannot read {self.path(path)}: {one_line(error)}") from error

    def read_json(self, path: str) -> Any:
        """
        Returns:
            The value in a JSON file; None where there is none, or it is damaged.

        Raises:
            StoreError: as `read`.
        """
        content = self.read(path)
        return None if content is None else _parsed(content)

    def read_jsons(self, paths: Sequence[str]) -> dict[str, Any]:
        """As `read_json` of many; at once, where the file system can do that.

        Returns:
            By path, the values that there are.
        """
        places = [self.path(path) for path in paths]
        try:
            everything: list[None] = [None] * len(places)
            contents = self.files.cat_ranges(places, everything, everything, on_error="return")
        except Exception as error:  # whatever a file system raises
            raise StoreError(f"cannot read {self.root}: {one_line(error)}") from error
        found = {}
        for path, content in zip(paths, contents, strict=True):
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                raise StoreError(f"cannot read {self.path(path)}: {one_line(content)}") from content
            if isinstance(content, bytes) and (value := _parsed(content)) is not None:
                found[path] = value
        return found

    def write_json(self, path: str, value: object) -> None:
        """Write a value as JSON, its keys sorted, as `write` does."""
        self.write(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def remove(self, path: str) -> None:
        """Delete a file, if it is there.

        Raises:
            StoreError: it can't be deleted.
        """
        with _storing(path):
            if self.files.exists(self.path(path)):
                self.files.rm(self.path(path))


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


@contextmanager
def _storing(path: str) -> Iterator[None]:
    """Failures of the file system as one line."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # whatever a file system raises
        raise StoreError(f"cannot use {path} in the results: {one_line(error)}") from error
