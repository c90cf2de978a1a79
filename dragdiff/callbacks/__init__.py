"""Lightning callbacks: point tracking, which acts, and observers, which only watch."""

from dragdiff.callbacks.base import DragCallback
from dragdiff.callbacks.observers import Frames, Progress, Spectator, Trajectory, Watch
from dragdiff.callbacks.tracking import PointTracking

__all__ = ["DragCallback", "Frames", "PointTracking", "Progress", "Spectator", "Trajectory", "Watch"]
