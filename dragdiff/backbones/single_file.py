"""Stable Diffusion 1.x / 2.x and their autoencoders from one .safetensors file in the original layout, without network.

diffusers converts the weights; what such a file lacks, the components' configurations and CLIP's tokenizer, is shipped.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dragdiff.errors import UserError

SHIPPED = Path(__file__).parent.parent / "assets" / "single_file"
PAD_TOKENS = {"sd1": "<|endoftext|>", "sd2": "!"}
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# CLIP's text encoder as early anime models and node editors name it
OTHER_TEXT = re.compile(
    r"cond_stage_model\.(clip_[lh]\.)?(transformer\.)?(text_model\.)?(?=embeddings\.|encoder\.|final_layer_norm\.)"
)


def family(file: Path, *, given: Collection[str] = ()) -> str:
    """ "sd1" or "sd2", from the names and shapes of a checkpoint's weights; nothing of it is loaded.

    Args:
        given: "vae" where the checkpoint needs no autoencoder.

    Raises:
        UserError: unreadable, incomplete, or another kind of model.
    """
    shapes, _ = _shapes(file)
    first = shapes.get(f"{UNET}input_blocks.0.0.weight")
    context = shapes.get(f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if any(name.startswith("conditioner.") for name in shapes) or (first and not context):
        raise UserError(f"{file} is no Stable Diffusion 1.x or 2.x (SDXL?): it is not supported yet")
    if not first or not context:
        raise UserError(f"{file} is no Stable Diffusion checkpoint: a LoRA, an autoencoder or another kind of model?")
    if first[1] != 4:
        raise UserError(f"{file} takes {first[1]} latent channels: inpainting and the like are not supported, only 4")
    if "vae" not in given and not any(name.startswith(VAE) for name in shapes):
        raise UserError(
            f"{file} lacks the autoencoder: give one, e.g. model.vae=stabilityai/sd-vae-ft-mse, or the full checkpoint"
        )
    if not any(name.startswith(TEXT) for name in shapes):
        raise UserError(f"{file} lacks the text encoder: give the full checkpoint, not a pruned one")
    return "sd2" if context[1] == 1024 or f"{TEXT}transformer." not in "\n".join(shapes) else "sd1"


def prediction(file: Path) -> str:
    """What the network predicts, as `ModelConfig.prediction`, where the checkpoint says it; else "".

    Raises:
        UserError: unreadable.
    """
    shapes, metadata = _shapes(file)
    if "v_pred" in shapes:  # an empty weight, which node editors and trainers write as a mark
        return "v_prediction"
    said = metadata.get("modelspec.prediction_type", "")
    return {"v": "v_prediction", "epsilon": "epsilon"}.get(said, "")


def load_pipeline(file: Path, *, dtype: torch.dtype, **parts: Any) -> Any:
    """A diffusers `StableDiffusionPipeline`; `parts` replace components of the checkpoint.

    Raises:
        UserError: as `family`; or weights are missing.
    """
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
    from transformers import CLIPTextModel

    kind = family(file, given=parts)
    weights, folder = _weights(file), SHIPPED / kind
    parts.setdefault("tokenizer", clip_tokenizer(pad_token=PAD_TOKENS[kind]))
    for part, model in {"unet": UNet2DConditionModel, "vae": AutoencoderKL}.items():
        if part not in parts:
            parts[part] = _converted(model, weights, folder / part, file, dtype)
    text = create_diffusers_clip_model_from_ldm(
        CLIPTextModel, weights, "text_encoder", str(folder), torch_dtype=dtype, local_files_only=True
    )
    check_complete(file, [name for name, weight in text.named_parameters() if weight.is_meta])
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), text_encoder=text, **parts)
    if "ztsnr" in weights:  # another such mark: trained down to pure noise
        pipeline.scheduler.register_to_config(rescale_betas_zero_snr=True)
    return pipeline


def load_vae(file: Path, *, dtype: torch.dtype) -> Any:
    """A diffusers `AutoencoderKL`.

    Raises:
        UserError: weights are missing.
    """
    from diffusers import AutoencoderKL

    return _converted(AutoencoderKL, _weights(file), SHIPPED / "sd1" / "vae", file, dtype)


def _converted(kind: Any, weights: dict[str, Tensor], folder: Path, file: Path, dtype: torch.dtype) -> Any:
    """A diffusers UNet or autoencoder; the folder has its configuration, the file is for messages.

    Raises:
        UserError: weights are missing.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    config = kind.load_config(str(folder))
    with torch.device("meta"):
        model = kind.from_config(config)
    found = weights  # of an autoencoder by itself, maybe in diffusers' names already
    if any(name.startswith((UNET, VAE, "decoder.mid.")) for name in weights):
        convert = convert_ldm_vae_checkpoint if "latent_channels" in config else convert_ldm_unet_checkpoint
        try:
            found = convert(dict(weights), config=config)
        except KeyError as error:
            check_complete(file, [str(error.args[0])])
    present = {name: weight.to(dtype) for name, weight in found.items() if weight is not None}
    check_complete(file, model.load_state_dict(present, strict=False, assign=True).missing_keys)
    return model.eval()


def check_complete(where: object, missing: Collection[str], others: Collection[str] = ()) -> None:
    """
    Args:
        where: file or folder, for the message.
        missing: names of a model's weights that it lacks.
        others: names of weights there that the model has no place for.

    Raises:
        UserError: weights are missing.
    """
    if missing:
        strange = f" (what is {min(others)!r} there?)" if others else ""
        raise UserError(
            f"{where} is incomplete: it lacks {len(missing)} of the model's weights, e.g. {min(missing)!r}{strange}; "
            "download it again"
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


def _shapes(file: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The shapes of a file's weights by name, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {_renamed(name): opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            return shapes, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _weights(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {_renamed(name): weight for name, weight in load_file(file).items()}


def _renamed(name: str) -> str:
    return OTHER_TEXT.sub(f"{TEXT}transformer.text_model.", name)
