"""How well an edit of a procedural scene matches the truth, measured without the editor's own tracking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dragdiff.data.scenes import KINDS, Scene, moved, render

MARGIN = 4.0  # px of the 64 px picture: how far beside the drag's path the part is looked for
FAR = 1000.0  # px: a displacement that takes a part out of the picture
CHUNK = 256  # scenes rendered at once


@dataclass(frozen=True)
class SceneScore:
    """An edit against the truth.

    Attributes:
        displacement: (dx, dy) by which the part has moved, px of the 64 px picture; None when it is gone.
        distance_before, distance_after: of the part to its true place, px of the 64 px picture; a part that is gone
            counts as not moved.
        psnr_inside, ssim_inside: of the edit to the truth, inside the mask.
        psnr_inside_source, ssim_inside_source: of the unedited picture to the truth, inside the mask.
        psnr_outside: of the edit to the source, outside the mask.
    """

    displacement: np.ndarray | None
    distance_before: float
    distance_after: float
    psnr_inside: float
    psnr_inside_source: float
    ssim_inside: float
    ssim_inside_source: float
    psnr_outside: float


def score(scene: Scene, image: np.ndarray) -> SceneScore:
    """Compare an edit of a scene with its truth and its source.

    Args:
        image: (S, S, 3) uint8, the edited picture.
    """
    mask, source = np.array(scene.sample.mask), scene.sample.image
    displacement = measured_displacement(scene, image)
    return SceneScore(
        displacement=displacement,
        distance_before=float(np.linalg.norm(scene.displacement)),
        distance_after=float(np.linalg.norm(scene.displacement - (0 if displacement is None else displacement))),
        psnr_inside=psnr(image, scene.truth, mask),
        psnr_inside_source=psnr(source, scene.truth, mask),
        ssim_inside=ssim(image, scene.truth, mask),
        ssim_inside_source=ssim(source, scene.truth, mask),
        psnr_outside=psnr(image, source, ~mask),
    )


def measured_displacement(scene: Scene, image: np.ndarray) -> np.ndarray | None:
    """The displacement of the part whose re-rendering explains the picture best inside the mask.

    An exhaustive search at 1 px over the drag's path and a margin, where the mask leaves room for the part, then at
    1/4 px around the best: neither the model nor the tracker has a say in it.

    Returns:
        (2,) float64, (dx, dy) in px of the 64 px picture; 0 on an axis that the part can't move along. None when the
        scene without the part explains the picture better than the part at any place does.
    """
    reach = np.arange(
        -np.ceil(np.linalg.norm(scene.displacement) + MARGIN), np.linalg.norm(scene.displacement) + MARGIN
    )
    best = np.zeros(2)
    for offsets in (reach, np.arange(-3, 4) * 0.25):
        axes = [best[axis] + offsets if axis in KINDS[scene.kind].axes else np.zeros(1) for axis in (0, 1)]
        candidates = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
        candidates = candidates[_distance_to_path(candidates, scene.displacement) <= MARGIN]
        errors = _errors(scene, image, candidates)
        best = candidates[np.argmin(errors)]
    return None if _errors(scene, image, np.array([[FAR, FAR]]))[0] < errors.min() else best


def _distance_to_path(points: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of points (n, 2) to the straight way from the origin to `end`."""
    along = np.clip(points @ end / (end @ end), 0, 1)
    return np.linalg.norm(points - along[:, None] * end, axis=1)


def _errors(scene: Scene, image: np.ndarray, displacements: np.ndarray) -> np.ndarray:
    """Mean squared difference inside the mask between the picture and each re-rendering, (n,)."""
    mask, size = np.array(scene.sample.mask), image.shape[0]
    seen = image[mask].astype(np.float32)
    family = KINDS[scene.kind].family
    errors = [
        np.square(
            render(family, moved(scene.kind, scene.parameters, chunk), size)[:, mask].astype(np.float32) - seen
        ).mean(axis=(1, 2))
        for chunk in np.array_split(displacements, -(-len(displacements) // CHUNK))
    ]
    return np.concatenate(errors)


def psnr(image: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """Peak signal-to-noise ratio over the True pixels of a mask (H, W), of uint8 pictures (H, W, 3).

    Returns:
        dB; infinity where they are equal.
    """
    error = np.square(image[mask].astype(np.float64) - reference[mask]).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(image: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> float:
    """Mean structural similarity (torchmetrics, Gaussian window) over the True pixels of a mask.

    Args:
        image, reference: (H, W, 3) uint8.
        mask: (H, W) bool.
    """

    def tensor(picture: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255

    _, full = structural_similarity_index_measure(
        tensor(image), tensor(reference), data_range=1.0, return_full_image=True
    )
    return float(full[0].mean(dim=0)[torch.from_numpy(mask)].mean())
