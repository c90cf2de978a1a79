"""`Editor`: the one path from a sample to a result, used by command line, Python, studies and tests."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
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
from dragdiff.config import Config, ModelConfig, check, load_config
from dragdiff.data.sample import EditSample
from dragdiff.errors import UserError
from dragdiff.loggers import log_result, open_logger
from dragdiff.models.drag import LatentDrag, MaskTerm
from dragdiff.models.lora import LoRAFinetune, check_resume, crops, seeded_noise
from dragdiff.models.trainer import fit
from dragdiff.modules import attention, ddim, lora, motion, points, tracking
from dragdiff.modules.backbone import (
    Backbone,
    feature_block,
    freeu,
    gradient_checkpointing,
    self_attention_layers,
)
from dragdiff.modules.features import FeatureMap, combine_guidance, forward_with_features
from dragdiff.modules.images import to_tensor, to_uint8
from dragdiff.modules.loading import load_backbone, resolve_autocast, skeleton

Report = Callable[[str, int, int, str], None]  # stage, steps done, steps in all, note
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
        seconds: wall time of each stage.
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
        device = self.backbone.device
        self.autocast = resolve_autocast(config.model.autocast, device=device, dtype=config.model.dtype)
        folder = Path(config.cache.folder).expanduser() if config.cache.folder else cache.default_folder()
        self._loras, self._inversions = (
            cache.StageCache(folder / stage if config.cache.enabled else None) for stage in ("lora", "inversion")
        )
        self._references: dict[str, list[attention.States]] = {}  # of the picture edited last

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
        self.seconds = {}
        if self.backbone.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.backbone.device)
        scheduler = self._scheduler()
        generated: list[Tensor] = []
        if self.config.generate.enabled:
            picture, generated, scheduler = self._generate(sample.prompt)
            sample = working = dataclasses.replace(sample, image=picture)
        else:
            working = sample.resized(self.config.data.max_size)
        keep = self._keep(working)
        adapter = self._named_lora() if self.config.generate.enabled else self.finetune(working, logger=logger)
        with self._frozen(), lora.merged(self.backbone.network, adapter), self._freeu():
            embeddings = self._embeddings(sample.prompt)
            if self.config.generate.enabled:
                source = generated[len(generated) - 1 - self.drag_steps_of_schedule]
            else:
                source = self._invert(working, embeddings)
            if not torch.isfinite(source).all():
                raise UserError(
                    f"the latent at the drag's timestep is not finite: with model.dtype={self.config.model.dtype} and "
                    f"autocast {self.autocast} the model overflows; use model.dtype=fp32 model.autocast=none"
                )
            drag, trajectory, frames = self._drag(
                sample, working, source, embeddings, keep, folder, logger, callbacks, watch
            )
            image = self._denoise(sample, source, drag.latent.detach(), embeddings, scheduler)
        if not trajectory.positions:
            trajectory.positions.append(drag.handles)
        to_px = {"image_size": sample.image.shape[:2], "grid": self._grid(working)}
        return EditResult(
            sample=sample,
            image=image,
            trajectory=self._way(trajectory.positions, sample, working),
            steps=drag.steps_done,
            stop_reason=drag.stop_reason or "steps",
            frames=[(step, picture, points.to_image(handles, **to_px).numpy()) for step, picture, handles in frames],
            seconds=dict(self.seconds),
            peak_memory_mb=peak_memory_mb(self.backbone.device),
            config=self.config,
        )

    def edit_and_save(self, sample: EditSample, folder: str | Path, **observers: Any) -> EditResult:
        """As `edit`; writes into the folder, and logs as `config.logger` says, all that the command does.

        Args:
            observers: `callbacks` and `watch`, as for `edit`.

        Raises:
            UserError: as `edit`; also, before any work, where the folder can't be made.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
        with open_logger(self.config, name=folder.name, folder=folder) as logger:
            result = self.edit(sample, folder=folder, logger=logger, **observers)
            output.save(result, folder)
            log_result(logger, output.comparison(result), output.metrics(result))
        return result

    def finetune(
        self, sample: EditSample, *, folder: Path | None = None, logger: Logger | None = None
    ) -> lora.LoRA | None:
        """The sample's LoRA: the file that the config names, or the cached one, or a newly trained one.

        Args:
            folder: where intermediate LoRAs and a checkpoint go every `lora.save_every` steps.

        Returns:
            None when `lora.steps` is 0 and no file is named.
        """
        settings, sample = self.config.lora, sample.resized(self.config.data.max_size)
        if settings.path:
            return self._named_lora()
        if settings.steps == 0:
            return None
        if settings.resume or (folder is not None and settings.save_every):
            return self._train_lora(sample, folder, logger)
        return self._loras.get(
            self._lora_key(sample, settings.steps),
            make=lambda: self._train_lora(sample, folder, logger),
            save=lora.save,
            load=self._cached_lora,
        )

    def share_lora(self, sample: EditSample, steps: Collection[int]) -> None:
        """Train the sample's LoRA once for edits with different `lora.steps`: each goes into the cache on the way."""
        sample = sample.resized(self.config.data.max_size)
        missing = {count: key for count in steps if (key := self._lora_key(sample, count)) not in self._loras}
        if not missing or not self.config.cache.enabled:
            return

        def keep(count: int, trained: lora.LoRA) -> None:
            if _is_finite(trained):
                self._loras.put(missing[count], trained, save=lora.save)

        longest = dataclasses.replace(self.config.lora, steps=max(missing))
        with suppress(UserError):  # that it diverged; whose steps are too many will say so
            self.reconfigured(dataclasses.replace(self.config, lora=longest))._train_lora(
                sample, None, None, snapshots=missing, keep=keep
            )

    def reconfigured(self, config: Config) -> Editor:
        """An editor with other settings, but the same model, `config.model` notwithstanding, and what it has in memory.

        Raises:
            UserError: bad settings.
        """
        other = Editor(config, self.backbone, report=self.report)
        other._references = self._references
        return other

    def forget(self) -> None:
        """Give up what is kept in memory for the next edit of the same picture."""
        self._references.clear()
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
        picture, path, _ = self._generate(prompt)
        return picture, path

    def _generate(self, prompt: str) -> tuple[np.ndarray, list[Tensor], Any]:
        """As `generate`; also the scheduler as it was at the drag's step.

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
        )
        total = len(scheduler.timesteps)
        at_drag = copy.deepcopy(scheduler)
        adapted = lora.merged(self.backbone.network, self._named_lora())
        with self._frozen(), adapted, self._freeu(), self._stage("generate", total) as advance:

            def step_done(done: int) -> None:
                nonlocal at_drag
                if done == total - self.drag_steps_of_schedule:
                    at_drag = copy.deepcopy(scheduler)
                advance(done, "")

            predict = self._predictor(self._embeddings(prompt))
            path = ddim.sample(predict, latent, scheduler=scheduler, start=0, report=step_done)
            image = self._to_picture(path[-1], (settings.height, settings.width))
        return image, path, at_drag

    # ------------------------------------------------------------------------------- stages

    def _named_lora(self) -> lora.LoRA | None:
        path = self.config.lora.path
        return lora.load(Path(path).expanduser()) if path else None

    def _cached_lora(self, entry: Path) -> lora.LoRA:
        cached = lora.load(entry)
        self.report("LoRA", self.config.lora.steps, self.config.lora.steps, "from the cache")
        return cached

    def _train_lora(
        self,
        sample: EditSample,
        folder: Path | None,
        logger: Logger | None,
        *,
        snapshots: Collection[int] = (),
        keep: Callable[[int, lora.LoRA], None] = lambda steps, trained: None,
    ) -> lora.LoRA:
        settings, backbone = self.config.lora, self.backbone
        alpha = settings.alpha or float(settings.rank)
        scheduler = backbone.scheduler(self.config.ddim.steps)
        inputs = self._lora_inputs(sample)
        resume = Path(settings.resume).expanduser() if settings.resume else None
        if resume:
            check_resume(resume, settings=inputs, steps=settings.steps)
        with self._frozen(), self._stage("LoRA", settings.steps) as advance:
            with torch.no_grad():
                posterior, latent_shape, slack = crops(
                    backbone, sample.image, resolution=settings.resolution, encode_each=settings.crop == "pixel"
                )
                embedding = backbone.embed([sample.prompt])
            draw = seeded_noise(
                seed=self.config.seed,
                batch_size=settings.batch_size,
                latent_shape=latent_shape,
                slack=slack,
                train_timesteps=len(scheduler.alphas_cumprod),
            )
            with lora.injected(
                backbone.network,
                backbone.lora_targets,
                rank=settings.rank,
                alpha=alpha,
                seed=self.config.seed,
            ):
                module = LoRAFinetune(
                    backbone,
                    posterior=posterior,
                    embedding=embedding,
                    draw=draw,
                    lr=settings.lr,
                    weight_decay=settings.weight_decay,
                    scheduler=scheduler,
                    settings=inputs,
                )
                callbacks: list[L.Callback] = [
                    Progress(advance),
                    LoRASnapshots(backbone.network, snapshots, keep, scale=alpha / settings.rank),
                ]
                if folder is not None and settings.save_every:
                    callbacks.append(
                        LoRACheckpoint(backbone.network, folder, every=settings.save_every, scale=alpha / settings.rank)
                    )
                fit(
                    module,
                    steps=settings.steps,
                    device=backbone.device,
                    autocast=self.autocast,
                    callbacks=callbacks,
                    logger=logger,
                    resume=resume,
                )
                trained = lora.extract(lora.parameters(backbone.network), scale=alpha / settings.rank)
        if not _is_finite(trained):
            raise UserError(f"the LoRA's training diverged: try a smaller lora.lr than {settings.lr:g}")
        return trained

    def _invert(self, sample: EditSample, embeddings: Tensor) -> Tensor:
        """The picture's latent at the drag's timestep, by DDIM inversion, or from the cache."""
        steps = self.drag_steps_of_schedule

        def compute() -> Tensor:
            with self._stage("inversion", steps) as advance, torch.no_grad():
                mean, _ = self.backbone.encode(to_tensor(sample.image).to(self.backbone.device))
                path = ddim.invert(
                    self._predictor(embeddings),
                    mean,
                    scheduler=self._scheduler(),
                    steps=steps,
                    report=lambda done: advance(done, ""),
                )
            return path[-1]

        def load(entry: Path) -> Tensor:
            latent = cache.load_tensor(entry).to(self.backbone.device)
            self.report("inversion", steps, steps, "from the cache")
            return latent

        if not self.config.cache.enabled:
            return compute()
        key = self._model_inputs() | {  # the LoRA's part of it, too
            "image": cache.digest(image=sample.image),
            "prompt": sample.prompt,
            "steps": [steps, self.config.ddim.steps],
        }
        return self._inversions.get(cache.digest(**key), make=compute, save=cache.save_tensor, load=load)

    def _drag(
        self,
        sample: EditSample,
        working: EditSample,
        source: Tensor,
        embeddings: Tensor,
        keep: Tensor | None,
        folder: Path | None,
        logger: Logger | None,
        callbacks: Sequence[L.Callback],
        watch: Watch | None,
    ) -> tuple[LatentDrag, Trajectory, list[tuple[int, np.ndarray, Tensor]]]:
        settings, backbone = self.config.drag, self.backbone
        scheduler = self._scheduler()
        index = len(scheduler.timesteps) - self.drag_steps_of_schedule
        t, grid, size = scheduler.timesteps[index], self._grid(working), working.image.shape[:2]
        alpha = scheduler.alphas_cumprod[int(t)]
        mask = None
        if keep is not None and settings.mask_weight > 0:
            mask = MaskTerm(
                keep,
                settings.mask_weight,
                alpha,
                ddim.alpha_before(scheduler, index),
                backbone.prediction_type,
            )
        blocks = [backbone.feature_block(name) for name in settings.features]
        guidance = self._guidance

        def probe(latent: Tensor, need_output: bool) -> tuple[Tensor | None, FeatureMap]:
            rows = torch.cat([latent] * len(embeddings))
            output, maps = forward_with_features(
                lambda: backbone.predict(rows, t, embeddings), blocks, need_output=need_output
            )
            if guidance > 1:
                maps = [combine_guidance(features, guidance) for features in maps]
                output = None if output is None else guide(output, guidance)
            return output, FeatureMap(maps, grid)

        def preview(latent: Tensor) -> np.ndarray:
            x0, _ = ddim.predict_x0_and_noise(
                latent,
                self._predictor(embeddings)(latent, t),
                alpha=alpha,
                prediction_type=backbone.prediction_type,
            )
            shrink = min(1.0, PREVIEW_LATENT / max(x0.shape[2:]))
            x0 = F.interpolate(x0, scale_factor=shrink, mode="area") if shrink < 1 else x0
            return to_uint8(backbone.decode(x0) / 2 + 0.5)

        trajectory = Trajectory()
        frames = Frames(
            preview,
            draw=lambda picture: output.frame(picture, sample, self._way(trajectory.positions, sample, working)),
            every=self.config.output.frames_every,
            folder=folder and folder / "frames",
        )
        drag = LatentDrag(
            probe,
            latent=source,
            handles=points.to_grid(torch.tensor(np.asarray(working.handles)), image_size=size, grid=grid),
            targets=points.to_grid(torch.tensor(np.asarray(working.targets)), image_size=size, grid=grid),
            supervision=_strategy("drag.supervision", settings.supervision, motion.SUPERVISIONS),
            radius=settings.motion_radius,
            stop_distance=settings.stop_distance,
            lr=settings.lr,
            mask=mask,
        )
        with self._stage("drag", settings.steps) as advance:
            acting = PointTracking(
                _strategy("drag.tracker", settings.tracker, tracking.TRACKERS),
                radius=settings.tracking_radius,
            )
            watching = [trajectory, Progress(advance, px_per_grid=sample.height / grid[0]), *callbacks]
            if frames.every:
                watching.append(frames)
            if watch is not None:
                watching.append(Spectator(watch, trajectory, frames, to_px=lambda way: self._way(way, sample, working)))
            fit(
                drag,
                steps=settings.steps,
                device=backbone.device,
                autocast=self.autocast,
                callbacks=[acting, *watching],
                logger=logger,
            )
        return drag.to(backbone.device), trajectory, frames.frames

    def _denoise(
        self, sample: EditSample, source: Tensor, dragged: Tensor, embeddings: Tensor, scheduler: Any
    ) -> np.ndarray:
        settings, backbone = self.config.control, self.backbone
        steps = self.drag_steps_of_schedule
        predict = uncontrolled = self._predictor(embeddings)
        if settings.enabled:
            layers = attention.layers_from(backbone.self_attention_layers, settings.start_layer)
            reference = enumerate(self._reference(source, embeddings, copy.deepcopy(scheduler), layers))

            def controlled(latents: Tensor, t: Tensor) -> Tensor:
                step, states = next(reference)
                states = states if step >= settings.start_step else {}
                with attention.mutual_self_attention(backbone.network, layers, states):
                    return uncontrolled(latents, t)

            predict = controlled
        with self._stage("denoise", steps) as advance:
            path = ddim.sample(
                predict,
                dragged,
                scheduler=scheduler,
                start=len(scheduler.timesteps) - steps,
                report=lambda done: advance(done, ""),
            )
        with self._stage("decode", 1) as advance, torch.no_grad():
            image = self._to_picture(path[-1], sample.image.shape[:2])
            advance(1, "")
        return image

    def _reference(
        self, source: Tensor, embeddings: Tensor, scheduler: Any, layers: Sequence[str]
    ) -> Iterator[attention.States]:
        """What the source's self-attention sees at each denoising step, in the memory that the config allows.

        The source is denoised by itself, step by step beside the edited latent, and not as a row of its batch: then
        it makes no difference to a result whether the states come from memory.
        """
        budget = self.config.cache.reference_mb * 2**20
        if budget == 0:
            yield from self._reference_states(source, embeddings, scheduler, layers)
            return
        key = cache.digest(
            **self._model_inputs(),
            source=source.float().cpu().numpy(),
            embeddings=embeddings.float().cpu().numpy(),
            scheduler=[type(scheduler).__name__, scheduler.timesteps.tolist()],
            layers=list(layers),
            generate=dataclasses.asdict(self.config.generate),
        )
        if key in self._references:
            yield from self._references[key]
            return
        self._references.clear()
        steps, kept = self.drag_steps_of_schedule, []
        for states in self._reference_states(source, embeddings, scheduler, layers):
            if steps * sum(value.nbytes for value in states.values()) <= budget:
                kept.append(states)
            if len(kept) == steps:
                self._references[key] = kept
            yield states

    def _reference_states(
        self, source: Tensor, embeddings: Tensor, scheduler: Any, layers: Sequence[str]
    ) -> Iterator[attention.States]:
        predict, states = self._predictor(embeddings), {}

        def recording(latent: Tensor, t: Tensor) -> Tensor:
            nonlocal states
            with attention.recorded(self.backbone.network, layers) as states:
                return predict(latent, t)

        start = len(scheduler.timesteps) - self.drag_steps_of_schedule
        for _ in ddim.path_down(recording, source, scheduler=scheduler, start=start):
            yield states

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

    def _grid(self, sample: EditSample) -> points.Size:
        return points.grid_size(sample.image.shape[:2], self.config.drag.grid_scale)

    def _way(self, positions: Sequence[Tensor], sample: EditSample, working: EditSample) -> np.ndarray:
        """Handles on the working size's grid, one (N, 2) for each step, as (K, N, 2), (x, y) in px of the sample."""
        to_px = {"image_size": sample.image.shape[:2], "grid": self._grid(working)}
        way = np.stack([points.to_image(position, **to_px).numpy() for position in positions])
        way[0] = sample.handles  # where the person clicked, not its rounding to the grid
        return way

    def _keep(self, sample: EditSample) -> Tensor | None:
        """1 where the latent may not change, (1, 1, h, w); None without a mask."""
        if sample.mask is None:
            return None
        latent_size = self.backbone.latent_size(*sample.image.shape[:2])
        mask = torch.from_numpy(np.array(sample.mask))
        return 1 - points.mask_to_latent(mask, grid=self._grid(sample), latent_size=latent_size).to(
            self.backbone.device
        )

    def _embeddings(self, prompt: str) -> Tensor:
        """(1, tokens, D), or with guidance (2, tokens, D): negative, positive."""
        prompts = [prompt] if self._guidance == 1 else [self.config.generate.negative_prompt, prompt]
        with torch.no_grad():
            return self.backbone.embed(prompts)

    def _predictor(self, embeddings: Tensor) -> ddim.Predict:
        """The guided model output for latents (B, C, h, w)."""

        def predict(latents: Tensor, t: Tensor) -> Tensor:
            rows = torch.cat([latents] * len(embeddings))
            output = self.backbone.predict(rows, t, embeddings.repeat_interleave(len(latents), dim=0))
            return output if self._guidance == 1 else guide(output, self._guidance)

        return predict

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
            "precision": f"{self.config.model.dtype}, autocast {self.autocast}, {self.backbone.device.type}",
        }

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
        """No weight wants a gradient, every module is in evaluation mode, and memory is saved as the config says; all
        of it put back on leaving.
        """
        modules = [module for root in self.backbone.modules for module in root.modules()]
        parameters = [parameter for root in self.backbone.modules for parameter in root.parameters()]
        training = [module.training for module in modules]
        wanted = [parameter.requires_grad for parameter in parameters]
        try:
            for root in self.backbone.modules:
                root.requires_grad_(False).eval()
            low = self.config.model.memory == "low"
            with gradient_checkpointing(self.backbone.network) if low else nullcontext():
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
        raise UserError(
            "the device's memory is too small for this picture: set a smaller data.max_size, model.dtype=fp16 or "
            "a smaller lora.batch_size"
        ) from error


def guide(output: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): (2B, ...) negative then positive -> (B, ...)."""
    negative, positive = output.chunk(2)
    return negative + guidance * (positive - negative)


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
