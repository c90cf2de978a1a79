"""Where results are kept: a folder, or any place that fsspec can reach, shared by all workers."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dragdiff.aliases import Json
from dragdiff.errors import UserError, one_line
from dragdiff.reading import MOST_JSON, NotAFile, parsed, read_file, take_away

RESULT, SCORES = "edit.json", "scores.json"
PARTIAL = ".partial"
NOTHING = (
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
    NotAFile,
)  # raised where there is no such file


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
                if os.path.isdir(self.path(path)):  # nothing of ours
                    take_away(self.path(path))
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
            self._take_away(self.path("results", key))

    def has_result(self, key: str) -> bool:
        """Whether there is one, which may be damaged."""
        with _storing(key):
            return self.files.isfile(self.path("results", key, RESULT))

    def read(self, path: str) -> bytes | None:
        """
        Returns:
            A file's content; None where there is none.

        Raises:
            StoreError: the place can't be read.
        """
        return self.read_many([path]).get(path)

    def read_many(self, paths: Sequence[str], *, most: int | None = None) -> dict[str, bytes]:
        """As `read` of many; at once, where the file system can do that.

        Args:
            most: bytes; what is larger counts as missing.

        Returns:
            By path, the contents that there are.
        """
        places = [self.path(path) for path in paths]
        contents = [_local(place, most) for place in places] if self._local else self._fetched(places)
        found = {}
        for path, content in zip(paths, contents, strict=True):
            if isinstance(content, bytes):
                found[path] = content
            elif not isinstance(content, NOTHING):
                raise StoreError(f"cannot read {self.path(path)}: {one_line(content)}") from content
        return found

    def _fetched(self, places: list[str]) -> list[bytes | Exception]:
        everything: list[None] = [None] * len(places)
        try:
            contents: list[bytes | Exception] = self.files.cat_ranges(places, everything, everything, on_error="return")
        except Exception as error:  # whatever a file system raises
            raise StoreError(f"cannot read {self.root}: {one_line(error)}") from error
        return contents

    def read_json(self, path: str) -> Json | None:
        """
        Returns:
            The object in a JSON file; None where there is none, or it is damaged.

        Raises:
            StoreError: as `read`.
        """
        return self.read_jsons([path]).get(path)

    def read_jsons(self, paths: Sequence[str]) -> dict[str, Json]:
        """As `read_json` of many; at once, where the file system can do that.

        Returns:
            By path, the objects that there are.
        """
        found = {}
        for path, content in self.read_many(paths, most=MOST_JSON).items():
            with suppress(ValueError):
                if isinstance(value := parsed(content), dict):
                    found[path] = value
        return found

    def write_json(self, path: str, value: object) -> None:
        """Write a value as JSON, its keys sorted, as `write` does."""
        self.write(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())

    def remove(self, path: str) -> None:
        """Delete a file, if it is there, and whatever stands in its place.

        Raises:
            StoreError: it can't be deleted.
        """
        with _storing(path):
            self._take_away(self.path(path))

    def _take_away(self, place: str) -> None:
        if self._local:
            take_away(place)
        elif self.files.exists(place):
            self.files.rm(place, recursive=True)


def _local(place: str, most: int | None) -> bytes | Exception:
    try:
        return read_file(place, most=most)
    except OSError as error:
        return error


@contextmanager
def _storing(path: str) -> Iterator[None]:
    """Failures of the file system as one line."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # whatever a file system raises
        raise StoreError(f"cannot use {path} in the results: {one_line(error)}") from error
