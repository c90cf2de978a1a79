"""What the source pictures leave behind, by inversion or by the generation's own path: at each noise level their latent
and, when asked for, features and attention states."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dragdiff import cache
from dragdiff.backbones import lora_file
from dragdiff.backbones.diffusion import States
from dragdiff.job import Job
from dragdiff.modules import ddim
from dragdiff.modules.images import to_tensor
from dragdiff.stages.decoding import to_picture

Generated = tuple[list[np.ndarray], list[Tensor], Any]  # pictures, latents from the noise down, scheduler at the top


@dataclass(frozen=True)
class Level:
    """A noise level of the schedule.

    Attributes:
        index: of the schedule's timesteps, which descend.
        t: its timestep, a scalar on the model's device.
        alpha, alpha_below: cumulative alpha here and one step below.
    """

    index: int
    t: Tensor
    alpha: Tensor
    alpha_below: Tensor


@dataclass(frozen=True)
class Reference:
    """The sources (P, C, h, w) at a level, seen once.

    Attributes:
        below: their latents one DDIM step below, for the mask term; None at the top, where the edits' own first forward
            gives the same without a difference in rounding.
        states: what entered the self-attention layers that were asked for.
        features: of the points that were asked for, with a row for each source.
    """

    below: Tensor | None
    states: States
    features: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that keeping it takes."""
        return sum(value.nbytes for value in (*self.states.values(), *self.features))


@dataclass(eq=False)
class Source:
    """The job's source pictures at every level.

    Attributes:
        path: latents (P, C, h, w), the clean ones first, those of the top level last.
        scheduler: at the top level, with what a multistep solver remembers of the sources.
        recorded: states on the way up, of each level from the lowest, where they were asked for and fit into memory.
    """

    job: Job
    path: list[Tensor]
    scheduler: Any
    recorded: list[States] = field(default_factory=list)

    @property
    def top(self) -> Level:
        """The level of the drag."""
        return self.level(len(self.scheduler.timesteps) - self.job.config.ddim.taken)

    def level(self, index: int) -> Level:
        """The level of a timestep of the schedule."""
        scheduler = self.scheduler
        t = scheduler.timesteps[index]
        alpha = scheduler.alphas_cumprod[int(t)]
        return Level(index, t.to(self.job.model.device), alpha, ddim.alpha_before(scheduler, index))

    def latents(self) -> Tensor:
        """Each edit's source at the top level, (E, C, h, w)."""
        return torch.cat([self.path[-1][edit.picture, None] for edit in self.job.edits])

    def down(self, *, layers: Sequence[str] = (), features: Sequence[str] = (), way: str = "down") -> Iterator[Step]:
        """The way down, a step for each level from the top on; the sources go beside.

        The sources are denoised by themselves, and not as rows of the edits' batch: then it makes no difference to a
        result whether what they leave comes from memory.

        Args:
            layers: self-attention layers whose states are wanted.
            features: feature points whose features are wanted.
            way: "down": what a forward at each level's own latent sees, on the sources' way down. "up": what the
                inversion saw, which comes to a level with the latent below it.
        """
        job, rows = self.job, [edit.picture for edit in self.job.edits]
        solver = self._solver(rows)
        references = self._references(list(layers), list(features), way)
        for index in range(self.top.index, len(self.scheduler.timesteps)):
            reference = next(references) if layers or features else Reference(None, {}, [])
            yield Step(job, self.level(index), reference, list(layers), solver, index - self.top.index)

    def _references(self, layers: list[str], features: list[str], way: str) -> Iterator[Reference]:
        """In the memory that the settings allow, kept for the next edit of the same pictures."""
        job = self.job
        made = self._up(layers) if way == "up" else self._down(layers, features)
        budget, steps = job.config.cache.reference_mb * 2**20, job.config.ddim.taken
        if budget == 0:
            yield from made
            return
        key = cache.digest(
            models=job.adapters,
            source=self.path[-1].float().cpu().numpy(),
            condition={name: value.tolist() for branch in job.denoiser.branches for name, value in branch.items()},
            scheduler=[type(self.scheduler).__name__, self.scheduler.timesteps.tolist()],
            layers=layers,
            features=features,
            way=way,
            generate=dataclasses.asdict(job.config.generate),
        )
        memory = job.kept["references"]
        if key in memory:
            yield from cast(list[Reference], memory[key])
            return
        memory.clear()
        kept: list[Reference] = []
        for reference in made:
            if steps * reference.nbytes <= budget:
                kept.append(reference)
            if len(kept) == steps:
                memory[key] = kept
            yield reference

    def _solver(self, pictures: Sequence[int]) -> Any:
        """A scheduler of its own at the top level, for a batch of so many rows."""
        solver = copy.deepcopy(self.scheduler)
        if remembered := getattr(solver, "model_outputs", None):
            solver.model_outputs = [value if value is None else value[list(pictures)] for value in remembered]
        if hasattr(solver, "set_begin_index"):
            solver.set_begin_index(self.top.index)
        return solver

    def _down(self, layers: list[str], features: list[str]) -> Iterator[Reference]:
        denoiser, everyone = self.job.denoiser, list(range(len(self.path[-1])))
        latents, solver = self.path[-1], self._solver(everyone)
        for index in range(self.top.index, len(solver.timesteps)):
            level = self.level(index)
            with torch.no_grad(), self.job.model.recorded_attention(layers) as states:
                output, maps = denoiser.with_features(latents, level.t, everyone, names=features, need_output=True)
                assert output is not None
                alphas, kind = {"alpha": level.alpha, "alpha_to": level.alpha_below}, self.job.model.prediction_type
                below = ddim.move(latents, output, **alphas, prediction_type=kind)
                latents = solver.step(output, solver.timesteps[index], latents).prev_sample
            yield Reference(below if index > self.top.index else None, states, maps)

    def _up(self, layers: list[str]) -> Iterator[Reference]:
        everyone = list(range(len(self.path[-1])))
        for number in reversed(range(len(self.path) - 1)):
            below = self.path[number]
            if self.recorded:
                states = self.recorded[number]
            else:
                level = self.level(len(self.scheduler.timesteps) - 1 - number)
                with torch.no_grad(), self.job.model.recorded_attention(layers) as states:
                    self.job.denoiser(below, level.t, everyone)
            yield Reference(None, states, [])


