"""How long each stage takes, as a ratio to a bare forward of the denoiser, and how much memory it needs.

    python benchmarks/speed.py                                       # Stable Diffusion 1.5's size, random weights
    python benchmarks/speed.py model=sd15 device=cuda dtype=fp16     # a real one: an overlay, a folder, a file
    python benchmarks/speed.py memory=low output=low.json            # or compile=true
    python benchmarks/speed.py --compare before.json after.json

Everything measured runs through `Editor.edit`: its reports of progress start and stop the clock. A stage's first steps
are not counted (they set up the Trainer, encode the picture, get memory from the system that the others use again),
those after them are averaged; decoding has one step, which is. A bare forward of the same batch and precision runs just
before each stage and just after it, twice for the same reason, of which the second counts; a ratio is the median over
the repetitions of the stage by the mean of the forwards. They run in a process of their own, with the model once more:
in that of an edit they would gain from what it sets there, on a CPU by memory that is kept for reuse, and would not be
what a user has without it. Speed does not depend on the weights. `compile=true` compares gradients before an edit's
first stage, and compiles for what is new in a stage in its first step; the forward, the counts and the framework's
share are never compiled, so that ratios can be compared. On a CPU with one thread the clock is the
process's CPU time, else the wall's. Peaks of memory are measured apart, each stage in a process of its own: on a CPU
resident memory, on a GPU the allocator's. Previews (`output.frames_every`) are left out of the times; the peaks include
one. `batch=N` adds what a LoRA step and a drag step of N edits take at once, each picture with its own LoRA, against
those of as many edits one by one in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dragdiff import Editor, EditSample, Request
from dragdiff.backbones import lora_file
from dragdiff.backbones.loading import DTYPES, load_backbone, resolve_device
from dragdiff.backbones.single_file import PAD_TOKENS, SHIPPED, clip_tokenizer
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.config import Config, find_overlay, load_config
from dragdiff.errors import UserError
from dragdiff.modules import ddim, lora, motion, points, tracking
from dragdiff.modules.features import FeatureMap
from dragdiff.options import describe
from report import comparison, read, table
from settings import STEPS_ON_A_GPU, BenchmarkConfig, load_benchmark

RANDOM = ("sd15-random", "tiny")
PEAK_STEPS = 2  # what the first frees may be kept for the second
OVERHEAD_STEPS = 60  # of a drag with the tiny model
OVERHEAD_REPEATS = 9
# the CPU's attention, which torch's counter leaves out
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


class Stage(NamedTuple):
    """A stage to measure: which of `Editor`'s, with what, and what it is compared with.

    Attributes:
        reports: the name by which `Editor` reports it.
        rows: batch of the bare forward that it is compared with.
        autocast: whether it runs under the Trainer's precision.
        masked: whether the sample has a mask.
    """

    reports: str
    rows: int = 1
    autocast: bool = False
    masked: bool = True


LORA_BATCH = Config().lora.batch_size
STAGES = {
    "lora": Stage("LoRA", rows=LORA_BATCH, autocast=True),
    "inversion": Stage("inversion"),
    "drag, mask": Stage("drag", autocast=True),
    "drag, no mask": Stage("drag", autocast=True, masked=False),
    "denoise": Stage("denoise"),
    "decode": Stage("decode"),
}
# stages that one edit measures together
EDITS = (("lora",), ("inversion", "drag, mask", "denoise", "decode"), ("drag, no mask",))


class _Enough(Exception):
    """Raised from a report when all that was to be measured has been."""


# ----------------------------------------------------------------------------------- what is measured


def load(settings: BenchmarkConfig) -> StableDiffusion:
    """The model, with random weights or a real one.

    Raises:
        UserError: no such model, or no such device.
    """
    if settings.model in RANDOM:
        device = resolve_device(settings.device)
        pipeline = random_pipeline(tiny=settings.model == "tiny", dtype=settings.dtype, device=device)
        return StableDiffusion(pipeline.to(device), name=settings.model)
    return load_backbone(model_config(settings).model)


def random_pipeline(*, tiny: bool, dtype: str, device: torch.device) -> Any:
    """A diffusers pipeline of Stable Diffusion 1.5's structure with random weights; `tiny` has a few channels only.

    Args:
        device: draws the weights.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import logging
    from transformers import CLIPTextConfig, CLIPTextModel

    logging.set_verbosity_error()
    unet, vae, text = (
        json.loads((SHIPPED / "sd1" / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")
    )
    if tiny:
        small = {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}
        unet |= small | {"cross_attention_dim": 8, "attention_head_dim": 2}
        vae |= small
        text |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        parts = {
            "unet": UNet2DConditionModel.from_config(unet),
            "vae": AutoencoderKL.from_config(vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
        }
    return StableDiffusionPipeline(
        **{name: part.to(DTYPES[dtype]) for name, part in parts.items()},
        tokenizer=clip_tokenizer(pad_token=PAD_TOKENS["sd1"]),
        scheduler=DDIMScheduler.from_config(json.loads((SHIPPED / "sd1/scheduler/scheduler_config.json").read_text())),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def model_config(settings: BenchmarkConfig) -> Config:
    keys: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype, "autocast": settings.autocast}
    keys |= {"memory": settings.memory, "compile": settings.compile}
    overlays: list[Any] = []
    if settings.model not in RANDOM:
        try:
            overlays = [find_overlay(settings.model)]
        except UserError:
            keys["path"] = settings.model
    return load_config([*overlays, {"model": keys}])


def editor(
    settings: BenchmarkConfig, backbone: StableDiffusion, *, steps: int, adapter: str, **sections: Any
) -> Editor:
    """An editor whose stages have `steps` steps each; no cache, nothing stops early.

    Args:
        adapter: a LoRA's file for the edit; empty = train one.
        sections: more settings, by section.
    """
    given: dict[str, Any] = {
        "lora": {"path": adapter, "steps": steps, "batch_size": LORA_BATCH, "resolution": settings.size},
        # the schedule has more steps than are taken; which ones makes no difference to the time
        "ddim": {"steps": 50, "strength": steps / 50},
        # so small a rate that no handle reaches its target, which would end the drag early
        "drag": {"steps": steps, "stop_distance": 0.0, "lr": 1e-6},
        "output": {"frames_every": 0},
        "cache": {"enabled": False},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    config = dataclasses.replace(load_config([given]), model=model_config(settings).model)
    return Editor(config, backbone)


def make_sample(size: int, *, masked: bool, number: int = 0) -> EditSample:
    """A noise picture, of each number another, with one drag across its middle; the mask leaves a border."""
    image = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    mask = np.zeros((size, size), dtype=bool)
    mask[size // 8 : -size // 8, size // 8 : -size // 8] = True
    pair = [[size // 4, size // 4], [3 * size // 4, 3 * size // 4]]
    return EditSample(image, "a picture of a benchmark", points=[pair], mask=mask if masked else None)


def run_edit(
    edit: Editor,
    measured: Sequence[str],
    size: int,
    watch: Callable[[str, int, int], None],
    *,
    count: int = 1,
    logger: Logger | None = None,
) -> None:
    """Edit until the stages of these names are done.

    Args:
        watch: told of a measured stage, the steps done in it and its steps in all.
        count: pictures that are edited at once.
        logger: of the first.

    Raises:
        UserError: the edit failed, or memory is too small for so many at once.
    """
    names = {STAGES[name].reports: name for name in measured}
    done: set[str] = set()

    def report(stage: str, step: int, total: int, note: str) -> None:
        if stage in names:
            watch(names[stage], step, total)
            done.update([stage] if step == total else [])
        elif done == set(names):
            raise _Enough

    edit.report = report
    samples = [make_sample(size, masked=STAGES[measured[0]].masked, number=number) for number in range(count)]
    requests = [Request(sample, logger=None if number else logger) for number, sample in enumerate(samples)]
    try:
        with warnings.catch_warnings():
            # that a batch goes on in halves, which would be timed in its place
            warnings.filterwarnings("error", message="the device's memory is too small", category=UserWarning)
            for result in edit.edit_batch(requests):
                if isinstance(result, UserError):
                    raise result
    except _Enough:
        pass
    except UserWarning:
        raise UserError(f"the device's memory is too small for {count} edits at once: set a smaller batch") from None
    finally:
        edit.report = lambda stage, done, total, note: None
    if done != set(names):
        raise RuntimeError(f"of {', '.join(names)} only {', '.join(done) or 'nothing'} ran to its end")


def bare_forward(edit: Editor, size: int, *, rows: int, autocast: bool) -> Callable[[], None]:
    """One forward of the denoiser by itself, not compiled, without gradient."""
    backbone = edit.backbone
    assert isinstance(backbone, StableDiffusion)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((rows, backbone.latent_channels, *backbone.latent_size(size, size)), generator=generator)
    width = backbone.network.config.cross_attention_dim
    text = torch.randn((rows, 77, width), generator=generator)
    latents, text = (x.to(backbone.device, backbone.network.dtype) for x in (latents, text))
    t = torch.tensor(500, device=backbone.device)

    @torch.no_grad()
    def forward() -> None:
        mixed = autocast and edit.autocast != "none"
        half = torch.float16 if edit.autocast == "fp16" else torch.bfloat16
        with torch.autocast(backbone.device.type, dtype=half) if mixed else nullcontext():
            backbone.network(latents, t, encoder_hidden_states=text)

    return forward


# ----------------------------------------------------------------------------------- time and operations


@dataclass
class Clock:
    """Seconds, of the process's CPU or of the wall; waits for a GPU before it is read."""

    device: torch.device
    kind: str

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.process_time() if self.kind == "cpu" else time.perf_counter()

    def time(self, action: Callable[[], Any]) -> float:
        before = self()
        action()
        return self() - before


def make_clock(settings: BenchmarkConfig, device: torch.device) -> Clock:
    """The process's clock, with its threads set."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return Clock(device, "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall")


def operations(
    settings: BenchmarkConfig, backbone: StableDiffusion, adapter: str, names: Sequence[str]
) -> dict[str, float]:
    """GFLOP (multiplication and addition are two) of one step of each stage and of one forward for each batch."""
    settings = dataclasses.replace(settings, compile=False)  # a counter does not see into compiled code
    counts: dict[str, float] = {}
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)

    def watch(name: str, step: int, total: int) -> None:
        if step == total:
            counter.__exit__(None, None, None)
            counts[name] = counter.get_total_flops() / 1e9
        elif step == total - 1:
            counter.__enter__()

    for measured in _edits(names):
        run_edit(
            editor(settings, backbone, steps=2, adapter=_adapter(measured, adapter)), measured, settings.size, watch
        )
    edit = editor(settings, backbone, steps=1, adapter=adapter)
    with counter:
        bare_forward(edit, settings.size, rows=1, autocast=False)()
    counts["forward"] = counter.get_total_flops() / 1e9
    return counts


def times(
    settings: BenchmarkConfig,
    backbone: StableDiffusion,
    adapter: str,
    names: Sequence[str],
    clock: Clock,
    forward: Callable[[Stage], float],
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a step of each stage, and of the forwards around it, one of each for each repetition.

    Args:
        forward: seconds of the bare forward that a stage is compared with.
    """
    steps = settings.warmup + settings.steps
    seconds: dict[str, list[float]] = {name: [] for name in names}
    forwards: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(settings.repeats):
        for measured in _edits(names):
            edit = editor(settings, backbone, steps=steps, adapter=_adapter(measured, adapter))
            around: dict[str, list[float]] = {name: [] for name in measured}

            def time_forward(name: str, step: int, around: dict[str, list[float]] = around) -> None:
                around[name].append(forward(STAGES[name]))

            for name, took in step_seconds(edit, measured, settings, clock, aside=time_forward).items():
                seconds[name].append(took)
                forwards[name].append(mean(around[name]))
        print(f"repetition {repeat + 1} of {settings.repeats}", file=sys.stderr, flush=True)
    return seconds, forwards


def forward_seconds(edit: Editor, size: int, clock: Clock, stage: Stage) -> float:
    """Seconds of the bare forward that a stage is compared with: the second of two."""
    forward = bare_forward(edit, size, rows=stage.rows, autocast=stage.autocast)
    forward()
    return clock.time(forward)


_alone: tuple[Editor, int, Clock]  # in the process of the bare forwards: their model, side of the picture, and clock


def _load_alone(settings: BenchmarkConfig) -> None:
    global _alone
    backbone = load(settings)
    _alone = editor(settings, backbone, steps=1, adapter=""), settings.size, make_clock(settings, backbone.device)


def _forward_alone(stage: Stage) -> float:
    return forward_seconds(*_alone, stage)


@contextmanager
def forwards_alone(settings: BenchmarkConfig) -> Iterator[Callable[[Stage], float]]:
    """Bare forwards in a process of their own, with the model once more."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_load_alone, initargs=(settings,)) as pool:
        yield lambda stage: pool.submit(_forward_alone, stage).result()


def compared(seconds: Sequence[float], forwards: Sequence[float]) -> dict[str, float]:
    """What a stage's repetitions come to: their ratios to the bare forwards beside them, and the medians of both."""
    ratios = [step / forward for step, forward in zip(seconds, forwards, strict=True)]
    return {
        "ratio": median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "seconds": median(seconds),
        "forward_seconds": median(forwards),
    }


def step_seconds(
    edit: Editor,
    measured: Sequence[str],
    settings: BenchmarkConfig,
    clock: Clock,
    *,
    count: int = 1,
    aside: Callable[[str, int], None] = lambda name, step: None,
) -> dict[str, float]:
    """Seconds of a step of each stage of an edit.

    Args:
        count: edits at once.
        aside: called at a stage's start and end, with its name and the steps done; not timed.
    """
    found: dict[str, float] = {}
    started = 0.0

    def watch(name: str, step: int, total: int) -> None:
        nonlocal started
        counted = max(1, total - settings.warmup)
        if step == total:
            found[name] = (clock() - started) / counted
        if step in (0, total):
            aside(name, step)
        if step == total - counted:
            started = clock()

    run_edit(edit, measured, settings.size, watch, count=count)
    return found


def together(
    settings: BenchmarkConfig,
    backbone: StableDiffusion,
    clock: Clock,
    measured: Sequence[str] = ("lora", "drag, mask"),
    **sections: Any,
) -> dict[str, dict[str, float]]:
    """What `settings.batch` edits of different pictures take at once: the median, least and most of the ratio of a step
    to that of as many edits one by one.

    Args:
        sections: as for `editor`.
    """
    count = settings.batch
    ratios: dict[str, list[float]] = {name: [] for name in measured}
    for repeat in range(settings.repeats):
        edit = editor(settings, backbone, steps=settings.warmup + settings.steps, adapter="", **sections)
        took = {}
        for edits in (1, count) if repeat % 2 == 0 else (count, 1):  # what drifts goes both ways
            took[edits] = step_seconds(edit, measured, settings, clock, count=edits)
        for name in measured:
            ratios[name].append(took[count][name] / (count * took[1][name]))
        print(f"batch {repeat + 1} of {settings.repeats}", file=sys.stderr, flush=True)
    return {name: {"ratio": median(r), "ratio_low": min(r), "ratio_high": max(r)} for name, r in ratios.items()}


def _edits(names: Sequence[str]) -> Iterator[list[str]]:
    for together in EDITS:
        if measured := [name for name in together if name in names]:
            yield measured


def _adapter(measured: Sequence[str], adapter: str) -> str:
    return "" if "lora" in measured else adapter


def matmul_gflops(clock: Clock, dtype: torch.dtype) -> float:
    """What a large product of matrices reaches, GFLOP/s: the roof that the stages are compared with."""
    side, repeats = (8192, 20) if clock.device.type == "cuda" else (2048, 3)
    a, b = (torch.randn((side, side), device=clock.device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(repeats):
        best = min(best, clock.time(lambda: a @ b))
    return 2 * side**3 / best / 1e9


# ----------------------------------------------------------------------------------- the framework's share


def overhead(settings: BenchmarkConfig, clock: Clock) -> dict[str, float]:
    """Milliseconds of a drag step with a tiny model: the product's, under its Trainer with callbacks and a CSV log,
    and the same maths in a bare loop; the medians over some repetitions, also of what the one takes more than the
    other, with its least and most.
    """
    plain: dict[str, Any] = {"dtype": "fp32", "autocast": "none", "memory": "normal", "compile": False}
    tiny = dataclasses.replace(settings, model="tiny", size=64, **plain)
    backbone = load(tiny)
    ours, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(OVERHEAD_REPEATS):
            lengths = {"lora": {"steps": 0}, "ddim": {"strength": 0.02}, "drag": {"steps": OVERHEAD_STEPS}}
            edit = editor(tiny, backbone, steps=1, adapter="", **lengths)
            started = 0.0

            def watch(name: str, step: int, total: int) -> None:
                nonlocal started
                if step == 1:
                    started = clock()
                elif step == total:
                    ours.append((clock() - started) / (total - 1))

            run_edit(edit, ["drag, mask"], tiny.size, watch, logger=CSVLogger(folder, name=str(repeat)))
            bare.append(bare_drag(edit, tiny.size, clock))
    added = sorted(1e3 * (one - other) for one, other in zip(ours, bare, strict=True))
    return {
        "product_ms": 1e3 * median(ours),
        "bare_ms": 1e3 * median(bare),
        "added_ms": median(added),
        "added_low": added[0],
        "added_high": added[-1],
    }


def bare_drag(edit: Editor, size: int, clock: Clock) -> float:
    """Seconds of a step of the masked drag without `PointDrag`, Trainer, callbacks and log."""
    backbone, settings = edit.backbone, edit.config.drag
    sample, grid = make_sample(size, masked=True), points.grid_size((size, size), settings.grid_scale)
    handles, targets = (
        points.to_grid(torch.tensor(np.asarray(which)), image_size=(size, size), grid=grid).to(backbone.device)
        for which in (sample.handles, sample.targets)
    )
    scheduler = backbone.scheduler(edit.config.ddim.steps)
    index = len(scheduler.timesteps) - 1
    alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[index])]
    t = scheduler.timesteps[index].to(backbone.device)
    alpha_to = ddim.alpha_before(scheduler, index)
    backbone.network.requires_grad_(False)
    with torch.no_grad():
        condition = backbone.condition([sample.prompt])
    shape = (1, backbone.latent_channels, *backbone.latent_size(size, size))
    latent = torch.randn(shape, device=backbone.device, requires_grad=True)
    keep = torch.ones((1, 1, *shape[2:]), device=backbone.device)
    optimizer = torch.optim.Adam([latent], lr=settings.lr)
    initial = templates = None
    started = 0.0
    for step in range(OVERHEAD_STEPS):
        if step == 1:
            started = clock()
        output, maps = backbone.with_features(
            lambda: backbone.predict(latent, t, condition), settings.features, need_output=True
        )
        features = FeatureMap(maps, grid)
        assert output is not None
        templates = features.at(handles).detach() if templates is None else templates
        if step:
            with torch.no_grad():
                handles = tracking.nearest(
                    features, templates=templates, handles=handles, radius=settings.tracking_radius
                )
        previous = ddim.move(
            latent, output, alpha=alpha, alpha_to=alpha_to, prediction_type=backbone.prediction_type
        )  # fmt: skip
        initial = previous.detach() if initial is None else initial
        loss = motion.one_step(
            features, handles=handles, targets=targets, radius=settings.motion_radius, stop_distance=0.0
        ) + settings.mask_weight * motion.mask_term(previous, initial, keep=keep)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (clock() - started) / (OVERHEAD_STEPS - 1)


# ----------------------------------------------------------------------------------- memory


def peak_memory(settings: BenchmarkConfig, adapter: str, name: str) -> dict[str, float]:
    """MB at a stage's peak and with the model just loaded; for a process of its own."""
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    backbone = load(settings)
    found = {"loaded_mb": _memory(backbone.device), "peak_mb": 0.0}
    adapter = _adapter([name], adapter)
    edit = editor(settings, backbone, steps=PEAK_STEPS, adapter=adapter, output={"frames_every": 10})
    highest = Highest(backbone.device)

    def watch(name: str, step: int, total: int) -> None:
        if step == 0:
            highest.start()
        elif step == total:
            found["peak_mb"] = highest.stop()

    run_edit(edit, [name], settings.size, watch)
    return found


def peaks(settings: BenchmarkConfig, adapter: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """`peak_memory` of each stage, one process after the other."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as pool:
        return {name: pool.submit(peak_memory, settings, adapter, name).result() for name in names}


def _memory(device: torch.device) -> float:
    """MB in use now."""
    used = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**20


class Highest(threading.Thread):
    """The most memory in use between start and stop: the allocator's own figure on a GPU, else looked at by a thread
    (a child's `ru_maxrss` begins with its parent's, and can't be reset).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(daemon=True)
        self.device, self.most, self.over = device, 0.0, threading.Event()

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        super().start()

    def run(self) -> None:
        while not self.over.wait(0.005):
            self.most = max(self.most, _memory(self.device))

    def stop(self) -> float:
        """MB."""
        self.over.set()
        self.join()
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return max(self.most, _memory(self.device))


# ----------------------------------------------------------------------------------- results


def measure(settings: BenchmarkConfig) -> dict[str, Any]:
    """All that the settings ask for, as plain values for JSON."""
    names = _chosen(settings)
    steps = settings.steps or (1 if resolve_device(settings.device).type == "cpu" else STEPS_ON_A_GPU)
    settings = dataclasses.replace(settings, steps=steps)
    stages: dict[str, dict[str, float]] = {name: {} for name in names}
    results: dict[str, Any] = {
        "settings": dataclasses.asdict(settings) | {"peak_steps": PEAK_STEPS, "forwards": "alone"},
        "stages": stages,
    }
    with tempfile.TemporaryDirectory() as folder:
        backbone = load(settings)
        adapter = random_lora(backbone, Path(folder))
        device = backbone.device
        clock = make_clock(settings, device)
        results |= {"clock": clock.kind, "machine": machine(device)}
        if settings.repeats:
            results["overhead"] = overhead(settings, clock)  # first, while memory is as the system gave it
            gflop = operations(settings, backbone, adapter, names)
            half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(_autocast(settings, backbone))
            plain = DTYPES[settings.dtype]
            roofs = {dtype: matmul_gflops(clock, dtype) for dtype in {plain, half or plain}}
            with forwards_alone(settings) as forward:
                seconds, forwards = times(settings, backbone, adapter, names, clock, forward)
            results |= {"roof_gflop_per_s": round(roofs[plain]), "forward_gflop": gflop["forward"]}
            for name, stage in stages.items():
                roof = roofs[half or plain if STAGES[name].autocast else plain]
                stage |= compared(seconds[name], forwards[name]) | {
                    "gflop": gflop[name],
                    "over_roof": median(seconds[name]) * roof / gflop[name],
                }
            if settings.batch > 1:
                results["batch"] = together(settings, backbone, clock)
        del backbone
        gc.collect()  # Trainers are cycles, by which it would stay
        torch.cuda.empty_cache()
        if settings.memory_peaks:
            for name, found in peaks(settings, adapter, names).items():
                stages[name] |= found
    return rounded(results)


def rounded(results: dict[str, Any]) -> dict[str, Any]:
    """Results with four digits, as JSON has them."""
    return json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.4g}"))


def _chosen(settings: BenchmarkConfig) -> list[str]:
    unknown = [name for name in settings.stages if name not in STAGES]
    if unknown:
        raise UserError(f"stages names {unknown[0]!r}: there are {', '.join(STAGES)}")
    return [name for name in STAGES if name in settings.stages or not settings.stages]


def _autocast(settings: BenchmarkConfig, backbone: StableDiffusion) -> str:
    return editor(settings, backbone, steps=1, adapter="").autocast


def random_lora(backbone: StableDiffusion, folder: Path) -> str:
    """A LoRA of the default rank, so that an edit has one to merge without training it."""
    rank = Config().lora.rank
    start = lora.trainable(backbone.network, backbone.lora_targets, rank=rank, alpha=float(rank), seed=0, pictures=1)
    with start as (_, current):
        return str(lora_file.save(current(0), folder))


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="all keys, with their defaults:\n\n" + describe(BenchmarkConfig()).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE.json", "AFTER.json"))
    given = parser.parse_args(argv)
    # as Lightning will set it, so that cuda:0 is the same one in all processes
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    try:
        if given.compare:
            print(comparison(*map(read, given.compare)))
            return 0
        settings = load_benchmark(given.settings)
        out = Path(settings.output) if settings.output else None
        if out and not out.parent.is_dir():
            raise UserError(f"output is {settings.output!r}: there is no folder {str(out.parent)!r}")
        results = measure(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(results))
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
