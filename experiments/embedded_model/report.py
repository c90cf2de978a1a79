"""Show how far the embedded model's successor is: curves, scenes with their captions, reconstructions, samples.

    python experiments/embedded_model/report.py            # of the weights in experiments/embedded_model/checkpoint
    python experiments/embedded_model/report.py --only scenes

Writes into --out: scenes.png (48 unseen scenes with their captions), edits.png (source, truth and mask of each kind),
training.png (from the logs in --work), reconstruction.png, samples.png (from captions alone), and prints the
autoencoder's PSNR over scenes that it was not trained on, whole and inside the masks of the edits.
"""

from __future__ import annotations

import argparse
import csv
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw
from scenes import KINDS, RENDERERS, caption, make_scene, render, sample_parameters

from dragdiff.metrics.truth import psnr
from dragdiff.modules.images import to_tensor, to_uint8

ROOT = Path(__file__).resolve().parents[2]
UNSEEN_SEED = 99
STAGES = ("scenes", "curves", "reconstruction", "samples")


def curve(folder: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one logged figure, over all versions (a resumed run begins a new one)."""
    rows = [row for file in sorted(folder.glob("version_*/metrics.csv")) for row in csv.DictReader(file.open())]
    points = {int(row["step"]): float(row[column]) for row in rows if row.get(column)}
    return np.array(sorted(points)), np.array([points[step] for step in sorted(points)])


def smooth(values: np.ndarray, width: int = 15) -> np.ndarray:
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def draw_curves(work: Path, out: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    panels = [("autoencoder", "psnr", "reconstruction PSNR, dB"), ("denoiser", "mse", "noise prediction MSE")]
    for axis, (stage, column, label) in zip(axes, panels, strict=True):
        steps, values = curve(work / "logs" / stage, column)
        axis.set(title=stage, xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        if len(steps):
            axis.plot(steps, values, color="#bbbbbb", linewidth=0.7)
            axis.plot(steps, smooth(values), color="#1f5adc")
    axes[1].set_yscale("log")
    figure.savefig(out / "training.png", dpi=110)


def unseen(family: str, n: int) -> tuple[np.ndarray, list[str]]:
    """Pictures (n, 128, 128, 3) uint8 that nothing was trained on, and their captions."""
    parameters = sample_parameters(family, np.random.default_rng(UNSEEN_SEED), n)
    return render(family, parameters), [caption(family, parameters, i) for i in range(n)]


def captioned(pictures: list[np.ndarray], captions: list[str], columns: int = 6, zoom: int = 2) -> Image.Image:
    """A sheet of square pictures, each above its caption."""
    side, text = pictures[0].shape[0] * zoom, 72
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 8), lines * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, words) in enumerate(zip(pictures, captions, strict=True)):
        left, top = index % columns * (side + 8), index // columns * (side + text)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), (left, top))
        block = "\n".join(textwrap.wrap(words, 44))
        draw.multiline_text((left + 2, top + side + 2), block, fill="black", font_size=11, spacing=1)
    return sheet


def draw_edits(seeds: int = 5) -> Image.Image:
    """A line for each kind: source with its point pairs, truth, truth with all but the mask darkened."""
    lines = []
    for kind in KINDS:
        cells = []
        for seed in range(seeds):
            scene = make_scene(kind, seed)
            source = Image.fromarray(np.array(scene.sample.image))
            draw = ImageDraw.Draw(source)
            for (x, y), target in scene.sample.points:
                draw.line([(x, y), tuple(target)], fill="magenta")
                draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill="red")
            masked = np.where(np.array(scene.sample.mask)[..., None], scene.truth, scene.truth // 2)
            cells.append(np.concatenate([np.array(source), scene.truth, masked], axis=1))
        lines.append(np.concatenate(cells, axis=1))
    return Image.fromarray(np.concatenate(lines))


def reconstruct(vae: torch.nn.Module, pictures: np.ndarray) -> np.ndarray:
    """(n, S, S, 3) uint8 through the autoencoder and back."""
    decoded = [vae.decode(vae.encode(to_tensor(picture)).latent_dist.mean).sample for picture in pictures]
    return np.stack([to_uint8(picture / 2 + 0.5) for picture in decoded])


def report_reconstruction(vae: torch.nn.Module, out: Path, n: int = 64) -> None:
    pairs = []
    for family in RENDERERS:
        pictures, _ = unseen(family, n)
        decoded = reconstruct(vae, pictures)
        everywhere = np.ones(pictures.shape[1:3], bool)
        figures = [psnr(one, other, everywhere) for one, other in zip(decoded, pictures, strict=True)]
        print(f"{family}: reconstruction {np.mean(figures):.1f} dB, worst of {n} {min(figures):.1f} dB", flush=True)
        worst = np.argsort(figures)[:8]
        pairs += [np.concatenate([np.concatenate([pictures[i], decoded[i]]) for i in worst], axis=1)]
    for kind in KINDS:
        scenes = [make_scene(kind, 5000 + seed) for seed in range(n // 2)]
        decoded = reconstruct(vae, np.stack([scene.truth for scene in scenes]))
        masks = [np.array(scene.sample.mask) for scene in scenes]
        figures = [psnr(one, scene.truth, mask) for one, scene, mask in zip(decoded, scenes, masks, strict=True)]
        print(f"{kind}: truth inside the mask {np.mean(figures):.1f} dB, worst of {n // 2} {min(figures):.1f} dB")
    save(np.concatenate(pairs), out / "reconstruction.png")


def report_samples(pipeline: StableDiffusionPipeline, out: Path, each: int, guidance: float, steps: int) -> None:
    captions = [text for family in RENDERERS for text in unseen(family, each)[1]]
    pictures: list[np.ndarray] = []
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(captions), 12):
        batch = captions[start : start + 12]
        images = pipeline(
            batch, num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="np"
        ).images
        pictures += list((images * 255).round().astype(np.uint8))
    captioned(pictures, captions).save(out / "samples.png")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "embedded_model_128", help="with the logs")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "embedded_report")
    parser.add_argument("--samples", type=int, default=12, help="of each family")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if "scenes" in args.only:
        sets = [unseen(family, 24) for family in RENDERERS]
        pictures = [picture for images, _ in sets for picture in images]
        captioned(pictures, [text for _, texts in sets for text in texts]).save(args.out / "scenes.png")
        draw_edits().save(args.out / "edits.png")
    if "curves" in args.only:
        draw_curves(args.work, args.out)
    if "reconstruction" in args.only:
        vae = AutoencoderKL.from_pretrained(args.checkpoint / "vae", use_safetensors=True).float()
        report_reconstruction(vae, args.out)
    if "samples" in args.only:
        pipeline = StableDiffusionPipeline.from_pretrained(args.checkpoint, use_safetensors=True).to(torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        report_samples(pipeline, args.out, args.samples, args.guidance, args.sampling_steps)


def save(picture: np.ndarray, path: Path) -> None:
    image = Image.fromarray(picture)
    image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC).save(path)


if __name__ == "__main__":
    main()
