"""`LatentDrag`: the optimisation of a latent, or of several at once (DragDiffusion, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor, nn

from dragdiff.callbacks.base import DragCallback
from dragdiff.models.trainer import each
from dragdiff.modules import ddim, motion
from dragdiff.modules.features import FeatureMap

# latents (B, C, h, w), the numbers of their drags, whether the network's output is needed
# -> (output (B, C, h, w) or None, each one's features)
Probe = Callable[[Tensor, Sequence[int], bool], tuple[Tensor | None, Sequence[FeatureMap]]]

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


class Drag(nn.Module):
    """One latent on its way, and what moves it.

    Attributes:
        latent: (1, C, h, w), what is optimised.
        handles: (N, 2) where the handles are now, (row, col) in grid px; moved by the tracking callback.
        initial_handles, targets: (N, 2), likewise.
        templates: (N, C), features at the initial handles, from the first forward.
        steps_done: updates of the latent.
        stop_reason: "" while running, then "reached", "steps" or a sentence about divergence.
        values: what is logged of this step.
    """

    templates: Tensor

    def __init__(
        self,
        *,
        latent: Tensor,
        handles: Tensor,
        targets: Tensor,
        supervision: motion.Supervision,
        radius: int,
        stop_distance: float,
        lr: float,
        steps: int,
        mask: MaskTerm | None,
        callbacks: Sequence[L.Callback] = (),
    ) -> None:
        """
        Args:
            steps: updates at most.
            callbacks: the `DragCallback`s among them see the features of this drag, in this order.
        """
        super().__init__()
        self.supervision, self.mask, self.callbacks = supervision, mask, callbacks
        self.latent = nn.Parameter(latent.detach().clone())
        self.initial_handles, self.targets = handles.to(latent.device), targets.to(latent.device)
        self.handles = self.initial_handles.clone()
        self.radius, self.stop_distance, self.lr, self.steps = radius, stop_distance, lr, steps
        self.steps_done = 0
        self.stop_reason = "" if steps > 0 else "steps"
        self.values: dict[str, Tensor | float] = {}
        self._initial_previous: Tensor | None = None
        self._before: Tensor | None = None

    def stop(self, reason: str) -> None:
        """Request the end; a step that has not updated the latent yet leaves it as it is."""
        self.stop_reason = reason

    def log(self, name: str, value: Tensor | float) -> None:
        """Log a value of this step, e.g. from a callback."""
        self.values[name] = value

    def begin(self, trainer: L.Trainer) -> None:
        """Show the latent of the step to come to the callbacks."""
        for callback in self.callbacks:
            if isinstance(callback, DragCallback):
                callback.on_latent(trainer, self)

    def look(self, trainer: L.Trainer, features: FeatureMap) -> None:
        """Show a step's features to the callbacks, the tracker among them."""
        self.values = {}
        if self.steps_done == 0:
            self.templates = features.at(self.initial_handles).detach()
        for callback in self.callbacks:
            if isinstance(callback, DragCallback):
                callback.on_features(trainer, self, features)

    def loss(self, output: Tensor | None, features: FeatureMap) -> Tensor:
        """Motion supervision and mask term; output (1, C, h, w), None without a mask."""
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
        self.values |= {"drag/loss": loss, "drag/motion": motion_loss, "drag/mask": mask_loss}
        self._before = self.latent.detach().clone()
        return loss

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

    def updated(self) -> None:
        """Count an update of the latent, or take it back where it diverged."""
        loss = self.values["drag/loss"]
        assert isinstance(loss, Tensor) and self._before is not None
        if torch.isfinite(loss) and torch.isfinite(self.latent).all() and self.latent.abs().max() < DIVERGED:
            self.steps_done += 1
            if self.steps_done == self.steps:
                self.stop("steps")
            return
        with torch.no_grad():
            self.latent.copy_(self._before)
        self.stop(
            f"diverged at step {self.steps_done + 1} (loss {loss.item():.3g}); kept the latent before it: lower drag.lr"
        )


class LatentDrag(L.LightningModule):
    """Moves the content under the handles to the targets; latents are its only parameters.

    Several drags share each forward; one that has arrived leaves the batch. No drag sees another's rows.
    """

    def __init__(self, probe: Probe, drags: Sequence[Drag]) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step may end without an update
        self.probe = probe
        self.drags: Sequence[Drag] = nn.ModuleList(drags)  # type: ignore[assignment]

    def training_step(self, _: int) -> None:
        running = [number for number, drag in enumerate(self.drags) if not drag.stop_reason]
        drags = [self.drags[number] for number in running]
        for drag in drags:
            drag.begin(self.trainer)
        need_output = any(drag.mask is not None for drag in drags)
        output, features = self.probe(torch.cat([drag.latent for drag in drags]), running, need_output)
        losses = []
        for row, drag in enumerate(drags):
            drag.look(self.trainer, features[row])
            if not drag.stop_reason:
                losses.append(drag.loss(None if output is None else output[row : row + 1], features[row]))
        moving = [drag for drag in drags if not drag.stop_reason]
        self._log(running)
        if losses:
            self._update(torch.stack(losses).sum() if len(losses) > 1 else losses[0], moving)
        if all(drag.stop_reason for drag in self.drags):
            self.trainer.should_stop = True

    def _update(self, loss: Tensor, drags: Sequence[Drag]) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, L.pytorch.core.optimizer.LightningOptimizer)
        optimizer.zero_grad()
        if loss.requires_grad:  # not when every handle is an anchor and there is no mask
            self.manual_backward(loss)
            for drag in self.drags:
                if drag not in drags:
                    drag.latent.grad = None  # else Adam's memory of earlier steps would move it on
            optimizer.step()
        for drag in drags:
            drag.updated()

    def _log(self, running: Sequence[int]) -> None:
        for number in running:
            values = self.drags[number].values
            self.log_dict({each(number, name, len(self.drags)): value for name, value in values.items()})

    def on_train_end(self) -> None:
        for drag in self.drags:
            drag.stop(drag.stop_reason or "steps")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": [drag.latent], "lr": drag.lr} for drag in self.drags])
