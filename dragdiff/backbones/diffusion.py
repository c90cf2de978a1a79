"""What drag editing needs of a latent diffusion model; each architecture is one class behind it.

Nothing outside of this folder knows how a model is built: layers and blocks are named, and the names are the model's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dragdiff.modules.features import forward_with_features

if TYPE_CHECKING:
    from dragdiff.config import GenerateConfig, ModelConfig

Condition = dict[str, Tensor]
"""What the network is told beside latent and timestep, by the network's own names: (rows, ...) each."""
States = dict[str, Tensor]
"""Hidden states (rows, tokens, channels) that enter self-attention layers, by the layers' names."""


class Diffusion(ABC):
    """A latent diffusion model. Latents and images are float32 at this interface.

    Attributes:
        name: for logs and messages.
        network: the denoiser.
        modules: everything that has weights.
        conditioners: those of them that make conditions.
        device: where it runs.
        prediction_type: "epsilon" or "v_prediction".
        latent_stride: image px per latent px.
        latent_channels: channels of a latent.
        trained_size: side of the pictures that it was trained on, px; 0 = not known.
        feature_strides: latent px per feature px of each feature point, in execution order.
        bottleneck: the feature point with the coarsest features.
        lora_targets: name endings of the projections that a LoRA updates.
        self_attention_layers: names in execution order.
        state: names of attributes of modules that change an output and are no weights.
    """

    name: str
    network: nn.Module
    modules: Sequence[nn.Module]
    conditioners: Sequence[nn.Module]
    device: torch.device
    prediction_type: str
    latent_stride: int
    latent_channels: int
    trained_size: int = 0
    feature_strides: Mapping[str, int]
    bottleneck: str
    lora_targets: Sequence[str]
    self_attention_layers: Sequence[str]
    state: Sequence[str] = ()

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The latent posterior of images.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            Mean and std, scaled, each (B, C, h, w).
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents.

        Args:
            latents: scaled, (B, C, h, w).

        Returns:
            (B, 3, H', W'), about [-1, 1] and finite where the latents are; H' and W' are multiples of the stride.

        Raises:
            UserError: the autoencoder can't make a finite picture of finite latents.
        """

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Numbers that stand for prompts; warns of one that is too long.

        Returns:
            (B, tokens) int64.
        """

    @abstractmethod
    def condition(self, prompts: Sequence[str]) -> Condition:
        """What prompts tell the network.

        Returns:
            A row for each prompt, float.
        """

    @abstractmethod
    def predict(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output, of the kind of `prediction_type`.

        Args:
            latents: (B, C, h, w).
            t: timestep, a scalar or (B,).
            condition: a row for each latent.
        """

    @abstractmethod
    def feature_block(self, name: str) -> nn.Module:
        """The module whose output is the named feature point.

        Raises:
            UserError: no such feature point; lists those there are.
        """

    @abstractmethod
    def scheduler(self, steps: int, kind: str = "ddim") -> Any:
        """A fresh diffusers scheduler with its timesteps set.

        Args:
            steps: timesteps of the whole schedule.
            kind: as in `GenerateConfig.scheduler`.

        Raises:
            UserError: the model's schedule has no room for so many.
        """

    @abstractmethod
    def recorded_attention(self, layers: Sequence[str]) -> AbstractContextManager[States]:
        """While it lasts, forwards note what enters self-attention layers, in the states that it yields.

        Args:
            layers: their names.
        """

    @abstractmethod
    def shared_attention(
        self, layers: Sequence[str], states: States, *, where: Sequence[bool] | None = None
    ) -> AbstractContextManager[None]:
        """While it lasts, the named self-attention layers take keys and values from states, a row of them for each row
        of the batch (with guidance: negative, positive).

        Args:
            where: rows of one guidance branch that do; the others see themselves. None = all.
        """

    @abstractmethod
    def saving_memory(self) -> AbstractContextManager[None]:
        """While it lasts, gradients of the network need less memory and more time; their values are the same."""

    @abstractmethod
    def compiled(self) -> AbstractContextManager[None]:
        """While it lasts, the network is faster once it has been compiled; the same results but for rounding."""

    @abstractmethod
    def sharpened(self, settings: GenerateConfig) -> AbstractContextManager[None]:
        """While it lasts, the network generates as FreeU has it (Si et al. 2023, arXiv 2309.11497), if it shall.

        Args:
            settings: `freeu` and its factors.
        """

    def with_features(
        self, forward: Callable[[], Tensor], names: Sequence[str], *, need_output: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """A forward's output, and the features (B, C_i, h_i, w_i) of the named points, with gradient.

        Args:
            forward: runs the network.
            need_output: False stops it at the last of these points; its output is None then.
        """
        return forward_with_features(forward, [self.feature_block(name) for name in names], need_output=need_output)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latent of an image of this size."""
        return height // self.latent_stride, width // self.latent_stride

    @contextmanager
    def frozen(self, settings: ModelConfig) -> Iterator[None]:
        """While it lasts, no weight wants a gradient, every module is in evaluation mode, and memory or time is saved
        as the settings say; all of it put back on leaving."""
        modules = [module for root in self.modules for module in root.modules()]
        parameters = [parameter for root in self.modules for parameter in root.parameters()]
        training = [module.training for module in modules]
        wanted = [parameter.requires_grad for parameter in parameters]
        try:
            for root in self.modules:
                root.requires_grad_(False).eval()
            with (
                self.saving_memory() if settings.memory == "low" else nullcontext(),
                self.compiled() if settings.compile else nullcontext(),
            ):
                yield
        finally:
            for module, mode in zip(modules, training, strict=True):
                module.training = mode
            for parameter, want in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(want)


def rows_of(condition: Condition, rows: Sequence[int]) -> Condition:
    """Some rows of a condition.

    Args:
        rows: their numbers, in the order in which they are wanted.
    """
    everyone = list(range(len(next(iter(condition.values())))))
    if list(rows) == everyone:
        return condition
    # a list as index would have to be copied to the device first, which waits for that
    return {name: torch.stack([value[row] for row in rows]) for name, value in condition.items()}


def joined(conditions: Sequence[Condition]) -> Condition:
    """The rows of several conditions, one after the other."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}
