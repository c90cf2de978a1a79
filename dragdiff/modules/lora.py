"""LoRA on a denoiser's attention projections (Hu et al. 2021, arXiv 2106.09685): train, run for each row, merge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dragdiff.errors import UserError
from dragdiff.moved import tell_moved

if TYPE_CHECKING:
    from peft import LoraConfig

tell_moved(__name__)
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # peft's name endings
NO_ADAPTER = "__base__"  # peft's name for it


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


def peft_config(lora: LoRA) -> LoraConfig:
    """How peft describes it."""
    from peft import LoraConfig

    ranks = {path: down.shape[0] for path, down in lora.down.items()}
    # 12 digits: 15 / 11 * 11 is not 15
    alphas = {path: float(f"{lora.scale[path] * rank:.12g}") for path, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        rank_pattern={path: own for path, own in ranks.items() if own != rank},
        alpha_pattern={path: own for path, own in alphas.items() if own != alpha},
        target_modules=sorted(lora.down),
    )


class Rows:
    """Which of the pictures' adapters a batch's rows have: row r that of the picture `pictures[r % len(pictures)]`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.pictures: Sequence[int] = range(len(names))

    def tell(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook of peft's layers."""
        rows = [self.names[picture] for picture in self.pictures]
        return args, kwargs | {"adapter_names": rows * (len(args[0]) // len(rows))}


@contextmanager
def trainable(
    network: nn.Module, targets: Sequence[str], *, rank: int, alpha: float, seed: int, pictures: int
) -> Iterator[tuple[list[dict[str, nn.Parameter]], Callable[[int], LoRA]]]:
    """A LoRA to train for each of some pictures, all from the same start; taken out again on leaving.

    Down-projections start normal with std 1 / rank, up-projections at zero, drawn from `seed`. While the context lasts,
    only LoRA parameters require a gradient.

    Args:
        targets: name endings of the modules to wrap.
        alpha: the scale is alpha / rank.
        pictures: row r of the network's batches is of picture r % pictures.

    Yields:
        (the parameters of each picture by peft's names, a function that copies the LoRA of a picture).
    """
    from peft import LoraConfig

    paths = [name for name, module in network.named_modules() if _is_target(name, module, targets)]
    names = [f"picture_{number}" for number in range(pictures)]
    own: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": paths, "init_lora_weights": "gaussian"}
    with _injected(network, {name: LoraConfig(**own) for name in names}, seed=seed):
        weights = [_parameters(network, name) for name in names]
        for parameter in [parameter for own in weights for parameter in own.values()]:
            parameter.requires_grad_(True)  # peft wants one for those of the active adapter alone
        with _told(network, Rows(names)) if pictures > 1 else nullcontext():
            yield weights, lambda picture: extract(weights[picture], scale=alpha / rank)


@contextmanager
def unmerged(network: nn.Module, loras: Sequence[LoRA | None]) -> Iterator[Rows]:
    """Add its own LoRA to each row of the network's batches while the context lasts.

    Raises:
        UserError: the LoRAs do not fit the network.
    """
    names = [NO_ADAPTER if lora is None else f"picture_{number}" for number, lora in enumerate(loras)]
    given = {name: lora for name, lora in zip(names, loras, strict=True) if lora is not None}
    for lora in given.values():
        for path in _updates(network, lora):
            if not isinstance(network.get_submodule(path), nn.Linear):
                raise UserError(
                    f"the LoRA updates {path}, which is no linear projection: use it for one edit at a time"
                )
    with _injected(network, {name: peft_config(lora) for name, lora in given.items()}, seed=0):
        for name, lora in given.items():
            for key, parameter in _parameters(network, name).items():
                source = lora.down if key.endswith(DOWN) else lora.up
                parameter.data.copy_(source[key.removesuffix(DOWN).removesuffix(UP)].flatten(1))
                parameter.requires_grad_(False)
        with _told(network, Rows(names)) as rows:
            yield rows


@contextmanager
def _told(network: nn.Module, rows: Rows) -> Iterator[Rows]:
    from peft.tuners.lora import LoraLayer

    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, LoraLayer):
                stack.callback(module.register_forward_pre_hook(rows.tell, with_kwargs=True).remove)
        yield rows


@contextmanager
def _injected(network: nn.Module, configs: Mapping[str, LoraConfig], *, seed: int) -> Iterator[None]:
    """Put peft's layers around projections, an adapter for each config; take them out again on leaving."""
    from peft import inject_adapter_in_model

    if hasattr(network, "peft_config"):
        raise UserError(
            "the model carries adapters already: unload them, or fuse and then unload them, before a LoRA is trained"
        )
    wrapped = {path for config in configs.values() for path in config.target_modules or ()}
    originals = {path: network.get_submodule(path) for path in wrapped}
    wants_gradient = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    try:
        for name, config in configs.items():
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the accelerators' generators
                inject_adapter_in_model(config, network, adapter_name=name)
            for parameter in _parameters(network, name).values():  # weights may be half precision, these may not
                parameter.data = parameter.data.float()
        yield
    finally:
        for path, module in originals.items():
            network.set_submodule(path, module)
        if hasattr(network, "peft_config"):
            del network.peft_config
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(wants_gradient[name])


def _is_target(name: str, module: nn.Module, targets: Sequence[str]) -> bool:
    return isinstance(module, nn.Linear) and any(name == target or name.endswith(f".{target}") for target in targets)


def _parameters(network: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by peft's names without its own: `<path>.lora_A.weight`, `.lora_B.weight`."""
    return {
        name.replace(f".{adapter}.", "."): parameter
        for name, parameter in network.named_parameters()
        if f".{adapter}." in name
    }


def extract(weights: Mapping[str, Tensor], *, scale: float) -> LoRA:
    """A LoRA from copies of its weights.

    Args:
        weights: by peft's names, `<path>.lora_A.weight` (rank, in) and `<path>.lora_B.weight` (out, rank).
        scale: of every update, alpha / rank.
    """
    down, up = (
        {name.removesuffix(end): value.detach().clone() for name, value in weights.items() if name.endswith(end)}
        for end in (DOWN, UP)
    )
    return LoRA(down, up, dict.fromkeys(down, scale))


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
    updates = _updates(network, lora)
    originals = [weight.data for weight, _, _ in updates.values()]
    try:
        for path, (weight, down, up) in updates.items():
            down, up = (part.to(weight.device).float() for part in (down, up))
            update = (lora.scale[path] * up @ down).view(weight.shape)
            weight.data = (weight.data.float() + update).to(weight.dtype)
        yield
    finally:
        for (weight, _, _), original in zip(updates.values(), originals, strict=True):
            weight.data = original


def _updates(network: nn.Module, lora: LoRA) -> dict[str, tuple[nn.Parameter, Tensor, Tensor]]:
    """(weight, down (rank, in), up (out, rank)) by path.

    Raises:
        UserError: the LoRA does not fit the network.
    """
    updates = {}
    for path, down in lora.down.items():
        try:
            weight = network.get_parameter(f"{path}.weight")
        except AttributeError:
            raise UserError(
                f"the LoRA is for a module {path!r} that this model lacks: it was made for another model"
            ) from None
        down, up = (part.flatten(1) for part in (down, lora.up[path]))
        if (len(up), down.shape[1]) != tuple(weight.flatten(1).shape):
            raise UserError(
                f"the LoRA does not fit this model at {path}: it updates {(len(up), down.shape[1])}, "
                f"the model has {tuple(weight.shape)}: it was made for another model"
            )
        updates[path] = weight, down, up
    return updates
