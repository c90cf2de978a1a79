"""Stable Diffusion 1.x / 2.x on diffusers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dragdiff.backbones import attention
from dragdiff.backbones.compilation import Compilation
from dragdiff.backbones.diffusion import Condition, Diffusion, States
from dragdiff.errors import UserError

if TYPE_CHECKING:
    from dragdiff.config import GenerateConfig

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"
)  # fmt: skip
FREEU = ("b1", "b2", "s1", "s2")


class StableDiffusion(Diffusion):
    """Stable Diffusion 1.x / 2.x: any diffusers pipeline with `vae`, `text_encoder`, `tokenizer`, `unet`, `scheduler`.

    An edit leaves the pipeline as it was, so that a pipeline of one's own can be lent to an editor:
    `Editor(config, backbone=StableDiffusion(pipeline))`.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    bottleneck = "mid_block"
    # adapters' strength (peft), FreeU, an autoencoder's tiles (diffusers)
    state = (
        *("scaling", "_active_adapter", "_disable_adapters", "merged_adapters", *FREEU),
        *("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"),
    )

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
        self.conditioners = (pipeline.text_encoder,)
        self.modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
        self.device = pipeline.unet.device
        self.latent_stride = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        self.latent_channels = pipeline.unet.config.in_channels
        side = pipeline.unet.config.sample_size
        self.trained_size = self.latent_stride * (side if isinstance(side, int) else 64)
        self.feature_strides = feature_strides(self.network)
        self.self_attention_layers = self_attention_layers(self.network)
        self.compilation = Compilation(self.network, self._probe_gradient)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        posterior = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        scale = vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    def decode(self, latents: Tensor) -> Tensor:
        images = _decoded(self.pipeline.vae, latents)
        if torch.isfinite(images).all() or not torch.isfinite(latents).all():
            return images
        # some published autoencoders overflow in half precision
        with torch.autocast(self.device.type, enabled=False):
            images = _decoded(copy.deepcopy(self.pipeline.vae).float(), latents)
        if not torch.isfinite(images).all():
            half = "" if self.pipeline.vae.dtype == torch.float32 else "set model.dtype=fp32, "
            raise UserError(
                f"the autoencoder of {self.name} overflows, its picture is not finite: {half}download it again, or use "
                "another, e.g. model.vae=stabilityai/sd-vae-ft-mse"
            )
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

    def condition(self, prompts: Sequence[str]) -> Condition:
        tokens = self.tokenize(prompts).to(self.device)
        return {"encoder_hidden_states": self.pipeline.text_encoder(tokens)[0]}

    def predict(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = self.network.dtype
        told = {name: value.to(dtype) for name, value in condition.items()}
        return self.network(latents.to(dtype), t.to(self.device), **told).sample.float()

    def feature_block(self, name: str) -> nn.Module:
        if name not in self.feature_strides:
            raise UserError(f"drag.features names {name!r}: the model has {', '.join(self.feature_strides)}")
        return self.network.get_submodule(name)

    def recorded_attention(self, layers: Sequence[str]) -> AbstractContextManager[States]:
        return attention.recorded(self.network, layers)

    def shared_attention(
        self, layers: Sequence[str], states: States, *, where: Sequence[bool] | None = None
    ) -> AbstractContextManager[None]:
        return attention.mutual_self_attention(self.network, layers, states, where=where)

    def saving_memory(self) -> AbstractContextManager[None]:
        return gradient_checkpointing(self.network)

    def compiled(self) -> AbstractContextManager[None]:
        return self.compilation.on()

    def sharpened(self, settings: GenerateConfig) -> AbstractContextManager[None]:
        if not settings.freeu:
            return nullcontext()
        return freeu(self.network, **{key: getattr(settings, f"freeu_{key}") for key in FREEU})

    def _probe_gradient(self) -> Tensor:
        """Of the output by a latent of the size that the model was trained with, for fixed noise."""
        random = torch.Generator().manual_seed(0)
        side, width = self.network.config.sample_size, self.network.config.cross_attention_dim
        latent = torch.randn((1, self.latent_channels, side, side), generator=random).to(self.device).requires_grad_()
        text = torch.randn((1, 8, width), generator=random).to(self.device)
        with torch.enable_grad():
            output = self.predict(latent, torch.tensor(500), {"encoder_hidden_states": text})
            weights = torch.randn(output.shape, generator=random).to(self.device)
            return torch.autograd.grad((output * weights).sum(), latent)[0]

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


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    # the published code multiplies by 1 / scale; dividing differs in the last bit
    images: Tensor = vae.decode((1 / vae.config.scaling_factor * latents).to(vae.device, vae.dtype)).sample
    return images.float()


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
    with _restored(unet.modules(), ("gradient_checkpointing", "_gradient_checkpointing_func")):
        unet.enable_gradient_checkpointing()
        yield


@contextmanager
def freeu(unet: Any, *, b1: float, b2: float, s1: float, s2: float) -> Iterator[None]:
    """FreeU (Si et al. 2023, arXiv 2309.11497) on a UNet; the state before is put back on leaving."""
    with _restored(unet.up_blocks, FREEU):
        unet.enable_freeu(b1=b1, b2=b2, s1=s1, s2=s2)
        yield


@contextmanager
def _restored(modules: Iterable[nn.Module], keys: Sequence[str]) -> Iterator[None]:
    """Attributes of modules are as before on leaving, and away where there were none."""
    before = [(module, {key: vars(module)[key] for key in keys if key in vars(module)}) for module in modules]
    try:
        yield
    finally:
        for module, values in before:
            for key in keys:
                vars(module).pop(key, None)
            vars(module).update(values)


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
