"""`Editor`: the one path from a sample to a result, used by command line, Python, studies and tests."""

from __future__ import annotations

import copy
import dataclasses
import gc
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from dragdiff import cache, output
from dragdiff.callbacks import Watch
from dragdiff.checks import check_blocks, check_settings, shared_settings
from dragdiff.config import Config, ModelConfig, load_config
from dragdiff.data.sample import EditSample
from dragdiff.edits import Edit, EditResult, Request
from dragdiff.errors import UserError
from dragdiff.loggers import log_result, open_logger
from dragdiff.models.trainer import Recording
from dragdiff.modules import lora, points
from dragdiff.modules.backbone import Backbone
from dragdiff.modules.denoiser import Denoiser
from dragdiff.modules.loading import load_backbone, skeleton
from dragdiff.stages import Report, Stages, keep_rows, named_lora

TOO_LITTLE_MEMORY = (
    "the device's memory is too small for this picture: set model.memory=low, a smaller data.max_size, "
    "model.dtype=fp16 or a smaller lora.batch_size"
)


class Editor(Stages):
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
        check_settings(config, skeleton(config.model) if backbone is None else None)
        named_lora(config)
        super().__init__(config, backbone or load_backbone(config.model), report)
        check_blocks(config, self.backbone.feature_block, self.backbone.self_attention_layers)
        self.ran_together = 0  # edits of the last batch, or pictures whose LoRAs were trained

    @classmethod
    def from_config(cls, *files: str | Path, overrides: Sequence[str] = (), **kwargs: Any) -> Editor:
        """An editor from YAML overlays (paths, or names of shipped ones) and `key=value` overrides."""
        return cls(load_config(files, overrides), **kwargs)

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

        Results are those of `edit` but for rounding. The samples' pictures may be the same, then they share what
        depends on nothing else. Where a GPU's memory is too small for all at once, they go on in halves.

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
        warnings.warn(
            f"the device's memory is too small for {len(requests)} edits at once: they go on in halves", stacklevel=2
        )
        for request in requests:
            if isinstance(request.logger, Recording):
                request.logger.clear()
        middle, results = len(requests) // 2, []
        for half in (requests[:middle], requests[middle:]):
            self.forget()
            try:
                results += self.edit_batch(half)
            except torch.OutOfMemoryError:  # what the other half has made is not lost
                results += [UserError(TOO_LITTLE_MEMORY)] * len(half)
        return results

    def _edit_batch(self, requests: Sequence[Request]) -> list[EditResult | UserError]:
        self.seconds = {}
        self._begin_together()
        self._check_batch(requests)
        scheduler = self._scheduler()
        path: list[Tensor] = []
        prompts: list[str] = []
        generated: list[np.ndarray] = []
        if self.config.generate.enabled:
            prompts = list(dict.fromkeys(request.sample.prompt for request in requests))
            generated, path, scheduler = self._generate(prompts)
        outcomes: dict[int, EditResult | UserError] = {}
        edits, pictures = self._begin(requests, dict(zip(prompts, generated, strict=True)), outcomes)
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
                        keep_rows(scheduler, rows)
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
            return named_lora(self.config)
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
        """Train each sample's LoRA once for edits with different `lora.steps`: each goes into the cache on the way.

        Where a GPU's memory is too small for all at once, they go on in halves.
        """
        samples = list({self._lora_key(w, 0): w for w in map(self._working, samples)}.values())  # each picture once
        try:
            self._share_loras(samples, steps)
            return
        except torch.OutOfMemoryError:
            if len(samples) == 1:
                raise
        middle = len(samples) // 2
        for half in (samples[:middle], samples[middle:]):
            self.forget()
            self.share_loras(half, steps)

    def _begin_together(self) -> None:
        """What was run before, and its peak of memory, does not count."""
        self.ran_together = 0
        if self.backbone.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.backbone.device)

    def _share_loras(self, samples: Sequence[EditSample], steps: Collection[int]) -> None:
        self._begin_together()
        keys = {(row, count): self._lora_key(sample, count) for row, sample in enumerate(samples) for count in steps}
        missing = [place for place, key in keys.items() if key not in self._loras]
        if not missing or not self.config.cache.enabled:
            return
        rows = sorted({row for row, _ in missing})

        def keep(number: int, count: int, trained: lora.LoRA) -> None:
            if (place := (rows[number], count)) in missing:
                self._loras.put(keys[place], trained, save=lora.save)

        most = max(count for _, count in missing)
        longest = dataclasses.replace(self.config.lora, steps=most)
        # one that diverges says so where it is used
        self.reconfigured(dataclasses.replace(self.config, lora=longest))._train_loras(
            [samples[row] for row in rows], [None] * len(rows), snapshots=steps, keep=keep
        )
        self.ran_together = len(rows)

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
            gc.collect()  # a Trainer that failed is a cycle
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

    def _check_batch(self, requests: Sequence[Request]) -> None:
        if not requests:
            raise UserError("a batch needs at least one edit")
        sizes = set()
        for request in requests:
            with suppress(UserError):  # of one sample: `_begin` says so
                sizes.add(self.size_class(request.sample))
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
        self,
        requests: Sequence[Request],
        generated: Mapping[str, np.ndarray],
        outcomes: dict[int, EditResult | UserError],
    ) -> tuple[list[Edit], list[EditSample]]:
        """The edits that can begin, and their different source pictures at the working size.

        Args:
            generated: the pictures that take the place of the samples', by prompt; empty where none are generated.
        """
        edits: list[Edit] = []
        pictures: dict[tuple[str, str], EditSample] = {}
        for number, request in enumerate(requests):
            sample, config = request.sample, request.config or self.config
            try:
                if generated:
                    working = sample = dataclasses.replace(sample, image=generated[sample.prompt])
                else:
                    working = self._working(sample)
                keep = self._keep(working, config.drag)
            except UserError as error:
                outcomes[number] = UserError(str(error))  # without what its traceback holds
                continue
            key = (cache.digest(image=working.image), sample.prompt)
            pictures.setdefault(key, working)
            edits.append(Edit(number, list(pictures).index(key), request, config, sample, working, keep))
        return edits, list(pictures.values())


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
            gc.collect()  # Trainers are cycles, by which it would stay
            torch.cuda.empty_cache()
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


def _made(folder: str | Path) -> Path:
    """A folder that is there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(folder)!r}: {error.strerror or error}") from error
    return folder
