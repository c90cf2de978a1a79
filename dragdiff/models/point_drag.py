"""`PointDrag`: the optimisation that moves the content under handles to their targets (DragDiffusion, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import lightning as L
import torch
from torch import Tensor

from dragdiff.callbacks.base import DragCallback
from dragdiff.models.separate import Separate
from dragdiff.models.trainer import of_run
from dragdiff.models.variables import Variable
from dragdiff.modules import ddim, motion
from dragdiff.modules.features import FeatureMap
from dragdiff.modules.points import Points

# latents (B, C, h, w), the numbers of their edits, whether the network's output is needed
# -> (output (B, C, h, w) or None, each one's features)
Forward = Callable[[Tensor, Sequence[int], bool], tuple[Tensor | None, Sequence[FeatureMap]]]


@dataclass(frozen=True)
class MaskTerm:
    """What the mask term needs.

    Attributes:
        keep: (1, 1, h, w), 1 where nothing may change.
        weight: lambda.
        alpha, alpha_below: cumulative alpha at the drag's level and one step below it.
        prediction_type: "epsilon" or "v_prediction".
        initial: the source's latent one step below, (1, C, h, w); None = that of the drag's own first forward.
    """

    keep: Tensor
    weight: float
    alpha: Tensor
    alpha_below: Tensor
    prediction_type: str
    initial: Tensor | None = None


@dataclass(eq=False)
class Drag:
    """The drag of one edit at one level.

    Attributes:
        points: moved by the tracking callback.
        steps: updates at most.
        callbacks: the `DragCallback`s among them see the features of this drag, in this order.
        first: updates of this edit before it, at other levels.
        reference: features of the unedited latent; None = those of the first forward.
        value: what is optimised, (1, ...).
        templates: (N, C), the reference's features at the initial handles.
        steps_done: updates.
        stop_reason: "" while it runs, then "reached", "steps", or what else ended it in words.
        values: of the step at hand, logged at its end.
    """

    points: Points
    supervision: motion.Supervision
    radius: int
    stop_distance: float
    lr: float
    steps: int
    mask: MaskTerm | None = None
    callbacks: Sequence[L.Callback] = ()
    first: int = 0
    reference: FeatureMap | None = None
    value: Tensor = field(init=False, repr=False)
    templates: Tensor = field(init=False, repr=False)
    steps_done: int = 0
    stop_reason: str = ""
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Updates of the edit up to now, over all levels."""
        return self.first + self.steps_done

    def stop(self, reason: str) -> None:
        """End it here; a step that has not updated yet leaves everything as it is.

        Args:
            reason: "reached", or a sentence for the user.
        """
        self.stop_reason = reason

    def log(self, name: str, value: Tensor) -> None:
        """Log a scalar of this step."""
        self.values[name] = value.detach()

    def see(self, features: FeatureMap) -> None:
        """Take the first features as reference, where none was given."""
        if self.steps_done == 0:
            self.reference = self.reference or features.detach()
            self.templates = self.reference.at(self.points.initial)

    def loss(self, latent: Tensor, output: Tensor | None, features: FeatureMap) -> Tensor:
        """Motion supervision and mask term.

        Args:
            latent, output: (1, C, h, w); no output without a mask.
        """
        motion_loss = self.supervision(
            features,
            reference=self.reference,
            handles=self.points.handles,
            initial=self.points.initial,
            targets=self.points.targets,
            radius=self.radius,
            stop_distance=self.stop_distance,
        )
        mask_loss = torch.zeros_like(motion_loss)
        if self.mask is not None:
            assert output is not None
            mask_loss = self.mask.weight * self._mask_loss(latent, output, self.mask)
        loss = motion_loss + mask_loss
        for name, value in (("loss", loss), ("motion", motion_loss), ("mask", mask_loss)):
            self.log(f"drag/{name}", value)
        return loss

    def _mask_loss(self, latent: Tensor, output: Tensor, mask: MaskTerm) -> Tensor:
        below = ddim.move(
            latent,
            output,
            alpha=mask.alpha,
            alpha_to=mask.alpha_below,
            prediction_type=mask.prediction_type,
        )
        if self._initial_below is None:
            # from the same forward: under an L1 norm a rounding difference would become a gradient of full size
            self._initial_below = below.detach() if mask.initial is None else mask.initial
        return motion.mask_term(below, self._initial_below, keep=mask.keep)

    _initial_below: Tensor | None = None


