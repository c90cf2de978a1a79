"""`LatentDrag`: the optimisation of a latent, or of several at once (DragDiffusion, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import lightning as L
import torch
from torch import Tensor, nn

from dragdiff.callbacks.base import DragCallback
from dragdiff.models.separate import Separate, own_scalers
from dragdiff.models.trainer import each
from dragdiff.modules import ddim, motion
from dragdiff.modules.features import FeatureMap

# latents (B, C, h, w), the numbers of their drags, whether the network's output is needed
# -> (output (B, C, h, w) or None, each one's features)
Probe = Callable[[Tensor, Sequence[int], bool], tuple[Tensor | None, Sequence[FeatureMap]]]

TOO_LARGE = 1000.0  # latents have entries of some units, with strong guidance of some tens
LOOK_EVERY = 8  # steps between the host's looks at a device that works while the host goes on
_DIVERGED = "diverged"


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


@dataclass(frozen=True)
class _Part:
    """What a step's tracking, or its update, has found; scalars that stay on the device until the host looks.

    Attributes:
        step: updates of the latent before it.
        values: logged.
        stops: reasons to end here, and whether they hold.
    """

    step: int
    values: dict[str, Tensor | float] = field(default_factory=dict)
    stops: dict[str, Tensor | float] = field(default_factory=dict)


class Drag(nn.Module):
    """One latent on its way, and what moves it.

    The host may queue steps without knowing whether the device has found that the drag has ended: from its end on, by
    `ended`, latent and handles stay as they are, and the host's next look drops what was counted and kept since.

    Attributes:
        latent: (1, C, h, w), what is optimised.
        handles: (N, 2) where the handles are now, (row, col) in grid px; moved by the tracking callback.
        initial_handles, targets: (N, 2), likewise; all on the latent's device.
        templates: (N, C), features at the initial handles, from the first forward.
        ended: scalar bool on the device.
        looking: whether the host may read from the device in this step.
        seen: steps whose features the callbacks have seen.
        steps_done: updates of the latent.
        stop_reason: "" while running, then "reached", "steps" or a sentence about divergence.
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
        self.ended = torch.zeros((), dtype=torch.bool, device=latent.device)
        self.looking = True
        self.seen = self.steps_done = 0
        self.stop_reason = "" if steps > 0 else "steps"
        self._unseen: list[_Part] = []
        self._initial_previous: Tensor | None = None
        self._before: Tensor | None = None

    def stop(self, reason: str, when: Tensor | None = None) -> None:
        """Request the end; a step that has not updated the latent yet leaves it as it is.

        Args:
            when: a scalar bool on the latent's device, whether to end; None: yes.
        """
        if when is None:
            self.stop_reason = reason
            return
        self.ended = self.ended | when
        self._unseen[-1].stops[reason] = when
        if self.looking and bool(when):
            self.stop_reason = reason

    def log(self, name: str, value: Tensor | float) -> None:
        """Log a value of this step, e.g. from a callback; a scalar tensor is read when the host looks."""
        if isinstance(value, Tensor):
            value = value.detach().to(self.latent.device, torch.float32).squeeze()
        self._unseen[-1].values[name] = value

    def watched(self) -> bool:
        """Whether somebody wants to know this step's state, or it is the last."""
        return self.steps_done + 1 == self.steps or any(
            callback.reads(self) if isinstance(callback, DragCallback) else True for callback in self.callbacks
        )

    def begin(self, trainer: L.Trainer, *, looking: bool) -> None:
        """Show the latent of the step to come to the callbacks."""
        self.looking = looking
        self._unseen.append(_Part(self.steps_done))
        for callback in self.callbacks:
            if isinstance(callback, DragCallback):
                callback.on_latent(trainer, self)

    def look(self, trainer: L.Trainer, features: FeatureMap) -> None:
        """Show a step's features to the callbacks, the tracker among them."""
        self.seen += 1
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
        self._unseen.append(_Part(self.steps_done))
        for name, value in (("loss", loss), ("motion", motion_loss), ("mask", mask_loss)):
            self.log(f"drag/{name}", value)
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

    @torch.no_grad()
    def updated(self) -> None:
        """Count an update of the latent; it is taken back where it diverged, and where the drag had ended before."""
        loss = self._unseen[-1].values["drag/loss"]
        assert isinstance(loss, Tensor) and self._before is not None
        fine = torch.isfinite(loss) & (self.latent.abs().max() < TOO_LARGE)  # a comparison with NaN is false
        self.stop(_DIVERGED, when=~fine)
        self.latent.copy_(torch.where(self.ended, self._before, self.latent))
        self.steps_done += 1

    def unseen(self) -> list[dict[str, Tensor | float]]:
        """Where the scalars are that the host does not know yet; it puts numbers in place of them, then `learn`s."""
        return [numbers for part in self._unseen for numbers in (part.values, part.stops)]

    def learn(self) -> dict[int, dict[str, float]]:
        """Find out whether the drag has ended; what each step since the last look has to log, by the step's number."""
        logged: dict[int, dict[str, float]] = {}
        for part in self._unseen:
            logged.setdefault(part.step, {}).update({name: float(value) for name, value in part.values.items()})
            reasons = [reason for reason, holds in part.stops.items() if holds]
            if reasons:
                self.stop_reason, self.steps_done, self.seen = reasons[-1], part.step, part.step + 1
                break
        if self.stop_reason == _DIVERGED:
            self.stop(
                f"diverged at step {self.steps_done + 1} (loss {logged[self.steps_done]['drag/loss']:.3g}); "
                "kept the latent before it: lower drag.lr"
            )
        elif self.steps_done == self.steps:
            self.stop(self.stop_reason or "steps")
        self._unseen.clear()
        return logged


