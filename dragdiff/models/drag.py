"""`LatentDrag`: the optimisation of one latent (DragDiffusion, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn

from dragdiff.callbacks.base import DragCallback
from dragdiff.modules import ddim, motion
from dragdiff.modules.features import FeatureMap

# latent (1, C, h, w), whether the network's output is needed -> (output or None, features)
Probe = Callable[[Tensor, bool], tuple[Tensor | None, FeatureMap]]

DIVERGED = 1000.0  # latents have entries of some units, with strong guidance of some tens


@dataclass(frozen=True)
class MaskTerm:
    """What the mask term needs.

    Attributes:
        keep: (1, 1, h, w), 1 where nothing may change.
        weight: lambda.
        alpha: cumulative alpha at the drag's timestep.
        alpha_before: cumulative alpha one step below it.
        prediction_type: "epsilon" or "v_prediction".
    """

    keep: Tensor
    weight: float
    alpha: Tensor
    alpha_before: Tensor
    prediction_type: str


class LatentDrag(L.LightningModule):
    """Moves the content under the handles to the targets; the latent is its only parameter.

    Attributes:
        latent: (1, C, h, w), what is optimised.
        handles: (N, 2) where the handles are now, (row, col) in grid px; moved by the tracking callback.
        initial_handles, targets: (N, 2), likewise.
        templates: (N, C), features at the initial handles, from the first forward.
        stop_reason: "" while running, then "reached", "steps" or a sentence about divergence.
    """

    templates: Tensor

    def __init__(
        self,
        probe: Probe,
        *,
        latent: Tensor,
        handles: Tensor,
        targets: Tensor,
        supervision: motion.Supervision,
        radius: int,
        stop_distance: float,
        lr: float,
        mask: MaskTerm | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step may end without an update
        self.probe, self.supervision, self.mask = probe, supervision, mask
        self.latent = nn.Parameter(latent.detach().clone())
        self.initial_handles, self.handles, self.targets = handles.clone(), handles.clone(), targets.clone()
        self.radius, self.stop_distance, self.lr = radius, stop_distance, lr
        self.steps_done = 0
        self.stop_reason = ""
        self._initial_previous: Tensor | None = None

    def stop(self, reason: str) -> None:
        """Request the end; a step that has not updated the latent yet leaves it as it is."""
        self.stop_reason = reason
        self.trainer.should_stop = True

    def training_step(self, step: int) -> None:
        output, features = self.probe(self.latent, self.mask is not None)
        if step == 0:
            self.templates = features.at(self.initial_handles).detach()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, DragCallback):
                callback.on_features(self.trainer, self, features)
        if self.trainer.should_stop:
            return

        motion_loss = self.supervision(
            features,
            handles=self.handles,
            targets=self.targets,
            radius=self.radius,
            stop_distance=self.stop_distance,
        )
        mask_loss = torch.zeros_like(motion_loss)
        if self.mask is not None:
            assert output is not None
            mask_loss = self.mask.weight * self._mask_loss(output, self.mask)
        loss = motion_loss + mask_loss
        self.log_dict({"drag/loss": loss, "drag/motion": motion_loss, "drag/mask": mask_loss})
        self._update(loss, step)

    def _mask_loss(self, output: Tensor, mask: MaskTerm) -> Tensor:
        previous = ddim.move(
            self.latent,
            output,
            alpha=mask.alpha,
            alpha_to=mask.alpha_before,
            prediction_type=mask.prediction_type,
        )
        if self._initial_previous is None:
            # from the same forward: under an L1 norm a rounding difference would become a gradient of full size
            self._initial_previous = previous.detach()
        return motion.mask_term(previous, self._initial_previous, keep=mask.keep)

    def _update(self, loss: Tensor, step: int) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, L.pytorch.core.optimizer.LightningOptimizer)
        before = self.latent.detach().clone()
        optimizer.zero_grad()
        if loss.requires_grad:  # not when every handle is an anchor and there is no mask
            self.manual_backward(loss)
            optimizer.step()
        if not (torch.isfinite(loss) and torch.isfinite(self.latent).all() and self.latent.abs().max() < DIVERGED):
            with torch.no_grad():
                self.latent.copy_(before)
            self.stop(f"diverged at step {step + 1} (loss {loss.item():.3g}); kept the latent before it: lower drag.lr")
            return
        self.steps_done = step + 1

    def on_train_end(self) -> None:
        self.stop_reason = self.stop_reason or "steps"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.latent], lr=self.lr)
