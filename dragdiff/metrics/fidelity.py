"""How much of a picture an edit has kept. Doing nothing scores best: read these beside the identity baseline."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dragdiff.backbones.loading import hub_folder
from dragdiff.errors import UserError, one_line
from dragdiff.modules.images import to_tensor

Score = Callable[[np.ndarray, np.ndarray], float]  # of two pictures (H, W, 3) uint8
SIDE = 224  # px at which LPIPS compares


def image_fidelity() -> Score:
    """1 - LPIPS (AlexNet; torchmetrics), both pictures resized bilinearly to 224 x 224, as DragBench is scored.

    Raises:
        UserError: torchvision or AlexNet's weights are missing; says how to get them.
    """
    try:
        import_module("torchvision")
    except Exception as error:  # also where it is there, but was built for another torch
        raise UserError(
            f"image fidelity needs torchvision ({one_line(error)}): pip install 'dragdiff[metrics]', with the "
            "torchvision that belongs to the installed torch"
        ) from error
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex").eval()
    except Exception as error:  # no network, a damaged download: whatever torch.hub raises
        raise UserError(
            f"image fidelity needs the weights of torchvision's AlexNet, which are not in {torch.hub.get_dir()} and "
            f"can't be fetched ({one_line(error)}): run it once with network"
        ) from error

    @torch.no_grad()
    def score(source: np.ndarray, edited: np.ndarray) -> float:
        small = (F.interpolate(to_tensor(image), (SIDE, SIDE), mode="bilinear") for image in (source, edited))
        lpips.reset()
        return 1 - float(lpips(*small))

    return score


def clip_similarity(model: str, revision: str) -> Score:
    """Cosine of the CLIP embeddings of two pictures (transformers); published: "openai/clip-vit-base-patch32".

    Args:
        model: a hub id or a local folder.
        revision: of the hub id; "" = the newest.

    Raises:
        UserError: no such model, or it can't be fetched.
    """
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    try:
        if not Path(model).expanduser().is_dir():  # transformers would ask a hub that does not answer for minutes
            hub_folder(model, revision, needed=["config.json", "preprocessor_config.json"])
        settings: dict[str, Any] = {"revision": revision} if revision else {}
        processor = AutoImageProcessor.from_pretrained(model, use_fast=False, **settings)
        network = CLIPVisionModelWithProjection.from_pretrained(model, use_safetensors=True, **settings).eval()
    except Exception as error:  # no network, a foreign model: the libraries raise many things
        pinned = f" --revision {revision}" if revision else ""
        raise UserError(
            f"CLIP similarity needs the model {model!r} with .safetensors weights ({one_line(error)}): give a local "
            f"folder, or fetch it once with network, `hf download {model}{pinned}`"
        ) from error

    @torch.no_grad()
    def score(source: np.ndarray, edited: np.ndarray) -> float:
        pictures = [Image.fromarray(image) for image in (source, edited)]
        embeddings = network(**processor(images=pictures, return_tensors="pt")).image_embeds
        return float(F.cosine_similarity(embeddings[0], embeddings[1], dim=0))

    return score
