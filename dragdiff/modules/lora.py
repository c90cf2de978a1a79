"""LoRA on a denoiser's attention projections (Hu et al. 2021, arXiv 2106.09685): inject, read, write, merge."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dragdiff.errors import UserError, one_line

ADAPTER = "dragdiff"
FILE_NAME = "pytorch_lora_weights.safetensors"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # peft's name endings


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates by module path.

    Attributes:
        down: (rank, in, ...) for each path.
        up: (out, rank, ...) for each path.
        scale: alpha / rank for each path; the update of a weight is scale * up @ down.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    scale: dict[str, float]


@contextmanager
def injected(network: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, seed: int) -> Iterator[None]:
    """Put trainable peft LoRA layers around the target projections; take them out again on leaving.

    Down-projections start normal with std 1 / rank, up-projections at zero, drawn from `seed`. While the context lasts,
    only LoRA parameters require a gradient.

    Args:
        targets: name endings of the modules to wrap, e.g. "to_q", "to_out.0".
        alpha: the scale is alpha / rank.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if hasattr(network, "peft_config"):
        raise UserError("the model carries adapters already: unload or fuse them before a LoRA is trained")
    originals = {name: module for name, module in network.named_modules() if _is_target(name, module, targets)}
    wants_gradient = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(originals),
        init_lora_weights="gaussian",
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the accelerators' generators too
            inject_adapter_in_model(config, network, adapter_name=ADAPTER)
        for parameter in parameters(network).values():  # weights may be half precision, what is optimised may not
            parameter.data = parameter.data.float()
        yield
    finally:
        for name, module in originals.items():
            network.set_submodule(name, module)
        if hasattr(network, "peft_config"):
            del network.peft_config
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(wants_gradient[name])


def _is_target(name: str, module: nn.Module, targets: Sequence[str]) -> bool:
    return isinstance(module, nn.Linear) and any(name == target or name.endswith(f".{target}") for target in targets)


def parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The injected LoRA parameters by peft's names without the adapter: `<path>.lora_A.weight`, `.lora_B.weight`."""
    return {
        name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in network.named_parameters()
        if f".{ADAPTER}." in name
    }


def extract(weights: Mapping[str, Tensor], *, scale: float) -> LoRA:
    """A LoRA from weights named as by `parameters` (copies)."""
    down, up = (
        {name.removesuffix(end): value.detach().clone() for name, value in weights.items() if name.endswith(end)}
        for end in (DOWN, UP)
    )
    return LoRA(down, up, dict.fromkeys(down, scale))


def save(lora: LoRA, folder: Path) -> Path:
    """Write `pytorch_lora_weights.safetensors` as diffusers' `load_lora_weights` takes it, rank and alpha included.

    Returns:
        The file's path. It appears whole or not at all.
    """
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    ranks = {path: down.shape[0] for path, down in lora.down.items()}
    # 12 digits: 15 / 11 * 11 is not 15
    alphas = {path: float(f"{lora.scale[path] * rank:.12g}") for path, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    metadata = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        rank_pattern={path: own for path, own in ranks.items() if own != rank},
        alpha_pattern={path: own for path, own in alphas.items() if own != alpha},
        target_modules=sorted(lora.down),
    ).to_dict()
    layers = {f"{path}{DOWN}": value.cpu() for path, value in lora.down.items()}
    layers |= {f"{path}{UP}": value.cpu() for path, value in lora.up.items()}
    partial = folder / f"{FILE_NAME}.partial.safetensors"
    try:
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata, weight_name=partial.name
        )
        return partial.replace(folder / FILE_NAME)
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> LoRA:
    """Read a LoRA saved by this project, by diffusers (peft or older keys), by kohya's scripts or by the reference.

    A text encoder's part is left out, with a warning.

    Args:
        path: a .safetensors file, or a folder that holds `pytorch_lora_weights.safetensors`.

    Raises:
        UserError: missing, unreadable, or not a LoRA of a UNet.
    """
    from safetensors import SafetensorError, safe_open

    file = path / FILE_NAME if path.is_dir() else path
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


@contextmanager
def merged(network: nn.Module, lora: LoRA | None) -> Iterator[None]:
    """Add a LoRA to the weights that it is for; put the very same weights back on leaving.

    Merging costs nothing per forward, unlike separate low-rank layers, and changes outputs by rounding only.

    Raises:
        UserError: the LoRA does not fit the network.
    """
    if lora is None:
        yield
        return
    originals: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for path, down in lora.down.items():
            try:
                weight = network.get_parameter(f"{path}.weight")
            except AttributeError:
                raise UserError(
                    f"the LoRA is for a module {path!r} that this model lacks: it was made for another model"
                ) from None
            down, up = (part.to(weight.device).float().flatten(1) for part in (down, lora.up[path]))
            if (len(up), down.shape[1]) != weight.flatten(1).shape:
                raise UserError(
                    f"the LoRA does not fit this model at {path}: it updates {(len(up), down.shape[1])}, "
                    f"the model has {tuple(weight.shape)}: it was made for another model"
                )
            originals.append((weight, weight.data))
            update = (lora.scale[path] * up @ down).view(weight.shape)
            weight.data = (weight.data.float() + update).to(weight.dtype)
        yield
    finally:
        for weight, data in originals:
            weight.data = data
