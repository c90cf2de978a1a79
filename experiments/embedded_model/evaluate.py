"""Edit held-out scenes with the embedded model's default settings and measure them against the truth.

    python experiments/embedded_model/evaluate.py                     # 32 scenes of each kind
    python experiments/embedded_model/evaluate.py --seeds 0 8 --kinds sun drag.lr=0.02

Prints one line a kind and writes scores and a contact sheet (source | edited | truth) into --out. The model was never
trained on these scenes; its settings were chosen on seeds 0 to 11, so that 1000 to 1031 are held out from both.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from dragdiff import Editor
from dragdiff.data.scenes import KINDS, make_scene
from dragdiff.metrics.truth import SceneScore, score


def summary(scores: list[SceneScore]) -> dict[str, float]:
    """The figures of the bar that the embedded model has to clear, over the scenes of one kind."""

    def mean(name: str) -> float:
        return float(np.mean([getattr(s, name) for s in scores]))

    left = np.array([s.distance_after / s.distance_before for s in scores])
    return {
        "scenes": len(scores),
        "distance_before": mean("distance_before"),
        "distance_after": mean("distance_after"),
        "left_of_drag_length": float(left.mean()),
        "nearer_than_half": float((left < 0.5).mean()),
        "psnr_inside": mean("psnr_inside"),
        "psnr_inside_source": mean("psnr_inside_source"),
        "ssim_inside": mean("ssim_inside"),
        "ssim_inside_source": mean("ssim_inside_source"),
        "psnr_outside": mean("psnr_outside"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings other than the defaults")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", nargs=2, type=int, default=(1000, 1032), metavar=("FIRST", "END"))
    parser.add_argument("--out", type=Path, default=Path("outputs/embedded_evaluation"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    quiet = ["cache.enabled=false", "output.frames_every=0"]
    editor = Editor.from_config("embedded", overrides=[*quiet, *args.overrides])
    report: dict[str, dict[str, object]] = {}
    for kind in args.kinds:
        scores, rows, seconds, steps = [], [], [], []
        for seed in range(*args.seeds):
            scene = make_scene(kind, seed)
            start = time.perf_counter()
            result = editor.edit(scene.sample)
            seconds.append(time.perf_counter() - start)
            steps.append(result.steps)
            scores.append(score(scene, result.image))
            rows.append(np.concatenate([scene.sample.image, result.image, scene.truth], axis=1))
        figures = summary(scores) | {"seconds": float(np.median(seconds)), "steps": float(np.mean(steps))}
        print(kind, {name: round(value, 3) for name, value in figures.items()}, flush=True)
        report[kind] = {
            "summary": figures,
            "scores": [
                asdict(s) | {"displacement": None if s.displacement is None else list(s.displacement)} for s in scores
            ],
        }
        Image.fromarray(sheet(rows)).save(args.out / f"{kind}.png")
    (args.out / "scores.json").write_text(json.dumps({"overrides": args.overrides, "kinds": report}, indent=1))


def sheet(rows: list[np.ndarray], columns: int = 4) -> np.ndarray:
    """Pictures of one size on a white sheet, row by row."""
    height, width = rows[0].shape[:2]
    lines = -(-len(rows) // columns)
    canvas = np.full((lines * (height + 4), columns * (width + 8), 3), 255, np.uint8)
    for index, picture in enumerate(rows):
        top, left = index // columns * (height + 4), index % columns * (width + 8)
        canvas[top : top + height, left : left + width] = picture
    return canvas


if __name__ == "__main__":
    main()
