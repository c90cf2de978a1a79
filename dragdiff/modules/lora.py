"""LoRA on a denoiser's attention projections (Hu et al. 2021, arXiv 2106.09685): inject, read, write, merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dragdiff.errors import UserError

ADAPTER = "dragdiff"
FILE_NAME = "pytorch_lora_weights.safetensors"


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

    originals = {name: module for name, module in network.named_modules() if _is_target(name, module, targets)}
    wants_gradient = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(originals), init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    try:
        for name, parameter in network.named_parameters():
            if ".lora_" in name:  # weights may be half precision, what is optimised may not
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
    ends = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
    down, up = (
        {name.removesuffix(end): value.detach().clone() for name, value in weights.items() if name.endswith(end)}
        for end in ends.values()
    )
    return LoRA(down, up, dict.fromkeys(down, scale))


def save(lora: LoRA, folder: Path) -> Path:
    """Write `pytorch_lora_weights.safetensors` as diffusers' `load_lora_weights` takes it, rank and alpha included.

    Returns:
        The file's path. It appears whole or not at all.
    """
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    rank = next(iter(lora.down.values())).shape[0]
    scale = next(iter(lora.scale.values()))
    metadata = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=sorted(lora.down)).to_dict()
    layers = {f"{path}.lora_A.weight": value.cpu() for path, value in lora.down.items()}
    layers |= {f"{path}.lora_B.weight": value.cpu() for path, value in lora.up.items()}
    partial = f"{FILE_NAME}.partial.safetensors"
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata, weight_name=partial
    )
    return (folder / partial).replace(folder / FILE_NAME)


def load(path: Path) -> LoRA:
    """Read a LoRA saved by this project, by diffusers (peft or older keys) or by the reference.

    Args:
        path: a .safetensors file, or a folder that holds `pytorch_lora_weights.safetensors`.

    Raises:
        UserError: missing, unreadable, or without UNet LoRA weights.
    """
    import json

    from diffusers import StableDiffusionPipeline
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from safetensors import SafetensorError, safe_open

    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no LoRA at {path}: expected a .safetensors file, or a folder with {FILE_NAME}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read the LoRA {file}: {error}") from error

    state = {key.replace("unet.unet.", "unet.", 1): value for key, value in state.items()}  # the reference's prefix
    try:
        state, alphas = StableDiffusionPipeline.lora_state_dict(state)
        state = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
        state = convert_unet_state_dict_to_peft(state)
        lora = extract(state, scale=1.0)
    except (ValueError, KeyError) as error:
        raise UserError(f"cannot read the LoRA {file}: {error}") from error
    if not lora.down or lora.down.keys() != lora.up.keys():
        raise UserError(f"{file} holds no UNet LoRA weights (pairs of lora_A / lora_B or lora.down / lora.up)")

    saved = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    alpha = saved.get("unet.lora_alpha")
    alphas = {key.removeprefix("unet.").removesuffix(".alpha"): value for key, value in (alphas or {}).items()}
    for module, down in lora.down.items():
        own = alphas.get(module, alpha)
        if own is not None:
            lora.scale[module] = float(own) / down.shape[0]
    return lora


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
            update = lora.scale[path] * lora.up[path].flatten(1).float() @ down.flatten(1).float()
            if update.numel() != weight.numel():
                raise UserError(
                    f"the LoRA does not fit this model at {path}: it updates {tuple(update.shape)}, "
                    f"the model has {tuple(weight.shape)}"
                )
            originals.append((weight, weight.data))
            weight.data = (weight.data.float() + update.view(weight.shape).to(weight.device)).to(weight.dtype)
        yield
    finally:
        for weight, data in originals:
            weight.data = data
