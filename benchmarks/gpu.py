r"""All that is worth knowing of a GPU in one run of some minutes, in the order of worth.

    python benchmarks/gpu.py                                                # 6 minutes, results in gpu.json and gpu.md
    python benchmarks/gpu.py minutes=10 parts=[numbers,stages] output=out/h100.json
    python benchmarks/gpu.py device=cpu model=embedded                      # what it measures, without a GPU

The parts:

numbers         runs of the published code replayed on the GPU in fp32 (TF32 off), and single functions compared with
                the CPU: the largest deviations, and what differs by more than rounding
stages          seconds of a step of each stage, and their ratio to a bare forward, as benchmarks/speed.py has them
dragdiffusion   a whole edit at the published settings: seconds of each stage, peak memory; then
gooddrag        the same; then
fastdrag        the same
batch-4         a drag step of four edits at once, whose pictures have LoRAs of their own, by those of one by one; then
batch-8         the same
compiled        `stages` with model.compile
fp32            `stages` with fp32 weights and without mixed precision

`stages` and those after it have Stable Diffusion 1.5's size, random weights and fp16. After each result JSON and table
are written anew. A part that fails is told with its error, one that would not fit into the minutes left is left out,
one that outlasts them is ended; the others are not affected: parts run in a process that is replaced after a failure.

On a machine without network: what is needed besides torch, its own needs, numpy and pillow is in benchmarks/gpu.txt and
goes there as wheels for its Python and processor, here 3.12 on x86-64. All of them have 33 MB, the repository without
`docs` and `experiments`, which are not needed, 30 MB; of what that machine has already they need not be taken along.

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux2014_x86_64 -c constraints.txt -d wheels -r benchmarks/gpu.txt
    pip install --no-index --no-deps wheels/*.whl      # there
    PYTHONPATH=. python benchmarks/gpu.py

Neither W&B nor matplotlib is among them, nor dragdiff itself, which needs no installing.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dragdiff import Editor
from dragdiff.backbones.loading import load_backbone, resolve_device
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.config import load_config
from dragdiff.errors import UserError, one_line
from dragdiff.methods.method import total_forwards
from dragdiff.modules import ddim, motion, tracking, warp
from dragdiff.modules.features import FeatureMap
from dragdiff.options import describe
from report import parts_table
from settings import BenchmarkConfig, GPUConfig, load_gpu
from speed import (
    EDITS,
    Clock,
    Highest,
    Stage,
    compared,
    editor,
    forward_seconds,
    load,
    machine,
    make_clock,
    make_sample,
    model_config,
    random_lora,
    rounded,
    times,
    together,
)

TESTS = Path(__file__).parent.parent / "tests"
Found = dict[str, Any]
COMPILING = 90.0  # s that a compiler may take
MARGIN = 1.3  # what a part may take by what its forwards do
LEAST = 5.0  # s with which no part is begun


class TooLong(Exception):
    """A part would take more than the time that is left."""


@dataclass
class Bench:
    """What parts share in their process.

    Attributes:
        until: when the time is over, by `time.monotonic`.
    """

    settings: GPUConfig
    until: float = 0.0
    _loaded: tuple[BenchmarkConfig, StableDiffusion] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where all runs."""
        return resolve_device(self.settings.device)

    @property
    def dtype(self) -> str:
        """The weights' precision."""
        return "fp32" if self.device.type == "cpu" else "fp16"

    def prepared(self, **changes: Any) -> tuple[BenchmarkConfig, StableDiffusion, Clock]:
        """What benchmarks/speed.py measures with: settings, the model, a clock."""
        own = self.settings
        wanted = BenchmarkConfig(
            model=own.model,
            device=str(self.device),
            dtype=self.dtype,
            size=own.size,
            warmup=own.warmup,
            steps=own.steps,
            repeats=own.repeats,
            threads=0,
        )
        wanted = replace(wanted, **changes)
        if self._loaded is None or self._loaded[0].dtype != wanted.dtype:
            self._loaded = None  # its memory is free before the next is loaded
            self._loaded = wanted, load(wanted)
        backbone = self._loaded[1]
        if not wanted.size:
            wanted.size = backbone.latent_stride * backbone.network.config.sample_size
        return wanted, backbone, make_clock(wanted, backbone.device)

    def afford(self, forward: float, edits: Sequence[Editor], *, beside: float = 0.0) -> None:
        """
        Args:
            forward: seconds of a bare forward of one row.
            edits: what a part runs, as far as a method says what it does.
            beside: seconds of what else it does.

        Raises:
            TooLong: these would not fit into the time left.
        """
        forwards = sum(sum(total_forwards(edit.method.stages(edit.config)).values()) for edit in edits)
        needs, left = beside + MARGIN * forwards * forward, self.until - time.monotonic()
        if needs > left:
            raise TooLong(f"would take about {needs:.0f} s, {max(left, 0):.0f} s were left")


