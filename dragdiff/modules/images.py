"""Pictures as arrays and as tensors."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [-1, 1]."""
    return rearrange(torch.from_numpy(np.array(image)).float() / 127.5 - 1, "h w c -> 1 c h w")


def to_uint8(images: Tensor) -> np.ndarray:
    """(1, 3, H, W) in [0, 1] -> (H, W, 3) uint8, cut off, not rounded, as the reference does."""
    return (rearrange(images[0], "c h w -> h w c").clamp(0, 1) * 255).to(torch.uint8).cpu().numpy()