class LatentDrag(L.LightningModule):
    """Moves the content under the handles to the targets; latents are its only parameters.

    Several drags share each forward; one that has arrived leaves the batch. No drag sees another's rows.

    Attributes:
        looking: whether the host knows all at the end of this step. Between these steps it reads nothing from the
            device and makes it wait for nothing.
    """

    def __init__(self, probe: Probe, drags: Sequence[Drag], *, look_every: int) -> None:
        """
        Args:
            look_every: steps from one look to the next; up to so many are computed for nothing after a drag's end. What
                a drag comes to does not depend on it. A callback that `reads` makes the host look more often.
        """
        super().__init__()
        self.automatic_optimization = False  # a step may end without an update
        self.probe, self.look_every, self.looking = probe, look_every, True
        self.drags: Sequence[Drag] = nn.ModuleList(drags)  # type: ignore[assignment]

    def training_step(self, step: int) -> None:
        self.looking = step % self.look_every == 0 or any(drag.watched() for drag in self.drags if not drag.stop_reason)
        if self.looking:
            self._look()  # so that nobody sees a step after a drag's end
        if running := [number for number, drag in enumerate(self.drags) if not drag.stop_reason]:
            self._move(running)
        if self.looking or all(drag.stop_reason for drag in self.drags):
            self._look()
        if all(drag.stop_reason for drag in self.drags):
            self.trainer.should_stop = True

    def _move(self, running: Sequence[int]) -> None:
        drags = [self.drags[number] for number in running]
        for drag in drags:
            drag.begin(self.trainer, looking=self.looking)
        need_output = any(drag.mask is not None for drag in drags)
        output, features = self.probe(torch.cat([drag.latent for drag in drags]), running, need_output)
        losses = []
        for row, drag in enumerate(drags):
            drag.look(self.trainer, features[row])
            if not drag.stop_reason:
                loss = drag.loss(None if output is None else output[row : row + 1], features[row])
                losses.append(self._scalers[drag].scale(loss))
        moving = [drag for drag in drags if not drag.stop_reason]
        if losses:
            self._update(torch.stack(losses).sum() if len(losses) > 1 else losses[0], moving)

    def _update(self, loss: Tensor, drags: Sequence[Drag]) -> None:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        if loss.requires_grad:  # a supervision may have nothing to pull
            self.manual_backward(loss)
            for drag in self.drags:
                if drag not in drags:
                    drag.latent.grad = None  # else Adam's memory of earlier steps would move it on
            optimizer.step()
        for drag in drags:
            drag.updated()

    def _look(self) -> None:
        """Learn in one transfer what the device has found since the last look, and log it.

        Loggers and callbacks are told from here: `self.log` would have Lightning read each value in each step, and
        takes half a millisecond for each.
        """
        _to_host([numbers for drag in self.drags for numbers in drag.unseen()])
        logged: dict[int, dict[str, float]] = {}
        for number, drag in enumerate(self.drags):
            for step, values in drag.learn().items():
                named = {each(number, name, len(self.drags)): value for name, value in values.items()}
                logged.setdefault(step, {}).update(named)
        latest: dict[str, float] = {}
        for step, values in sorted(logged.items()):
            latest |= values
            for logger in self.loggers:
                logger.log_metrics({**values, "epoch": self.current_epoch}, step)
        if logged:
            self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in latest.items()})
            for logger in self.loggers:
                logger.save()

    def on_train_end(self) -> None:
        for drag in self.drags:
            drag.stop(drag.stop_reason or "steps")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        scalers = own_scalers(self.trainer, len(self.drags))
        self._scalers = dict(zip(self.drags, scalers, strict=True))
        # fused, it leaves out by itself a step that overflowed; else the loss scaler has the host read whether it did
        adams = [torch.optim.Adam([drag.latent], lr=drag.lr, fused=drag.latent.is_cuda) for drag in self.drags]
        return Separate(adams, scalers)


def _to_host(parts: Sequence[dict[str, Tensor | float]]) -> None:
    """Put numbers in the place of scalar tensors, by one transfer."""
    found = [(part, name, value) for part in parts for name, value in part.items() if isinstance(value, Tensor)]
    if found:
        numbers = torch.stack([value.float() for _, _, value in found]).tolist()
        for (part, name, _), number in zip(found, numbers, strict=True):
            part[name] = number