# ----------------------------------------------------------------------------------- numbers


def numbers(bench: Bench) -> Iterator[Found]:
    """Deviations of single functions from the CPU's, then of whole runs from what the published code gave."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        found: Found = {"functions": {}, "runs": {}}
        for name, function in functions().items():
            found["functions"][name] = deviation(function(torch.device("cpu")), function(bench.device))
        yield found
        for name, checks in replays(bench.device):
            found["runs"][name] = checks
            yield found
    finally:
        torch.backends.cudnn.allow_tf32 = True  # as torch has it


def deviation(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The largest difference of any two values."""
    return max(float((a.cpu().double() - b.cpu().double()).abs().max()) for a, b in zip(one, other, strict=True))


def functions() -> dict[str, Callable[[torch.device], Sequence[Tensor]]]:
    """What editing is made of, by name: what each gives on a device, for the same numbers everywhere."""
    random = torch.Generator().manual_seed(0)
    latent, other, unedited = (torch.randn((1, 4, 32, 32), generator=random) for _ in range(3))
    maps = [torch.randn((1, 64, 16, 16), generator=random), torch.randn((1, 32, 32, 32), generator=random)]
    handles, targets = torch.tensor([[12.0, 40.0], [30.0, 2.0]]), torch.tensor([[20.0, 41.0], [5.0, 60.0]])
    region = torch.zeros((32, 32), dtype=torch.bool)
    region[4:28, 6:20] = True
    alphas = {"alpha": torch.tensor(0.3), "alpha_to": torch.tensor(0.4)}

    def pulled(loss: Callable[[FeatureMap, FeatureMap], Tensor], maps: list[Tensor]) -> list[Tensor]:
        leaves = [values.clone().requires_grad_() for values in maps]
        with torch.enable_grad():
            value = loss(FeatureMap(leaves, (64, 64)), FeatureMap(maps, (64, 64)))
            return [value.detach(), *torch.autograd.grad(value, leaves)]

    def one_step(handles: Tensor, targets: Tensor, *maps: Tensor) -> list[Tensor]:
        given: Any = {"handles": handles, "targets": targets, "radius": 2, "stop_distance": 1.0}
        return pulled(lambda now, before: motion.one_step(now, **given), list(maps))

    def to_initial(handles: Tensor, targets: Tensor, *maps: Tensor) -> list[Tensor]:
        given: Any = {"handles": handles + 1, "initial": handles, "targets": targets, "radius": 3, "reach": 4.0}
        loss = partial(motion.to_initial, stop_distance=1.0, **given)
        return pulled(lambda now, before: loss(now, reference=before), list(maps))

    def tracked(handles: Tensor, *maps: Tensor) -> list[Tensor]:
        features = FeatureMap(list(maps), (64, 64))
        return [tracking.nearest(features, templates=features.at(handles + 2), handles=handles, radius=5)]

    def warped(blend: str, mode: str, handles: Tensor, targets: Tensor, region: Tensor, latent: Tensor) -> list[Tensor]:
        displacement = warp.stretch(handles / 2, targets / 2, region, blend=blend)
        moved, holes = warp.relocate(latent[0], region, displacement)
        generator = torch.Generator().manual_seed(1)
        filled = warp.fill(moved, holes, mode=mode, original=latent[0], generator=generator)
        return [displacement, holes.float(), filled]

    def there(function: Callable[..., Sequence[Tensor]], *given: Any) -> Callable[[torch.device], Sequence[Tensor]]:
        return lambda device: function(*tree_map_only(Tensor, lambda value: value.to(device), given))

    def move(latent: Tensor, output: Tensor, *, kind: str) -> list[Tensor]:
        return [ddim.move(latent, output, prediction_type=kind, **alphas)]

    keep = (latent[:, :1] > 0).float()
    return {
        "DDIM step, epsilon": there(partial(move, kind="epsilon"), latent, other),
        "DDIM step, v": there(partial(move, kind="v_prediction"), latent, other),
        "features at handles": there(lambda at, *maps: [FeatureMap(list(maps), (64, 64)).at(at)], handles, *maps),
        "supervision, one step": there(one_step, handles, targets, *maps),
        "supervision, to initial": there(to_initial, handles, targets, *maps),
        "mask term": there(lambda a, b, keep: [motion.mask_term(a, b, keep=keep)], latent, unedited, keep),
        "tracking": there(tracked, handles, *maps),
        "warp, average, neighbours": there(warped, "average", "neighbours", handles, targets, region, latent),
        "warp, nearest, noise": there(warped, "nearest", "noise", handles, targets, region, latent),
    }


