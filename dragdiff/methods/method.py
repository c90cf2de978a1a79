"""What a drag method says of itself. All that is known of it elsewhere (settings, needs, progress, estimates) is read
from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dragdiff.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from dragdiff.config import Config
    from dragdiff.data.sample import EditSample
    from dragdiff.job import Job

METHODS_OWN = (
    "lora",
    "ddim",
    "drag",
    "control",
)  # shared sections of settings that each method has values of its own for
NEEDS = ("points",)  # what a method may need of a sample
# What a step costs, in forwards of the denoiser for one row: measured on Stable Diffusion's structure.
LORA_STEP = 2.3  # of each row of its batch
DRAG_STEP = 2.3
DECODING = 3.0


@dataclass(frozen=True)
class Stage:
    """A part of the work for one edit.

    Attributes:
        name: by which its progress is reported; several parts may be one stage.
        steps: at most.
        forwards: of all steps, at most, in forwards of the denoiser for one row.
        calls: how many rows of the denoiser they run at most; an encoding, decoding or backward is none.
        shared_by: beginnings of the settings on which it depends besides picture and model, where edits that agree in
            them share it; empty = it is each edit's own.
    """

    name: str
    steps: int
    forwards: float
    calls: int
    shared_by: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Method:
    """A way to edit.

    Attributes:
        name: as in `method=NAME`, and of its section of settings.
        summary: one sentence on what it does.
        needs: what a sample must have: "points".
        reads: beginnings of the keys of shared sections that it reads.
        stages: the work that it does for one edit with given settings.
        run: edits the job's samples; a picture (H, W, 3) uint8 for each edit that is left at its end.
        title, paper, year: of the publication, if any; `paper` is its arXiv number.
        uses: what else of a sample has a say: "mask", "prompt".
        published: its values of settings that have other defaults, by key.
        settings: the dataclass of the settings that it alone has.
        prompt: the prompt that it works with, of the settings and the sample's.
        draws: whether its result depends on the seed, LoRA and generation apart.
        note: what a user should know of it, e.g. about weights.
        licence: of the authors' own code, as a hint; this one is the package's.
        source: the text of the file that it is from, where that is not part of the package.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    stages: Callable[[Config], list[Stage]]
    run: Callable[[Job], list[np.ndarray]]
    title: str = ""
    paper: str = ""
    year: int = 0
    uses: tuple[str, ...] = ()
    published: dict[str, Any] = field(default_factory=dict)
    settings: type | None = None
    prompt: Callable[[Config, str], str] = lambda config, prompt: prompt
    draws: bool = False
    note: str = ""
    licence: str = ""
    source: str = ""

    def reads_key(self, key: str) -> bool:
        """Whether it reads an option of the shared sections.

        Args:
            key: dotted, as `drag.lr`.
        """
        return any(key == beginning or key.startswith(f"{beginning}.") for beginning in self.reads)

    def check(self, sample: EditSample) -> None:
        """
        Raises:
            UserError: the sample lacks something that the method needs.
        """
        if "points" in self.needs and not len(sample.points):
            raise UserError(
                f"there are no points, and {self.name} needs them: give pairs [[[x, y], [x, y]], ...], each a handle "
                "and its target, in px"
            )


def origin_stages(config: Config) -> list[Stage]:
    """What comes before a drag: the LoRA and the inversion of a real picture, or the generation of one."""
    steps, taken, lora = config.ddim.steps, config.ddim.taken, config.lora
    if config.generate.enabled:
        rows = steps * guidance_rows(config)
        return [Stage("generate", steps, rows, rows, ("ddim", "generate", "lora.path"))]
    inversion = Stage("inversion", taken, taken, taken, ("lora", "ddim"))
    if lora.path or not lora.steps:
        return [inversion]
    rows = lora.batch_size * lora.steps
    return [Stage("LoRA", lora.steps, LORA_STEP * rows, rows, ("lora",)), inversion]


def denoising_stages(config: Config, *, steps: int, shared: bool = True) -> list[Stage]:
    """The source's branch and the edited one for so many steps, and the decoding.

    Args:
        shared: whether the source's branch is the same for all edits of a picture.
    """
    rows = steps * guidance_rows(config)
    source = Stage("denoise", steps, rows, rows, ("lora", "ddim", "control.start_layer") if shared else ())
    own = Stage("denoise", steps, rows, rows)
    return [*([source] if config.control.enabled else []), own, Stage("decode", 1, DECODING, 0)]


def guidance_rows(config: Config) -> int:
    """Rows of the denoiser for one latent: two with classifier-free guidance."""
    return 2 if config.generate.enabled and config.generate.guidance != 1 else 1


def total_forwards(stages: Sequence[Stage]) -> dict[str, float]:
    """What the parts of each stage cost together, in forwards of the denoiser for one row, in their order."""
    forwards: dict[str, float] = {}
    for stage in stages:
        forwards[stage.name] = forwards.get(stage.name, 0.0) + stage.forwards
    return forwards


def done_forwards(stages: Sequence[Stage], drag_steps: int) -> float:
    """What an edit has cost, in forwards of the denoiser for one row.

    Args:
        drag_steps: updates that it did; all else runs to its end.
    """
    share = {stage.name: min(1.0, drag_steps / stage.steps) for stage in stages if stage.name == "drag"}
    return sum(stage.forwards * share.get(stage.name, 1.0) for stage in stages)


def total_steps(stages: Sequence[Stage]) -> dict[str, int]:
    """Steps of each stage as its progress counts them.

    Returns:
        By the stage's name, in the order of the work.
    """
    steps: dict[str, int] = {}
    for stage in stages:
        steps[stage.name] = max(stage.steps, steps.get(stage.name, 0))
    return steps
