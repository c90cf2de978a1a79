"""What benchmarks/speed.py and benchmarks/gpu.py measure, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dragdiff.config import loaded
from dragdiff.options import at_least, check_values, more_than, one_of, option

STEPS_ON_A_GPU = 16  # that are timed of a stage


@dataclass
class BenchmarkConfig:
    """What benchmarks/speed.py measures."""

    model: str = option("sd15-random", "sd15-random | tiny (random weights), an overlay, or as model.path")
    device: str = option("auto", "as model.device")
    dtype: str = option("fp32", "as model.dtype", one_of("fp32", "bf16", "fp16"))
    autocast: str = option("auto", "as model.autocast", one_of("auto", "fp16", "bf16", "none"))
    memory: str = option("normal", "as model.memory", one_of("normal", "low"))
    compile: bool = option(False, "as model.compile")
    size: int = option(512, "side of the picture, px", at_least(64))
    stages: list[str] = option([], "which stages; empty = all")
    warmup: int = option(2, "first steps of a stage, not timed", at_least(1))
    steps: int = option(
        0, f"steps of a stage that are timed, after those; 0 = 1 on a CPU, else {STEPS_ON_A_GPU}", at_least(0)
    )
    repeats: int = option(5, "repetitions; 0 = no times, only memory", at_least(0))
    batch: int = option(
        1, "edits at once, whose LoRA and drag steps are compared with one by one; 1 = not", at_least(1)
    )
    memory_peaks: bool = option(True, "measure memory, each stage in a process of its own")
    threads: int = option(1, "of the CPU; 0 = torch's own choice", at_least(0))
    output: str = option("", "JSON file for the results; empty = none")


@dataclass
class GPUConfig:
    """What benchmarks/gpu.py measures."""

    minutes: float = option(6.0, "after which it is over", more_than(0))
    device: str = option("cuda", "as model.device")
    model: str = option("sd15-random", "as of benchmarks/speed.py, of all parts but `numbers`")
    size: int = option(0, "side of the picture, px; 0 = what the model was trained with", at_least(0))
    parts: list[str] = option([], "which parts; empty = all")
    warmup: int = option(2, "first steps of a stage, not timed", at_least(1))
    steps: int = option(STEPS_ON_A_GPU, "steps of a stage that are timed, after those", at_least(1))
    repeats: int = option(3, "repetitions", at_least(1))
    output: str = option("gpu.json", "JSON file for the results; a table goes beside it, as .md")


def load_benchmark(overrides: Sequence[str] = ()) -> BenchmarkConfig:
    """As `load_config`, of a benchmark's settings, in `key=value`.

    Raises:
        UserError: as `load_config`.
    """
    settings = loaded(BenchmarkConfig, [], overrides)
    check_values(settings)
    return settings


def load_gpu(overrides: Sequence[str] = ()) -> GPUConfig:
    """As `load_benchmark`, of the settings of benchmarks/gpu.py.

    Raises:
        UserError: as `load_config`.
    """
    settings = loaded(GPUConfig, [], overrides)
    check_values(settings)
    return settings