@dataclass(eq=False)
class Step:
    """A level on the way down, with what the sources leave there.

    Attributes:
        number: counted from the top.
    """

    job: Job
    level: Level
    reference: Reference
    layers: list[str]
    solver: Any
    number: int

    def down(self, latents: Tensor, *, controlled: Sequence[bool] | None = None) -> Tensor:
        """The edits' latents (E, C, h, w) one level below.

        Args:
            controlled: whose self-attention takes keys and values from the source; None = all, where the step has
                states and `control.start_step` is reached.
        """
        job, pictures, states = self.job, [edit.picture for edit in self.job.edits], self.reference.states
        shared = states and self.number >= job.config.control.start_step and (controlled is None or any(controlled))
        with torch.no_grad():
            with (
                job.denoiser.shared_attention(self.layers, states, pictures=pictures, where=controlled)
                if shared
                else nullcontext()
            ):
                output = job.denoiser(latents, self.level.t, pictures)
            return self.solver.step(output, self.solver.timesteps[self.level.index], latents).prev_sample


def source(job: Job, *, states: Sequence[str] = ()) -> Source:
    """The source pictures' latents: generated with their pictures, from the cache, or by DDIM inversion.

    Edits whose source's latent is not finite are dropped.

    Args:
        states: self-attention layers whose states on the way up will be wanted: they are noted while a picture is
            inverted, where `Source.down` would compute them again.
    """
    kind = job.config.generate.scheduler if job.config.generate.enabled else "ddim"
    scheduler = job.model.scheduler(job.config.ddim.steps, kind)
    if job.config.generate.enabled:
        images, path, scheduler = generated(job)
        prompts = [picture.prompt for picture in job.pictures]
        for edit in job.edits:
            image = images[prompts.index(edit.sample.prompt)]
            edit.sample = edit.working = dataclasses.replace(edit.sample, image=image)
        job.pictures = [
            dataclasses.replace(picture, image=image) for picture, image in zip(job.pictures, images, strict=True)
        ]
        top = len(path) - 1 - job.config.ddim.taken
        found = Source(job, list(reversed(path[top:])), scheduler)
    else:
        found = _inverted(job, scheduler, list(states))
    good = torch.isfinite(found.path[-1]).flatten(1).all(dim=1).tolist()
    for edit in list(job.edits):
        if not good[edit.picture]:
            job.drop(edit, job.not_finite)
    return found


