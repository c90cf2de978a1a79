"""A LoRA's file: written as diffusers reads it; read as diffusers, kohya's scripts and the published code write it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dragdiff.errors import UserError, one_line
from dragdiff.modules.lora import DOWN, UP, LoRA, extract, peft_config

FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
# what is more than a LoRA, by a part of its weights' names
OTHERS = {
    "hada_": "a LoHa (LyCORIS)",
    "lokr_": "a LoKr (LyCORIS)",
    "dora_scale": "a DoRA",
    "magnitude": "a DoRA",
    "oft_": "an OFT",
    "lora_mid": "a LoCon in Tucker form (LyCORIS)",
    "glora": "a GLoRA (LyCORIS)",
    ".diff": "a full difference (LyCORIS)",
    "emb_params": "a textual inversion",
    "model.diffusion_model.": "a whole checkpoint (for model.path)",
}


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
    if not path.is_dir():
        return path
    return next((path / name for name in (FILE_NAME, PEFT_NAME) if (path / name).is_file()), path / FILE_NAME)


def load(path: Path) -> LoRA:
    """Read a LoRA saved by this project, by diffusers (peft or older keys), peft, kohya's scripts or the reference.

    A text encoder's part is left out, with a warning.

    Args:
        path: a .safetensors file, or a folder that holds `pytorch_lora_weights.safetensors`, or peft's own.

    Raises:
        UserError: missing, unreadable, or not a LoRA of a UNet.
    """
    from safetensors import safe_open

    file = file_of(path)
    if not file.is_file():
        raise UserError(f"no LoRA at {path}: expected a .safetensors file, or a folder with {FILE_NAME}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        _check_kind(weights)
        if any(key.startswith(PEFT_PREFIX) for key in weights):
            weights = {f"unet.{key.removeprefix(PEFT_PREFIX)}": value for key, value in weights.items()}
            config = json.loads((file.parent / PEFT_CONFIG).read_text(encoding="utf-8"))
            metadata = {f"unet.{key}": value for key, value in config.items()}
        weights = _to_peft_names(weights)
    except UserError as error:
        raise UserError(f"{file} is {error}") from None
    except Exception as error:  # the libraries raise nearly anything for damaged and foreign files
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
        lora.scale[module] = _scale(metadata, module, rank, file)
    return lora


def _scale(metadata: Any, module: str, rank: int, file: Path) -> float:
    """Alpha / rank as peft computes it, where patterns are regular expressions for the end of a module's path.

    Raises:
        UserError: the metadata's values are odd.
    """
    from peft.utils.other import get_pattern_key

    try:
        patterns: Any = metadata.get("unet.alpha_pattern") or {}
        alpha: Any = patterns.get(get_pattern_key(patterns, module), metadata.get("unet.lora_alpha", rank))
        scale = alpha / (math.sqrt(rank) if metadata.get("unet.use_rslora") else rank)
        if isinstance(alpha, bool) or not math.isfinite(scale):
            raise ValueError(f"alpha is {alpha}")
        return float(scale)
    except Exception as error:  # values of any type, expressions that do not compile
        raise UserError(
            f"the metadata of the LoRA {file} are odd: lora_alpha and alpha_pattern must give a number for {module} "
            f"({one_line(error)}); save it again, or remove its metadata"
        ) from error


def _check_kind(weights: Mapping[str, Tensor]) -> None:
    """
    Raises:
        UserError: it is more than a LoRA; says what.
    """
    for part, kind in OTHERS.items():
        if any(part in key for key in weights):
            raise UserError(f"{kind}, not a LoRA: only plain LoRAs can be used, some programs convert to one")


def _to_peft_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's LoRA weights under peft's names, whatever they are called; kohya's alphas are multiplied in.

    Raises:
        ValueError, KeyError: from diffusers' converter, where it does not know a name.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

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