def replays(device: torch.device) -> Iterator[tuple[str, Found]]:
    """The tests that replay the published code, on a device: for each run its checks, with the largest deviation, by
    the tolerance on a CPU, and what went wrong."""
    sys.path.insert(0, str(TESTS))
    import pytest
    import test_published_runs
    import test_traces

    tiny_sd = test_traces.TRACES / "tiny-sd"
    model = {"path": str(tiny_sd), "device": str(device), "dtype": "fp32"}
    backbone = load_backbone(load_config([{"model": model}]).model)
    by_replay = {
        name: check
        for name, check in vars(test_traces).items()
        if name.startswith("test_") and "replay" in _arguments(check)
    }
    for case in test_traces.SCENES:
        replay, checks = test_traces.replayed(case, backbone, tiny_sd), {}
        for name, check in by_replay.items():
            for given in [{"attention": "fused"}, {"attention": "plain"}] if "attention" in _arguments(check) else [{}]:
                said = " ".join([name[5:].replace("_", " "), *given.values()])
                checks[said] = watched(test_traces, partial(check, replay, **given))
        yield f"dragdiffusion {case}", checks
    test_published_runs.DEVICE = str(device)
    for method, check, more in (
        ("gooddrag", test_published_runs.test_gooddrag, {}),
        ("dragnoise", test_published_runs.test_dragnoise, {"end_step": 0}),
    ):
        for case in test_published_runs.runs(method):
            with pytest.MonkeyPatch.context() as patch:
                run = partial(check, case.values[0], monkeypatch=patch, **more)
                yield f"{method} {case.values[0]}", {"whole run": watched(test_published_runs, run)}


def _arguments(check: object) -> Sequence[str]:
    return list(inspect.signature(check).parameters) if inspect.isfunction(check) else []


def watched(module: Any, check: Callable[[], None]) -> Found:
    """Run a test of a module; its comparisons by `near` are noted, and raise nothing."""
    largest, original = {"deviation": 0.0, "of_tolerance": 0.0}, module.near

    def near(actual: Any, expected: Any, tolerance: float) -> None:
        if isinstance(actual, list):
            assert len(actual) == len(expected)
            actual = torch.stack(actual) if actual else torch.zeros(0)
        here, there = (x.numpy(force=True) if isinstance(x, Tensor) else np.asarray(x) for x in (actual, expected))
        worst = float(np.abs(here.astype(float) - there).max()) if here.size else 0.0
        largest["deviation"] = max(largest["deviation"], worst)
        largest["of_tolerance"] = max(largest["of_tolerance"], worst / tolerance if tolerance else 2.0 * (worst > 0))

    module.near = near
    try:
        check()
        return largest
    except Exception as error:  # what a check says, whatever it is
        return largest | {"wrong": short(error)}
    finally:
        module.near = original


