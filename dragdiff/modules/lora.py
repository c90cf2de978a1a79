"""LoRA on a denoiser's attention projections (Hu et al. 2021, arXiv 2106.09685): inject, read, write, merge."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dragdiff.errors import UserError, one_line
from dragdiff.modules.compilation import is_plain
from dragdiff.modules.host_memory import Resting
from dragdiff.modules.low_rank import project, updated

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

    @property
    def is_finite(self) -> bool:
        """Whether its training has not diverged."""
        return all(bool(torch.isfinite(up).all()) for up in self.up.values())


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

    from dragdiff.modules.peft_layer import MergedLinear

    if hasattr(network, "peft_config"):
        raise UserError(
            "the model carries adapters already: unload them, or fuse and then unload them, before a LoRA is trained"
        )
    originals = {name: module for name, module in network.named_modules() if _is_target(name, module, targets)}
    wants_gradient = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(originals),
        init_lora_weights="gaussian",
    )
    config._register_custom_module({nn.Linear: MergedLinear})
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


# ------------------------------------------------------------------------------------------- a LoRA for each row


class Rows:
    """The LoRAs of P pictures for the rows of a batch: row r has the one of picture `active[r % len(active)]`.

    Attributes:
        active: numbers of pictures; set it before a forward whose rows are others.
        weights: (P, rank, in) and (P, out, rank) for each module, by peft's names; smaller ranks padded with zeros.
    """

    def __init__(self, weights: Mapping[str, Tensor], scale: Mapping[str, Tensor]) -> None:
        self.weights, self.scale = weights, scale
        # where the weights are: brought there in each forward, they would have a GPU wait
        self._factors = {path: factor.to(weights[f"{path}{DOWN}"]) for path, factor in scale.items()}
        self._active, self._index = list(range(len(next(iter(weights.values()), ())))), torch.empty(0)

    @property
    def active(self) -> list[int]:
        return self._active

    @active.setter
    def active(self, pictures: Sequence[int]) -> None:
        if list(pictures) != self._active:
            self._active = list(pictures)
            self._index = torch.tensor(self._active, device=next(iter(self.weights.values())).device)

    @classmethod
    def of(cls, loras: Sequence[LoRA | None], device: torch.device | None = None) -> Rows:
        """Copies, float32; None is no update."""
        weights: dict[str, Tensor] = {}
        scale: dict[str, Tensor] = {}
        for path in dict.fromkeys(path for lora in loras if lora is not None for path in lora.down):
            found = [lora if lora is not None and path in lora.down else None for lora in loras]
            first = next(lora for lora in found if lora is not None)
            rank = max(lora.down[path].shape[0] for lora in found if lora is not None)
            down = torch.zeros(len(loras), rank, first.down[path].flatten(1).shape[1])
            up = torch.zeros(len(loras), first.up[path].shape[0], rank)
            scale[path] = torch.ones(len(loras), 1, 1, dtype=torch.float64)
            for row, lora in enumerate(found):
                if lora is not None:
                    own = lora.down[path].shape[0]
                    down[row, :own], up[row, :, :own] = lora.down[path].flatten(1), lora.up[path].flatten(1)
                    scale[path][row] = lora.scale[path]
            weights[f"{path}{DOWN}"], weights[f"{path}{UP}"] = down.to(device), up.to(device)
        return cls(weights, scale)

    def lora(self, picture: int) -> LoRA:
        """A copy of one picture's."""
        own = extract({name: weight[picture] for name, weight in self.weights.items()}, scale=1.0)
        own.scale.update({path: scale[picture].item() for path, scale in self.scale.items()})
        return own

    def project(self, path: str, layer: nn.Linear, inputs: Tensor) -> Tensor:
        """The projection at a path, with each row's LoRA; inputs (rows, ..., in)."""
        return project(inputs, layer.weight, layer.bias, *self._of(path))

    def updated(self, path: str, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The same from the projection's output."""
        return updated(output, *inputs, *self._of(path))

    def _of(self, path: str) -> tuple[Tensor, Tensor, Tensor]:
        """(down, up, scale) of the active pictures."""
        parts = self.weights[f"{path}{DOWN}"], self.weights[f"{path}{UP}"], self._factors[path]
        if self.active == list(range(len(parts[0]))):
            return parts
        down, up, scale = (part[self._index] for part in parts)
        return down, up, scale


@contextmanager
def beside(network: nn.Module, rows: Rows) -> Iterator[Rows]:
    """Add its own LoRA to each row of the network's batches while the context lasts.

    One product of stacked matrices for all pictures; peft's own way with `adapter_names` goes through them one by one.

    Raises:
        UserError: the LoRAs do not fit the network.
    """
    with ExitStack() as stack:
        for path in rows.scale:
            layer = _projection(network, path)
            down, up = rows.weights[f"{path}{DOWN}"], rows.weights[f"{path}{UP}"]
            _check_fit(path, (up.shape[1], down.shape[2]), layer.weight)
            if not isinstance(layer, nn.Linear):
                raise UserError(
                    f"the LoRA updates {path}, which is no linear projection: use it for one edit at a time"
                )
            if type(layer) is nn.Linear and is_plain(layer):
                vars(layer)["forward"] = partial(rows.project, path, layer)
                stack.callback(vars(layer).pop, "forward")
            else:  # of an owner's making
                stack.callback(layer.register_forward_hook(partial(rows.updated, path)).remove)
        yield rows


def can_be_beside(network: nn.Module, lora: LoRA) -> bool:
    """Whether it updates linear projections only, as those that are trained here do."""
    return all(isinstance(_projection(network, path), nn.Linear) for path in lora.down)


@contextmanager
def trainable(
    network: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, seed: int, pictures: int
) -> Iterator[tuple[Mapping[str, nn.Parameter], Callable[[int], LoRA]]]:
    """A LoRA to train for each of some pictures, all from the same start; taken out again on leaving.

    Args:
        targets, rank, alpha, seed: as for `injected`.
        pictures: row r of the network's batches is of picture r % pictures.

    Yields:
        (the parameters, a function that copies the LoRA of a picture).
    """
    with injected(network, targets, rank=rank, alpha=alpha, seed=seed):
        single = parameters(network)
        start = extract(single, scale=alpha / rank)
        if pictures == 1:
            yield single, lambda _: extract(single, scale=alpha / rank)
            return
        device = next(iter(single.values())).device
    rows = Rows.of([start] * pictures, device)
    several = {name: nn.Parameter(weight) for name, weight in rows.weights.items()}
    rows.weights = several
    with beside(network, rows):
        yield several, rows.lora


# ------------------------------------------------------------------------------------------- files and weights


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


@contextmanager
def merged(network: nn.Module, lora: LoRA | None, *, briefly: bool = False) -> Iterator[None]:
    """Add a LoRA to the weights that it is for; put the very same weights back on leaving.

    Merging costs nothing per forward, unlike separate low-rank layers, and changes outputs by rounding only.

    Args:
        briefly: the replaced weights stay in memory meanwhile, as moving them to a file and back would take longer.

    Raises:
        UserError: the LoRA does not fit the network.
    """
    if lora is None:
        yield
        return
    updates: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = {}
    for path, down in lora.down.items():
        weight = _projection(network, path).weight
        down, up = (part.flatten(1) for part in (down, lora.up[path]))
        _check_fit(path, (len(up), down.shape[1]), weight)
        updates[path] = weight, down, up
    originals = [weight.data for weight, _, _ in updates.values()]
    rest = Resting([] if briefly else originals)
    try:
        for path, (weight, down, up) in updates.items():
            down, up = (part.to(weight.device).float() for part in (down, up))
            update = (lora.scale[path] * up @ down).view(weight.shape)
            weight.data = (weight.data.float() + update).to(weight.dtype)
        rest.sleep()
        yield
    finally:
        try:
            rest.wake()
        finally:
            for (weight, _, _), original in zip(updates.values(), originals, strict=True):
                weight.data = original


def _projection(network: nn.Module, path: str) -> Any:
    """The module of that path that a LoRA is for."""
    try:
        network.get_parameter(f"{path}.weight")
    except AttributeError:
        raise UserError(
            f"the LoRA is for a module {path!r} that this model lacks: it was made for another model"
        ) from None
    return network.get_submodule(path)


def _check_fit(path: str, updated: tuple[int, int], weight: Tensor) -> None:
    if updated != tuple(weight.flatten(1).shape):
        raise UserError(
            f"the LoRA does not fit this model at {path}: it updates {updated}, "
            f"the model has {tuple(weight.shape)}: it was made for another model"
        )
