"""Diffusion models behind one small interface; Stable Diffusion 1.x / 2.x on diffusers.

Everything else in the package talks to `Backbone`, so that another architecture is one new class here.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dragdiff.errors import UserError
from dragdiff.modules.compilation import Compilation
from dragdiff.modules.host_memory import resting

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"
)  # fmt: skip


class Backbone(ABC):
    """What drag editing needs of a latent diffusion model. Latents and images are float32 at this interface."""

    name: str  # for logs
    network: Any  # the denoiser, an nn.Module
    text_encoder: nn.Module
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
    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Numbers (B, tokens) that stand for the prompts; warns of one that is too long."""

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

    @abstractmethod
    def saving_memory(self) -> AbstractContextManager[None]:
        """While it lasts, gradients of the network need less memory and more time; their values are the same."""

    @abstractmethod
    def parts_resting(self) -> AbstractContextManager[None]:
        """While it lasts, what is beside the network takes host memory only while it is used; no weight may change."""

    @abstractmethod
    def compiled(self) -> AbstractContextManager[None]:
        """While it lasts, the network is faster once it has been compiled; the same results but for rounding."""

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latent of an image of this size."""
        return height // self.latent_stride, width // self.latent_stride


class StableDiffusion(Backbone):
    """Stable Diffusion 1.x / 2.x: any diffusers pipeline with `vae`, `text_encoder`, `tokenizer`, `unet`, `scheduler`.

    An edit leaves the pipeline as it was, so that a pipeline of one's own can be lent to an editor:
    `Editor(config, backbone=StableDiffusion(pipeline))`.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    _let_go: Callable[[], None] = staticmethod(lambda: None)  # called after each use of a part beside the network

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
        self.text_encoder = pipeline.text_encoder
        self.modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        self.device = pipeline.unet.device
        self.latent_stride = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.latent_channels = pipeline.unet.config.in_channels
        self.feature_strides = feature_strides(self.network)
        self.self_attention_layers = self_attention_layers(self.network)
        self.compilation = Compilation()

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        self._let_go()
        scale = vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        # the published code multiplies by 1 / scale; dividing differs in the last bit
        images = vae.decode((1 / vae.config.scaling_factor * latents).to(vae.device, vae.dtype)).sample.float()
        self._let_go()
        return images

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        length = tokenizer.model_max_length
        for prompt in prompts:
            count = len(tokenizer(prompt, verbose=False).input_ids)
            if count > length:
                warnings.warn(
                    f"the prompt has {count} tokens, the model reads the first {length}: {prompt!r}",
                    stacklevel=1,  # said once, whoever asks
                )
        return tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    def embed(self, prompts: Sequence[str]) -> Tensor:
        embeddings = self.pipeline.text_encoder(self.tokenize(prompts).to(self.device))[0]
        self._let_go()
        return embeddings

    def predict(self, latents: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        dtype = self.network.dtype
        return self.network(
            latents.to(dtype), t.to(self.device), encoder_hidden_states=embeddings.to(dtype)
        ).sample.float()

    def feature_block(self, name: str) -> nn.Module:
        return feature_block(self.network, name)

    def saving_memory(self) -> AbstractContextManager[None]:
        return gradient_checkpointing(self.network)

    @contextmanager
    def parts_resting(self) -> Iterator[None]:
        with resting(self.pipeline.vae, self.pipeline.text_encoder) as self._let_go:
            try:
                yield
            finally:
                del self._let_go

    @contextmanager
    def compiled(self) -> Iterator[None]:
        layout = channels_last(self.network) if self.device.type == "cuda" else nullcontext()
        with layout, self.compilation.of(self.network):
            yield

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
def gradient_checkpointing(unet: Any) -> Iterator[None]:
    """Activations are computed again for the backward (Chen et al. 2016, arXiv 1604.06174); put back on leaving."""
    keys = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [(module, {key: vars(module)[key] for key in keys if key in vars(module)}) for module in unet.modules()]
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for module, values in before:
            for key in keys:
                vars(module).pop(key, None)
            vars(module).update(values)


@contextmanager
def channels_last(network: nn.Module) -> Iterator[None]:
    """Weights of convolutions in the memory order that a GPU's tensor cores want (NHWC); put back on leaving."""
    weights = [weight for weight in network.parameters() if weight.dim() == 4 and weight.is_contiguous()]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()


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