# ----------------------------------------------------------------------------------- time and memory


def stages(bench: Bench, *, beside: float = 0.0, **changes: Any) -> Iterator[Found]:
    """A step of each stage.

    Args:
        beside: seconds of what else is to be done.
        changes: to the settings of the other parts.
    """
    settings, backbone, clock = bench.prepared(**changes)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapter, steps = random_lora(backbone, Path(folder)), settings.warmup + settings.steps
        edits = [editor(settings, backbone, steps=steps, adapter="" if "lora" in names else adapter) for names in EDITS]
        forward = partial(forward_seconds, edits[0], settings.size, clock)
        found: Found = {"forward_seconds": forward(Stage("forward")), "stages": {}}
        yield found
        bench.afford(found["forward_seconds"], edits * settings.repeats, beside=beside)
        for names in EDITS:
            seconds, forwards = times(settings, backbone, adapter, names, clock, forward)
            found["stages"] |= {name: compared(seconds[name], forwards[name]) for name in names}
            found["notes"] = sorted({str(one.message) for one in said if "model.compile" in str(one.message)})
            yield found


def whole_edit(bench: Bench, *, method: str) -> Iterator[Found]:
    """An edit at a method's published settings, with as many steps as it may have: the weights are random, so nothing
    may end it early."""
    settings, backbone, clock = bench.prepared()
    wall = Clock(backbone.device, "wall")
    own: Found = {"gooddrag": {"patience": 10**6}} if method == "gooddrag" else {}
    config = load_config(
        [
            {"method": method, "cache": {"enabled": False}, "output": {"frames_every": 0}, **own},
            {"methods": {method: {"drag": {"lr": 1e-6, "stop_distance": 0.0}}}} if method != "fastdrag" else {},
            {"methods": {method: {"lora": {"resolution": settings.size}}}},
        ]
    )
    edit = Editor(replace(config, model=model_config(settings).model), backbone)
    forward = forward_seconds(edit, settings.size, clock, Stage("forward"))
    bench.afford(forward, [edit])
    before = wall()
    result = edit.edit(make_sample(settings.size, masked=True))
    yield {
        "seconds": wall() - before,
        "of_stages": result.seconds,
        "drag_steps": result.steps,
        "peak_mb": result.peak_memory_mb,
        "forward_seconds": forward,
    }


def batch(bench: Bench, *, count: int) -> Iterator[Found]:
    """A drag step of several edits at once; the LoRAs are trained for one step, so that each picture has its own."""
    settings, backbone, clock = bench.prepared(batch=count)
    lora = {"steps": 1, "batch_size": 1}
    edit = editor(settings, backbone, steps=settings.warmup + settings.steps, adapter="", lora=lora)
    forward = forward_seconds(edit, settings.size, clock, Stage("forward"))
    bench.afford(forward, [edit] * (1 + count) * settings.repeats)
    highest = Highest(backbone.device)
    highest.start()
    found = together(settings, backbone, clock, ["drag, mask"], lora=lora)["drag, mask"]
    yield found | {"peak_mb": highest.stop()}


def compiled(bench: Bench) -> Iterator[Found]:
    """`stages`, compiled."""
    yield from stages(bench, compile=True, beside=COMPILING)


def fp32(bench: Bench) -> Iterator[Found]:
    """`stages` in single precision.

    Raises:
        TooLong: they are in any case.
    """
    if bench.dtype == "fp32":
        raise TooLong("`stages` has fp32 here")
    yield from stages(bench, dtype="fp32", autocast="none")


