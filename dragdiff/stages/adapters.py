"""The identity-preserving fine-tune: a LoRA for each picture (DragDiffusion, section 3.2), and the network with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from dragdiff import cache
from dragdiff.backbones import lora_file
from dragdiff.callbacks import LoRAProgress
from dragdiff.callbacks.checkpoint import LoRACheckpoint, LoRASnapshots
from dragdiff.config import Config
from dragdiff.data.sample import EditSample
from dragdiff.errors import UserError
from dragdiff.job import Job
from dragdiff.models.lora_finetune import LoRAFinetune, TrainingPicture, check_resume, crops, seeded_noise
from dragdiff.models.trainer import fit, shared_logger
from dragdiff.modules import lora
from dragdiff.modules.denoiser import Denoiser
from dragdiff.modules.lora import LoRA

LOST = 5  # losses in a row that are not finite: a single one may be under fp16, so many at the end are divergence
Keep = Callable[[int, int, LoRA], None]


def finetune(job: Job) -> list[LoRA | None]:
    """The LoRA of each of the job's pictures: the file that the settings name, from the cache, or newly trained.

    Edits of a picture whose training diverged are dropped.

    Returns:
        For each picture its LoRA; None where none is wanted.
    """
    settings = job.config.lora
    if settings.path or job.config.generate.enabled or settings.steps == 0 or not job.pictures:
        return [named(job.config)] * len(job.pictures)
    # the losses go to the first edit of each picture
    first = [next(edit for edit in job.edits if edit.picture == number) for number in range(len(job.pictures))]
    loggers = [edit.request.logger for edit in first]
    adapters: list[LoRA | None] = []
    for number, trained in enumerate(trained_loras(job, loggers)):
        adapters.append(None if isinstance(trained, UserError) else trained)
        if isinstance(trained, UserError):
            for edit in [edit for edit in job.edits if edit.picture == number]:
                job.drop(edit, trained)
    return adapters


@contextmanager
def adapted(job: Job, adapters: Sequence[LoRA | None]) -> Iterator[None]:
    """The job's network with each picture's LoRA, in its weights if it is the same for all, else beside them; with
    FreeU where the settings want it. Sets the job's denoiser.

    Raises:
        UserError: a LoRA does not fit the network.
    """
    network, first = job.model.network, adapters[0] if adapters else None
    same = all(adapter is first for adapter in adapters)
    generate = job.config.generate
    job.adapters = [{}] * len(adapters)
    if not same and (job.config.cache.enabled or job.config.cache.reference_mb):
        job.adapters = []
        for adapter in adapters:
            with lora.merged(network, adapter):
                job.adapters.append(job.model_inputs())
    negative = [generate.negative_prompt] if generate.enabled and generate.guidance != 1 else []
    prompts = [picture.prompt for picture in job.pictures]
    condition = job.condition([*negative, *prompts])
    positive = {name: value[len(negative) :] for name, value in condition.items()}
    branches = [positive]
    if negative:
        branches.insert(0, {name: value[:1].expand_as(positive[name]) for name, value in condition.items()})
    with (
        lora.merged(network, first) if same else lora.unmerged(network, adapters) as rows,
        job.model.sharpened(generate if generate.enabled else dataclasses.replace(generate, freeu=False)),
    ):
        if same:
            job.adapters = [job.model_inputs()] * len(adapters)
        guidance = generate.guidance if generate.enabled else 1.0
        job.denoiser = Denoiser(job.model, branches, guidance=guidance, adapters=None if same else rows)
        yield


def named(config: Config) -> LoRA | None:
    """The LoRA whose file the settings name.

    Raises:
        UserError: it is no LoRA.
    """
    return lora_file.load(Path(config.lora.path).expanduser()) if config.lora.path else None


def trained_loras(job: Job, loggers: Sequence[Logger | None]) -> list[LoRA | UserError]:
    """Each picture's LoRA, from the cache or trained, those that are missing together.

    Returns:
        For each picture its LoRA, or why there is none: its latent or loss is not finite, or a run can't be resumed.
    """
    settings, store = job.config.lora, job.caches["lora"]
    if settings.resume:  # a checkpoint is good for one picture
        trained: list[LoRA | UserError] = []
        for picture, logger in zip(job.pictures, loggers, strict=True):
            try:
                trained += train(job, [picture], [logger])
            except UserError as error:
                trained.append(UserError(str(error)))
        return trained
    keys = [_lora_key(job, picture, settings.steps) for picture in job.pictures]
    found: dict[str, LoRA | UserError] = {}
    for key in keys:
        if key not in found and (cached := store.find(key, load=lora_file.load)) is not None:
            found[key] = cached
            job.report("LoRA", settings.steps, settings.steps, "from the cache")
    missing = {key: number for number, key in enumerate(keys) if key not in found}
    if missing:
        numbers = list(missing.values())
        made = train(job, [job.pictures[i] for i in numbers], [loggers[i] for i in numbers])
        for key, result in zip(missing, made, strict=True):
            found[key] = result
            if isinstance(result, LoRA):
                store.put(key, result, save=lora_file.save)
    return [found[key] for key in keys]


def share(job: Job, steps: Collection[int]) -> int:
    """Train each picture's LoRA once for edits with different `lora.steps`: each goes into the cache on the way.

    Returns:
        How many pictures were trained on.
    """
    store = job.caches["lora"]
    keys = {(row, count): _lora_key(job, picture, count) for row, picture in enumerate(job.pictures) for count in steps}
    missing = [place for place, key in keys.items() if key not in store]
    if not missing or not job.config.cache.enabled:
        return 0
    rows = sorted({row for row, _ in missing})

    def keep(number: int, count: int, trained: LoRA) -> None:
        if (place := (rows[number], count)) in missing:
            store.put(keys[place], trained, save=lora_file.save)

    most = max(count for _, count in missing)
    longest = dataclasses.replace(job.config, lora=dataclasses.replace(job.config.lora, steps=most))
    # one that diverges says so where it is used
    train(
        dataclasses.replace(job, config=longest),
        [job.pictures[row] for row in rows],
        [None] * len(rows),
        snapshots=steps,
        keep=keep,
    )
    return len(rows)


def train(
    job: Job,
    pictures: Sequence[EditSample],
    loggers: Sequence[Logger | None],
    *,
    folder: Path | None = None,
    snapshots: Collection[int] = (),
    keep: Keep = lambda number, steps, trained: None,
) -> list[LoRA | UserError]:
    """Train a LoRA on each picture, all in one batch; a folder, or a run to resume, is for one picture.

    A picture whose latent is not finite is left out: under loss scaling it would hold back all others.

    Args:
        folder: where LoRAs and a checkpoint go every `lora.save_every` steps.
        snapshots: numbers of steps after which `keep` is given the picture's number, the steps and the LoRA.
    """
    settings, inputs = job.config.lora, _lora_inputs(job, pictures[0])
    resume = Path(settings.resume).expanduser() if settings.resume else None
    if resume:
        check_resume(resume, settings=inputs, steps=settings.steps)
    with job.stage("LoRA", settings.steps) as advance:
        prepared = [_prepared(job, picture) for picture in pictures]
        good = [number for number, picture in enumerate(prepared) if picture.is_finite]
        if not good:
            return [job.not_finite] * len(pictures)
        with _training(job, [prepared[number] for number in good], inputs) as (module, current):

            def learned() -> dict[int, LoRA | UserError]:
                return {number: _learned(job, module, row, current(row)) for row, number in enumerate(good)}

            def keep_all(steps: int) -> None:
                for number, made in learned().items():
                    if isinstance(made, LoRA):
                        keep(number, steps, made)

            callbacks: list[L.Callback] = [LoRAProgress(advance), LoRASnapshots(snapshots, keep_all)]
            if folder is not None and settings.save_every:
                callbacks.append(LoRACheckpoint(lambda: current(0), folder, every=settings.save_every))
            fit(
                module,
                steps=settings.steps,
                device=job.model.device,
                autocast=job.autocast,
                callbacks=callbacks,
                logger=shared_logger([loggers[number] for number in good]),
                resume=resume,
                own_scaling=len(good) > 1,
            )
            trained = learned()
    return [trained.get(number, job.not_finite) for number in range(len(pictures))]


@contextmanager
def _training(
    job: Job, pictures: Sequence[TrainingPicture], inputs: dict[str, Any]
) -> Iterator[tuple[LoRAFinetune, Callable[[int], LoRA]]]:
    """The module that trains a LoRA for each picture, with its layers in the network; and the LoRA of a picture."""
    settings, model = job.config.lora, job.model
    with lora.trainable(
        model.network,
        model.lora_targets,
        rank=settings.rank,
        alpha=settings.alpha or float(settings.rank),
        seed=job.config.seed,
        pictures=len(pictures),
    ) as (weights, current):
        module = LoRAFinetune(
            model,
            weights,
            pictures,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            scheduler=model.scheduler(job.config.ddim.steps),
            scaling=job.autocast == "fp16",
            settings=inputs,
        )
        yield module, current


def _learned(job: Job, module: LoRAFinetune, row: int, made: LoRA) -> LoRA | UserError:
    """What a picture's training has given up to now."""
    lost = int(module.lost[row])
    if 0 < lost == module.steps_done:
        return job.not_finite
    # a loss scaler keeps the weights finite
    if lost >= LOST or not made.is_finite:
        return UserError(f"the LoRA's training diverged: try a smaller lora.lr than {job.config.lora.lr:g}")
    return made


