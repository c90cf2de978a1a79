"""What comes to the web page as files and what goes from it as such: pictures, masks, samples, results."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from dragdiff.config import Config, to_files
from dragdiff.data import readers
from dragdiff.data.sample import EditSample, load_image
from dragdiff.errors import UserError

SAMPLE_FILES = re.compile(
    r"(edit|points|prompt)\.json|meta_data\.pkl|mask\.png|(image|original|original_image|origin_image)\.(png|jpe?g|webp)"
)
MARKERS = (".json", ".pkl")  # one of these makes pictures a sample
DOWNLOADED = ("edited.png", "comparison.png", "trajectory.gif", "metrics.json")
URL = "data:image/png;base64,"


def read_upload(
    files: Sequence[tuple[str, bytes]], wanted: str | None, megabytes: float
) -> EditSample | tuple[np.ndarray, str] | list[str]:
    """What a visitor has uploaded.

    Args:
        files: their names, without folders, and contents: a picture, a zip of samples, or the files of a sample.
        wanted: of a zip's samples.
        megabytes: the most that they may have, also unpacked.

    Returns:
        A sample; or a picture (H, W, 3) uint8 and its name; or, where none is wanted of several samples, their names.

    Raises:
        UserError: says what is wrong with them.
    """
    if not files:
        raise UserError("there is no file in this upload")
    limit = int(megabytes * 2**20)
    if sum(len(content) for _, content in files) > limit:
        raise UserError(f"the upload is larger than {megabytes:g} MB")
    name = plain_name(Path(files[0][0]).stem if wanted is None else wanted)
    if len(files) == 1 and zipfile.is_zipfile(io.BytesIO(files[0][1])):
        found = _samples(files[0][1])
        if len(found) > 1 and wanted not in found:
            return list(found)
        chosen = wanted if wanted in found else next(iter(found))
        name = plain_name(chosen.rpartition("/")[2]) if chosen else name
        files = _unzipped(files[0][1], found[chosen], limit)
    with tempfile.TemporaryDirectory() as folder, _unnamed(folder):
        if len(files) == 1:
            path = Path(folder) / (plain_name(files[0][0]) or "picture")
            path.write_bytes(files[0][1])
            return load_image(path), name
        if not any(file.endswith(MARKERS) for file, _ in files):
            raise UserError("these files are no sample, which needs edit.json or meta_data.pkl: open one picture")
        for file, content in files:
            if SAMPLE_FILES.fullmatch(file):
                (Path(folder) / file).write_bytes(content)
        return readers.read_sample(Path(folder), name)


@contextmanager
def _unnamed(folder: str) -> Iterator[None]:
    """A reader's message names the file, not the server's folder."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}/", "").replace(folder, "the sample")) from error


def export(sample: EditSample, *, dragbench: bool) -> bytes:
    """
    Returns:
        A zip with the sample's folder, in our format or DragBench's.
    """
    with tempfile.TemporaryDirectory() as folder:
        write = readers.write_dragbench if dragbench else readers.write_folder
        write(sample, Path(folder) / sample.name)
        return _zipped(Path(folder), {})


def results(sample: EditSample, config: Config, folder: Path) -> bytes:
    """
    Returns:
        A zip with all that a run has made in its folder, and with the edit and the config that repeat it.
    """
    with tempfile.TemporaryDirectory() as made:
        readers.write_folder(sample, Path(made) / sample.name)
        config = dataclasses.replace(config, sample=sample.name)
        if config.generate.enabled:
            mask = f"{sample.name}/mask.png" if sample.mask is not None else ""
            config = dataclasses.replace(config, sample="", points=sample.points.tolist(), mask=mask)
        more = {f"{sample.name}/{name}": (folder / name).read_bytes() for name in DOWNLOADED}
        more |= {f"{sample.name}/{name}": text.encode() for name, text in to_files(config).items()}
        return _zipped(Path(made), more)


def mask_url(mask: np.ndarray) -> str:
    """A mask as the page has it.

    Args:
        mask: (H, W) bool.

    Returns:
        The data URL of a PNG, white where True.
    """
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
    return URL + base64.b64encode(buffer.getvalue()).decode()


def read_mask(given: object) -> np.ndarray | None:
    """The page's mask, a data URL of a PNG.

    Returns:
        (H, W) uint8, or None where none is given.

    Raises:
        UserError: it is no such thing.
    """
    if not given:
        return None
    try:
        encoded = str(given).removeprefix(URL)
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["PNG"]) as image:
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, binascii.Error, Image.DecompressionBombError) as error:
        raise UserError("the mask can't be read: draw it again") from error


def plain_name(name: str) -> str:
    """Letters, digits and a few signs, so that it may name a file anywhere."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:60].strip("._-") or "picture"


@contextmanager
def _readable_zip(content: bytes) -> Iterator[zipfile.ZipFile]:
    """
    Raises:
        UserError: damaged or encrypted, as soon as it shows.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, ValueError, NotImplementedError, EOFError) as error:
        raise UserError("the zip can't be read, it may be damaged or encrypted") from error


def _samples(content: bytes) -> dict[str, list[zipfile.ZipInfo]]:
    """The folders in a zip that are samples, with their files.

    Raises:
        UserError: there is none, or as `_readable_zip`.
    """
    folders: dict[str, list[zipfile.ZipInfo]] = {}
    with _readable_zip(content) as archive:
        for info in archive.infolist():
            folder, _, file = info.filename.rpartition("/")
            if SAMPLE_FILES.fullmatch(file):
                folders.setdefault(folder, []).append(info)
    found = {name: files for name, files in folders.items() if any(f.filename.endswith(MARKERS) for f in files)}
    if not found:
        raise UserError("there is no sample in this zip: it needs edit.json or meta_data.pkl")
    return found


def _unzipped(content: bytes, members: list[zipfile.ZipInfo], limit: int) -> list[tuple[str, bytes]]:
    """Files of a zip, in memory.

    Raises:
        UserError: they are more than `limit` bytes, or as `_readable_zip`.
    """
    files, size = [], 0
    with _readable_zip(content) as archive:
        for info in members:
            with archive.open(info) as member:
                data = member.read(limit - size + 1)
            size += len(data)
            if size > limit:
                raise UserError(f"unpacked the zip is larger than {limit / 2**20:g} MB")
            files.append((info.filename.rpartition("/")[2], data))
    return files


def _zipped(folder: Path, more: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
        for name, content in more.items():
            archive.writestr(name, content)
    return buffer.getvalue()