PARTS: dict[str, Callable[[Bench], Iterator[Found]]] = {
    "numbers": numbers,
    "stages": stages,
    **{method: partial(whole_edit, method=method) for method in ("dragdiffusion", "gooddrag", "fastdrag")},
    **{f"batch-{count}": partial(batch, count=count) for count in (4, 8)},
    "compiled": compiled,
    "fp32": fp32,
}


# ----------------------------------------------------------------------------------- one part after the other


def work(connection: Connection, settings: GPUConfig) -> None:
    """Run parts as they are asked for, and tell what each finds."""
    bench = Bench(settings)
    connection.send(("machine", machine(bench.device)))
    while True:
        name, left = connection.recv()
        bench.until = time.monotonic() + left
        try:
            for found in PARTS[name](bench):
                connection.send(("found", rounded(found)))
            connection.send(("done", ""))
        except TooLong as error:
            connection.send(("skipped", str(error)))
        except Exception as error:  # whatever it is, the others shall run
            traceback.print_exc()
            connection.send(("failed", short(error)))


def short(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {one_line(error)}"[:300]


class Worker:
    """A process that runs parts."""

    def __init__(self, settings: GPUConfig) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(theirs, settings), daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """Now."""
        self.process.kill()
        self.process.join()


def measure(settings: GPUConfig, save: Callable[[Found], None]) -> Found:
    """All parts that fit into the minutes.

    Args:
        save: given what there is, after each result.
    """
    until, worker = time.monotonic() + 60 * settings.minutes, None
    results: Found = {"settings": asdict(settings), "machine": {}, "parts": {}}
    for name in chosen(settings):
        began = time.monotonic()
        part = results["parts"][name] = {"state": "running", "why": "", "seconds": 0.0, "found": {}}
        if until - began < LEAST:
            part |= {"state": "skipped", "why": "no time was left"}
        else:
            worker = worker or Worker(settings)
            worker.connection.send((name, until - began))
        while part["state"] == "running":
            assert worker is not None
            try:
                there = worker.connection.poll(max(0.0, until - time.monotonic()))
                kind, what = worker.connection.recv() if there else ("stopped", "the minutes were over")
            except EOFError:
                worker.process.join()
                kind, what = "failed", f"its process ended with {worker.process.exitcode}"
            if kind == "machine":
                results["machine"] = what
                continue
            part["seconds"] = round(time.monotonic() - began, 1)
            part |= {"found": what} if kind == "found" else {"state": kind, "why": what}
            save(results)
            if kind in ("failed", "stopped"):  # of a GPU that failed nothing more can be had in that process
                worker.end()
                worker = None
        save(results)
        print(f"{name}: {part['state']} {part['why']}", file=sys.stderr, flush=True)
    if worker is not None:
        worker.end()
    return results


def chosen(settings: GPUConfig) -> list[str]:
    """The parts that were asked for.

    Raises:
        UserError: there is none of that name.
    """
    for name in settings.parts:
        if name not in PARTS:
            raise UserError(f"parts names {name!r}: there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in settings.parts or not settings.parts]


def write(results: Found, out: Path) -> None:
    """The results and their table beside them, each at once: whoever reads meanwhile, or ends it, finds them whole."""
    for file, text in ((out, json.dumps(results, indent=1)), (out.with_suffix(".md"), parts_table(results))):
        new = file.with_name(f"{file.name}.new")
        new.write_text(text + "\n", "utf-8")
        os.replace(new, file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="all keys, with their defaults:\n\n" + describe(GPUConfig()).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    given = parser.parse_args(argv)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as Lightning will set it
    try:
        settings = load_gpu(given.settings)
        chosen(settings)
        resolve_device(settings.device)
        out = Path(settings.output)
        if not out.parent.is_dir():
            raise UserError(f"output is {settings.output!r}: there is no folder {str(out.parent)!r}")
        results = measure(settings, partial(write, out=out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(parts_table(results))
    return 0 if all(part["state"] in ("done", "skipped") for part in results["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