def _prepared(job: Job, picture: EditSample) -> TrainingPicture:
    settings = job.config.lora
    with torch.no_grad():
        posterior, latent_shape, slack = crops(
            job.model, picture.image, resolution=settings.resolution, encode_each=settings.crop == "pixel"
        )
    draw = seeded_noise(
        seed=job.config.seed,
        batch_size=settings.batch_size,
        latent_shape=latent_shape,
        slack=slack,
        train_timesteps=len(job.model.scheduler(job.config.ddim.steps).alphas_cumprod),
    )
    return TrainingPicture(posterior, job.condition([picture.prompt]), draw)


def _lora_key(job: Job, picture: EditSample, steps: int) -> str:
    """Under which the cache has a picture's LoRA."""
    return cache.digest(**_lora_inputs(job, picture), steps=steps)


def _lora_inputs(job: Job, picture: EditSample) -> dict[str, Any]:
    """Everything that each step of the LoRA's training depends on, as plain values."""
    settings = dataclasses.asdict(job.config.lora)
    for other in ("path", "steps", "save_every", "resume"):
        del settings[other]
    return (
        {f"lora.{key}": value for key, value in settings.items()}
        | {
            "image": cache.digest(image=picture.image),
            "prompt": picture.prompt,
            "seed": job.config.seed,
        }
        | job.model_inputs()
    )
