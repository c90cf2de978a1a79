"""`Editor`: the one path from a sample to a result, used by command line, Python, studies and tests."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from dragdiff import cache, methods, output
from dragdiff.aliases import Report
from dragdiff.backbones.diffusion import Diffusion
from dragdiff.backbones.loading import load_backbone, resolve_autocast, structure
from dragdiff.callbacks import Watch
from dragdiff.checks import check_settings, shared_settings
from dragdiff.config import Config, ModelConfig, load_config
from dragdiff.data.sample import EditSample
from dragdiff.errors import NothingLeft, UserError, out_of_memory
from dragdiff.job import EditResult, Job, Request
from dragdiff.loggers import log_result, open_logger
from dragdiff.methods.method import Method
from dragdiff.models.trainer import Recording
from dragdiff.modules import points
from dragdiff.modules.lora import LoRA
from dragdiff.stages import adapters, edits
from dragdiff.stages.sources import generated

TOO_LITTLE_MEMORY = (
    "the device's memory is too small for this picture: set model.memory=low, a smaller data.max_size, "
    "model.dtype=fp16, or a smaller lora.batch_size, lora.rank or drag.motion_radius"
)


class Editor:
    """Edits samples with one loaded model, by the method that the settings name.

    Example:
        >>> from dragdiff import Editor, EditSample
        >>> editor = Editor.from_config("embedded")                                   # doctest: +SKIP
        >>> result = editor.edit(EditSample("cat.png", "a cat", [[[10, 20], [30, 20]]]))  # doctest: +SKIP

        With a diffusers pipeline of one's own, which an edit leaves as it was:

        >>> editor = Editor(config, backbone=StableDiffusion(pipeline))               # doctest: +SKIP

    Attributes:
        report: called after each step of each stage.
        autocast: mixed precision of what is optimised: "none", "fp16" or "bf16".
        ran_together: edits of the last batch, or pictures whose LoRAs were trained.
    """

    def __init__(
        self,
        config: Config,
        backbone: Diffusion | None = None,
        *,
        method: Method | str | None = None,
        report: Report | None = None,
    ) -> None:
        """
        Args:
            backbone: a loaded model; None loads the one that the config names.
            method: one of your own, in place of the config's; then sections that each method has values of its own for
                are at this one's.

        Raises:
            UserError: bad settings, or no such model.
        """
        if method is not None:
            config = load_config([dataclasses.asdict(config)], [{"method": methods.bring(method)}])
        check_settings(config, structure(config.model) if backbone is None else None)
        adapters.named(config)
        self.config, self.backbone = config, backbone or load_backbone(config.model)
        self.report = report or (lambda stage, done, total, note: None)
        check_settings(config, self.backbone)
        self.method = methods.find(config.method)
        self.method.stages(config)  # what is wrong with a method of one's own is said before any work
        self.autocast = resolve_autocast(config.model.autocast, device=self.backbone.device, dtype=config.model.dtype)
        folder = Path(config.cache.folder).expanduser() if config.cache.folder else cache.default_folder()
        limit = round(config.cache.limit_gb * 1e9)
        self.caches = {
            stage: cache.StageCache(folder / stage if config.cache.enabled else None, limit=limit)
            for stage in cache.STAGES
        }
        self.kept: dict[str, dict[str, object]] = {"references": {}, "generated": {}}  # of the pictures edited last
        self.ran_together = 0

    def __repr__(self) -> str:
        return f"<Editor: {self.method.name} with {self.backbone.name} on {self.backbone.device}>"

    @classmethod
    def from_config(
        cls, *files: str | Path, overrides: Sequence[str] = (), method: Method | str | None = None, **kwargs: Any
    ) -> Editor:
        """An editor from YAML overlays (paths, or names of shipped ones) and `key=value` overrides.

        Args:
            method: one of your own, whose settings the overrides may name.
            kwargs: as for `Editor`.
        """
        chosen = [] if method is None else [f"method={methods.bring(method)}"]
        return cls(load_config(files, [*chosen, *overrides]), **kwargs)

    # ------------------------------------------------------------------------------------------- edits

    def edit(
        self,
        sample: EditSample,
        *,
        config: Config | None = None,
        folder: Path | None = None,
        logger: Logger | None = None,
        callbacks: Sequence[L.Callback] = (),
        watch: Watch | None = None,
    ) -> EditResult:
        """Edit one sample.

        Args:
            sample: picture, prompt, and what the method needs. With `generate.enabled` its picture, of the size that
                will be generated, does not matter.
            config: in place of the editor's, see `Request`.
            folder: where intermediate frames are written as they come; None keeps them in memory only.
            logger: a Lightning logger for losses, distances and frames (`config.logger` is for `edit_and_save`).
            callbacks: more observers of the drag.
            watch: told of each drag step: its number, the handles (N, 2) as (x, y) in px of the sample's image, and the
                preview (h, w, 3) uint8 if this step has one (`output.frames_every`).

        Raises:
            UserError: the sample does not fit the settings.
        """
        (result,) = self.edit_batch([Request(sample, config, folder, logger, callbacks, watch)])
        if isinstance(result, UserError):
            raise result
        return result

    def edit_batch(self, requests: Sequence[Request]) -> list[EditResult | UserError]:
        """Edit several samples at once: their LoRAs are trained in one batch, their latents dragged in one.

        Results are those of `edit` but for rounding. The samples' pictures may be the same, then they share what
        depends on nothing else. Where a GPU's memory is too small for all at once, they go on one by one.

        Args:
            requests: whose pictures have latents of one size, see `size_class`.

        Returns:
            For each request its result, or what is wrong with it; the others are not affected.

        Raises:
            UserError: the requests don't fit into one batch.
        """

        _check_batch(self, requests)
        try:
            return self._run(requests)
        except (RuntimeError, MemoryError) as error:
            if len(requests) == 1 or not out_of_memory(error):
                raise
        # outside of the clause the error is gone, and with it what it holds
        warnings.warn(
            f"the device's memory is too small for {len(requests)} edits at once: they go on one by one", stacklevel=2
        )
        results: list[EditResult | UserError] = []
        for request in requests:
            self.forget()
            if isinstance(request.logger, Recording):
                request.logger.clear()
            try:
                results += self._run([request])
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                # what the others have made is not lost
                results.append(UserError(TOO_LITTLE_MEMORY))
        return results

    def _run(self, requests: Sequence[Request]) -> list[EditResult | UserError]:
        self._begin()
        job = self.job()
        outcomes: dict[int, EditResult | UserError] = {}
        with suppress(NothingLeft), self.backbone.frozen(self.config.model):
            for number, request in enumerate(requests):
                try:
                    edits.begin(job, self.method, number, request)
                except UserError as error:
                    outcomes[number] = UserError(str(error))  # without what its traceback holds
            images = self.method.run(job) if job.edits else []
            _check_pictures(self.method, images, job)
            self.ran_together = len(job.edits)
            for edit, image in zip(job.edits, images, strict=True):
                outcomes[edit.number] = edits.result(job, edit, image)
        outcomes |= job.failed
        return [outcomes[number] for number in range(len(requests))]

    def size_class(self, sample: EditSample) -> points.Size:
        """(h, w) of the sample's latent: edits with the same can be in one batch."""
        generate = self.config.generate
        size = (generate.height, generate.width) if generate.enabled else self._working(sample).image.shape[:2]
        return self.backbone.latent_size(*size)

    def _working(self, sample: EditSample) -> EditSample:
        return edits.at_working_size(sample, self.config, self.backbone)

    # ------------------------------------------------------------------------------------------- with files

    def edit_and_save(
        self, sample: EditSample, folder: str | Path, *, config: Config | None = None, **observers: Any
    ) -> EditResult:
        """As `edit`; writes into the folder, and logs as `config.logger` says, all that the command does.

        Args:
            config, observers: `config`, `callbacks` and `watch`, as for `edit`.

        Raises:
            UserError: as `edit`; also, before any work, where the folder can't be made.
        """
        folder = _made(folder)
        with open_logger(config or self.config, name=folder.name, folder=folder) as logger:
            result = self.edit(sample, config=config, folder=folder, logger=logger, **observers)
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

    # ------------------------------------------------------------------------------------------- parts of an edit

    def finetune(self, sample: EditSample, *, folder: Path | None = None, logger: Logger | None = None) -> LoRA | None:
        """The sample's LoRA: the file that the config names, or the cached one, or a newly trained one.

        Args:
            folder: where intermediate LoRAs and a checkpoint go every `lora.save_every` steps.

        Returns:
            None when `lora.steps` is 0 and no file is named.
        """
        settings = self.config.lora
        if settings.path:
            return adapters.named(self.config)
        if settings.steps == 0:
            return None
        job = self.job([self._working(sample)])
        with self.backbone.frozen(self.config.model):
            if folder is not None and settings.save_every:
                (trained,) = adapters.train(job, job.pictures, [logger], folder=folder)
            else:
                (trained,) = adapters.trained_loras(job, [logger])
        if isinstance(trained, UserError):
            raise trained
        return trained

    def share_loras(self, samples: Sequence[EditSample], steps: Collection[int]) -> None:
        """Train each sample's LoRA once for edits with different `lora.steps`: each goes into the cache on the way."""
        self._begin()
        different = {cache.digest(image=w.image, prompt=w.prompt): w for w in map(self._working, samples)}
        with self.backbone.frozen(self.config.model):
            self.ran_together = adapters.share(self.job(list(different.values())), steps)

    def generate(self, prompt: str) -> tuple[np.ndarray, list[Tensor]]:
        """Generate a picture as `config.generate` says.

        Returns:
            ((H, W, 3) uint8, the latent before each step and the clean one).
        """
        size = self.config.generate.height, self.config.generate.width
        job = self.job([EditSample(np.zeros((*size, 3), np.uint8), prompt, [])])
        with self.backbone.frozen(self.config.model), adapters.adapted(job, [adapters.named(self.config)]):
            (picture,), path, _ = generated(job)
        return picture, path

    def job(self, pictures: Sequence[EditSample] = ()) -> Job:
        """A job with this editor's model and settings, and no edits yet."""
        return Job(self.config, self.backbone, [], list(pictures), self.caches, self.kept, self.autocast, self.report)

    # ------------------------------------------------------------------------------------------- the editor itself

    def reconfigured(self, config: Config, *, report: Report | None = None) -> Editor:
        """An editor with other settings, but the same model, `config.model` notwithstanding, and what it has in memory.

        Raises:
            UserError: bad settings.
        """
        other = Editor(config, self.backbone, report=report or self.report)
        other.kept = self.kept
        return other

    def forget(self) -> None:
        """Give up what is kept in memory for the next edit of the same picture."""
        for memory in self.kept.values():
            memory.clear()
        if self.backbone.device.type == "cuda":
            gc.collect()  # a Trainer that failed is a cycle
            torch.cuda.empty_cache()

    def without_memory(self) -> Editor:
        """The same, keeping nothing between edits in memory."""
        self.forget()
        kept = dataclasses.replace(self.config.cache, reference_mb=0)
        return self.reconfigured(dataclasses.replace(self.config, cache=kept))

    def _begin(self) -> None:
        """What was run before, and its peak of memory, does not count."""
        self.ran_together = 0
        if self.backbone.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.backbone.device)


