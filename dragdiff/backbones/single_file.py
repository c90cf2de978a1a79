"""Stable Diffusion 1.x / 2.x and their autoencoders from one .safetensors file in the original layout, without network.

diffusers converts the weights; what such a file lacks, the components' configurations and CLIP's tokenizer, is shipped.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import torch

from dragdiff.errors import UserError

SHIPPED = Path(__file__).parent.parent / "assets" / "single_file"
PAD_TOKENS = {"sd1": "<|endoftext|>", "sd2": "!"}
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def family(file: Path) -> str:
    """ "sd1" or "sd2", from the names and shapes of a checkpoint's weights; nothing of it is loaded.

    Raises:
        UserError: unreadable, incomplete, or another kind of model.
    """
    shapes = _shapes(file)
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    context = shapes.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if any(name.startswith("conditioner.") for name in shapes) or (first and not context):
        raise UserError(f"{file} is no Stable Diffusion 1.x or 2.x (SDXL?): it is not supported yet")
    if not first or not context:
        raise UserError(f"{file} is no Stable Diffusion checkpoint: a LoRA, an autoencoder or another kind of model?")
    if first[1] != 4:
        raise UserError(f"{file} takes {first[1]} latent channels: inpainting and the like are not supported, only 4")
    for prefix, part in ((VAE, "autoencoder"), (TEXT, "text encoder")):
        if not any(name.startswith(prefix) for name in shapes):
            raise UserError(f"{file} lacks the {part}: give the full checkpoint, not a pruned one")
    return "sd1" if any(name.startswith(f"{TEXT}transformer.") for name in shapes) else "sd2"


def load_pipeline(file: Path, *, dtype: torch.dtype, **parts: Any) -> Any:
    """A diffusers `StableDiffusionPipeline`; `parts` replace components of the checkpoint.

    Raises:
        UserError: as `family`.
    """
    from diffusers import StableDiffusionPipeline

    kind = family(file)
    parts.setdefault("tokenizer", clip_tokenizer(pad_token=PAD_TOKENS[kind]))
    return StableDiffusionPipeline.from_single_file(
        str(file), config=str(SHIPPED / kind), local_files_only=True, dtype=dtype, **parts
    )


def load_vae(file: Path, *, dtype: torch.dtype) -> Any:
    """A diffusers `AutoencoderKL`."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_single_file(
        str(file), config=str(SHIPPED / "sd1"), subfolder="vae", local_files_only=True, dtype=dtype
    )


def clip_tokenizer(*, pad_token: str) -> Any:
    """The tokenizer of CLIP's text encoders, from its merges alone."""
    from transformers import CLIPTokenizer

    merges = gzip.decompress((SHIPPED / "clip_merges.txt.gz").read_bytes()).decode().split("\n")
    # the order of the bytes' stand-ins: printable characters as they are, then the others (GPT-2's table)
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    words = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    pairs = [tuple(merge.split()) for merge in merges]
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, pad_token=pad_token, model_max_length=77)  # type: ignore[arg-type]


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
