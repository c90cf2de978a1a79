"""Draw the figures of the embedded model's README from the training logs and the exported weights.

    python experiments/embedded_model/report.py --work outputs/embedded_model

Writes docs/embedded/: training.png (both stages), samples.png (from captions alone), reconstruction.png, and prints the
autoencoder's PSNR over scenes that it was not trained on.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from dragdiff import load_config
from dragdiff.backbones.loading import load_backbone
from dragdiff.data.scenes import RENDERERS, caption, render, sample_parameters
from dragdiff.metrics.truth import psnr
from dragdiff.modules.images import to_tensor, to_uint8

ROOT = Path(__file__).resolve().parents[2]
UNSEEN_SEED = 99


def curve(folder: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one logged figure, over all versions (a resumed run begins a new one)."""
    rows = [row for file in sorted(folder.glob("version_*/metrics.csv")) for row in csv.DictReader(file.open())]
    points = {int(row["step"]): float(row[column]) for row in rows if row.get(column)}
    return np.array(sorted(points)), np.array([points[step] for step in sorted(points)])


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def draw_curves(work: Path, out: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    panels = [("autoencoder", "psnr", "reconstruction PSNR, dB"), ("denoiser", "mse", "noise prediction MSE")]
    for axis, (stage, column, label) in zip(axes, panels, strict=True):
        steps, values = curve(work / "logs" / stage, column)
        axis.plot(steps, values, color="#bbbbbb", linewidth=0.7)
        axis.plot(steps, smooth(values), color="#1f5adc")
        axis.set(title=stage, xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    figure.savefig(out / "training.png", dpi=110)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "embedded_model")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "embedded")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    draw_curves(args.work, args.out)

    backbone = load_backbone(load_config(["embedded"]).model)
    captions, pairs = [], []
    for family in RENDERERS:
        parameters = sample_parameters(family, np.random.default_rng(UNSEEN_SEED), 64)
        pictures = render(family, parameters)
        decoded = [to_uint8(backbone.decode(backbone.encode(to_tensor(picture))[0]) / 2 + 0.5) for picture in pictures]
        everywhere = np.ones(pictures.shape[1:3], bool)
        figures = [psnr(one, other, everywhere) for one, other in zip(decoded, pictures, strict=True)]
        print(f"{family}: reconstruction PSNR {np.mean(figures):.1f} dB, worst of {len(figures)} {min(figures):.1f} dB")
        pairs.append(np.concatenate([np.concatenate([pictures[i], decoded[i]]) for i in range(8)], axis=1))
        captions += [caption(family, parameters, i) for i in range(8)]
    save(np.concatenate(pairs), args.out / "reconstruction.png")

    pipeline = backbone.pipeline
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        captions, num_inference_steps=50, guidance_scale=2.0, generator=generator, output_type="np"
    ).images
    grid = (images * 255).round().astype(np.uint8).reshape(2, 8, 64, 64, 3)
    save(np.concatenate([np.concatenate(list(row), axis=1) for row in grid]), args.out / "samples.png")


def save(picture: np.ndarray, path: Path) -> None:
    image = Image.fromarray(picture)
    image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC).save(path)


if __name__ == "__main__":
    main()
