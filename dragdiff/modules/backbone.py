"""Diffusion models behind one small interface; Stable Diffusion 1.x / 2.x on diffusers.

Everything else in the package talks to `Backbone`, so that another architecture is one new class here.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dragdiff.errors import UserError

if TYPE_CHECKING:
    from dragdiff.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED_MODEL = ASSETS / "embedded-sd"


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

    The pipeline's modules are frozen and put into evaluation mode for the time of an edit only; see `Editor`.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any, *, name: str = "") -> None:
        self.pipeline = pipeline
        self.name = name or type(pipeline).__name__
        self.network: Any = pipeline.unet
        self.modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        self.device = pipeline.unet.device
        self.prediction_type = str(pipeline.scheduler.config.get("prediction_type", "epsilon"))
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise UserError(
                f"{self.name} predicts {self.prediction_type!r}: only epsilon and v_prediction models can be "
                "inverted by DDIM"
            )
        if "beta_schedule" not in pipeline.scheduler.config:
            raise UserError(
                f"{self.name} has a {type(pipeline.scheduler).__name__}: only models with a DDPM noise schedule can be "
                "inverted"
            )
        self.latent_stride = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.latent_channels = pipeline.unet.config.in_channels
        self.feature_strides = self._feature_strides()
        self.self_attention_layers = [
            name
            for block in self.feature_strides
            for name, module in self.network.get_submodule(block).named_modules(prefix=block)
            if name.endswith("attn1") and hasattr(module, "processor")
        ]

    def _feature_strides(self) -> dict[str, int]:
        stride = 1
        strides = {}
        for index, block in enumerate(self.network.down_blocks):
            stride *= 2 if block.downsamplers else 1
            strides[f"down_blocks.{index}"] = stride
        strides["mid_block"] = stride
        for index, block in enumerate(self.network.up_blocks):
            stride //= 2 if block.upsamplers else 1
            strides[f"up_blocks.{index}"] = stride
        return strides

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
        if name not in self.feature_strides:
            raise UserError(f"drag.features names {name!r}: the model has {', '.join(self.feature_strides)}")
        return self.network.get_submodule(name)

    def scheduler(self, steps: int, kind: str = "ddim") -> Any:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        config = self.pipeline.scheduler.config
        if kind == "ddim":
            # a converted PNDM config would clip the predicted clean latent unless told not to
            scheduler = DDIMScheduler.from_config(config, clip_sample=False, set_alpha_to_one=False)
        else:
            scheduler = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=kind == "dpm++2m-karras")
        scheduler.set_timesteps(steps)
        return scheduler


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
    if config.path == "embedded":
        if not EMBEDDED_MODEL.is_dir():
            raise UserError(f"the embedded model is not in {EMBEDDED_MODEL}: reinstall dragdiff")
        return
    for key, path in (("model.path", config.path), ("model.vae", config.vae)):
        if path and _looks_local(path) and not Path(path).expanduser().exists():
            raise UserError(
                f"{key} is {path!r}: no such file or folder; give a diffusers folder, a .safetensors file or a hub id"
            )
        if Path(path).is_file() and Path(path).suffix != ".safetensors":
            raise UserError(f"{key} is {path!r}: only .safetensors files are read, never pickled ones")
    folder = Path(config.path).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"model.path is {config.path!r}: the folder has no model_index.json, so it is no diffusers pipeline"
        )


def _looks_local(path: str) -> bool:
    return (
        path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in (".safetensors", ".ckpt", ".pt")
    )


def _quiet() -> None:
    """The libraries' own bars and notes on loading (optional image processors, parts left out) are not for our users."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
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
    path = EMBEDDED_MODEL if config.path == "embedded" else Path(config.path).expanduser()
    common: dict[str, Any] = {"dtype": dtype}
    plain: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    hub: dict[str, Any] = {"use_safetensors": True}
    _quiet()
    try:
        if config.vae:
            local = Path(config.vae).expanduser().exists()
            if Path(config.vae).is_file():
                plain["vae"] = AutoencoderKL.from_single_file(config.vae, **common)
            else:
                plain["vae"] = AutoencoderKL.from_pretrained(config.vae, local_files_only=local, **common, **hub)
        if path.is_file():
            pipeline = StableDiffusionPipeline.from_single_file(str(path), **common, **plain)
        elif path.is_dir():
            pipeline = StableDiffusionPipeline.from_pretrained(
                str(path), local_files_only=True, **common, **plain, **hub
            )
        else:
            revision = config.revision or None
            pipeline = StableDiffusionPipeline.from_pretrained(config.path, revision=revision, **common, **plain, **hub)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot load the model {config.path!r}"
            + (f" with the VAE {config.vae!r}" if config.vae else "")
            + f": {reason} -- give a local diffusers folder or .safetensors file, or fetch it once with "
            f"`huggingface-cli download {config.path}`"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    return StableDiffusion(pipeline, name=config.path)
