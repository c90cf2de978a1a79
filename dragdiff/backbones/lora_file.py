"""A LoRA's file: written as diffusers reads it; read as diffusers, kohya's scripts and the published code write it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dragdiff.errors import UserError, one_line
from dragdiff.modules.lora import DOWN, UP, LoRA, extract, peft_config

FILE_NAME = "pytorch_lora_weights.safetensors"


def save(lora: LoRA, folder: Path) -> Path:
    """Write `pytorch_lora_weights.safetensors` as diffusers' `load_lora_weights` takes it, rank and alpha included.

    Returns:
        The file's path. It appears whole or not at all.
    """
    from diffusers import StableDiffusionPipeline

    layers = {f"{path}{DOWN}": value.cpu() for path, value in lora.down.items()}
    layers |= {f"{path}{UP}": value.cpu() for path, value in lora.up.items()}
    partial = folder / f"{FILE_NAME}.partial.safetensors"
    try:
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers,
            unet_lora_adapter_metadata=peft_config(lora).to_dict(),
            weight_name=partial.name,
        )
        return partial.replace(folder / FILE_NAME)
    finally:
        partial.unlink(missing_ok=True)


def file_of(path: Path) -> Path:
    """The file that a path names, or that is in the folder which it names."""
    return path / FILE_NAME if path.is_dir() else path


def load(path: Path) -> LoRA:
    """Read a LoRA saved by this project, by diffusers (peft or older keys), by kohya's scripts or by the reference.

    A text encoder's part is left out, with a warning.

    Args:
        path: a .safetensors file, or a folder that holds `pytorch_lora_weights.safetensors`.

    Raises:
        UserError: missing, unreadable, or not a LoRA of a UNet.
    """
    from safetensors import SafetensorError, safe_open

    file = file_of(path)
    if not file.is_file():
        raise UserError(f"no LoRA at {path}: expected a .safetensors file, or a folder with {FILE_NAME}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        weights = _to_peft_names(weights)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the LoRA {file}: {one_line(error)}") from error
    strange = [key for key in weights if not key.endswith((DOWN, UP))]
    if strange:
        raise UserError(f"{file} is no plain LoRA: what is {strange[0]!r} (of {len(strange)} such weights)?")
    lora = extract(weights, scale=1.0)
    if not lora.down or lora.down.keys() != lora.up.keys():
        raise UserError(f"{file} holds no UNet LoRA weights (pairs of lora_A / lora_B or lora.down / lora.up)")
    for module, down in lora.down.items():
        rank = down.shape[0]
        if lora.up[module].shape[1] != rank:
            raise UserError(f"{file} is damaged: at {module} the ranks {rank} and {lora.up[module].shape[1]} differ")
        alpha = metadata.get("unet.alpha_pattern", {}).get(module, metadata.get("unet.lora_alpha", rank))
        lora.scale[module] = alpha / (math.sqrt(rank) if metadata.get("unet.use_rslora") else rank)
    return lora


def _to_peft_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's LoRA weights under peft's names, whatever they are called; kohya's alphas are multiplied in.

    Raises:
        ValueError, KeyError: from diffusers' converter, where it does not know a name.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    if any("dora" in key or "magnitude" in key for key in weights):
        raise ValueError("it is a DoRA, which is more than a LoRA and not supported")
    weights = {key.replace("unet.unet.", "unet.", 1): value for key, value in weights.items()}  # the reference's prefix
    for key in [key for key in weights if key.endswith(".alpha")]:
        module, alpha = key.removesuffix(".alpha"), float(weights.pop(key))
        down, up = f"{module}.lora_down.weight", f"{module}.lora_up.weight"
        weights[up] = weights[up].float() * (alpha / weights[down].shape[0])
    converted, _ = StableDiffusionPipeline.lora_state_dict(weights)
    unet = {key.removeprefix("unet."): value for key, value in converted.items() if not key.startswith("text_encoder")}
    if len(unet) < len(converted):
        warnings.warn("only the UNet's part of the LoRA is used, not its text encoder's", stacklevel=3)
    return convert_unet_state_dict_to_peft(unet)
