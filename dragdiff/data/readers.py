"""Samples on disk: one folder each, in our own plain format or in one of those of the published data sets.

| format            | files of one folder                                                                    |
|-------------------|----------------------------------------------------------------------------------------|
| plain (ours)      | ``image.png`` (or jpg, webp), ``edit.json`` {"prompt", "points"}, ``mask.png`` if any  |
| DragBench, -DR    | ``original_image.png``, ``meta_data.pkl``                                              |
| Drag100           | ``original.jpg``, ``mask.png``, ``points.json`` {"points"}                             |
| SDE-Drag          | ``origin_image.png``, ``mask.png``, ``prompt.json`` {"prompt", "source", "target"}     |
| a result          | ``edited.png``, ``metrics.json`` {"prompt"}, ``mask.png`` if any; it has no points     |

In all of them points are (x, y) in px of the image, and white (or 1) in a mask means editable.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dragdiff.aliases import Json
from dragdiff.data.safe_pickle import PickledArray, load_pickle
from dragdiff.data.sample import EditSample, FilePath, load_image, load_mask
from dragdiff.errors import UserError
from dragdiff.reading import read_json

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_folder(path: FilePath) -> EditSample:
    """Read a folder in the plain format; its points are ``[[[x, y], [x, y]], ...]`` or flat, in px.

    Raises:
        UserError: for anything missing, unreadable or malformed, with the path.
    """
    folder = Path(path)
    edit = _read_json(folder / "edit.json", "prompt", "points")
    images = sorted(f for f in folder.glob("image.*") if f.suffix.lower() in _IMAGE_SUFFIXES)
    if len(images) != 1:
        found = " and ".join(f.name for f in images) or "no image.png"
        raise UserError(f"{folder} holds {found}: it needs one image.png (or .jpg, .webp)")
    mask_file = folder / "mask.png"
    mask = load_mask(mask_file) if os.path.lexists(mask_file) else None
    return _sample(folder, load_image(images[0]), edit["prompt"], edit["points"], mask)


def write_folder(sample: EditSample, path: FilePath) -> None:
    """Write a sample in the plain format; `read_folder` gives it back exactly, named after the folder.

    The folder appears as a whole or not at all.

    Raises:
        UserError: when ``path`` is there already and not an empty folder, or cannot be written.
    """
    with _new_folder(path) as folder:
        Image.fromarray(sample.image).save(folder / "image.png")
        if sample.mask is not None:
            Image.fromarray(sample.mask.astype("uint8") * 255).save(folder / "mask.png")
        edit = {"prompt": sample.prompt, "points": sample.points.tolist()}
        (folder / "edit.json").write_text(json.dumps(edit, ensure_ascii=False, indent=2) + "\n", "utf-8")


def read_dragbench(path: FilePath) -> EditSample:
    """Read a folder of DragBench; its pickle is untrusted, so nothing that it names is run.

    A mask without any editable pixel means there that none was drawn: all of the image may change.

    Raises:
        UserError: for anything missing, unreadable, malformed or refused, with the path.
    """
    folder = Path(path)
    file = folder / "meta_data.pkl"
    meta = load_pickle(file)
    if not isinstance(meta, dict) or not meta.keys() >= {"prompt", "points", "mask"}:
        raise UserError(f"{file} is not of DragBench: it needs a prompt, points and a mask")
    points, mask = meta["points"], meta["mask"]
    if isinstance(points, PickledArray):
        points = points.array.tolist()
    elif isinstance(points, list | tuple):
        points = [p.array.tolist() if isinstance(p, PickledArray) else p for p in points]
    if not isinstance(points, list) or not all(map(_is_point, points)):
        raise UserError(f"{file} holds malformed points: they must be a list of [x, y] in px")
    if not isinstance(mask, PickledArray):
        raise UserError(f"{file} holds no mask: it must be an array (height, width) of 0 and 1")
    drawn = mask.array if mask.array.any() else None
    return _sample(folder, load_image(folder / "original_image.png"), meta["prompt"], points, drawn)


def write_dragbench(sample: EditSample, path: FilePath) -> None:
    """Write a sample as a folder of DragBench, with ``user_drag.png`` as its picture of the drags.

    `read_dragbench` gives it back, named after the folder and with a mask of all pixels where there was none:
    other programs may take one without any as nothing that may change. The pickle loads with numpy 1 and 2.
    The folder appears as a whole or not at all.

    Raises:
        UserError: when ``path`` is there already and not an empty folder, or cannot be written.
    """
    from dragdiff.output import annotated  # here, since only this needs what it imports

    numbers = sample.points.reshape(-1, 2).tolist()
    mask = np.ones(sample.image.shape[:2], bool) if sample.mask is None else sample.mask
    meta = {
        "prompt": sample.prompt,
        "points": [[int(n) if n.is_integer() else n for n in point] for point in numbers],
        "mask": mask.astype(np.uint8),
    }
    with _new_folder(path) as folder:
        Image.fromarray(sample.image).save(folder / "original_image.png")
        annotated(sample).save(folder / "user_drag.png")
        (folder / "meta_data.pkl").write_bytes(_pickled(meta))


def read_drag100(path: FilePath) -> EditSample:
    """Read a folder of Drag100, which has no prompts: the sample's is empty.

    Raises:
        UserError: for anything missing, unreadable or malformed, with the path.
    """
    folder = Path(path)
    points = _read_json(folder / "points.json", "points")["points"]
    return _sample(folder, load_image(folder / "original.jpg"), "", points, load_mask(folder / "mask.png"))


def read_sde_drag(path: FilePath) -> EditSample:
    """Read a folder as SDE-Drag saves it (DragBench-S).

    Raises:
        UserError: for anything missing, unreadable or malformed, with the path.
    """
    folder = Path(path)
    file = folder / "prompt.json"
    edit = _read_json(file, "prompt", "source", "target")
    try:
        points = list(zip(edit["source"], edit["target"], strict=True))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: source and target must be lists of equal length") from error
    image, mask = load_image(folder / "origin_image.png"), load_mask(folder / "mask.png")
    return _sample(folder, image, edit["prompt"], points, mask)


def read_result(path: FilePath) -> EditSample:
    """Read the folder of an edit's result: its picture, with the edit's prompt and mask and without points, to drag on.

    Raises:
        UserError: for anything missing, unreadable or malformed, with the path.
    """
    folder = Path(path)
    prompt = _read_json(folder / "metrics.json").get("prompt", "")
    mask = load_mask(folder / "mask.png") if os.path.lexists(folder / "mask.png") else None
    return _sample(folder, load_image(folder / "edited.png"), prompt, [], mask)


# A folder is a sample when it holds one of these files, in this order.
_READERS: dict[str, Callable[[FilePath], EditSample]] = {
    "edit.json": read_folder,
    "meta_data.pkl": read_dragbench,
    "points.json": read_drag100,
    "prompt.json": read_sde_drag,
    "edited.png": read_result,
}


def read_sample(path: FilePath, name: str | None = None) -> EditSample:
    """Read one folder in whichever of the formats it has; ``name`` takes the place of the folder's name.

    Raises:
        UserError: for a folder in none of the formats, or one that cannot be read.
    """
    reader = _reader(Path(path))
    if reader is None:
        raise UserError(f"{path} is no sample: it holds no {', '.join(_READERS)}")
    sample = reader(path)
    return sample if name is None else replace(sample, name=name)


def find_samples(path: FilePath) -> list[Path]:
    """The folders of all samples at or below ``path``, sorted; nothing is read, so some may be broken.

    Hidden folders and folders inside of a sample are left out; links to folders are followed.

    Raises:
        UserError: when ``path`` is not a folder or there is no sample in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the folder of a sample, or one with samples below it")
    found, visited = [], set()
    for parent, children, _ in os.walk(root, followlinks=True):
        folder = Path(parent)
        place = folder.resolve()
        is_sample = _reader(folder) is not None
        if is_sample and place not in visited:
            found.append(folder)
        if is_sample or place in visited:  # a link may lead back up
            children.clear()
        visited.add(place)
        children[:] = sorted(child for child in children if not child.startswith("."))
    if not found:
        raise UserError(f"{root} holds no sample: no {', '.join(_READERS)} in it or in a folder below it")
    return found


