"""What an edit leaves behind: pictures, animation, numbers, the resolved config."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from dragdiff.config import Config, to_yaml
from dragdiff.errors import UserError

if TYPE_CHECKING:
    from dragdiff.data.sample import EditSample
    from dragdiff.editor import EditResult

HANDLE, TARGET, ARROW, SHADE = (228, 26, 28), (31, 90, 220), (255, 255, 255), (20, 20, 20)
SHOWN_SIDE = 384  # px: smaller pictures are enlarged in comparisons, so that one sees something


def new_folder(config: Config, name: str) -> Path:
    """Make `<output.folder>/<name>/`, numbered where that is taken, and write the resolved config into it.

    Raises:
        UserError: it can't be written.
    """
    base = Path(config.output.folder).expanduser()
    try:
        for number in range(1, 100_000):
            folder = base / (name if number == 1 else f"{name}-{number}")
            if not folder.exists():
                folder.mkdir(parents=True)
                break
        (folder / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise UserError(f"cannot write to output.folder {str(base)!r}: {error.strerror or error}") from error
    return folder


def save(result: EditResult, folder: Path) -> list[Path]:
    """Write `edited.png`, `comparison.png`, `trajectory.gif` and `metrics.json`; returns their paths."""
    Image.fromarray(result.image).save(folder / "edited.png")
    comparison(result).save(folder / "comparison.png")
    first, *rest = animation(result)
    first.save(
        folder / "trajectory.gif",
        save_all=True,
        append_images=rest,
        duration=[250] * len(rest) + [2000],
        loop=0,
    )
    (folder / "metrics.json").write_text(json.dumps(metrics(result), indent=2) + "\n")
    return [folder / name for name in ("edited.png", "comparison.png", "trajectory.gif", "metrics.json")]


def metrics(result: EditResult) -> dict[str, Any]:
    """Distances as tracked (px of the image), steps, stop reason, seconds per stage, peak memory."""
    pairs = zip(
        result.sample.points.tolist(),
        result.trajectory[-1].tolist(),
        result.distance_before,
        result.distance_after,
        strict=True,
    )
    return {
        "points": [
            {
                "handle": handle,
                "target": target,
                "tracked": tracked,
                "distance_before_px": round(float(before), 3),
                "distance_after_px": round(float(after), 3),
            }
            for (handle, target), tracked, before, after in pairs
        ],
        "steps": result.steps,
        "stop_reason": result.stop_reason,
        "seconds": {stage: round(seconds, 3) for stage, seconds in result.seconds.items()},
        "peak_memory_mb": round(result.peak_memory_mb, 1),
    }


def _zoom(size: Sequence[int]) -> int:
    return max(1, math.ceil(SHOWN_SIDE / max(size)))


def _enlarged(picture: np.ndarray, zoom: int) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.BICUBIC) if zoom > 1 else image


def annotated(sample: EditSample, *, zoom: int = 1) -> Image.Image:
    """The source with its fixed area dimmed and an arrow from each handle (red) to its target (blue)."""
    image = _enlarged(sample.image, zoom)
    if sample.mask is not None:
        dimmed = Image.blend(image, Image.new("RGB", image.size, SHADE), 0.45)
        image = Image.composite(image, dimmed, Image.fromarray(np.array(sample.mask)).convert("L").resize(image.size))
    draw = ImageDraw.Draw(image)
    radius = max(3.0, max(image.size) / 110)
    for handle, target in (np.asarray(sample.points) * zoom).tolist():
        _arrow(draw, handle, target, radius)
    return image


def _arrow(draw: ImageDraw.ImageDraw, handle: list[float], target: list[float], radius: float) -> None:
    (x0, y0), (x1, y1) = handle, target
    for colour, width in ((SHADE, radius * 1.3), (ARROW, radius * 0.7)):
        draw.line((x0, y0, x1, y1), fill=colour, width=max(1, round(width)))
    for (x, y), colour in ((handle, HANDLE), (target, TARGET)):
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius),
            fill=colour,
            outline=ARROW,
            width=max(1, round(radius / 4)),
        )


def comparison(result: EditResult) -> Image.Image:
    """Source with arrows and mask | edited picture."""
    zoom = _zoom(result.image.shape[:2])
    left, right = annotated(result.sample, zoom=zoom), _enlarged(result.image, zoom)
    gap = max(4, left.width // 60)
    sheet = Image.new("RGB", (left.width * 2 + gap, left.height), (255, 255, 255))
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + gap, 0))
    return sheet


def animation(result: EditResult) -> list[Image.Image]:
    """The intermediate previews with the handles' way so far; the source first, the edited picture last."""
    zoom = _zoom(result.image.shape[:2])
    size = (result.image.shape[1] * zoom, result.image.shape[0] * zoom)
    radius = max(3.0, max(size) / 110)
    pictures = [annotated(result.sample, zoom=zoom)]
    for step, preview, handles in result.frames:
        picture = Image.fromarray(preview).resize(size, Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(picture)
        way = result.trajectory[: step + 1] * zoom
        for index, (handle, target) in enumerate(zip(handles * zoom, result.sample.targets * zoom, strict=True)):
            if len(way) > 1:
                draw.line(
                    [tuple(position) for position in way[:, index].tolist()],
                    fill=ARROW,
                    width=max(1, round(radius * 0.7)),
                )
            _arrow(draw, handle.tolist(), target.tolist(), radius)
        pictures.append(picture)
    return [*pictures, _enlarged(result.image, zoom)]
