"""What an edit leaves behind: pictures, animation, numbers, the resolved config."""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dragdiff import methods
from dragdiff.aliases import Json
from dragdiff.config import Config, to_files
from dragdiff.errors import UserError

if TYPE_CHECKING:
    from dragdiff.data.sample import EditSample
    from dragdiff.job import EditResult

HANDLE, TARGET, DARK = (228, 26, 28), (31, 90, 220), (20, 20, 20)
SHOWN_SIDE = 384  # px: smaller pictures are enlarged in comparisons, so that one sees something
SHEET_SIDE = 1200  # px: larger pictures are made smaller in comparisons
ANIMATED_SIDE = 640  # px: larger pictures are made smaller in animations


def new_folder(config: Config) -> Path:
    """Make `<output.folder>/<output.name>/`, numbered where that is taken, and write the resolved config into it.

    Raises:
        UserError: it can't be written.
    """
    first = _first_choice(config)
    try:
        for number in itertools.count(1):
            folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        _write_texts(folder, to_files(config))
    except OSError as error:
        raise UserError(f"cannot write to output.folder {config.output.folder!r}: {error.strerror or error}") from error
    return folder


def unused(config: Config) -> str:
    """An `output.name` under which nothing is yet: the wanted one, or that with a number."""
    first = _first_choice(config)
    names = itertools.chain([config.output.name], (f"{config.output.name}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(first.with_name(Path(name).name)))


def check_writable(config: Config) -> None:
    """Whether `new_folder` will be able to write; leaves nothing behind.

    Raises:
        UserError: it won't.
    """
    parent = _first_choice(config).absolute().parent
    nearest = next(place for place in (parent, *parent.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to output.folder {config.output.folder!r}: {nearest} is no folder that can be written to "
            f"({error.strerror or error})"
        ) from error


def _first_choice(config: Config) -> Path:
    return Path(config.output.folder).expanduser() / config.output.name


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file to write that takes its place only when it is complete, also when it is interrupted."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save(result: EditResult, folder: Path) -> list[Path]:
    """Write an edit's files, each whole or not at all.

    Returns:
        Where they are: `edited.png`, `comparison.png`, `trajectory.gif`, `metrics.json`; `mask.png` where the sample
        has one, so that the result can be dragged on; `config.yaml`, and with it a method's file of the user's own.
    """
    mask, texts = result.sample.mask, to_files(result.config)
    with written(folder / "edited.png") as file:
        Image.fromarray(result.image).save(file)
    with written(folder / "comparison.png") as file:
        comparison(result).save(file)
    with written(folder / "trajectory.gif") as file:
        _save_gif(animation(result), file)
    if mask is not None:
        with written(folder / "mask.png") as file:
            Image.fromarray(np.asarray(mask).astype(np.uint8) * 255).save(file)
    _write_texts(folder, {"metrics.json": json.dumps(metrics(result), indent=2) + "\n"} | texts)
    pictures = ["edited.png", "comparison.png", "trajectory.gif", *([] if mask is None else ["mask.png"])]
    return [folder / name for name in (*pictures, "metrics.json", *texts)]


def _write_texts(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        with written(folder / name) as file:
            file.write_text(content, "utf-8")


def metrics(result: EditResult) -> Json:
    """An edit's numbers.

    Returns:
        Of each pair its positions and distances as tracked (px of the image); steps, stop reason, seconds for each
        stage, peak memory (MB).
    """
    points = []
    for number, (handle, target) in enumerate(result.sample.points.tolist()):
        point = {"handle": handle, "target": target}
        point["distance_before_px"] = round(float(result.distance_before[number]), 3)
        if result.trajectory is not None and result.distance_after is not None:
            point["tracked"] = result.trajectory[-1, number].tolist()
            point["distance_after_px"] = round(float(result.distance_after[number]), 3)
        points.append(point)
    return {
        "method": methods.find(result.config.method).name,
        "prompt": result.sample.prompt,
        "points": points,
        "steps": result.steps,
        "stop_reason": result.stop_reason,
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
        "peak_memory_mb": round(result.peak_memory_mb, 1),
    }


def comparison(result: EditResult) -> Image.Image:
    """Source with arrows and mask | edited picture; small pictures are enlarged, large ones made smaller."""
    scale = _scale(result.sample, least=SHOWN_SIDE, most=SHEET_SIDE)
    left, right = annotated(result.sample, scale=scale), _resized(result.image, scale)
    gap = max(4, left.width // 60)
    sheet = Image.new("RGB", (left.width * 2 + gap, left.height), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + gap, 0))
    return sheet


def side_by_side(results: Sequence[EditResult]) -> Image.Image:
    """The source and what each method has made of it, with its name, seconds and distances.

    Args:
        results: of one sample.
    """
    sample = results[0].sample
    scale = _scale(sample, least=SHOWN_SIDE, most=ANIMATED_SIDE)
    pictures = [annotated(sample, scale=scale), *(_resized(result.image, scale) for result in results)]
    captions = ["source", *map(_in_words, results)]
    letters = max(12, pictures[0].width // 26)
    font = ImageFont.load_default(letters)
    gap, line = max(4, pictures[0].width // 60), round(1.4 * letters)
    width, height = pictures[0].size
    sheet = Image.new("RGB", ((width + gap) * len(pictures) - gap, height + 2 * gap + 2 * line), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        sheet.paste(picture, (column * (width + gap), 0))
        pen.multiline_text((column * (width + gap) + gap, height + gap), caption, fill=DARK, font=font)
    return sheet


def _in_words(result: EditResult) -> str:
    name, seconds = methods.find(result.config.method).name, sum(result.seconds.values())
    if result.distance_after is None:
        return f"{name}, {seconds:.1f} s\nnot tracked"
    before, after = float(result.distance_before.mean()), float(result.distance_after.mean())
    return f"{name}, {seconds:.1f} s\n{before:.1f} px to the target, {after:.1f} after (tracked)"


def animation(result: EditResult) -> list[Image.Image]:
    """An edit's pictures in the order of time, of equal size.

    Returns:
        The source; previews and edited picture with the way that each handle has gone; the edited picture.
    """
    scale = _scale(result.sample, least=SHOWN_SIDE, most=ANIMATED_SIDE)
    if result.trajectory is None:
        return [annotated(result.sample, scale=scale), _resized(result.image, scale)]
    previews = [frame(preview, result.sample, result.trajectory[: step + 1]) for step, preview, _ in result.frames]
    arrived = frame(result.image, result.sample, result.trajectory)
    return [annotated(result.sample, scale=scale), *previews, arrived, _resized(result.image, scale)]


def frame(picture: np.ndarray, sample: EditSample, trajectory: np.ndarray) -> Image.Image:
    """A preview or picture (h, w, 3) uint8, enlarged or made smaller to be looked at, with the points on it.

    Args:
        trajectory: (K, N, 2), (x, y) in px of the sample's image: each handle's way so far.
    """
    scale = _scale(sample, least=SHOWN_SIDE, most=ANIMATED_SIDE)
    size = max(1, round(sample.width * scale)), max(1, round(sample.height * scale))
    pairs = np.stack([trajectory[-1], sample.targets], axis=1)
    shown = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    return _draw(shown, pairs * scale, ways=trajectory.swapaxes(0, 1) * scale)


def annotated(sample: EditSample, *, scale: float = 1) -> Image.Image:
    """The source with its fixed area dimmed and an arrow from each handle (red) to its target (blue).

    Args:
        scale: by how much it is enlarged, < 1: made smaller.
    """
    picture = _resized(sample.image, scale)
    if sample.mask is not None:
        dimmed = Image.blend(picture, Image.new("RGB", picture.size, DARK), 0.45)
        mask = Image.fromarray(np.array(sample.mask)).convert("L").resize(picture.size)
        picture = Image.composite(picture, dimmed, mask)
    return _draw(picture, sample.points * scale)


def _scale(sample: EditSample, *, least: int, most: int | None = None) -> float:
    side = max(sample.width, sample.height)
    if most is not None and side > most:
        return most / side
    return max(1, math.ceil(least / side))


def _resized(picture: np.ndarray, scale: float) -> Image.Image:
    image = Image.fromarray(picture)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _draw(picture: Image.Image, pairs: np.ndarray, *, ways: np.ndarray | None = None) -> Image.Image:
    """Lay arrows over a picture, smoothly: drawn larger and scaled down.

    Args:
        pairs: (N, 2, 2), (handle, target) as (x, y) in px of the picture.
        ways: (N, K, 2), where each handle has been.
    """
    side = max(picture.size)
    smooth = 3 if side <= 1024 else 1
    layer = Image.new("RGBA", (picture.width * smooth, picture.height * smooth), (*DARK, 0))
    pen = ImageDraw.Draw(layer)
    radius = max(4.0, side / 100) * smooth

    def line(positions: np.ndarray, colour: str | tuple[int, int, int], width: float) -> None:
        pen.line([tuple(p) for p in positions.tolist()], fill=colour, width=round(width * radius), joint="curve")

    def dot(centre: np.ndarray, colour: str | tuple[int, int, int], size: float) -> None:
        pen.circle(tuple(centre.tolist()), size * radius, fill=colour)

    for way in [] if ways is None else ways * smooth:
        line(way, HANDLE, 0.5)
    for handle, target in pairs * smooth:
        length = float(np.linalg.norm(target - handle))
        if length > 4 * radius:
            along = (target - handle) / length
            across = np.array([-along[1], along[0]])
            tip = target - 1.2 * radius * along
            head = tip - np.array([[0], [2 * radius]]) * along + np.array([[0], [radius]]) * across
            wings = np.stack([head[1], head[0], head[1] - 2 * radius * across])
            for colour, width in ((DARK, 1.1), ("white", 0.6)):
                line(np.stack([handle, tip]), colour, width)
                line(wings, colour, width)
        elif length > 0:
            line(np.stack([handle, target]), "white", 0.6)
        for centre, colour, size in ((target, TARGET, 1.0), (handle, HANDLE, 1.0 if length > radius else 0.5)):
            dot(centre, "white", size + 0.25)
            dot(centre, colour, size)
    return Image.alpha_composite(picture.convert("RGBA"), layer.resize(picture.size, Image.Resampling.BOX)).convert(
        "RGB"
    )


def _save_gif(pictures: Sequence[Image.Image], path: Path) -> None:
    """With one palette for all frames, so that what stands still does not flicker."""
    small = [picture.resize((96, 96)) for picture in pictures]
    strip = Image.new("RGB", (96 * len(small), 96))
    for index, picture in enumerate(small):
        strip.paste(picture, (96 * index, 0))
    marks = [*HANDLE, *TARGET, *DARK, 255, 255, 255]
    palette = strip.quantize(256 - len(marks) // 3)
    palette.putpalette([*(palette.getpalette() or [])[: 768 - len(marks)], *marks])
    first, *rest = (picture.quantize(palette=palette) for picture in pictures)
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=rest,
        duration=[1000, *[400] * (len(rest) - 1), 2000],
        loop=0,
    )
