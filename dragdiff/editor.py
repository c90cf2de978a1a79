"""`Editor`: the one path from a sample to a result, used by command line, Python, studies and tests."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger
from torch import Tensor

from dragdiff import cache, output
from dragdiff.callbacks import Frames, PointTracking, Progress, Spectator, Trajectory, Watch
from dragdiff.callbacks.checkpoint import LoRACheckpoint, LoRASnapshots
from dragdiff.config import Config, DragConfig, ModelConfig, check, load_config, walk
from dragdiff.data.sample import EditSample
from dragdiff.errors import UserError
from dragdiff.loggers import log_result, open_logger
from dragdiff.models.drag import LOOK_EVERY, Drag, LatentDrag, MaskTerm
from dragdiff.models.lora import Lesson, LoRAFinetune, check_resume, crops, seeded_noise
from dragdiff.models.trainer import Each, Recording, fit
from dragdiff.modules import attention, ddim, lora, motion, points, tracking
from dragdiff.modules.backbone import Backbone, feature_block, freeu, self_attention_layers
from dragdiff.modules.denoiser import Denoiser
from dragdiff.modules.features import FeatureMap
from dragdiff.modules.host_memory import freed_at_once, kept_for_reuse
from dragdiff.modules.images import to_tensor, to_uint8
from dragdiff.modules.loading import load_backbone, resolve_autocast, skeleton

Report = Callable[[str, int, int, str], None]  # stage, steps done, steps in all, note
TOO_LITTLE_MEMORY = (
    "the device's memory is too small for this picture: set model.memory=low, a smaller data.max_size, "
    "model.dtype=fp16 or a smaller lora.batch_size"
)
PREVIEW_LATENT = 32  # previews are decoded from a latent of at most this side


@dataclass(frozen=True)
class EditResult:
    """An edit and how it came about.

    Attributes:
        sample: what was asked for.
        image: the edited picture, (H, W, 3) uint8, of the sample's size.
        trajectory: (K, N, 2) float32, (x, y) in image px: each handle as tracked before each of K steps.
        steps: latent updates done.
        stop_reason: "reached", "steps", or a sentence about divergence.
        frames: (step, preview (h, w, 3) uint8, handles (N, 2) as (x, y) in image px).
        seconds: wall time of each stage; of a batch, its edits' share.
        peak_memory_mb: of the process (CPU) or of the device's allocator (CUDA).
        config: the resolved settings.
    """

    sample: EditSample
    image: np.ndarray
    trajectory: np.ndarray
    steps: int
    stop_reason: str
    frames: list[tuple[int, np.ndarray, np.ndarray]]
    seconds: dict[str, float]
    peak_memory_mb: float
    config: Config

    @property
    def distance_before(self) -> np.ndarray:
        """(N,) px from each handle to its target before the drag."""
        return np.linalg.norm(self.sample.targets - self.sample.handles, axis=1)

    @property
    def distance_after(self) -> np.ndarray:
        """(N,) px from each handle, as tracked at the end, to its target."""
        return np.linalg.norm(self.sample.targets - self.trajectory[-1], axis=1)


@dataclass(frozen=True)
class Request:
    """One edit of a batch; all but `config` as for `Editor.edit`.

    Attributes:
        config: in place of the editor's, with the same `shared_settings`; None = the editor's.
    """

    sample: EditSample
    config: Config | None = None
    folder: Path | None = None
    logger: Logger | None = None
    callbacks: Sequence[L.Callback] = ()
    watch: Watch | None = None


@dataclass(eq=False)
class _Edit:
    """An edit on its way through the stages.

    Attributes:
        number: of its request.
        picture: number of its source picture, which other edits of the batch may share.
        config: its settings.
        sample, working: as asked for, and at the size that is worked on.
        keep: (1, 1, h, w), 1 where the latent may not change; None without a mask.
    """

    number: int
    picture: int
    request: Request
    config: Config
    sample: EditSample
    working: EditSample
    keep: Tensor | None
    trajectory: Trajectory = dataclasses.field(default_factory=Trajectory)
    frames: Frames | None = None
    drag: Drag | None = None


class Editor:
    """Edits samples with one loaded model.

    Example:
        >>> from dragdiff import Editor, EditSample
        >>> editor = Editor.from_config("embedded")                                   # doctest: +SKIP
        >>> result = editor.edit(EditSample("cat.png", "a cat", [[[10, 20], [30, 20]]]))  # doctest: +SKIP

        With a diffusers pipeline of one's own, which an edit leaves as it was:

        >>> editor = Editor(config, backbone=StableDiffusion(pipeline))               # doctest: +SKIP
    """

    def __init__(self, config: Config, backbone: Backbone | None = None, *, report: Report | None = None) -> None:
        """
        Args:
            config: the settings; checked here.
            backbone: a loaded model; None loads the one that the config names.
            report: called after each step of each stage.

        Raises:
            UserError: bad settings, or no such model.
        """
        self.config = config
        check_settings(config, skeleton(config.model) if backbone is None else None)
        self._named_lora()
        self.backbone = backbone or load_backbone(config.model)
        _check_blocks(config, self.backbone.feature_block, self.backbone.self_attention_layers)
        self.report = report or (lambda stage, done, total, note: None)
        self.seconds: dict[str, float] = {}
        self.ran_together = 0  # edits of the last batch
        device = self.backbone.device
        self.autocast = resolve_autocast(config.model.autocast, device=device, dtype=config.model.dtype)
        folder = Path(config.cache.folder).expanduser() if config.cache.folder else cache.default_folder()
        self._loras, self._inversions, self._prompts = (
            cache.StageCache(folder / stage if config.cache.enabled else None, limit=round(config.cache.limit_gb * 1e9))
            for stage in cache.STAGES
        )
        self._references: dict[str, list[attention.States]] = {}  # of the picture edited last
        self._generated: dict[str, tuple[list[np.ndarray], list[Tensor], Any]] = {}  # last

    @classmethod
    def from_config(cls, *files: str | Path, overrides: Sequence[str] = (), **kwargs: Any) -> Editor:
        """An editor from YAML overlays (paths, or names of shipped ones) and `key=value` overrides."""
        return cls(load_config(files, overrides), **kwargs)

    # ------------------------------------------------------------------------------- the path

    def edit(
        self,
        sample: EditSample,
        *,
        folder: Path | None = None,
        logger: Logger | None = None,
        callbacks: Sequence[L.Callback] = (),
        watch: Watch | None = None,
    ) -> EditResult:
        """Drag one sample.

        Args:
            sample: picture, prompt, point pairs, mask. With `generate.enabled` its picture, of the size that will be
                generated, does not matter.
            folder: where intermediate frames are written as they come; None keeps them in memory only.
            logger: a Lightning logger for losses, distances and frames (`config.logger` is for `edit_and_save`).
            callbacks: more observers of the drag.
            watch: told of each drag step: its number, the handles (N, 2) as (x, y) in px of the sample's image, and the
                preview (h, w, 3) uint8 if this step has one (`output.frames_every`).

        Raises:
            UserError: the sample does not fit the settings.
        """
        (result,) = self.edit_batch([Request(sample, None, folder, logger, callbacks, watch)])
        if isinstance(result, UserError):
            raise result
        return result

    def edit_batch(self, requests: Sequence[Request]) -> list[EditResult | UserError]:
        """Drag several samples at once: their LoRAs are trained in one batch, their latents dragged in one.

        Results are those of `edit` but for rounding. (Under fp16 autocast an overflow in one holds all back for that
        step.) The samples' pictures may be the same, then they share what depends on nothing else. Where a GPU's memory
        is too small for all at once, they go on in halves.

        Args:
            requests: whose pictures have latents of one size, see `size_class`.

        Returns:
            For each request its result, or what is wrong with it; the others are not affected.

        Raises:
            UserError: the requests don't fit into one batch.
        """
        try:
            return self._edit_batch(requests)
        except torch.OutOfMemoryError:
            if len(requests) == 1:
                raise
        # outside of the clause the error is gone, and with it what it holds
        self.forget()
        warnings.warn(
            f"the device's memory is too small for {len(requests)} edits at once: they go on in halves", stacklevel=2
        )
        for request in requests:
            if isinstance(request.logger, Recording):
                request.logger.clear()
        middle, results = len(requests) // 2, []
        for half in (requests[:middle], requests[middle:]):
            try:
                results += self.edit_batch(half)
            except torch.OutOfMemoryError:  # what the other half has made is not lost
                results += [UserError(TOO_LITTLE_MEMORY)] * len(half)
        return results

    def _edit_batch(self, requests: Sequence[Request]) -> list[EditResult | UserError]:
        self.seconds = {}
        if self.backbone.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.backbone.device)
        self._check_batch(requests)
        scheduler = self._scheduler()
        path: list[Tensor] = []
        prompts: list[str] = []
        samples = [request.sample for request in requests]
        if self.config.generate.enabled:
            prompts = list(dict.fromkeys(sample.prompt for sample in samples))
            generated, path, scheduler = self._generate(prompts)
            samples = [dataclasses.replace(s, image=generated[prompts.index(s.prompt)]) for s in samples]
        outcomes: dict[int, EditResult | UserError] = {}
        edits, pictures = self._begin(requests, samples, outcomes)
        adapters = self._adapters(pictures, edits, outcomes)
        if edits:
            with self._frozen(), self._adapted(adapters) as beside, self._freeu():
                embeddings = self._embeddings([picture.prompt for picture in pictures])
                denoiser = Denoiser(self.backbone, embeddings, guidance=self._guidance, adapters=beside)
                inputs = self._inputs_of_each(adapters, beside)
                with self.backbone.parts_resting():
                    if path:
                        rows = [prompts.index(picture.prompt) for picture in pictures]  # a refused edit has no picture
                        sources = path[len(path) - 1 - self.drag_steps_of_schedule][rows]
                        _keep_rows(scheduler, rows)
                    else:
                        sources = self._invert(pictures, denoiser, inputs)
                    edits = self._finite(edits, sources, outcomes)
                    self._drag(edits, sources, denoiser)
                    images = self._denoise(edits, sources, denoiser, scheduler, inputs)
            self.ran_together = len(edits)
            for edit, image in zip(edits, images, strict=True):
                outcomes[edit.number] = self._result(edit, image, len(edits))
        return [outcomes[number] for number in range(len(requests))]

    def size_class(self, sample: EditSample) -> points.Size:
        """(h, w) of the sample's latent: edits with the same can be in one batch."""
        generate = self.config.generate
        size = (generate.height, generate.width) if generate.enabled else self._working(sample).image.shape[:2]
        return self.backbone.latent_size(*size)

    def edit_and_save(self, sample: EditSample, folder: str | Path, **observers: Any) -> EditResult:
        """As `edit`; writes into the folder, and logs as `config.logger` says, all that the command does.

        Args:
            observers: `callbacks` and `watch`, as for `edit`.

        Raises:
            UserError: as `edit`; also, before any work, where the folder can't be made.
        """
        folder = _made(folder)
        with open_logger(self.config, name=folder.name, folder=folder) as logger:
            result = self.edit(sample, folder=folder, logger=logger, **observers)
            output.save(result, folder)
            log_result(logger, output.comparison(result), output.metrics(result))
        return result

    def edit_and_save_batch(self, requests: Sequence[Request]) -> list[EditResult | UserError]:
        """As `edit_batch`; writes each into its `folder`, and logs as `config.logger` says.

        Raises:
            UserError: as `edit_batch`; also, before any work, where a folder can't be made.
        """
        named = [str(request.folder) for request in requests if request.folder is not None]
        if len(set(named)) < len(requests):
            raise UserError(f"each edit of a batch needs a folder of its own, these have {', '.join(named) or 'none'}")
        folders = [_made(name) for name in named]
        # W&B has one run at a time: each is opened when its edit is finished, and told what happened
        loggers = [Recording() if self.config.logger.kind != "none" else None for _ in requests]
        results = self.edit_batch(
            [dataclasses.replace(r, folder=f, logger=log) for r, f, log in zip(requests, folders, loggers, strict=True)]
        )
        for result, folder in zip(results, folders, strict=True):
            if isinstance(result, EditResult):
                output.save(result, folder)
        for number, (result, folder, recording) in enumerate(zip(results, folders, loggers, strict=True)):
            if isinstance(result, EditResult) and recording is not None:
                try:
                    with open_logger(result.config, name=folder.name, folder=folder) as logger:
                        recording.replay(logger)
                        log_result(logger, output.comparison(result), output.metrics(result))
                except UserError as error:
                    results[number] = UserError(f"{error} (the pictures are in {folder})")
        return results

    def finetune(
        self, sample: EditSample, *, folder: Path | None = None, logger: Logger | None = None
    ) -> lora.LoRA | None:
        """The sample's LoRA: the file that the config names, or the cached one, or a newly trained one.

        Args:
            folder: where intermediate LoRAs and a checkpoint go every `lora.save_every` steps.

        Returns:
            None when `lora.steps` is 0 and no file is named.
        """
        settings, sample = self.config.lora, self._working(sample)
        if settings.path:
            return self._named_lora()
        if settings.steps == 0:
            return None
        if settings.resume or (folder is not None and settings.save_every):
            (trained,) = self._train_loras([sample], [logger], folder=folder)
        else:
            (trained,) = self._finetune([sample], [logger])
        if isinstance(trained, UserError):
            raise trained
        return trained

    def share_loras(self, samples: Sequence[EditSample], steps: Collection[int]) -> None:
        """Train each sample's LoRA once for edits with different `lora.steps`: each goes into the cache on the way."""
        samples = list({self._lora_key(w, 0): w for w in map(self._working, samples)}.values())  # each picture once
        keys = {(row, count): self._lora_key(sample, count) for row, sample in enumerate(samples) for count in steps}
        missing = [place for place, key in keys.items() if key not in self._loras]
        if not missing or not self.config.cache.enabled:
            return
        rows = sorted({row for row, _ in missing})

        def keep(number: int, count: int, trained: lora.LoRA) -> None:
            if (place := (rows[number], count)) in missing and _is_finite(trained):
                self._loras.put(keys[place], trained, save=lora.save)

        most = max(count for _, count in missing)
        longest = dataclasses.replace(self.config.lora, steps=most)
        # one that diverges says so where it is used
        self.reconfigured(dataclasses.replace(self.config, lora=longest))._train_loras(
            [samples[row] for row in rows], [None] * len(rows), snapshots=steps, keep=keep
        )

    def reconfigured(self, config: Config) -> Editor:
        """An editor with other settings, but the same model, `config.model` notwithstanding, and what it has in memory.

        Raises:
            UserError: bad settings.
        """
        other = Editor(config, self.backbone, report=self.report)
        other._references, other._generated = self._references, self._generated
        return other

    def forget(self) -> None:
        """Give up what is kept in memory for the next edit of the same picture."""
        self._references.clear()
        self._generated.clear()
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()

    def without_memory(self) -> Editor:
        """The same, keeping nothing between edits in memory."""
        self.forget()
        kept = dataclasses.replace(self.config.cache, reference_mb=0)
        return self.reconfigured(dataclasses.replace(self.config, cache=kept))

    def generate(self, prompt: str) -> tuple[np.ndarray, list[Tensor]]:
        """Generate a picture as `config.generate` says.

        Returns:
            ((H, W, 3) uint8, the latent before each step and the clean one).
        """
        (picture,), path, _ = self._generate([prompt])
        return picture, path

    def _generate(self, prompts: Sequence[str]) -> tuple[list[np.ndarray], list[Tensor], Any]:
        """As `_sampled`; kept for the next edit of the same pictures."""
        if not self.config.cache.enabled:
            return self._sampled(prompts)
        key = cache.digest(
            **self._model_inputs(),
            prompts=list(prompts),
            seed=self.config.seed,
            ddim=dataclasses.asdict(self.config.ddim),
            generate=dataclasses.asdict(self.config.generate),
            lora=[self.config.lora.path, _changed_at(self.config.lora.path)],
        )
        if key not in self._generated:
            self._generated.clear()
            self._generated[key] = self._sampled(prompts)
        images, path, at_drag = self._generated[key]
        return images, path, copy.deepcopy(at_drag)  # which an edit moves on

    def _sampled(self, prompts: Sequence[str]) -> tuple[list[np.ndarray], list[Tensor], Any]:
        """As `generate`, of several prompts at once; also the scheduler as it was at the drag's step.

        A multistep solver (DPM++ 2M) remembers the step before. Denoising goes on with that memory, for the source and
        the edited row alike: without it the source would not come out as the picture that was generated.
        """
        settings = self.config.generate
        scheduler = self._scheduler()
        size = self.backbone.latent_size(settings.height, settings.width)
        generator = torch.Generator().manual_seed(self.config.seed)
        channels = self.backbone.latent_channels
        latent = (
            torch.randn((1, channels, *size), generator=generator).to(self.backbone.device) * scheduler.init_noise_sigma
        ).repeat(len(prompts), 1, 1, 1)
        total = len(scheduler.timesteps)
        at_drag = copy.deepcopy(scheduler)
        adapted = lora.merged(self.backbone.network, self._named_lora())
        with self._frozen(), adapted, self._freeu(), self._stage("generate", total) as advance:

            def step_done(done: int) -> None:
                nonlocal at_drag
                if done == total - self.drag_steps_of_schedule:
                    at_drag = copy.deepcopy(scheduler)
                advance(done, "")

            predict = Denoiser(self.backbone, self._embeddings(prompts), guidance=self._guidance)
            path = ddim.sample(predict, latent, scheduler=scheduler, start=0, report=step_done)
            images = [self._to_picture(clean[None], (settings.height, settings.width)) for clean in path[-1]]
        return images, path, at_drag

    # ------------------------------------------------------------------------------- stages

    def _named_lora(self) -> lora.LoRA | None:
        path = self.config.lora.path
        return lora.load(Path(path).expanduser()) if path else None

    def _cached_lora(self, entry: Path) -> lora.LoRA:
        cached = lora.load(entry)
        self.report("LoRA", self.config.lora.steps, self.config.lora.steps, "from the cache")
        return cached

    def _check_batch(self, requests: Sequence[Request]) -> None:
        if not requests:
            raise UserError("a batch needs at least one edit")
        sizes = {self.size_class(request.sample) for request in requests}
        if len(sizes) > 1:
            raise UserError(f"the pictures of a batch need latents of one size, these have {sorted(sizes)}")
        ours = shared_settings(self.config)
        for config in (request.config for request in requests if request.config is not None):
            check_settings(config)
            theirs = shared_settings(config)
            for key in ours:
                if ours[key] != theirs[key]:
                    raise UserError(
                        f"{key} is {theirs[key]!r} in one edit and {ours[key]!r} in another: the edits of a batch may "
                        "differ in their samples and in what drag.* says, drag.features apart"
                    )

    def _begin(
        self, requests: Sequence[Request], samples: Sequence[EditSample], outcomes: dict[int, EditResult | UserError]
    ) -> tuple[list[_Edit], list[EditSample]]:
        """The edits that can begin, and their different source pictures at the working size."""
        edits: list[_Edit] = []
        pictures: dict[tuple[str, str], EditSample] = {}
        for number, (request, sample) in enumerate(zip(requests, samples, strict=True)):
            working = sample if self.config.generate.enabled else self._working(sample)
            config = request.config or self.config
            try:
                keep = self._keep(working, config.drag)
            except UserError as error:
                outcomes[number] = UserError(str(error))  # without what its traceback holds
                continue
            key = (cache.digest(image=working.image), sample.prompt)
            pictures.setdefault(key, working)
            edits.append(_Edit(number, list(pictures).index(key), request, config, sample, working, keep))
        return edits, list(pictures.values())

    def _adapters(
        self, pictures: Sequence[EditSample], edits: list[_Edit], outcomes: dict[int, EditResult | UserError]
    ) -> list[lora.LoRA | None]:
        """The LoRA of each picture; the edits of one whose training diverged are ended."""
        settings = self.config.lora
        if settings.path or self.config.generate.enabled or settings.steps == 0 or not pictures:
            return [self._named_lora()] * len(pictures)
        # the losses go to the first edit of each picture
        loggers = [next(e.request.logger for e in edits if e.picture == number) for number in range(len(pictures))]
        adapters: list[lora.LoRA | None] = []
        for number, trained in enumerate((self._resumed if settings.resume else self._finetune)(pictures, loggers)):
            if not isinstance(trained, UserError):
                adapters.append(trained)
                continue
            adapters.append(None)
            for edit in [edit for edit in edits if edit.picture == number]:
                outcomes[edit.number] = trained
                edits.remove(edit)
        return adapters

    def _resumed(self, samples: Sequence[EditSample], loggers: Sequence[Logger | None]) -> list[lora.LoRA | UserError]:
        """Each sample's LoRA from `lora.resume` on; a checkpoint is good for one picture."""
        trained: list[lora.LoRA | UserError] = []
        for sample, logger in zip(samples, loggers, strict=True):
            try:
                trained += self._train_loras([sample], [logger])
            except UserError as error:
                trained.append(UserError(str(error)))
        return trained

    def _finetune(self, samples: Sequence[EditSample], loggers: Sequence[Logger | None]) -> list[lora.LoRA | UserError]:
        """Each sample's LoRA, from the cache or trained; those that are missing together."""
        keys = [self._lora_key(sample, self.config.lora.steps) for sample in samples]
        found: dict[str, lora.LoRA | UserError] = {}
        for key in keys:
            if key not in found and (cached := self._loras.find(key, load=self._cached_lora)) is not None:
                found[key] = cached
        missing = {key: number for number, key in enumerate(keys) if key not in found}
        if missing:
            numbers = list(missing.values())
            trained = self._train_loras([samples[i] for i in numbers], [loggers[i] for i in numbers])
            found |= dict(zip(missing, trained, strict=True))
            for key in missing:
                if isinstance(made := found[key], lora.LoRA):
                    self._loras.put(key, made, save=lora.save)
        return [found[key] for key in keys]

    def _train_loras(
        self,
        samples: Sequence[EditSample],
        loggers: Sequence[Logger | None],
        *,
        folder: Path | None = None,
        snapshots: Collection[int] = (),
        keep: Callable[[int, int, lora.LoRA], None] = lambda number, steps, trained: None,
    ) -> list[lora.LoRA | UserError]:
        """Train a LoRA on each sample, all in one batch; a folder, or a run to resume, is for one sample.

        A picture whose latent is not finite is left out: under loss scaling it would hold back all others.

        Args:
            snapshots: numbers of steps after which `keep` is given the sample's number, the steps and the LoRA.
        """
        settings, backbone = self.config.lora, self.backbone
        scheduler = backbone.scheduler(self.config.ddim.steps)
        inputs = self._lora_inputs(samples[0])
        resume = Path(settings.resume).expanduser() if settings.resume else None
        if resume:
            check_resume(resume, settings=inputs, steps=settings.steps)
        with self._frozen(), self._stage("LoRA", settings.steps) as advance:
            all_lessons = [self._lesson(sample, len(scheduler.alphas_cumprod)) for sample in samples]
            good = [number for number, lesson in enumerate(all_lessons) if lesson.is_finite]
            if not good:
                return [UserError(self._not_finite)] * len(samples)
            lessons, loggers = [all_lessons[number] for number in good], [loggers[number] for number in good]
            with lora.trainable(
                backbone.network,
                backbone.lora_targets,
                rank=settings.rank,
                alpha=settings.alpha or float(settings.rank),
                seed=self.config.seed,
                pictures=len(good),
            ) as (weights, current):
                module = LoRAFinetune(
                    backbone,
                    weights,
                    lessons,
                    lr=settings.lr,
                    weight_decay=settings.weight_decay,
                    scheduler=scheduler,
                    settings=inputs,
                )

                def keep_all(steps: int) -> None:
                    for row, number in enumerate(good):
                        keep(number, steps, current(row))

                callbacks: list[L.Callback] = [Progress(advance), LoRASnapshots(snapshots, keep_all)]
                if folder is not None and settings.save_every:
                    callbacks.append(LoRACheckpoint(lambda: current(0), folder, every=settings.save_every))
                fit(
                    module,
                    steps=settings.steps,
                    device=backbone.device,
                    autocast=self.autocast,
                    callbacks=callbacks,
                    logger=_one_logger(loggers),
                    resume=resume,
                )
                trained = {number: current(row) for row, number in enumerate(good)}
        diverged = UserError(f"the LoRA's training diverged: try a smaller lora.lr than {settings.lr:g}")
        return [
            UserError(self._not_finite)
            if number not in trained
            else trained[number]
            if _is_finite(trained[number])
            else diverged
            for number in range(len(samples))
        ]

    def _lesson(self, sample: EditSample, train_timesteps: int) -> Lesson:
        """What the LoRA of a sample learns from."""
        settings = self.config.lora
        with torch.no_grad():
            posterior, latent_shape, slack = crops(
                self.backbone, sample.image, resolution=settings.resolution, encode_each=settings.crop == "pixel"
            )
        embedding = self._embed([sample.prompt])
        draw = seeded_noise(
            seed=self.config.seed,
            batch_size=settings.batch_size,
            latent_shape=latent_shape,
            slack=slack,
            train_timesteps=train_timesteps,
        )
        return Lesson(posterior, embedding, draw)

    def _invert(self, pictures: Sequence[EditSample], denoiser: Denoiser, inputs: Sequence[dict[str, Any]]) -> Tensor:
        """The pictures' latents (P, C, h, w) at the drag's timestep, by DDIM inversion, or from the cache."""
        steps = self.drag_steps_of_schedule

        def load(entry: Path) -> Tensor:
            latent = cache.load_tensor(entry).to(self.backbone.device)
            self.report("inversion", steps, steps, "from the cache")
            return latent

        keys = [
            cache.digest(
                **own,  # the LoRA's part of it, too
                image=cache.digest(image=picture.image),
                prompt=picture.prompt,
                steps=[steps, self.config.ddim.steps],
            )
            for picture, own in zip(pictures, inputs, strict=True)
        ]
        latents = {number: self._inversions.find(key, load=load) for number, key in enumerate(keys)}
        missing = [number for number, latent in latents.items() if latent is None]
        if missing:
            with self._stage("inversion", steps) as advance, torch.no_grad():
                # one by one: an autoencoder needs more memory than all the rest
                clean = [
                    self.backbone.encode(to_tensor(pictures[i].image).to(self.backbone.device))[0] for i in missing
                ]
                path = ddim.invert(
                    lambda latent, t: denoiser(latent, t, missing),
                    torch.cat(clean),
                    scheduler=self._scheduler(),
                    steps=steps,
                    report=lambda done: advance(done, ""),
                )
            for number, latent in zip(missing, path[-1].split(1), strict=True):
                self._inversions.put(keys[number], latent, save=cache.save_tensor)
                latents[number] = latent
        return torch.cat([latents[number] for number in range(len(pictures))])

    def _finite(
        self, edits: Sequence[_Edit], sources: Tensor, outcomes: dict[int, EditResult | UserError]
    ) -> list[_Edit]:
        """The edits whose source's latent is good; the others are ended."""
        good = torch.isfinite(sources).flatten(1).all(dim=1).tolist()
        for edit in edits:
            if not good[edit.picture]:
                outcomes[edit.number] = UserError(self._not_finite)
        return [edit for edit in edits if good[edit.picture]]

    @property
    def _not_finite(self) -> str:
        return (
            f"the picture's latent is not finite: with model.dtype={self.config.model.dtype} and autocast "
            f"{self.autocast} the model overflows; use model.dtype=fp32 model.autocast=none"
        )

    def _drag(self, edits: Sequence[_Edit], sources: Tensor, denoiser: Denoiser) -> None:
        """Sets each edit's `drag`."""
        if not edits:
            return
        scheduler = self._scheduler()
        index = len(scheduler.timesteps) - self.drag_steps_of_schedule
        alphas = scheduler.alphas_cumprod[int(scheduler.timesteps[index])], ddim.alpha_before(scheduler, index)
        t = scheduler.timesteps[index].to(self.backbone.device)  # once, not in each forward
        grids = [self._grid(edit.working, edit.config.drag) for edit in edits]

        def probe(
            latents: Tensor, numbers: Sequence[int], need_output: bool
        ) -> tuple[Tensor | None, Sequence[FeatureMap]]:
            output, maps = denoiser.with_features(
                latents,
                t,
                [edits[number].picture for number in numbers],
                blocks=self.config.drag.features,
                need_output=need_output,
            )
            return output, [
                FeatureMap([features[row : row + 1] for features in maps], grids[number])
                for row, number in enumerate(numbers)
            ]

        for edit in edits:
            edit.drag = self._prepared(edit, sources[edit.picture : edit.picture + 1], denoiser, t, *alphas)
        drags = [edit.drag for edit in edits if edit.drag is not None]
        kept = nullcontext() if self.config.model.memory == "low" else kept_for_reuse()
        with self._stage("drag", max(drag.steps for drag in drags)) as advance, kept:
            scales = [edit.sample.height / grid[0] for edit, grid in zip(edits, grids, strict=True)]
            # a CPU never waits for itself, and a step after the end costs it as much as any other
            module = LatentDrag(probe, drags, look_every=1 if self.backbone.device.type == "cpu" else LOOK_EVERY)
            fit(
                module,
                steps=max(drag.steps for drag in drags),
                device=self.backbone.device,
                autocast=self.autocast,
                callbacks=[Progress(advance, px_per_grid=scales), *(c for drag in drags for c in drag.callbacks)],
                logger=_one_logger([edit.request.logger for edit in edits]),
            )
        module.to(self.backbone.device)

    def _prepared(
        self, edit: _Edit, source: Tensor, denoiser: Denoiser, t: Tensor, alpha: Tensor, alpha_before: Tensor
    ) -> Drag:
        """The drag of an edit, with its callbacks."""
        sample, working, settings, request = edit.sample, edit.working, edit.config.drag, edit.request
        grid, size, prediction_type = (
            self._grid(working, settings),
            working.image.shape[:2],
            self.backbone.prediction_type,
        )

        def preview(latent: Tensor) -> np.ndarray:
            output = denoiser(latent, t, [edit.picture])
            x0, _ = ddim.predict_x0_and_noise(latent, output, alpha=alpha, prediction_type=prediction_type)
            shrink = min(1.0, PREVIEW_LATENT / max(x0.shape[2:]))
            x0 = F.interpolate(x0, scale_factor=shrink, mode="area") if shrink < 1 else x0
            return to_uint8(self.backbone.decode(x0) / 2 + 0.5)

        edit.frames = Frames(
            preview,
            draw=lambda picture: output.frame(picture, sample, self._way(edit, edit.trajectory.positions)),
            every=edit.config.output.frames_every,
            folder=request.folder and request.folder / "frames",
            logger=request.logger,
        )
        tracker = _strategy("drag.tracker", settings.tracker, tracking.TRACKERS)
        callbacks = [PointTracking(tracker, radius=settings.tracking_radius), edit.trajectory, *request.callbacks]
        if edit.frames.every:
            callbacks.append(edit.frames)
        if request.watch is not None:
            callbacks.append(Spectator(request.watch, edit.trajectory, edit.frames, to_px=partial(self._way, edit)))
        mask = None
        if edit.keep is not None and settings.mask_weight > 0:
            mask = MaskTerm(edit.keep, settings.mask_weight, alpha, alpha_before, prediction_type)
        return Drag(
            latent=source,
            handles=points.to_grid(torch.tensor(np.asarray(working.handles)), image_size=size, grid=grid),
            targets=points.to_grid(torch.tensor(np.asarray(working.targets)), image_size=size, grid=grid),
            supervision=_strategy("drag.supervision", settings.supervision, motion.SUPERVISIONS),
            radius=settings.motion_radius,
            stop_distance=settings.stop_distance,
            lr=settings.lr,
            steps=settings.steps,
            mask=mask,
            callbacks=callbacks,
        )

    def _denoise(
        self,
        edits: Sequence[_Edit],
        sources: Tensor,
        denoiser: Denoiser,
        scheduler: Any,
        inputs: Sequence[dict[str, Any]],
    ) -> list[np.ndarray]:
        """The edited pictures.

        Args:
            scheduler: at the drag's timestep, with what a multistep solver remembers of the sources.
        """
        if not edits:
            return []
        settings, backbone = self.config.control, self.backbone
        steps, rows = self.drag_steps_of_schedule, [edit.picture for edit in edits]

        def uncontrolled(latents: Tensor, t: Tensor) -> Tensor:
            return denoiser(latents, t, rows)

        predict = uncontrolled
        if settings.enabled:
            layers = attention.layers_from(backbone.self_attention_layers, settings.start_layer)
            reference = enumerate(self._reference(sources, denoiser, copy.deepcopy(scheduler), layers, inputs))

            def controlled(latents: Tensor, t: Tensor) -> Tensor:
                step, states = next(reference)
                states = self._rows_of(states, rows, len(sources)) if step >= settings.start_step else {}
                with attention.mutual_self_attention(backbone.network, layers, states):
                    return uncontrolled(latents, t)

            predict = controlled
        _keep_rows(scheduler, rows)
        with self._stage("denoise", steps) as advance:
            path = ddim.sample(
                predict,
                torch.cat([edit.drag.latent.detach() for edit in edits if edit.drag is not None]),
                scheduler=scheduler,
                start=len(scheduler.timesteps) - steps,
                report=lambda done: advance(done, ""),
            )
        with self._stage("decode", len(edits)) as advance:
            images = []
            for edit, clean in zip(edits, path[-1].split(1), strict=True):
                images.append(self._to_picture(clean, edit.sample.image.shape[:2]))
                advance(len(images), "")
        return images

    @staticmethod
    def _rows_of(states: attention.States, pictures: Sequence[int], count: int) -> attention.States:
        """States of `count` pictures (in each guidance branch) as those of the pictures of a batch's rows."""
        if list(pictures) == list(range(count)):
            return states
        return {name: value.unflatten(0, (-1, count))[:, pictures].flatten(0, 1) for name, value in states.items()}

    def _reference(
        self,
        sources: Tensor,
        denoiser: Denoiser,
        scheduler: Any,
        layers: Sequence[str],
        inputs: Sequence[dict[str, Any]],
    ) -> Iterator[attention.States]:
        """What the sources' self-attention sees at each denoising step, in the memory that the config allows.

        The sources are denoised by themselves, step by step beside the edited latents, and not as rows of their batch:
        then it makes no difference to a result whether the states come from memory.
        """
        budget = self.config.cache.reference_mb * 2**20
        if budget == 0:
            yield from self._reference_states(sources, denoiser, scheduler, layers)
            return
        key = cache.digest(
            models=list(inputs),
            source=sources.float().cpu().numpy(),
            embeddings=denoiser.embeddings.float().cpu().numpy(),
            scheduler=[type(scheduler).__name__, scheduler.timesteps.tolist()],
            layers=list(layers),
            generate=dataclasses.asdict(self.config.generate),
        )
        if key in self._references:
            yield from self._references[key]
            return
        self._references.clear()
        steps, kept = self.drag_steps_of_schedule, []
        for states in self._reference_states(sources, denoiser, scheduler, layers):
            if steps * sum(value.nbytes for value in states.values()) <= budget:
                kept.append(states)
            if len(kept) == steps:
                self._references[key] = kept
            yield states

    def _reference_states(
        self, sources: Tensor, denoiser: Denoiser, scheduler: Any, layers: Sequence[str]
    ) -> Iterator[attention.States]:
        states: attention.States = {}

        def recording(latents: Tensor, t: Tensor) -> Tensor:
            nonlocal states
            with attention.recorded(self.backbone.network, layers) as states:
                return denoiser(latents, t)

        start = len(scheduler.timesteps) - self.drag_steps_of_schedule
        for _ in ddim.path_down(recording, sources, scheduler=scheduler, start=start):
            yield states

    def _result(self, edit: _Edit, image: np.ndarray, batch: int) -> EditResult:
        assert edit.drag is not None and edit.frames is not None
        to_px = {"image_size": edit.sample.image.shape[:2], "grid": self._grid(edit.working, edit.config.drag)}
        return EditResult(
            sample=edit.sample,
            image=image,
            trajectory=self._way(edit, edit.trajectory.positions or [edit.drag.handles]),
            steps=edit.drag.steps_done,
            stop_reason=edit.drag.stop_reason or "steps",
            frames=[
                (step, picture, points.to_image(handles, **to_px).numpy())
                for step, picture, handles in edit.frames.frames
            ],
            seconds={stage: seconds / batch for stage, seconds in self.seconds.items()},
            peak_memory_mb=peak_memory_mb(self.backbone.device),
            config=edit.config,
        )

    # ------------------------------------------------------------------------------- pieces

    @property
    def drag_steps_of_schedule(self) -> int:
        """Schedule steps between the drag's timestep and the clean picture."""
        return round(self.config.ddim.steps * self.config.ddim.strength)

    @property
    def _guidance(self) -> float:
        return self.config.generate.guidance if self.config.generate.enabled else 1.0

    def _scheduler(self) -> Any:
        generate = self.config.generate
        return self.backbone.scheduler(self.config.ddim.steps, generate.scheduler if generate.enabled else "ddim")

    def _working(self, sample: EditSample) -> EditSample:
        return sample.resized(self.config.data.max_size)

    def _grid(self, working: EditSample, settings: DragConfig) -> points.Size:
        return points.grid_size(working.image.shape[:2], settings.grid_scale)

    def _way(self, edit: _Edit, positions: Sequence[Tensor]) -> np.ndarray:
        """Handles on the working size's grid, one (N, 2) for each step, as (K, N, 2), (x, y) in px of the sample."""
        to_px = {"image_size": edit.sample.image.shape[:2], "grid": self._grid(edit.working, edit.config.drag)}
        way = points.to_image(torch.stack(list(positions)), **to_px).numpy()
        way[0] = edit.sample.handles  # where the person clicked, not its rounding to the grid
        return way

    def _keep(self, working: EditSample, settings: DragConfig) -> Tensor | None:
        """1 where the latent may not change, (1, 1, h, w); None without a mask."""
        if working.mask is None:
            return None
        latent_size = self.backbone.latent_size(*working.image.shape[:2])
        mask = torch.from_numpy(np.array(working.mask))
        return 1 - points.mask_to_latent(mask, grid=self._grid(working, settings), latent_size=latent_size).to(
            self.backbone.device
        )

    def _embeddings(self, prompts: Sequence[str]) -> Tensor:
        """(1, P, tokens, D), or with guidance (2, P, tokens, D): negative, positive."""
        negative = [] if self._guidance == 1 else [self.config.generate.negative_prompt]
        embedded = self._embed([*negative, *prompts])
        positive = embedded[len(negative) :]
        return torch.stack([embedded[:1].expand_as(positive), positive] if negative else [positive])

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, tokens, D), or from the cache."""
        tokens = self.backbone.tokenize(prompts)
        with torch.no_grad():
            if not self.config.cache.enabled:
                return self.backbone.embed(prompts)
            weights = cache.fingerprint(self.backbone.text_encoder)
            return self._prompts.get(
                cache.digest(weights=weights, tokens=tokens.tolist(), precision=self._precision),
                make=lambda: self.backbone.embed(prompts),
                save=cache.save_tensor,
                load=lambda entry: cache.load_tensor(entry).to(self.backbone.device),
            )

    @contextmanager
    def _adapted(self, adapters: Sequence[lora.LoRA | None]) -> Iterator[lora.Rows | None]:
        """The network with each picture's LoRA: in its weights if it is the same for all, else beside them.

        To save memory it is beside them, too: merging keeps a copy of the weights that it changes.
        """
        network, first = self.backbone.network, adapters[0]
        saving = self.config.model.memory == "low" and first is not None and lora.can_be_beside(network, first)
        if all(adapter is first for adapter in adapters) and not saving:
            with lora.merged(network, first):
                yield None
        else:
            with lora.beside(network, lora.Rows.of(adapters, self.backbone.device)) as rows:
                yield rows

    def _inputs_of_each(self, adapters: Sequence[lora.LoRA | None], rows: lora.Rows | None) -> list[dict[str, Any]]:
        """For each picture, `_model_inputs` of the network with its LoRA."""
        if not (self.config.cache.enabled or self.config.cache.reference_mb):
            return [{}] * len(adapters)
        if rows is None:
            return [self._model_inputs()] * len(adapters)
        inputs = []
        for adapter in adapters:
            with lora.merged(self.backbone.network, adapter):
                inputs.append(self._model_inputs())
        return inputs

    def _to_picture(self, latent: Tensor, size: points.Size) -> np.ndarray:
        """Decode one latent and resize it to (height, width), (H, W, 3) uint8."""
        with torch.no_grad():
            image = (self.backbone.decode(latent) / 2 + 0.5).clamp(0, 1)
        if tuple(image.shape[2:]) != tuple(size):
            image = F.interpolate(image, size, mode="bilinear")
        return to_uint8(image)

    def _lora_key(self, sample: EditSample, steps: int) -> str:
        return cache.digest(**self._lora_inputs(sample), steps=steps)

    def _lora_inputs(self, sample: EditSample) -> dict[str, Any]:
        """Everything that each step of the LoRA's training depends on, as plain values."""
        settings = dataclasses.asdict(self.config.lora)
        for other in ("path", "steps", "save_every", "resume"):
            del settings[other]
        return (
            {f"lora.{key}": value for key, value in settings.items()}
            | {
                "image": cache.digest(image=sample.image),
                "prompt": sample.prompt,
                "seed": self.config.seed,
            }
            | self._model_inputs()
        )

    def _model_inputs(self) -> dict[str, Any]:
        """Everything about the model as it is now that its outputs depend on, as plain values."""
        return {
            "model": cache.digest(
                weights=cache.fingerprint(*self.backbone.modules),
                prediction=self.backbone.prediction_type,
                noise=self.backbone.scheduler(1).alphas_cumprod.numpy(),
            ),
            "precision": self._precision,
        }

    @property
    def _precision(self) -> str:
        return f"{self.config.model.dtype}, autocast {self.autocast}, {self.backbone.device.type}"

    @contextmanager
    def _stage(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Times a stage and reports its steps."""
        start = time.perf_counter()
        self.report(name, 0, total, "")
        try:
            yield lambda done, note: self.report(name, done, total, note)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """No weight wants a gradient, every module is in evaluation mode, and memory or time is saved if it shall be;
        all of it put back on leaving."""
        modules = [module for root in self.backbone.modules for module in root.modules()]
        parameters = [parameter for root in self.backbone.modules for parameter in root.parameters()]
        training = [module.training for module in modules]
        wanted = [parameter.requires_grad for parameter in parameters]
        try:
            for root in self.backbone.modules:
                root.requires_grad_(False).eval()
            model = self.config.model
            low = model.memory == "low"
            with (
                self.backbone.saving_memory() if low else nullcontext(),
                freed_at_once() if low else nullcontext(),
                self.backbone.compiled() if model.compile else nullcontext(),
            ):
                yield
        finally:
            for module, mode in zip(modules, training, strict=True):
                module.training = mode
            for parameter, want in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(want)

    @contextmanager
    def _freeu(self) -> Iterator[None]:
        settings = self.config.generate
        if not (settings.enabled and settings.freeu):
            yield
            return
        factors = {key: getattr(settings, f"freeu_{key}") for key in ("b1", "b2", "s1", "s2")}
        with freeu(self.backbone.network, **factors):
            yield


class OneModel:
    """Editors of any settings; one model is loaded, and kept until another is named."""

    def __init__(self) -> None:
        self._editor: Editor | None = None
        self._loaded: ModelConfig | None = None

    def editor(self, config: Config) -> Editor:
        """
        Raises:
            UserError: bad settings, or no such model.
        """
        if self._editor is None or self._loaded != config.model:
            self._editor = None  # the memory of the model before is free before the next is loaded
            self._editor = Editor(config, load_backbone(config.model))
            self._loaded = copy.copy(config.model)
        return self._editor.reconfigured(config)


@contextmanager
def enough_memory() -> Iterator[None]:
    """
    Raises:
        UserError: the device's memory was too small.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(TOO_LITTLE_MEMORY) from error


def peak_memory_mb(device: torch.device) -> float:
    """Peak of the device's allocator (CUDA), else of this process's resident memory since it began; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


_AN_EDITS_OWN = ("sample", "image", "prompt", "points", "mask", "drag.", "edit.", "output.", "cache.")


def shared_settings(config: Config) -> dict[str, Any]:
    """The settings in which the edits of a batch must agree, by key."""
    return {key: value for key, _, value in walk(config) if key == "drag.features" or not key.startswith(_AN_EDITS_OWN)}


def _keep_rows(scheduler: Any, rows: Sequence[int]) -> None:
    """Let a multistep solver remember so many rows of its batch, in this order."""
    if remembered := getattr(scheduler, "model_outputs", None):
        scheduler.model_outputs = [value if value is None else value[list(rows)] for value in remembered]


def _made(folder: str | Path) -> Path:
    """A folder that is there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
    return folder


def _changed_at(path: str) -> int:
    """When a file or folder was last written, ns; 0 without a path."""
    return Path(path).expanduser().stat().st_mtime_ns if path else 0


def _one_logger(loggers: Sequence[Logger | None]) -> Logger | None:
    """What a Trainer tells that serves so many runs."""
    if all(logger is None for logger in loggers):
        return None
    return loggers[0] if len(loggers) == 1 else Each(loggers)


def _is_finite(trained: lora.LoRA) -> bool:
    return all(bool(torch.isfinite(up).all()) for up in trained.up.values())


def check_settings(config: Config, unet: Any = None) -> None:
    """What can be known of the settings without weights.

    Args:
        unet: the model's, see `loading.skeleton`; None leaves out what depends on it.

    Raises:
        UserError: bad settings.
    """
    check(config)
    _strategy("drag.supervision", config.drag.supervision, motion.SUPERVISIONS)
    _strategy("drag.tracker", config.drag.tracker, tracking.TRACKERS)
    if unet is not None:
        _check_blocks(config, lambda name: feature_block(unet, name), self_attention_layers(unet))


def _check_blocks(config: Config, find_block: Callable[[str], Any], layers: Sequence[str]) -> None:
    """Whether the model has the blocks that the settings name."""
    for name in config.drag.features:
        find_block(name)
    if config.control.enabled:
        attention.layers_from(layers, config.control.start_layer)


def _strategy(key: str, name: str, choices: dict[str, Any]) -> Any:
    if name not in choices:
        raise UserError(f"{key} is {name!r}: choose from {', '.join(sorted(choices))}")
    return choices[name]