class PointDrag(L.LightningModule):
    """Moves the content under the handles to the targets.

    Several edits share each forward; one that has arrived leaves the batch. None sees another's rows. With `scaling`
    (fp16) losses are scaled.
    """

    def __init__(self, forward: Forward, variable: Variable, drags: Sequence[Drag], *, scaling: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False  # a step may end without an update
        self.probe, self.variable, self.drags, self.scaling = forward, variable, drags, scaling
        for drag, value in zip(drags, variable.values, strict=True):
            drag.value = value
            drag.stop_reason = "" if drag.steps > 0 else "steps"

    def training_step(self, step: int) -> None:
        running = [number for number, drag in enumerate(self.drags) if not drag.stop_reason]
        for number in running:
            with self.variable.applied([number]):
                self._tell(self.drags[number], "on_latent", self.variable.latents([number]).detach())
        latents = self.variable.latents(running)
        need_output = any(self.drags[number].mask is not None for number in running)
        with self.variable.applied(running):
            output, features = self.probe(latents, running, need_output)
        losses: dict[int, Tensor] = {}
        for row, number in enumerate(running):
            drag = self.drags[number]
            drag.see(features[row])
            self._tell(drag, "on_features", features[row])
            if not drag.stop_reason:
                own = slice(row, row + 1)
                losses[number] = drag.loss(latents[own], None if output is None else output[own], features[row])
        self._update(losses)
        for row, number in enumerate(running):
            if number in losses:
                self._tell(self.drags[number], "on_update", features[row])
            if self.drags[number].steps_done == self.drags[number].steps:
                self.drags[number].stop_reason = self.drags[number].stop_reason or "steps"
        self._log(running)
        if all(drag.stop_reason for drag in self.drags):
            self.trainer.should_stop = True

    def _tell(self, drag: Drag, hook: str, seen: Tensor | FeatureMap) -> None:
        for callback in drag.callbacks:
            if isinstance(callback, DragCallback):
                getattr(callback, hook)(self.trainer, drag, seen)

    def _update(self, losses: dict[int, Tensor]) -> None:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        pulled = {number: loss for number, loss in losses.items() if loss.requires_grad}
        before = {number: self.drags[number].value.detach().clone() for number in losses}
        if pulled:  # a supervision may have nothing to pull
            self.manual_backward(self._optimizer.scaled(pulled))
            for number, drag in enumerate(self.drags):
                if number not in pulled:
                    drag.value.grad = None  # else Adam's memory of earlier steps would move it on
            optimizer.step()
        for number, loss in losses.items():
            drag = self.drags[number]
            # a comparison with NaN is false
            if not (bool(torch.isfinite(loss)) and float(drag.value.detach().abs().max()) < self.variable.limit):
                drag.stop(
                    f"diverged at step {drag.step + 1} (loss {float(loss):.3g}); "
                    "kept the latent before it: lower drag.lr"
                )
                drag.value.data.copy_(before[number])
            else:
                drag.steps_done += 1

    def _log(self, drags: Sequence[int]) -> None:
        """Tell loggers and callbacks a step's values; steps count on from level to level.

        Not by `self.log`, which takes half a millisecond for each of them.
        """
        values: dict[str, float] = {}
        for number in drags:
            drag, count = self.drags[number], len(self.drags)
            values |= {of_run(number, name, count): float(value) for name, value in drag.values.items()}
            drag.values = {}
        step = self.drags[drags[0]].first + self.trainer.fit_loop.batch_idx if drags else 0
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, step)
            logger.save()
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        adams = [torch.optim.Adam([drag.value], lr=drag.lr) for drag in self.drags]
        self._optimizer = Separate(adams, scaling=self.scaling)
        return self._optimizer
