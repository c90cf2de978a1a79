"""`Stages`: what an edit goes through, from its picture's LoRA to the denoised result; `Editor` runs them."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from dragdiff.callbacks import Frames, PointTracking, Progress, Spectator
from dragdiff.callbacks.checkpoint import LoRACheckpoint, LoRASnapshots
from dragdiff.checks import strategy
from dragdiff.config import Config, DragConfig
from dragdiff.data.sample import EditSample
from dragdiff.edits import Edit, EditResult
from dragdiff.errors import UserError
from dragdiff.models.drag import LOOK_EVERY, Drag, LatentDrag, MaskTerm
from dragdiff.models.lora import Lesson, LoRAFinetune, check_resume, crops, seeded_noise
from dragdiff.models.trainer import Each, fit
from dragdiff.modules import attention, ddim, lora, motion, points, tracking
from dragdiff.modules.backbone import Backbone, freeu
from dragdiff.modules.denoiser import Denoiser
from dragdiff.modules.features import FeatureMap
from dragdiff.modules.host_memory import freed_at_once, kept_for_reuse
from dragdiff.modules.images import to_tensor, to_uint8
from dragdiff.modules.loading import resolve_autocast

Report = Callable[[str, int, int, str], None]  # stage, steps done, steps in all, note
LOST = 5  # losses in a row that are not finite: a single one may be under fp16, so many at the end are divergence
PREVIEW_LATENT = 32  # previews are decoded from a latent of at most this side


class Stages:
    """The stages of edits with one loaded model and one set of settings; several edits go through each together.

    Attributes:
        report: called after each step of each stage.
        seconds: wall time of each stage of the edits at hand.
        autocast: "none", "fp16" or "bf16".
    """

    def __init__(self, config: Config, backbone: Backbone, report: Report | None) -> None:
        self.config, self.backbone = config, backbone
        self.report = report or (lambda stage, done, total, note: None)
        self.seconds: dict[str, float] = {}
        device = backbone.device
        self.autocast = resolve_autocast(config.model.autocast, device=device, dtype=config.model.dtype)
        folder = Path(config.cache.folder).expanduser() if config.cache.folder else cache.default_folder()
        self._loras, self._inversions, self._prompts = (
            cache.StageCache(folder / stage if config.cache.enabled else None, limit=round(config.cache.limit_gb * 1e9))
            for stage in cache.STAGES
        )
        self._references: dict[str, list[attention.States]] = {}  # of the picture edited last
        self._generated: dict[str, tuple[list[np.ndarray], list[Tensor], Any]] = {}  # last

    # --------------------------------------------------------------------------------------- the LoRA

    def _adapters(
        self, pictures: Sequence[EditSample], edits: list[Edit], outcomes: dict[int, EditResult | UserError]
    ) -> list[lora.LoRA | None]:
        """The LoRA of each picture; the edits of one whose training diverged are ended."""
        settings = self.config.lora
        if settings.path or self.config.generate.enabled or settings.steps == 0 or not pictures:
            return [named_lora(self.config)] * len(pictures)
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
            if key not in found and (cached := self._loras.find(key, load=lora.load)) is not None:
                found[key] = cached
                self.report("LoRA", self.config.lora.steps, self.config.lora.steps, "from the cache")
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
            trainable = lora.trainable(
                backbone.network,
                backbone.lora_targets,
                rank=settings.rank,
                alpha=settings.alpha or float(settings.rank),
                seed=self.config.seed,
                pictures=len(good),
            )
            with backbone.parts_resting(), trainable as (weights, current):
                module = LoRAFinetune(
                    backbone,
                    weights,
                    lessons,
                    lr=settings.lr,
                    weight_decay=settings.weight_decay,
                    scheduler=scheduler,
                    settings=inputs,
                )

                def learned(row: int) -> lora.LoRA | UserError:
                    """Up to now."""
                    lost, made = int(module.lost[row]), current(row)
                    if 0 < lost == module.steps_done:
                        return UserError(self._not_finite)
                    # a loss scaler keeps the weights finite
                    if lost >= LOST or not made.is_finite:
                        return UserError(f"the LoRA's training diverged: try a smaller lora.lr than {settings.lr:g}")
                    return made

                def keep_all(steps: int) -> None:
                    for row, number in enumerate(good):
                        if isinstance(made := learned(row), lora.LoRA):
                            keep(number, steps, made)

                progress = Progress(advance, look_every=self._look_every)
                callbacks: list[L.Callback] = [progress, LoRASnapshots(snapshots, keep_all)]
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
                outcomes: list[lora.LoRA | UserError] = [UserError(self._not_finite)] * len(samples)
                for row, number in enumerate(good):
                    outcomes[number] = learned(row)
        return outcomes

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
            with lora.merged(self.backbone.network, adapter, briefly=True):
                inputs.append(self._model_inputs())
        return inputs

    # ---------------------------------------------------------------------------- the source's latent

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
            lora=_changed_at(self.config.lora.path),
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
        adapted = lora.merged(self.backbone.network, named_lora(self.config))
        with self._frozen(), adapted, self._freeu():
            predict = Denoiser(self.backbone, self._embeddings(prompts), guidance=self._guidance)
            with self.backbone.parts_resting(), self._stage("generate", total) as advance:

                def step_done(done: int) -> None:
                    nonlocal at_drag
                    if done == total - self.drag_steps_of_schedule:
                        at_drag = copy.deepcopy(scheduler)
                    advance(done, "")

                path = ddim.sample(predict, latent, scheduler=scheduler, start=0, report=step_done)
                images = [self._to_picture(clean[None], (settings.height, settings.width)) for clean in path[-1]]
        return images, path, at_drag

    def _invert(self, pictures: Sequence[EditSample], denoiser: Denoiser, inputs: Sequence[dict[str, Any]]) -> Tensor:
        """The pictures' latents (P, C, h, w) at the drag's timestep, by DDIM inversion, or from the cache."""
        steps, scheduler = self.drag_steps_of_schedule, self._scheduler()
        keys = [
            cache.digest(
                **own,  # the LoRA's part of it, too
                image=cache.digest(image=picture.image),
                prompt=picture.prompt,
                steps=steps,
                timesteps=scheduler.timesteps.tolist(),
            )
            for picture, own in zip(pictures, inputs, strict=True)
        ]
        latents = {number: self._inversions.find(key, load=self._load_tensor) for number, key in enumerate(keys)}
        missing = [number for number, latent in latents.items() if latent is None]
        for _ in range(len(pictures) - len(missing)):
            self.report("inversion", steps, steps, "from the cache")
        if missing:
            with self._stage("inversion", steps) as advance, torch.no_grad():
                # one by one: an autoencoder needs more memory than all the rest
                clean = [
                    self.backbone.encode(to_tensor(pictures[i].image).to(self.backbone.device))[0] for i in missing
                ]
                path = ddim.invert(
                    lambda latent, t: denoiser(latent, t, missing),
                    torch.cat(clean),
                    scheduler=scheduler,
                    steps=steps,
                    report=lambda done: advance(done, ""),
                )
            for number, latent in zip(missing, path[-1].split(1), strict=True):
                self._inversions.put(keys[number], latent, save=cache.save_tensor)
                latents[number] = latent
        return torch.cat([latents[number] for number in range(len(pictures))])

    def _finite(
        self, edits: Sequence[Edit], sources: Tensor, outcomes: dict[int, EditResult | UserError]
    ) -> list[Edit]:
        """The edits whose source's latent is good; the others are ended."""
        good = torch.isfinite(sources).flatten(1).all(dim=1).tolist()
        for edit in edits:
            if not good[edit.picture]:
                outcomes[edit.number] = UserError(self._not_finite)
        return [edit for edit in edits if good[edit.picture]]

    @property
    def _not_finite(self) -> str:
        return (
            "the picture's latent, or its LoRA's loss, is not finite: with model.dtype="
            f"{self.config.model.dtype} and autocast {self.autocast} the model overflows; "
            "use model.dtype=fp32 model.autocast=none"
        )

    # --------------------------------------------------------------------------------------- the drag

    def _drag(self, edits: Sequence[Edit], sources: Tensor, denoiser: Denoiser) -> None:
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
        observers = {id(callback): callback for drag in drags for callback in drag.callbacks}  # edits may share one
        with self._stage("drag", max(drag.steps for drag in drags)) as advance:
            scales = [edit.sample.height / grid[0] for edit, grid in zip(edits, grids, strict=True)]
            module = LatentDrag(probe, drags, look_every=self._look_every)
            fit(
                module,
                steps=max(drag.steps for drag in drags),
                device=self.backbone.device,
                autocast=self.autocast,
                callbacks=[Progress(advance, px_per_grid=scales), *observers.values()],
                logger=_one_logger([edit.request.logger for edit in edits]),
            )
        module.to(self.backbone.device)

    def _prepared(
        self, edit: Edit, source: Tensor, denoiser: Denoiser, t: Tensor, alpha: Tensor, alpha_before: Tensor
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
        tracker = strategy("drag.tracker", settings.tracker, tracking.TRACKERS)
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
            supervision=strategy("drag.supervision", settings.supervision, motion.SUPERVISIONS),
            radius=settings.motion_radius,
            stop_distance=settings.stop_distance,
            lr=settings.lr,
            steps=settings.steps,
            mask=mask,
            callbacks=callbacks,
        )

    def _grid(self, working: EditSample, settings: DragConfig) -> points.Size:
        return points.grid_size(working.image.shape[:2], settings.grid_scale)

    def _way(self, edit: Edit, positions: Sequence[Tensor]) -> np.ndarray:
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

    # -------------------------------------------------------------------------------------- denoising

    def _denoise(
        self,
        edits: Sequence[Edit],
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
        own_rows = None if rows == list(range(len(sources))) else torch.tensor(rows, device=sources.device)

        def uncontrolled(latents: Tensor, t: Tensor) -> Tensor:
            return denoiser(latents, t, rows)

        predict = uncontrolled
        if settings.enabled:
            layers = attention.layers_from(backbone.self_attention_layers, settings.start_layer)
            reference = enumerate(self._reference(sources, denoiser, copy.deepcopy(scheduler), layers, inputs))

            def controlled(latents: Tensor, t: Tensor) -> Tensor:
                step, states = next(reference)
                if step < settings.start_step:
                    states = {}
                elif own_rows is not None:
                    states = self._rows_of(states, own_rows, len(sources))
                with attention.mutual_self_attention(backbone.network, layers, states):
                    return uncontrolled(latents, t)

            predict = controlled
        keep_rows(scheduler, rows)
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
    def _rows_of(states: attention.States, pictures: Tensor, count: int) -> attention.States:
        """States of `count` pictures (in each guidance branch) as those of the pictures of a batch's rows."""
        return {
            name: value.unflatten(0, (-1, count)).index_select(1, pictures).flatten(0, 1)
            for name, value in states.items()
        }

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

    def _result(self, edit: Edit, image: np.ndarray, batch: int) -> EditResult:
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

    # ----------------------------------------------------------------------------------------- pieces

    @property
    def drag_steps_of_schedule(self) -> int:
        """Schedule steps between the drag's timestep and the clean picture."""
        return round(self.config.ddim.steps * self.config.ddim.strength)

    @property
    def _on_cpu(self) -> bool:
        return self.backbone.device.type == "cpu"

    @property
    def _look_every(self) -> int:
        """Steps; a CPU never waits for itself, and a step after a drag's end costs it as much as any other."""
        return 1 if self._on_cpu else LOOK_EVERY

    @property
    def _guidance(self) -> float:
        return self.config.generate.guidance if self.config.generate.enabled else 1.0

    def _scheduler(self) -> Any:
        generate = self.config.generate
        return self.backbone.scheduler(self.config.ddim.steps, generate.scheduler if generate.enabled else "ddim")

    def _working(self, sample: EditSample) -> EditSample:
        return sample.resized(self.config.data.max_size)

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
                load=self._load_tensor,
            )

    def _load_tensor(self, entry: Path) -> Tensor:
        return cache.load_tensor(entry).to(self.backbone.device)

    def _to_picture(self, latent: Tensor, size: points.Size) -> np.ndarray:
        """Decode one latent and resize it to (height, width), (H, W, 3) uint8."""
        with torch.no_grad():
            image = (self.backbone.decode(latent) / 2 + 0.5).clamp(0, 1)
        if tuple(image.shape[2:]) != tuple(size):
            image = F.interpolate(image, size, mode="bilinear")
        return to_uint8(image)

    def _model_inputs(self) -> dict[str, Any]:
        """Everything about the model as it is now that its outputs depend on, as plain values."""
        return {
            "model": cache.digest(
                weights=cache.fingerprint(*self.backbone.modules),
                prediction=self.backbone.prediction_type,
                padding=self.backbone.tokenize([""]).tolist(),  # of prompts
                noise=self.backbone.scheduler(1).alphas_cumprod.numpy(),
            ),
            "precision": self._precision,
        }

    @property
    def _precision(self) -> str:
        return f"{self.config.model.dtype}, autocast {self.autocast}, {self.backbone.device.type}"

    @contextmanager
    def _stage(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Times a stage and reports its steps, all of which need the same memory."""
        start = time.perf_counter()
        self.report(name, 0, total, "")
        try:
            with kept_for_reuse() if self._on_cpu and self.config.model.memory == "normal" else nullcontext():
                yield lambda done, note: self.report(name, done, total, note)
            if self.backbone.device.type == "cuda":  # what a GPU still has to do is this stage's
                torch.cuda.synchronize(self.backbone.device)
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
                freed_at_once() if low and self._on_cpu else nullcontext(),
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


def named_lora(config: Config) -> lora.LoRA | None:
    """The LoRA whose file the settings name."""
    return lora.load(Path(config.lora.path).expanduser()) if config.lora.path else None


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


def keep_rows(scheduler: Any, rows: Sequence[int]) -> None:
    """Let a multistep solver remember so many rows of its batch, in this order."""
    if remembered := getattr(scheduler, "model_outputs", None):
        scheduler.model_outputs = [value if value is None else value[list(rows)] for value in remembered]


def _changed_at(path: str) -> list[Any]:
    """A LoRA's file, when it was last written, ns, and its bytes; empty without a path."""
    if not path:
        return []
    file = lora.file_of(Path(path).expanduser())
    return [str(file), file.stat().st_mtime_ns, file.stat().st_size]


def _one_logger(loggers: Sequence[Logger | None]) -> Logger | None:
    """What a Trainer tells that serves so many runs."""
    if all(logger is None for logger in loggers):
        return None
    return loggers[0] if len(loggers) == 1 else Each(loggers)
