"""Diffusion models behind one small interface; Stable Diffusion 1.x / 2.x on diffusers.

Everything else in the package talks to `Backbone`, so that another architecture is one new class here.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dragdiff.errors import UserError
from dragdiff.modules import single_file

if TYPE_CHECKING:
    from dragdiff.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMBEDDED_MODEL = Path(__file__).parent.parent / "assets" / "embedded-sd"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # the same parts; others need more
NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"
)  # fmt: skip
CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
HUB_TIMEOUT = 5.0  # s until a hub that does not answer is given up


class Backbone(ABC):
    """What drag editing needs of a latent diffusion model. Latents and images are float32 at this interface."""

    name: str  # for logs
    network: Any  # the denoiser, an nn.Module
    modules: Sequence[nn.Module]  # everything that has weights
    device: torch.device
    prediction_type: str  # "epsilon" or "v_prediction"
    latent_stride: int  # image px per latent px
    latent_channels: int
    feature_strides: Mapping[str, int]  # latent px per feature px of each feature point, in execution order
    lora_targets: Sequence[str]  # name endings of the projections that a LoRA updates
    self_attention_layers: Sequence[str]  # module names in execution order

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std, each (B, C, h, w), of the scaled latent posterior of images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H', W'), about [-1, 1], of scaled latents (B, C, h, w); H', W' are multiples of the stride."""

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, tokens, D)."""

    @abstractmethod
    def predict(self, latents: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """The network's output (B, C, h, w) for latents at timestep t (scalar or (B,))."""

    @abstractmethod
    def feature_block(self, name: str) -> nn.Module:
        """The module whose output is the named feature point.

        Raises:
            UserError: no such feature point; lists those there are.
        """

    @abstractmethod
    def scheduler(self, steps: int, kind: str = "ddim") -> Any:
        """A fresh diffusers scheduler with `steps` timesteps set; kind as in `GenerateConfig.scheduler`."""

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latent of an image of this size."""
        return height // self.latent_stride, width // self.latent_stride


class StableDiffusion(Backbone):
    """Stable Diffusion 1.x / 2.x: any diffusers pipeline with `vae`, `text_encoder`, `tokenizer`, `unet`, `scheduler`.

    An edit leaves the pipeline as it was, so that a pipeline of one's own can be lent to an editor:
    `Editor(config, backbone=StableDiffusion(pipeline))`.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any, *, name: str = "", prediction: str = "auto") -> None:
        """
        Args:
            pipeline: on the device where it shall run; not offloaded, attention projections not fused.
            name: for logs and error messages.
            prediction: as `ModelConfig.prediction`.

        Raises:
            UserError: a model that can't be used; says why.
        """
        self.pipeline = pipeline
        self.name = name or type(pipeline).__name__
        for part in PARTS:
            if getattr(pipeline, part, None) is None:
                raise UserError(f"{self.name} has no {part}: a Stable Diffusion 1.x or 2.x pipeline is needed")
        scheduler = pipeline.scheduler.config
        self.prediction_type = scheduler.get("prediction_type", "epsilon") if prediction == "auto" else prediction
        check_configs(
            self.name,
            unet=pipeline.unet.config,
            vae=pipeline.vae.config,
            scheduler={**scheduler, "prediction_type": self.prediction_type},
        )
        if any(getattr(module, "fused_projections", False) for module in pipeline.unet.modules()):
            raise UserError(f"{self.name} has fused attention projections: call unet.unfuse_qkv_projections() first")
        if hasattr(pipeline.unet, "_hf_hook"):
            raise UserError(f"{self.name} is offloaded: call remove_all_hooks() and to(device) on the pipeline first")
        self.network: Any = pipeline.unet
        self.modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        self.device = pipeline.unet.device
        self.latent_stride = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.latent_channels = pipeline.unet.config.in_channels
        self.feature_strides = feature_strides(self.network)
        self.self_attention_layers = self_attention_layers(self.network)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        # the published code multiplies by 1 / scale; dividing differs in the last bit
        return vae.decode((1 / vae.config.scaling_factor * latents).to(vae.device, vae.dtype)).sample.float()

    def embed(self, prompts: Sequence[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        length = tokenizer.model_max_length
        for prompt in prompts:
            count = len(tokenizer(prompt, verbose=False).input_ids)
            if count > length:
                warnings.warn(
                    f"the prompt has {count} tokens, the model reads the first {length}: {prompt!r}",
                    stacklevel=2,
                )
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.pipeline.text_encoder(tokens.to(self.device))[0]

    def predict(self, latents: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        dtype = self.network.dtype
        return self.network(
            latents.to(dtype), t.to(self.device), encoder_hidden_states=embeddings.to(dtype)
        ).sample.float()

    def feature_block(self, name: str) -> nn.Module:
        return feature_block(self.network, name)

    def scheduler(self, steps: int, kind: str = "ddim") -> Any:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        # the rest of the model's scheduler configuration is about a solver that is not used here
        config = self.pipeline.scheduler.config
        schedule = {key: config[key] for key in NOISE_SCHEDULE if key in config}
        schedule["prediction_type"] = self.prediction_type
        scheduler: Any
        if kind == "ddim":
            offset = config.get("steps_offset", 1)
            scheduler = DDIMScheduler(**schedule, steps_offset=offset, clip_sample=False, set_alpha_to_one=False)
        else:
            scheduler = DPMSolverMultistepScheduler(**schedule, use_karras_sigmas=kind == "dpm++2m-karras")
        scheduler.set_timesteps(steps)
        if int(scheduler.timesteps[0]) >= len(scheduler.alphas_cumprod):
            raise UserError(f"ddim.steps is {steps}: the model's schedule has no room for more than {steps - 1}")
        return scheduler


def feature_strides(unet: Any) -> dict[str, int]:
    """Latent px per feature px of a UNet's blocks, in execution order."""
    stride = 1
    strides = {}
    for index, block in enumerate(unet.down_blocks):
        stride *= 2 if block.downsamplers else 1
        strides[f"down_blocks.{index}"] = stride
    strides["mid_block"] = stride
    for index, block in enumerate(unet.up_blocks):
        stride //= 2 if block.upsamplers else 1
        strides[f"up_blocks.{index}"] = stride
    return strides


@contextmanager
def freeu(unet: Any, *, b1: float, b2: float, s1: float, s2: float) -> Iterator[None]:
    """FreeU (Si et al. 2023, arXiv 2309.11497) on a UNet; the state before is put back on leaving."""
    keys = ("b1", "b2", "s1", "s2")
    before = [{key: vars(block)[key] for key in keys if key in vars(block)} for block in unet.up_blocks]
    unet.enable_freeu(b1=b1, b2=b2, s1=s1, s2=s2)
    try:
        yield
    finally:
        for block, values in zip(unet.up_blocks, before, strict=True):
            for key in keys:
                vars(block).pop(key, None)
            vars(block).update(values)


def feature_block(unet: Any, name: str) -> nn.Module:
    """As `Backbone.feature_block`, of a bare UNet."""
    known = feature_strides(unet)
    if name not in known:
        raise UserError(f"drag.features names {name!r}: the model has {', '.join(known)}")
    return unet.get_submodule(name)


def self_attention_layers(unet: Any) -> list[str]:
    """Names of a UNet's self-attention modules, in execution order."""
    return [
        name
        for block in feature_strides(unet)
        for name, module in unet.get_submodule(block).named_modules(prefix=block)
        if name.endswith("attn1") and hasattr(module, "processor")
    ]


# ------------------------------------------------------------------------------------------- loading


def resolve_device(name: str) -> torch.device:
    """A torch device; "auto" takes cuda, then mps, then cpu.

    Raises:
        UserError: not a device, or not here.
    """
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device is {name!r}: it must be auto, cpu, cuda, cuda:N or mps") from None
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here.get(device.type, False):
        raise UserError(
            f"model.device is {name!r}: this machine or this build of torch has none; use model.device=auto"
        )
    return device


def resolve_autocast(name: str, *, device: torch.device, dtype: str) -> str:
    """Which mixed precision "auto" means: the reference's fp16 with loss scaling on CUDA, none elsewhere.

    Raises:
        UserError: fp16 mixed precision, which needs loss scaling, was asked for away from CUDA.
    """
    if name == "auto":
        return "fp16" if device.type == "cuda" and dtype != "bf16" else "none"
    if name == "fp16" and device.type != "cuda":
        raise UserError(
            f"model.autocast=fp16 needs CUDA, the device is {device.type}: use model.autocast=auto, bf16 or none"
        )
    return name


def check_model(config: ModelConfig) -> None:
    """What can be known of the model's settings without loading it.

    Raises:
        UserError: device, precision, or a local path that is not there.
    """
    device = resolve_device(config.device)
    resolve_autocast(config.autocast, device=device, dtype=config.dtype)
    if config.path == "embedded" and not EMBEDDED_MODEL.is_dir():
        raise UserError(f"the embedded model is not in {EMBEDDED_MODEL}: reinstall dragdiff")
    for key, path in (("model.path", _local(config.path)), ("model.vae", _local(config.vae))):
        if path and not path.exists():
            raise UserError(
                f"{key} is {str(path)!r}: no such file or folder; give a diffusers folder, a .safetensors file or a "
                "hub id"
            )
        if path and path.is_file() and path.suffix != ".safetensors":
            raise UserError(f"{key} is {str(path)!r}: only .safetensors files are read, never pickled ones")
    vae = _local(config.vae)
    if vae and vae.is_dir():
        _check_weights(vae)
    path = _local(config.path)
    if path and path.is_file():
        if single_file.family(path) == "sd2" and config.prediction == "auto":
            raise UserError(
                f"{path} does not say what it predicts: set model.prediction=v_prediction (SD 2.x for 768 px) or "
                "epsilon (SD 2.x base)"
            )
    else:
        _check_folder(_config_folder(config), config, weights=path is not None)


def _config_folder(config: ModelConfig) -> Path:
    """Where the configurations of the model's components are, in diffusers' layout."""
    path = _local(config.path)
    if path is None:
        return _hub_folder(config.path, config.revision)
    return single_file.SHIPPED / single_file.family(path) if path.is_file() else path


def _check_folder(folder: Path, config: ModelConfig, *, weights: bool) -> None:
    """What the configurations of a diffusers pipeline tell; with `weights`, also whether those are there."""
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"model.path is {config.path!r}: there is no model_index.json in it, so it is no diffusers pipeline"
        )
    index = _read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{config.path} is a {kind}: only Stable Diffusion 1.x and 2.x are supported so far")
    for part in PARTS:
        if not (index.get(part) or [None])[0] or not (folder / part).is_dir():
            raise UserError(f"{config.path} has no {part}: it is incomplete")
        if weights and part in ("unet", "text_encoder", "vae") and not (part == "vae" and config.vae):
            _check_weights(folder / part)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    if config.prediction != "auto":
        scheduler["prediction_type"] = config.prediction
    vae = {} if config.vae else _read_json(folder / "vae" / "config.json")
    check_configs(config.path, unet=_read_json(folder / "unet" / "config.json"), vae=vae, scheduler=scheduler)


def check_configs(name: str, *, unet: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """Whether components with these diffusers configurations can be used together.

    Raises:
        UserError: not; says why.
    """
    channels = unet.get("in_channels", 4)
    if unet.get("addition_embed_type") or unet.get("class_embed_type") or unet.get("encoder_hid_dim_type"):
        raise UserError(f"{name} wants more than a prompt (SDXL, unCLIP, IP-Adapter?): it is not supported yet")
    if channels != unet.get("out_channels", 4):
        raise UserError(
            f"{name} takes {channels} latent channels and gives {unet.get('out_channels', 4)}: inpainting, depth and "
            "the like are not supported, only plain text-to-image models"
        )
    if vae.get("latent_channels", channels) != channels:
        raise UserError(f"{name} works on {channels} latent channels, its autoencoder has {vae['latent_channels']}")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction") or "beta_schedule" not in scheduler:
        kind = scheduler.get("_class_name", "its scheduler")
        raise UserError(
            f"{name} predicts {prediction!r} with {kind}: only epsilon and v_prediction models with a DDPM noise "
            "schedule can be inverted"
        )


def _check_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is no model in diffusers' format")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no .safetensors file; pickled weights (.bin, .ckpt) are never read: convert them, "
            "e.g. by save_pretrained of a pipeline that was loaded from them"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"cannot read {file}: it must hold a JSON object")
    return value


def _local(path: str) -> Path | None:
    """The file or folder that a model's path means; None for a hub id or nothing."""
    if path == "embedded":
        return EMBEDDED_MODEL
    local = Path(path).expanduser()
    return local if path and (local.exists() or _looks_local(path)) else None


def _looks_local(path: str) -> bool:
    return (
        path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in (".safetensors", ".ckpt", ".pt")
    )


def _hub_folder(name: str, revision: str, *, needed: Sequence[str] = CONFIGS) -> Path:
    """Where the hub's cache holds a model; its configurations are fetched if they are not there.

    What is there is taken without asking the hub. A hub that does not answer is given up after seconds, not minutes.

    Raises:
        UserError: no such model or revision, or neither cache nor hub have it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        if all((folder / file).is_file() for file in needed):
            return folder
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise UserError(f"no model {name!r}: it is no file, folder or hub id") from None
    _ask_hub(name, revision)
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.json"]))
    except Exception as error:
        raise UserError(f"fetching {name} from the hub failed: {' '.join(str(error).split())[:200]}") from error


def _ask_hub(name: str, revision: str) -> None:
    """Whether the hub answers and has the model.

    Raises:
        UserError: it does not.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        raise UserError(f"accept the licence of {name} on its page on the hub, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"no model {name!r}: there is no such file or folder, and the hub has none of that name (a private one "
            "needs `hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r} on the hub") from None
    except Exception as error:  # no network: whatever the hub's library and its HTTP client raise
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"no model {name!r}: there is no such file or folder, the hub's cache {constants.HF_HUB_CACHE} lacks it or "
            f"a part of it, and the hub does not answer ({reason}); fetch it once with network, `hf download {name}`"
        ) from error


def skeleton(config: ModelConfig) -> Any:
    """The model's UNet without weights, to look at its structure before anything is loaded.

    Raises:
        UserError: as `check_model`.
    """
    from diffusers import UNet2DConditionModel

    check_model(config)
    file = _config_folder(config) / "unet" / "config.json"
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(_read_json(file))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} describes no UNet that can be built: {' '.join(str(error).split())[:200]}") from error


def _quiet() -> None:
    """The libraries' own bars and notes on loading (image processors, parts left out) are not for our users."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity(logging.CRITICAL)  # what they log as an error they raise as well
        library.disable_progress_bar()


def load_backbone(config: ModelConfig) -> StableDiffusion:
    """Load a Stable Diffusion 1.x / 2.x model; a local folder or file needs no network.

    Raises:
        UserError: no such model, or one that can't be used; says what was looked for and how to get it.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is first imported
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    check_model(config)
    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    _quiet()
    try:
        if config.vae:
            parts["vae"] = _load(AutoencoderKL, single_file.load_vae, config.vae, "", dtype=dtype)
        pipeline = _load(
            StableDiffusionPipeline, single_file.load_pipeline, config.path, config.revision, dtype=dtype, **parts
        )
    except UserError:
        raise
    except Exception as error:  # damaged or foreign files make the libraries raise nearly anything
        reason = " ".join(str(error).split(" (")[0].split())[:200].rstrip(".")
        raise UserError(
            f"cannot load the model {config.path!r}"
            + (f" with the autoencoder {config.vae!r}" if config.vae else "")
            + f": {reason}; give a Stable Diffusion 1.x or 2.x with .safetensors weights"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    return StableDiffusion(pipeline, name=config.path, prediction=config.prediction)


def _load(kind: Any, from_file: Callable[..., Any], name: str, revision: str, **settings: Any) -> Any:
    """A pipeline or model from a file, a folder, the hub's cache or, where that lacks it, the hub."""
    from diffusers import AutoencoderKL

    path = _local(name)
    if path and path.is_file():
        return from_file(path, **settings)
    settings["use_safetensors"] = True  # None would fall back to pickled weights
    folder = path or _hub_folder(name, revision, needed=["config.json"] if kind is AutoencoderKL else CONFIGS)
    weights = folder if (folder / "config.json").is_file() else folder / "unet"
    halves = all(".fp16." in file.name for file in weights.glob("*.safetensors"))
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, variant="fp16" if halves else None, **settings)
    except Exception:  # incomplete in the cache; the libraries say so in many ways
        if path:
            raise
        _ask_hub(name, revision)
        return kind.from_pretrained(name, revision=revision or None, **settings)
