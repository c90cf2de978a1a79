"""Mean distance: how far from its target the content of each handle is found in the edited picture.

By diffusion features (DIFT, Tang et al. 2023, arXiv 2306.03881), as DragBench is scored (DragDiffusion, section 4.2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torchmetrics import Metric

from dragdiff.backbones.diffusion import Diffusion, rows_of
from dragdiff.data.sample import EditSample
from dragdiff.modules.features import FeatureMap
from dragdiff.modules.images import to_tensor

TILE = 16_384  # positions compared at once: 1280 channels of them are 84 MB


def sample_seed(seed: int, sample: EditSample) -> int:
    """A seed from what the sample is, so that neither its place in a list nor its worker matters."""
    digest = hashlib.sha256(f"{seed} {sample.prompt!r} {sample.image.shape}".encode())
    digest.update(sample.image.tobytes())
    digest.update(sample.points.tobytes())
    return int.from_bytes(digest.digest()[:8]) >> 1


@torch.no_grad()
def diffusion_features(
    backbone: Diffusion,
    image: np.ndarray,
    prompt: str,
    *,
    t: int,
    block: str,
    ensemble: int,
    generator: torch.Generator,
) -> FeatureMap:
    """Features of a noised picture, averaged over noise samples, on the grid of its pixels.

    Args:
        image: (H, W, 3) uint8.
        t: timestep of the noise, of the model's training schedule.
        block: the feature point, see `Diffusion.feature_block`.
        ensemble: noise samples; each draws a latent from the posterior, then the noise.
        generator: on the CPU.
    """
    mean, std = backbone.encode(to_tensor(image).to(backbone.device))
    shape = (ensemble, *mean.shape[1:])
    posterior, noise = (torch.randn(shape, generator=generator).to(mean.device) for _ in range(2))
    alpha = backbone.scheduler(1).alphas_cumprod[t]
    latents = alpha.sqrt() * (mean + std * posterior) + (1 - alpha).sqrt() * noise
    condition = rows_of(backbone.condition([prompt]), [0] * ensemble)
    _, (features,) = backbone.with_features(
        lambda: backbone.predict(latents, torch.tensor(t), condition), [block], need_output=False
    )
    return FeatureMap([features.float().mean(dim=0, keepdim=True)], image.shape[:2])


@torch.no_grad()
def matches(source: FeatureMap, edited: FeatureMap, handles: np.ndarray, allowed: Sequence[np.ndarray]) -> np.ndarray:
    """Where the source's feature at each handle is found again: the largest cosine similarity.

    The edited picture's features are read in tiles: memory does not grow with the picture.

    Args:
        handles: (N, 2), (x, y) in px.
        allowed: for each handle the positions that count, (H, W) bool, at least one True.

    Returns:
        (N, 2) int64, (x, y) in px; the first in row-major order of equal ones.
    """
    height, width = edited.grid
    clicked = torch.from_numpy(np.asarray(handles)[:, ::-1].astype(np.int64).copy())
    templates = torch.nn.functional.normalize(source.at(clicked), dim=1)
    best, place = torch.full((len(handles),), -torch.inf), torch.zeros(len(handles), dtype=torch.int64)
    candidates = torch.from_numpy(np.stack([np.asarray(mask, dtype=bool) for mask in allowed]))
    rows_at_once = max(1, TILE // width)
    for top in range(0, height, rows_at_once):
        rows = torch.arange(top, min(top + rows_at_once, height))
        tile = torch.nn.functional.normalize(edited.window(rows, torch.arange(width)).flatten(1), dim=0)
        similarity = (templates @ tile).cpu()
        similarity[~candidates[:, rows].flatten(1)] = -torch.inf
        highest, index = similarity.max(dim=1)
        better = highest > best
        best, place = torch.where(better, highest, best), torch.where(better, index + top * width, place)
    return torch.stack([place % width, place // width], dim=1).numpy()


def search_areas(sample: EditSample, variant: str) -> list[np.ndarray]:
    """Where each handle's content may be found, (H, W) bool for each pair.

    Args:
        variant: "image": everywhere (DragBench's own); "mask": inside the editable area (DragLoRA, 2505.12427; all of
            it without a mask); "discs": within max(5, |h - t| / sqrt 2) px of the handle or the target (RegionDrag,
            2407.18247).
    """
    everywhere = np.ones((sample.height, sample.width), dtype=bool)
    if variant == "image":
        return [everywhere] * len(sample.points)
    if variant == "mask":
        return [everywhere if sample.mask is None else np.asarray(sample.mask)] * len(sample.points)
    if variant != "discs":
        raise ValueError(f"the variant {variant!r} is none of image, mask, discs")
    y, x = np.mgrid[: sample.height, : sample.width]
    areas = []
    for pair in sample.points.astype(np.float64):
        square = max(
            25.0, float(np.sum((pair[0] - pair[1]) ** 2)) / 2
        )  # of the radius: whole positions compare exactly
        areas.append(np.any([(x - px) ** 2 + (y - py) ** 2 <= square for px, py in pair], axis=0))
    return areas


def distances(sample: EditSample, found: np.ndarray, variant: str) -> np.ndarray:
    """From where each handle's content was found to its target.

    Args:
        found: (N, 2), (x, y) px.

    Returns:
        (N,): px, or with "discs" % of width and height.
    """
    unit = np.array([sample.width, sample.height]) / 100 if variant == "discs" else np.ones(2)
    return np.linalg.norm((found - sample.targets) / unit, axis=1)


class MeanDistance(Metric):
    """Mean over all pairs of the distance between a handle's content in the edited picture and its target.

    Drawing numbers from (seed, sample), the same for both pictures, makes a sample's distance independent of the order
    and of the worker, and that of no edit the drag's length. With `ordered` one generator runs through all samples and
    pictures, as in DragBench's own script: then the order of the updates matters.
    """

    higher_is_better = False
    full_state_update = False
    total: torch.Tensor
    pairs: torch.Tensor

    def __init__(
        self, backbone: Diffusion, *, t: int, block: str, ensemble: int, variant: str, seed: int, ordered: bool
    ) -> None:
        """
        Args:
            backbone: the model whose features are compared; published: Stable Diffusion 2.1.
            t, block, ensemble: as in `diffusion_features`; published: 261, "up_blocks.1", 8.
            variant: as in `search_areas`; "discs" gives % of width and height, the others px.

        Raises:
            UserError: no such block.
        """
        super().__init__()
        backbone.feature_block(block)
        self._backbone = (backbone,)  # in a tuple: no submodule
        self.t, self.block, self.ensemble, self.variant, self.seed = t, block, ensemble, variant, seed
        self._ordered = torch.Generator().manual_seed(seed) if ordered else None
        self._source: tuple[int, FeatureMap] | None = None  # seed and features of the last: often it comes again
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.tensor(0), dist_reduce_fx="sum")

    def features(self, sample: EditSample, edited: np.ndarray) -> tuple[FeatureMap, FeatureMap]:
        """The features that are compared.

        Args:
            edited: (H, W, 3) uint8, of the sample's size.

        Returns:
            Those of the source and those of the edited picture.
        """
        seed = sample_seed(self.seed, sample)
        if self._ordered is not None or self._source is None or self._source[0] != seed:
            self._source = seed, self._features(sample.image, sample, seed)
        return self._source[1], self._features(edited, sample, seed)

    def _features(self, image: np.ndarray, sample: EditSample, seed: int) -> FeatureMap:
        return diffusion_features(
            self._backbone[0],
            np.asarray(image),
            sample.prompt,
            t=self.t,
            block=self.block,
            ensemble=self.ensemble,
            generator=self._ordered or torch.Generator().manual_seed(seed),
        )

    def distances(self, sample: EditSample, edited: np.ndarray) -> np.ndarray:
        """
        Args:
            edited: (H, W, 3) uint8, of the sample's size.

        Returns:
            (N,), for each of the sample's pairs: px, or % of width and height.
        """
        found = matches(*self.features(sample, edited), sample.handles, search_areas(sample, self.variant))
        return distances(sample, found, self.variant)

    def update(self, sample: EditSample, edited: np.ndarray) -> None:
        values = self.distances(sample, edited)
        self.total += values.sum()
        self.pairs += len(values)

    def compute(self) -> torch.Tensor:
        return self.total / self.pairs