def sample_names(folders: Sequence[Path], root: FilePath) -> list[str]:
    """
    Returns:
        A name for each folder, unique in the list: its path below ``root``, joined by "-"; ``root`` itself gets its own
        name. Should two names be equal, the later gets a number at its end.
    """
    names: dict[str, None] = {}
    for folder in folders:
        stem = name = "-".join(folder.relative_to(root).parts) or folder.absolute().name
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names[name] = None
    return list(names)


def convert(source: FilePath, destination: FilePath) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Write all samples at or below ``source`` in the plain format, in the same tree of folders.

    Returns:
        The folders written, and for each sample that failed its folder and the reason: one that is broken,
        or already there, does not keep back the others.

    Raises:
        UserError: when there are no samples, or ``destination`` lies inside ``source``.
    """
    source, destination = Path(source), Path(destination)
    folders = find_samples(source)
    if destination.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{destination} lies inside {source}: choose a folder outside of it to write to")
    converted, failures = [], []
    for folder in folders:
        target = destination / folder.relative_to(source)
        try:
            write_folder(read_sample(folder), target)
            converted.append(target)
        except UserError as error:
            failures.append((folder, str(error)))
    return converted, failures


@contextmanager
def _new_folder(path: FilePath) -> Iterator[Path]:
    """A folder to write to, which becomes ``path`` at the end, or vanishes when something goes wrong.

    Raises:
        UserError: when ``path`` is there already and not an empty folder, or cannot be written.
    """
    folder = Path(path).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another one or remove it")
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _pickled(meta: Mapping[str, object]) -> bytes:
    """Pickle a dict with one array by the name of its module in numpy 1, which numpy 2 understands as well."""
    data = pickle.dumps(meta, 2)  # later protocols write names with their lengths
    for instruction, name, start in pickletools.genops(data):
        if instruction.name == "GLOBAL" and str(name).startswith("numpy._core."):
            return data[:start] + data[start:].replace(b"numpy._core.", b"numpy.core.", 1)
    return data


def _reader(folder: Path) -> Callable[[FilePath], EditSample] | None:
    for marker, reader in _READERS.items():
        if os.path.lexists(folder / marker):  # a dangling link is a broken sample, not none
            return reader
    return None


def _sample(folder: Path, image: NDArray, prompt: str, points: ArrayLike | list, mask: NDArray | None) -> EditSample:
    try:
        return EditSample(image, prompt, points, mask, folder.absolute().name)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def _read_json(path: Path, *keys: str) -> Json:
    """The object in a JSON file, which must have these keys."""
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object with {' and '.join(keys)}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{path} has no {' and no '.join(missing)}: add it")
    return content


def _is_point(value: object) -> bool:
    if not isinstance(value, list | tuple):
        return False
    return len(value) == 2 and all(isinstance(number, int | float) for number in value)
