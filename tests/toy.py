"""A stand-in for a UNet that recorded runs of whole methods were made with: a few matrices over channels.

A case's weights are W, V (C, c) and U (C, D) for c latent channels, C feature channels and D embedding channels,
`emb` (1, T, D), and perhaps `gain`; where there is a mid block also A (m, c), B (C, m) and Cm (c, m). Latents are
(B, c, h, w), embeddings (1 or B, T, D), and mid block outputs (B, m, h // 2, w // 2).
"""

from collections.abc import Mapping
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

from dragdiff.backbones.diffusion import Condition, Diffusion
from dragdiff.modules import ddim
from dragdiff.modules.features import FeatureMap
from dragdiff.modules.points import Size

Weights = dict[str, Tensor]

NAMES = ("W", "V", "U", "emb", "gain", "A", "B", "Cm")


def weights(cases: Mapping[str, np.ndarray], case: str, device: str | torch.device = "cpu") -> Weights:
    """Those of one recorded run, whose keys begin with `run:<case>:`."""
    keys = {name: f"run:{case}:{name}" for name in NAMES}
    return {name: torch.from_numpy(cases[key]).to(device) for name, key in keys.items() if key in cases}


def _mix(matrix: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("oc,bchw->bohw", matrix, values)


def mid_block(weights: Weights, latent: Tensor) -> Tensor:
    """What stands for the output of the UNet's mid block, at half the latent's size."""
    return torch.tanh(_mix(weights["A"], F.avg_pool2d(latent, 2)))


def raw_features(weights: Weights, latent: Tensor, condition: Tensor, *, mid: Tensor | None = None) -> Tensor:
    """(B, C, h, w), before any resizing; `mid` replaces the mid block's output."""
    inner = _mix(weights["W"], latent) + _mix(weights["V"], latent.roll(1, dims=-1))
    inner = inner + (condition.mean(dim=1) @ weights["U"].T)[:, :, None, None]
    if "B" in weights:
        inner = inner + _mix(weights["B"], _upwards(weights, latent, mid))
    return weights.get("gain", torch.ones(())) * torch.tanh(inner)


def noise(weights: Weights, latent: Tensor, t: Tensor | int, condition: Tensor, *, mid: Tensor | None = None) -> Tensor:
    """The model's output, of the latent's shape: the noise (epsilon) that it sees."""
    seen = torch.tanh(0.7 * latent) + 0.1 * latent.flip(-1) + 1e-4 * t + 0.05 * condition.mean()
    return seen + 0.2 * _mix(weights["Cm"], _upwards(weights, latent, mid)) if "Cm" in weights else seen


def _upwards(weights: Weights, latent: Tensor, mid: Tensor | None) -> Tensor:
    return F.interpolate(mid_block(weights, latent) if mid is None else mid, latent.shape[-2:], mode="nearest")


def features(weights: Weights, latent: Tensor, condition: Tensor, *, grid: Size, mid: Tensor | None = None):
    """The features as a drag sees them, of a batch of one, on a grid of (rows, cols)."""
    return FeatureMap([raw_features(weights, latent, condition, mid=mid)], grid)


def schedule(steps: int = 50) -> DDIMScheduler:
    """That of Stable Diffusion 1, with its timesteps set: 981, 961, ..., 1."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def step_down(scheduler: DDIMScheduler, latent: Tensor, output: Tensor, *, index: int) -> Tensor:
    """The latent one level below `scheduler.timesteps[index]`."""
    return ddim.move(
        latent,
        output,
        alpha=scheduler.alphas_cumprod[int(scheduler.timesteps[index])],
        alpha_to=ddim.alpha_before(scheduler, index),
        prediction_type="epsilon",
    )


class Network(nn.Module):
    """The stand-in as a module, with the two points that hooks may be set on."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights, self.mid, self.features = weights, nn.Identity(), nn.Identity()

    def forward(self, latents: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        mid = self.mid(mid_block(self.weights, latents)) if "A" in self.weights else None
        self.features(raw_features(self.weights, latents, condition, mid=mid))
        return noise(self.weights, latents, t, condition, mid=mid)


class Toy(Diffusion):
    """The stand-in as a model: whole methods run on it. Its pictures are black, whatever is decoded.

    Attributes:
        decoded: the latents that were to be decoded.
    """

    name, prediction_type, latent_stride, latent_channels = "toy", "epsilon", 8, 4
    feature_strides, bottleneck = {"mid": 2, "features": 1}, "mid"
    lora_targets, self_attention_layers = (), ()

    def __init__(self, weights: Weights) -> None:
        self.network = Network(weights)
        self.modules, self.conditioners, self.device = (self.network,), (), weights["W"].device
        self.decoded: list[Tensor] = []

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        latents = torch.zeros(len(images), 4, *self.latent_size(*images.shape[2:]), device=self.device)
        return latents, latents

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents)
        return torch.zeros(len(latents), 3, *(8 * side for side in latents.shape[2:]), device=self.device)

    def tokenize(self, prompts):
        return torch.zeros(len(prompts), 1, dtype=torch.int64)

    def condition(self, prompts) -> Condition:
        return {"condition": self.network.weights["emb"].repeat(len(prompts), 1, 1)}

    def predict(self, latents: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.network(latents, t, condition["condition"])

    def feature_block(self, name: str) -> nn.Module:
        return self.network.get_submodule(name)

    def scheduler(self, steps: int, kind: str = "ddim"):
        return schedule(steps)

    def recorded_attention(self, layers):
        return nullcontext({})

    def shared_attention(self, layers, states, *, where=None):
        return nullcontext()

    def saving_memory(self):
        return nullcontext()

    def compiled(self):
        return nullcontext()

    def sharpened(self, settings):
        return nullcontext()
