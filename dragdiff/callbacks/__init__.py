"""Lightning callbacks: point tracking, which acts, and observers, which only watch."""

from dragdiff.callbacks.base import DragCallback
from dragdiff.callbacks.observers import DragProgress, Frames, LoRAProgress, Trajectory, Watch
from dragdiff.callbacks.point_tracking import PeriodicTracking, PointTracking

__all__ = [
    "DragCallback",
    "DragProgress",
    "Frames",
    "LoRAProgress",
    "PeriodicTracking",
    "PointTracking",
    "Trajectory",
    "Watch",
]
