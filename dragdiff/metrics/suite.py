"""The metrics of a study by name: what each gives for an edit, and which can't be had here and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from dragdiff import cache
from dragdiff.config import MetricsConfig
from dragdiff.errors import UserError
from dragdiff.metrics.accuracy import RADII, dragging_accuracy

if TYPE_CHECKING:
    from dragdiff.study.plan import Subject

Values = dict[str, list[float]]  # by column: one value for each pair, or one for the image
Measure = Callable[["Subject", np.ndarray], Values]
AREAS = ("image", "mask", "discs")
COST = "cost"  # of the edit, not of its picture: what its result says


@dataclass(frozen=True)
class Column:
    """One number of a table.

    Attributes:
        over: what the published mean is over: "pairs" or "images".
        higher: whether more is better.
    """

    label: str
    unit: str
    over: str
    higher: bool


COLUMNS = {
    "true_distance": Column("true distance", "px of a 64 px scene", "images", False),
    "psnr_inside": Column("PSNR to the truth, inside", "dB", "images", True),
    "ssim_inside": Column("SSIM to the truth, inside", "", "images", True),
    "psnr_outside": Column("PSNR to the source, outside", "dB", "images", True),
    "ssim_outside": Column("SSIM to the source, outside", "", "images", True),
    "distance": Column("mean distance", "px", "pairs", False),
    "distance_mask": Column("mean distance, in the mask", "px", "pairs", False),
    "distance_discs": Column("mean distance, normalised", "% of width and height", "pairs", False),
    "fidelity": Column("image fidelity", "1 - LPIPS", "images", True),
    "clip": Column("CLIP similarity", "", "images", True),
} | {f"dai_{radius}": Column(f"DAI {radius}", "", "images", False) for radius in RADII}
COLUMNS |= {
    "forwards": Column("forwards of the denoiser", "a training step as what it costs", "images", False),
    "seconds": Column("time of an edit", "s", "images", False),
}


def metric_key(name: str, settings: MetricsConfig) -> str:
    """Names a metric's scores: the metric, and a hash of the settings that it depends on."""
    used: dict[str, object] = {}
    if name == "distance":
        model = {key: value for key, value in asdict(settings.distance).items() if key != "device"}
        used = {"model": model, "areas": sorted(settings.areas), "block": settings.block}
        used |= {"t": settings.t, "ensemble": settings.ensemble, "seed": settings.seed, "ordered": settings.ordered}
    if name == "clip":
        used = {"model": settings.clip_model, "revision": settings.clip_revision}
    return f"{name}-{cache.digest(**used)[:8]}"


def check_metrics(settings: MetricsConfig) -> None:
    """
    Raises:
        UserError: no such metric or area.
    """
    for key, given, known in (("names", settings.names, [*FACTORIES, COST]), ("areas", settings.areas, AREAS)):
        for name in given:
            if name not in known:
                raise UserError(f"metrics.{key} names {name!r}: there are {', '.join(known)}")
    if "distance" in settings.names and not settings.areas:
        raise UserError(f"metrics.areas is empty: name some of {', '.join(AREAS)}")


class Suite:
    """Metrics, with their models loaded.

    Attributes:
        unavailable: of metrics that can't be had, the name and what to do about it.
    """

    def __init__(self, settings: MetricsConfig, names: Sequence[str]) -> None:
        self.settings = settings
        self.unavailable: dict[str, str] = {}
        self._measures: dict[str, Measure] = {}
        for name in names:
            if name == COST:
                continue
            try:
                self._measures[name] = FACTORIES[name](settings)
            except UserError as error:
                self.unavailable[name] = str(error)

    def score(self, name: str, subject: Subject, edited: np.ndarray) -> Values | None:
        """What a metric gives for an edit.

        Args:
            edited: (H, W, 3) uint8, of the sample's size.

        Returns:
            Values by column; none where the metric does not apply to the sample; None where it can't be had at all.
        """
        measure = self._measures.get(name)
        return measure(subject, edited) if measure else None


# ------------------------------------------------------------------------------------------- factories


def _scene(settings: MetricsConfig) -> Measure:
    from dragdiff.metrics import truth

    def measure(subject: Subject, edited: np.ndarray) -> Values:
        if subject.scene is None:
            return {}
        score = truth.score(subject.scene, edited)
        return {
            "true_distance": [score.distance_after],
            "psnr_inside": [score.psnr_inside],
            "ssim_inside": [score.ssim_inside],
        }

    return measure


def _outside(settings: MetricsConfig) -> Measure:
    from dragdiff.metrics import truth

    def measure(subject: Subject, edited: np.ndarray) -> Values:
        if subject.sample.mask is None or subject.sample.mask.all():
            return {}
        fixed, source = ~np.asarray(subject.sample.mask), np.asarray(subject.sample.image)
        return {
            "psnr_outside": [truth.psnr(edited, source, fixed)],
            "ssim_outside": [truth.ssim(edited, source, fixed)],
        }

    return measure


def _distance(settings: MetricsConfig) -> Measure:
    from dragdiff.backbones.loading import check_model, load_backbone
    from dragdiff.metrics.correspondence import MeanDistance, distances, matches, search_areas

    check_model(settings.distance)
    metric = MeanDistance(
        load_backbone(settings.distance),
        t=settings.t,
        block=settings.block,
        ensemble=settings.ensemble,
        variant=settings.areas[0],
        seed=settings.seed,
        ordered=settings.ordered,
    )

    def measure(subject: Subject, edited: np.ndarray) -> Values:
        sample, values = subject.sample, {}
        maps = metric.features(sample, edited)
        for area in settings.areas:
            found = matches(*maps, sample.handles, search_areas(sample, area))
            column = "distance" if area == "image" else f"distance_{area}"
            values[column] = distances(sample, found, area).tolist()
        return values

    return measure


def _fidelity(settings: MetricsConfig) -> Measure:
    from dragdiff.metrics.fidelity import image_fidelity

    fidelity = image_fidelity()
    return lambda subject, edited: {"fidelity": [fidelity(np.asarray(subject.sample.image), edited)]}


def _clip(settings: MetricsConfig) -> Measure:
    from dragdiff.metrics.fidelity import clip_similarity

    similarity = clip_similarity(settings.clip_model, settings.clip_revision)
    return lambda subject, edited: {"clip": [similarity(np.asarray(subject.sample.image), edited)]}


def _accuracy(settings: MetricsConfig) -> Measure:
    return lambda subject, edited: {
        f"dai_{radius}": dragging_accuracy(subject.sample, edited, radius).tolist() for radius in RADII
    }


FACTORIES: dict[str, Callable[[MetricsConfig], Measure]] = {
    "scene": _scene,
    "outside": _outside,
    "distance": _distance,
    "fidelity": _fidelity,
    "clip": _clip,
    "accuracy": _accuracy,
}