def _inverted(job: Job, scheduler: Any, layers: list[str]) -> Source:
    steps, store = job.config.ddim.taken, job.caches["inversion"]
    keys = [
        cache.digest(
            **own,  # the LoRA's part of it, too
            image=cache.digest(image=picture.image),
            prompt=picture.prompt,
            steps=steps,
            timesteps=scheduler.timesteps.tolist(),
            kept="path",
        )
        for picture, own in zip(job.pictures, job.adapters, strict=True)
    ]

    def load(entry: Path) -> Tensor:
        return cache.load_tensors(entry)["path"].to(job.model.device)

    paths = {number: store.find(key, load=load) for number, key in enumerate(keys)}
    missing = [number for number, path in paths.items() if path is None]
    for _ in range(len(keys) - len(missing)):
        job.report("inversion", steps, steps, "from the cache")
    recorded: list[States] = []
    if missing:
        everything = len(missing) == len(keys) and job.config.model.memory == "normal"
        with job.stage("inversion", steps) as advance, torch.no_grad():
            # one by one: an autoencoder needs more memory than all the rest
            clean = [job.model.encode(to_tensor(job.pictures[i].image).to(job.model.device))[0] for i in missing]

            def predict(latents: Tensor, t: Tensor) -> Tensor:
                if not (layers and everything):
                    return job.denoiser(latents, t, missing)
                with job.model.recorded_attention(layers) as states:
                    output = job.denoiser(latents, t, missing)
                recorded.append(states)
                return output

            path = ddim.invert(
                predict, torch.cat(clean), scheduler=scheduler, steps=steps, report=lambda done: advance(done, "")
            )
        for row, number in enumerate(missing):
            inverted = torch.cat([latents[row, None] for latents in path])
            store.put(keys[number], {"path": inverted}, save=cache.save_tensors)
            paths[number] = inverted
    return Source(job, [torch.stack(rows) for rows in zip(*paths.values(), strict=True)], scheduler, recorded)


def generated(job: Job) -> Generated:
    """Pictures generated as `config.generate` says, all from the same noise; kept for the next job that wants them.

    A multistep solver (DPM++ 2M) remembers the step before. Denoising goes on with that memory, for the source and the
    edited row alike: without it the source would not come out as the picture that was generated.

    Returns:
        (a picture (H, W, 3) uint8 for each prompt; the latents before each step and the clean ones; the scheduler as it
        was at the top level).
    """
    prompts = [picture.prompt for picture in job.pictures]
    if not job.config.cache.enabled:
        return _generated(job)
    key = cache.digest(
        **job.model_inputs(),
        prompts=prompts,
        seed=job.config.seed,
        ddim=dataclasses.asdict(job.config.ddim),
        generate=dataclasses.asdict(job.config.generate),
        lora=_changed_at(job.config.lora.path),
    )
    memory = job.kept["generated"]
    if key not in memory:
        memory.clear()
        memory[key] = _generated(job)
    images, path, at_top = cast(Generated, memory[key])
    return images, path, copy.deepcopy(at_top)  # which an edit moves on


def _generated(job: Job) -> Generated:
    settings, model, count = job.config.generate, job.model, len(job.pictures)
    scheduler = model.scheduler(job.config.ddim.steps, settings.scheduler)
    size = model.latent_size(settings.height, settings.width)
    random = torch.Generator().manual_seed(job.config.seed)
    noise = torch.randn((1, model.latent_channels, *size), generator=random).to(model.device)
    latents = (noise * scheduler.init_noise_sigma).repeat(count, 1, 1, 1)
    total, everyone = len(scheduler.timesteps), list(range(count))
    at_top = copy.deepcopy(scheduler)
    with job.stage("generate", total) as advance:

        def step_done(done: int) -> None:
            nonlocal at_top
            if done == total - job.config.ddim.taken:
                at_top = copy.deepcopy(scheduler)
            advance(done, "")

        path = ddim.sample(
            lambda z, t: job.denoiser(z, t, everyone), latents, scheduler=scheduler, start=0, report=step_done
        )
        if not torch.isfinite(path[-1]).all():
            raise job.not_finite
        images = [to_picture(job, clean[None], (settings.height, settings.width)) for clean in path[-1]]
    return images, path, at_top


def _changed_at(path: str) -> list[Any]:
    """A LoRA's file, when it was last written, ns, and its bytes; empty without a path."""
    if not path:
        return []
    file = lora_file.file_of(Path(path).expanduser())
    return [str(file), file.stat().st_mtime_ns, file.stat().st_size]
