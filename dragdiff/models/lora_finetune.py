"""`LoRAFinetune`: the identity-preserving fine-tune of one image (DragDiffusion, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dragdiff.backbones.diffusion import Condition, Diffusion, joined, rows_of
from dragdiff.errors import UserError
from dragdiff.models.separate import Separate
from dragdiff.models.trainer import of_run
from dragdiff.modules.images import to_tensor
from dragdiff.reading import NotAFile, check_file

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
    model: Diffusion, image: np.ndarray, *, resolution: int, encode_each: bool
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
    pixels = to_tensor(np.asarray(picture)).to(model.device)
    side = model.latent_size(resolution, resolution)
    if encode_each and size[0] != size[1]:

        def encoded(corners: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            batch = [pixels[:, :, top : top + resolution, left : left + resolution] for top, left in corners]
            with torch.no_grad():
                return model.encode(torch.cat(batch))

        return encoded, (model.latent_channels, *side), (size[0] - resolution, size[1] - resolution)

    with torch.no_grad():
        mean, std = model.encode(pixels)

    def cut(latent: Tensor, corners: list[tuple[int, int]]) -> Tensor:
        return torch.cat([latent[:, :, top : top + side[0], left : left + side[1]] for top, left in corners])

    slack = (mean.shape[2] - side[0], mean.shape[3] - side[1])
    return lambda corners: (cut(mean, corners), cut(std, corners)), (mean.shape[1], *side), slack


@dataclass(frozen=True)
class TrainingPicture:
    """A picture that a LoRA learns.

    Attributes:
        posterior: latent posterior (mean, std), each (B, C, h, w), of the picture's crops at the given corners.
        condition: of its prompt, one row.
        draw: the random numbers of a step.
    """

    posterior: Posterior
    condition: Condition
    draw: Draw

    @property
    def is_finite(self) -> bool:
        """Whether the latent of the picture's first crop is."""
        return all(bool(torch.isfinite(part).all()) for part in self.posterior([(0, 0)]))


class LoRAFinetune(L.LightningModule):
    """Trains LoRA layers that are in a model's network, one for each picture of a batch; owns nothing else.

    Attributes:
        steps_done: in this run, which may have been resumed.
        lost: (P,) how many of the last of them had a loss that was not finite, of each picture.
    """

    lost: Tensor

    def __init__(
        self,
        model: Diffusion,
        weights: Sequence[Mapping[str, nn.Parameter]],
        pictures: Sequence[TrainingPicture],
        *,
        lr: float,
        weight_decay: float,
        scheduler: Any,
        scaling: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            model: with the LoRA layers in its network (`modules.lora.trainable`).
            weights: what is trained of each picture.
            pictures: one for each picture; row r of a batch is of picture r % their number.
            scheduler: diffusers scheduler that adds noise and knows the velocity.
            scaling: whether losses are scaled (fp16).
            settings: plain values that a checkpoint is good for; kept in it, see `check_resume`.
        """
        super().__init__()
        self._frozen = (model, pictures, scheduler)  # in a tuple: no submodules, no part of checkpoints
        self.lr, self.weight_decay, self.scaling, self.settings = lr, weight_decay, scaling, dict(settings or {})
        self.names = list(weights[0])
        self.lora = nn.ParameterList(parameter for own in weights for parameter in own.values())
        self.steps_done = 0
        self.register_buffer("lost", torch.zeros(len(pictures), dtype=torch.int64), persistent=False)

    def training_step(self, _: int) -> Tensor:
        model, pictures, scheduler = self._frozen
        parts = [self._draw(picture) for picture in pictures]
        latents, noise, t = (torch.stack(part, dim=1).flatten(0, 1) for part in zip(*parts, strict=True))
        count, batch = len(pictures), len(parts[0][0])
        condition = rows_of(joined([picture.condition for picture in pictures]), list(range(count)) * batch)
        predicted = model.predict(scheduler.add_noise(latents, noise, t), t, condition)
        target = noise if model.prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, t)
        losses = {i: F.mse_loss(predicted[i::count].float(), target[i::count].float()) for i in range(count)}
        self.log_dict({of_run(i, "lora/loss", count): loss for i, loss in losses.items()})
        self.lost = torch.where(torch.isfinite(torch.stack(list(losses.values())).detach()), 0, self.lost + 1)
        self.steps_done += 1
        # no LoRA is in another's loss
        return self._optimizer.scaled(losses) if self._optimizer else losses[0]

    def _draw(self, picture: TrainingPicture) -> tuple[Tensor, Tensor, Tensor]:
        """(clean latents, noise, timesteps) of one picture, (B, ...) each."""
        draw = picture.draw(self.global_step)
        mean, std = picture.posterior(draw.corners)
        noise, t, normal = (part.to(self.device) for part in (draw.noise, draw.timesteps, draw.posterior))
        return mean + std * normal, noise, t

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters, own = list(self.lora), len(self.names)
        adams = [
            torch.optim.AdamW(parameters[start : start + own], lr=self.lr, weight_decay=self.weight_decay)
            for start in range(0, len(parameters), own)
        ]
        self._optimizer = Separate(adams, scaling=self.scaling) if len(adams) > 1 else None
        return self._optimizer or adams[0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = dict(zip(self.names, checkpoint["state_dict"].values(), strict=True))
        checkpoint["settings"] = self.settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"lora.{i}": checkpoint["state_dict"][name] for i, name in enumerate(self.names)}


def check_resume(path: Path, *, settings: Mapping[str, Any], steps: int) -> None:
    """Whether a run of `steps` steps with these settings can go on from a checkpoint.

    Raises:
        UserError: missing, not a checkpoint of a LoRA, of a run with other settings (names them), or past `steps`.
    """
    try:
        check_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved, done = checkpoint["settings"], checkpoint["global_step"]
    except FileNotFoundError:
        raise UserError(f"lora.resume is {str(path)!r}: no such file; give a last.ckpt") from None
    except NotAFile as error:
        raise UserError(f"lora.resume is {str(path)!r}: {error.strerror}; give a last.ckpt") from None
    except Exception as error:  # torch raises whatever zip, pickle and the file system do
        raise UserError(f"lora.resume is {str(path)!r}: it can't be read as a checkpoint of a LoRA") from error
    other = [
        f"{key} ({saved.get(key)} then, {value} now)" for key, value in settings.items() if saved.get(key) != value
    ]
    if other:
        raise UserError(f"lora.resume: {path} is from a run with another {', '.join(other)}")
    if done > steps:
        raise UserError(f"lora.resume: {path} is at step {done} already, lora.steps is {steps}")
