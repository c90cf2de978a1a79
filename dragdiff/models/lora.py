"""`LoRAFinetune`: the identity-preserving fine-tune of one image (DragDiffusion, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.amp import GradScaler

from dragdiff.errors import UserError
from dragdiff.models.separate import Separate, own_scalers
from dragdiff.models.trainer import each
from dragdiff.modules.backbone import Backbone
from dragdiff.modules.images import to_tensor

Draw = Callable[[int], "Noise"]
Posterior = Callable[[list[tuple[int, int]]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Noise:
    """The random numbers of one step, drawn in the reference's order.

    Attributes:
        corners: (top, left) of each row's crop, in the unit of the thing that is cropped.
        posterior: (B, C, h, w) normal, picks a latent from the posterior.
        noise: (B, C, h, w) normal, what is predicted.
        timesteps: (B,) int64, uniform in [0, 1000).
    """

    corners: list[tuple[int, int]]
    posterior: Tensor
    noise: Tensor
    timesteps: Tensor


def seeded_noise(
    *,
    seed: int,
    batch_size: int,
    latent_shape: tuple[int, int, int],
    slack: tuple[int, int],
    train_timesteps: int,
) -> Draw:
    """Random numbers that depend on (seed, step) alone, so that a resumed run draws what an unbroken one does.

    Args:
        latent_shape: (C, h, w) of one crop's latent.
        slack: how far a crop's corner can go, (down, right); (0, 0) for a square picture.
    """

    def draw(step: int) -> Noise:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)

        def corner() -> tuple[int, int]:
            top, left = (int(torch.randint(0, s + 1, (), generator=generator)) for s in slack)
            return top, left

        corners = [corner() if any(slack) else (0, 0) for _ in range(batch_size)]
        posterior = torch.randn((batch_size, *latent_shape), generator=generator)
        noise = torch.randn((batch_size, *latent_shape), generator=generator)
        timesteps = torch.randint(0, train_timesteps, (batch_size,), generator=generator)
        return Noise(corners, posterior, noise, timesteps)

    return draw


def crops(
    backbone: Backbone, image: np.ndarray, *, resolution: int, encode_each: bool
) -> tuple[Posterior, tuple[int, int, int], tuple[int, int]]:
    """How the fine-tune sees a picture: resized so that its short side is `resolution`, then cropped square.

    Args:
        image: (H, W, 3) uint8.
        encode_each: encode the crops of each step, as the reference does; otherwise the whole picture is encoded once
            and crops are cut from its latent.

    Returns:
        (posterior of the crops at given corners, shape (C, h, w) of one crop's latent, how far corners can go (down,
        right)). Corners are in px with `encode_each`, else in latent px.
    """
    height, width = image.shape[:2]
    # the short side exactly, the long one rounded down, as torchvision's Resize does
    size = (
        (resolution, int(resolution * width / height))
        if height <= width
        else (int(resolution * height / width), resolution)
    )
    picture = Image.fromarray(image)
    if min(height, width) != resolution:
        picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = to_tensor(np.asarray(picture)).to(backbone.device)
    side = backbone.latent_size(resolution, resolution)
    if encode_each and size[0] != size[1]:

        def encoded(corners: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            batch = [pixels[:, :, top : top + resolution, left : left + resolution] for top, left in corners]
            with torch.no_grad():
                return backbone.encode(torch.cat(batch))

        return encoded, (backbone.latent_channels, *side), (size[0] - resolution, size[1] - resolution)

    with torch.no_grad():
        mean, std = backbone.encode(pixels)

    def cut(latent: Tensor, corners: list[tuple[int, int]]) -> Tensor:
        return torch.cat([latent[:, :, top : top + side[0], left : left + side[1]] for top, left in corners])

    slack = (mean.shape[2] - side[0], mean.shape[3] - side[1])
    return lambda corners: (cut(mean, corners), cut(std, corners)), (mean.shape[1], *side), slack


@dataclass(frozen=True)
class Lesson:
    """What a LoRA learns from.

    Attributes:
        posterior: latent posterior (mean, std), each (B, C, h, w), of the picture's crops at the given corners.
        embedding: (1, tokens, D) of its prompt.
        draw: the random numbers of a step.
    """

    posterior: Posterior
    embedding: Tensor
    draw: Draw

    @property
    def is_finite(self) -> bool:
        """Whether the latent of the picture's first crop is."""
        return all(bool(torch.isfinite(part).all()) for part in self.posterior([(0, 0)]))