class OneModel:
    """Editors of any settings; one model is loaded, and kept until another is named."""

    def __init__(self) -> None:
        self._editor: Editor | None = None
        self._loaded: ModelConfig | None = None

    def editor(self, config: Config, *, report: Report | None = None) -> Editor:
        """An editor with these settings, whose model is loaded where another one is.

        Raises:
            UserError: bad settings, or no such model.
        """
        if self._editor is None or self._loaded != config.model:
            self._editor = None  # the memory of the model before is free before the next is loaded
            gc.collect()  # Trainers are cycles, by which it would stay
            torch.cuda.empty_cache()
            self._editor = Editor(config, load_backbone(config.model))
            self._loaded = copy.copy(config.model)
        return self._editor.reconfigured(config, report=report)


def _check_batch(editor: Editor, requests: Sequence[Request]) -> None:
    """
    Raises:
        UserError: the requests don't fit into one batch.
    """
    if not requests:
        raise UserError("a batch needs at least one edit")
    sizes = set()
    for request in requests:
        with suppress(UserError):  # of one sample: its own edit says so
            sizes.add(editor.size_class(request.sample))
    if len(sizes) > 1:
        raise UserError(f"the pictures of a batch need latents of one size, these have {sorted(sizes)}")
    ours = shared_settings(editor.config)
    for config in (request.config for request in requests if request.config is not None):
        check_settings(config)
        theirs = shared_settings(config)
        for key in ours:
            if ours[key] != theirs.get(key):
                raise UserError(
                    f"{key} is {theirs.get(key)!r} in one edit and {ours[key]!r} in another: the edits of a batch "
                    "may differ in their samples and in what drag.* says, drag.features apart"
                )


def _check_pictures(method: Method, images: object, job: Job) -> None:
    """
    Raises:
        UserError: a method's `run` has not returned a picture of its size for each edit.
    """
    sizes = [edit.sample.image.shape for edit in job.edits]
    got = [getattr(image, "shape", image) for image in images] if isinstance(images, list) else images
    if not isinstance(images, list) or got != sizes or any(image.dtype != np.uint8 for image in images):
        raise UserError(
            f"{method.name}: run must return a list with a picture (H, W, 3) uint8 for each edit: expected "
            f"{sizes}, got {str(got)[:200]}"
        )


@contextmanager
def enough_memory() -> Iterator[None]:
    """
    Raises:
        UserError: the device's memory was too small.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(TOO_LITTLE_MEMORY) from error


def _made(folder: str | Path) -> Path:
    """A folder that is there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
    return folder