class LoRAFinetune(L.LightningModule):
    """Trains LoRA layers that are in a backbone's network, one for each picture of a batch; owns nothing else.

    Attributes:
        steps_done: in this run, which may have been resumed.
        lost: (P,) how many of the last of them had a loss that was not finite, of each picture.
    """

    lost: Tensor

    def __init__(
        self,
        backbone: Backbone,
        weights: Mapping[str, nn.Parameter],
        lessons: Sequence[Lesson],
        *,
        lr: float,
        weight_decay: float,
        scheduler: Any,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            backbone: with the LoRA layers in its network (`modules.lora.trainable`).
            weights: what is trained.
            lessons: one for each picture; row r of a batch is of picture r % their number.
            scheduler: diffusers scheduler that adds noise and knows the velocity.
            settings: plain values that a checkpoint is good for; kept in it, see `check_resume`.
        """
        super().__init__()
        self._frozen = (backbone, lessons, scheduler)  # in a tuple: no submodules, no part of checkpoints
        self.lr, self.weight_decay, self.settings = lr, weight_decay, dict(settings or {})
        self.names, self.lora = list(weights), nn.ParameterList(weights.values())
        self.steps_done = 0
        # for several pictures under fp16
        self._scalers = [GradScaler(enabled=False) for _ in lessons]
        self._rows: list[list[nn.Parameter]] = []
        self.register_buffer("lost", torch.zeros(len(lessons), dtype=torch.int64), persistent=False)

    def training_step(self, _: int) -> Tensor:
        backbone, lessons, scheduler = self._frozen
        parts = [self._draw(lesson) for lesson in lessons]
        latents, noise, t, embeddings = (torch.stack(part, dim=1).flatten(0, 1) for part in zip(*parts, strict=True))
        predicted = backbone.predict(scheduler.add_noise(latents, noise, t), t, embeddings)
        target = noise if backbone.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, t)
        count = len(lessons)
        losses = [F.mse_loss(predicted[i::count].float(), target[i::count].float()) for i in range(count)]
        self.log_dict({each(i, "lora/loss", count): loss for i, loss in enumerate(losses)})
        self.lost = torch.where(torch.isfinite(torch.stack(losses).detach()), 0, self.lost + 1)
        self.steps_done += 1
        scaled = [scaler.scale(loss) for scaler, loss in zip(self._scalers, losses, strict=True)]
        return torch.stack(scaled).sum()  # no LoRA is in another's loss

    def on_after_backward(self) -> None:
        for parameter, rows in zip(self.lora, self._rows, strict=False):  # no rows: one optimiser for all
            if parameter.grad is not None:
                for row, gradient in zip(rows, parameter.grad, strict=True):
                    row.grad = gradient
                parameter.grad = None

    def teardown(self, stage: str) -> None:
        for row in [row for rows in self._rows for row in rows]:  # which a Trainer does not know
            row.data, row.grad = row.new_empty(0), None

    def _draw(self, lesson: Lesson) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(clean latents, noise, timesteps, embeddings) of one picture, (B, ...) each."""
        draw = lesson.draw(self.global_step)
        mean, std = lesson.posterior(draw.corners)
        noise, t, normal = (self._sent(part) for part in (draw.noise, draw.timesteps, draw.posterior))
        latents = mean + std * normal
        return latents, noise, t, lesson.embedding.expand(len(t), -1, -1)

    def _sent(self, part: Tensor) -> Tensor:
        """On the device, without waiting for what a GPU still has to do."""
        if self.device.type == "cuda":
            return part.pin_memory().to(self.device, non_blocking=True)
        return part.to(self.device)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        adam = partial(torch.optim.AdamW, lr=self.lr, weight_decay=self.weight_decay, fused=self._fused)
        if len(self.lost) == 1:
            return adam(self.lora)
        self._scalers = own_scalers(self.trainer, len(self.lost))
        if not any(scaler.is_enabled() for scaler in self._scalers):
            return adam(self.lora)
        # each picture's part of a parameter, in the same memory
        self._rows = [[nn.Parameter(row) for row in parameter.detach()] for parameter in self.lora]
        return Separate([adam(rows) for rows in zip(*self._rows, strict=True)], self._scalers)

    @property
    def _fused(self) -> bool:
        """Fused, it leaves out by itself a step that overflowed; else the host would read whether it did."""
        return all(parameter.is_cuda for parameter in self.lora)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = dict(zip(self.names, checkpoint["state_dict"].values(), strict=True))
        checkpoint["settings"] = self.settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"lora.{i}": checkpoint["state_dict"][name] for i, name in enumerate(self.names)}
        for group in [group for state in checkpoint["optimizer_states"] for group in state["param_groups"]]:
            group["fused"] = self._fused  # the loss scaler relies on what the optimiser was made with


def check_resume(path: Path, *, settings: Mapping[str, Any], steps: int) -> None:
    """Whether a run of `steps` steps with these settings can go on from a checkpoint.

    Raises:
        UserError: missing, not a checkpoint of a LoRA, of a run with other settings (names them), or past `steps`.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved, done = checkpoint["settings"], checkpoint["global_step"]
    except FileNotFoundError:
        raise UserError(f"lora.resume is {str(path)!r}: no such file; give a last.ckpt") from None
    except Exception as error:  # torch raises whatever zip, pickle and the file system do
        raise UserError(f"lora.resume is {str(path)!r}: it can't be read as a checkpoint of a LoRA") from error
    other = [
        f"{key} ({saved.get(key)} then, {value} now)" for key, value in settings.items() if saved.get(key) != value
    ]
    if other:
        raise UserError(f"lora.resume: {path} is from a run with another {', '.join(other)}")
    if done > steps:
        raise UserError(f"lora.resume: {path} is at step {done} already, lora.steps is {steps}")
