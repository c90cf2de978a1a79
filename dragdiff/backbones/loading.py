"""Find, check and load a model: the embedded one, a diffusers folder, a single file, or one from the hub."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dragdiff.aliases import Json
from dragdiff.backbones import single_file
from dragdiff.backbones.layout import Structure, structure_of
from dragdiff.backbones.stable_diffusion import (
    PARTS,
    StableDiffusion,
    check_configs,
)
from dragdiff.errors import UserError, one_line

if TYPE_CHECKING:
    from dragdiff.config import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMBEDDED_MODEL = Path(__file__).parent.parent / "assets" / "embedded-sd"
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")  # the same parts; others need more
CONFIGS = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
UNET_CONFIG = ("unet/config.json|config.json",)
PIECE = 2**20  # bytes of a large file that are read at its beginning, middle and end to tell it from another
HUB_TIMEOUT = 5.0  # s until a hub that does not answer is given up


def resolve_device(name: str) -> torch.device:
    """A torch device; "auto" takes cuda, then mps, then cpu.

    Raises:
        UserError: not a device, or not here.
    """
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device is {name!r}: it must be auto, cpu, cuda, cuda:N or mps") from None
    here = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not here.get(device.type, False):
        raise UserError(
            f"model.device is {name!r}: this machine or this build of torch has none; use model.device=auto"
        )
    return device


def resolve_autocast(name: str, *, device: torch.device, dtype: str) -> str:
    """Which mixed precision "auto" means: the reference's fp16 with loss scaling on CUDA, none elsewhere.

    Raises:
        UserError: fp16 mixed precision, which needs loss scaling, was asked for away from CUDA.
    """
    if name == "auto":
        return "fp16" if device.type == "cuda" and dtype != "bf16" else "none"
    if name == "fp16" and device.type != "cuda":
        raise UserError(
            f"model.autocast=fp16 needs CUDA, the device is {device.type}: use model.autocast=auto, bf16 or none"
        )
    return name


def check_model(config: ModelConfig) -> None:
    """What can be known of the model's settings without loading it.

    Raises:
        UserError: device, precision, or a local path that is not there.
    """
    device = resolve_device(config.device)
    resolve_autocast(config.autocast, device=device, dtype=config.dtype)
    if config.path == "embedded" and not EMBEDDED_MODEL.is_dir():
        raise UserError(f"the embedded model is not in {EMBEDDED_MODEL}: reinstall dragdiff")
    for key, path in (("model.path", _local(config.path)), ("model.vae", _local(config.vae))):
        if path and not path.exists():
            raise UserError(
                f"{key} is {str(path)!r}: no such file or folder; give a diffusers folder, a .safetensors file or a "
                "hub id"
            )
        if path and path.is_file() and path.suffix != ".safetensors":
            raise UserError(f"{key} is {str(path)!r}: only .safetensors files are read, never pickled ones")
    vae = _local(config.vae)
    if vae and vae.is_dir():
        _check_weights(vae)
    unet = _local(config.unet)
    if unet and not unet.is_dir():
        raise UserError(f"model.unet is {str(unet)!r}: no such folder; give one in diffusers' format or a hub id")
    if unet:
        _check_weights(_unet_folder(config.unet))
    path = _local(config.path)
    if path and path.is_file():
        if _family(path, config) == "sd2" and config.prediction == "auto" and not single_file.prediction(path):
            raise UserError(
                f"{path} does not say what it predicts: set model.prediction=v_prediction (SD 2.x for 768 px) or "
                "epsilon (SD 2.x base)"
            )
    else:
        _check_folder(_config_folder(config), config, weights=path is not None)
    if config.unet:
        own = _read_json(_config_folder(config) / "unet" / "config.json").get("cross_attention_dim")
        other = _read_json(_unet_config(config)).get("cross_attention_dim")
        if own != other:
            raise UserError(
                f"the UNet {config.unet!r} reads prompts of {other} values a token, {config.path!r} gives {own}: "
                "it is for another model"
            )


def _config_folder(config: ModelConfig) -> Path:
    """Where the configurations of the model's components are, in diffusers' layout."""
    path = _local(config.path)
    if path is None:
        return hub_folder(config.path, config.revision)
    return single_file.SHIPPED / _family(path, config) if path.is_file() else path


def _family(file: Path, config: ModelConfig) -> str:
    return single_file.family(file, given=["vae"] if config.vae else [])


def _unet_config(config: ModelConfig) -> Path:
    """The configuration of the UNet that will be used."""
    return (_unet_folder(config.unet) if config.unet else _config_folder(config) / "unet") / "config.json"


def _unet_folder(name: str) -> Path:
    """Where a UNet is, in a folder or the hub's cache: by itself, or in a pipeline's."""
    folder = _local(name) or hub_folder(name, "", needed=UNET_CONFIG)
    return folder / "unet" if (folder / "unet").is_dir() else folder


def _check_folder(folder: Path, config: ModelConfig, *, weights: bool) -> None:
    """What the configurations of a diffusers pipeline tell; with `weights`, also whether those are there."""
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"model.path is {config.path!r}: there is no model_index.json in it, so it is no diffusers pipeline"
        )
    index = _read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{config.path} is a {kind}: only Stable Diffusion 1.x and 2.x are supported so far")
    for part in PARTS:
        if not (index.get(part) or [None])[0] or not (folder / part).is_dir():
            raise UserError(f"{config.path} has no {part}: it is incomplete")
        if weights and part in ("unet", "text_encoder", "vae") and not getattr(config, part, ""):
            _check_weights(folder / part)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    if config.prediction != "auto":
        scheduler["prediction_type"] = config.prediction
    vae = {} if config.vae else _read_json(folder / "vae" / "config.json")
    check_configs(config.path, unet=_read_json(_unet_config(config)), vae=vae, scheduler=scheduler)


def _check_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: it is no model in diffusers' format")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no .safetensors file; pickled weights (.bin, .ckpt) are never read: convert them, "
            "e.g. by save_pretrained of a pipeline that was loaded from them"
        )


def _read_json(file: Path) -> Json:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"cannot read {file}: it must hold a JSON object")
    return value


def _local(path: str) -> Path | None:
    """The file or folder that a model's path means; None for a hub id or nothing."""
    if path == "embedded":
        return EMBEDDED_MODEL
    local = Path(path).expanduser()
    return local if path and (local.exists() or _looks_local(path)) else None


def _looks_local(path: str) -> bool:
    return (
        path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in (".safetensors", ".ckpt", ".pt")
    )


def hub_folder(name: str, revision: str, *, needed: Sequence[str] = CONFIGS) -> Path:
    """Where the hub's cache holds a model; its configurations are fetched if they are not there.

    What is there is taken without asking the hub. A hub that does not answer is given up after seconds, not minutes.

    Args:
        needed: files without which it is not there; of `one|other` either is enough.

    Raises:
        UserError: no such model or revision, or neither cache nor hub have it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        if all(any((folder / file).is_file() for file in either.split("|")) for either in needed):
            return folder
    except LocalEntryNotFoundError:
        pass
    except HFValidationError:
        raise UserError(f"no model {name!r}: it is no file, folder or hub id") from None
    _ask_hub(name, revision)
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.json"]))
    except Exception as error:  # as above: no common base
        raise UserError(f"fetching {name} from the hub failed: {one_line(error)}") from error


def _ask_hub(name: str, revision: str) -> None:
    """Raises a UserError where the hub does not answer or has no such model."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        raise UserError(f"accept the licence of {name} on its page on the hub, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"no model {name!r}: there is no such file or folder, and the hub has none of that name (a private one "
            "needs `hf auth login`)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r} on the hub") from None
    except Exception as error:  # no network: whatever the hub's library and its HTTP client raise
        reason = one_line(error)
        raise UserError(
            f"no model {name!r}: there is no such file or folder, the hub's cache {constants.HF_HUB_CACHE} lacks it or "
            f"a part of it, and the hub does not answer ({reason}); fetch it once with network, `hf download {name}`"
        ) from error


def structure(config: ModelConfig) -> Structure:
    """How the model is built, before anything of it is loaded.

    Raises:
        UserError: as `check_model`.
    """
    check_model(config)
    file = _unet_config(config)
    try:
        return structure_of(_read_json(file))
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"{file} describes no UNet that can be built: {one_line(error)}") from error


def _quiet() -> None:
    """The libraries' own bars and notes on loading (image processors, parts left out) are not for our users."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity(logging.CRITICAL)  # what they log as an error they raise as well
        library.disable_progress_bar()


def load_backbone(config: ModelConfig) -> StableDiffusion:
    """Load a Stable Diffusion 1.x / 2.x model; a local folder or file needs no network.

    Raises:
        UserError: no such model, or one that can't be used; says what was looked for and how to get it.
    """
    from diffusers import AutoencoderKL

    check_model(config)
    device, dtype = resolve_device(config.device), DTYPES[config.dtype]
    parts: Json = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    _quiet()
    try:
        if (file := _local(config.vae)) and file.is_file():
            parts["vae"] = single_file.load_vae(file, dtype=dtype)
        elif config.vae:
            parts["vae"] = _load(_load_part, config.vae, "", ["config.json"], kind=AutoencoderKL, dtype=dtype)
        if config.vae:
            _check_scaling(parts["vae"], config)
        if config.unet:
            parts["unet"] = _load_unet(config.unet, dtype=dtype)
        if (file := _local(config.path)) and file.is_file():
            pipeline = single_file.load_pipeline(file, dtype=dtype, **parts)
        else:
            pipeline = _load(_load_pipeline, config.path, config.revision, CONFIGS, dtype=dtype, parts=parts)
    except UserError:
        raise
    except Exception as error:  # damaged or foreign files make the libraries raise nearly anything
        reason = " ".join(str(error).split(" (")[0].split())[:200].rstrip(".")
        raise UserError(
            f"cannot load the model {config.path!r}"
            + (f" with the autoencoder {config.vae!r}" if config.vae else "")
            + (f" with the UNet {config.unet!r}" if config.unet else "")
            + f": {reason}; give a Stable Diffusion 1.x or 2.x with .safetensors weights"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    prediction = config.prediction
    if prediction == "auto" and (file := _local(config.path)) and file.is_file():
        prediction = single_file.prediction(file) or "auto"
    return StableDiffusion(pipeline, name=config.path, prediction=prediction)


def _load(load: Callable[..., Any], name: str, revision: str, needed: Sequence[str], **settings: Any) -> Any:
    """A pipeline or a part from a folder, the hub's cache or, where that lacks it, the hub.

    Args:
        load: given a folder, or a hub id.
        needed: as for `hub_folder`.
    """
    path = _local(name)
    try:
        return load(path or hub_folder(name, revision, needed=needed), local_files_only=True, **settings)
    except UserError:
        raise
    except Exception:  # incomplete in the cache; the libraries say so in many ways
        if path:
            raise
        _ask_hub(name, revision)
        return load(name, revision=revision or None, **settings)


def _load_pipeline(source: Path | str, *, dtype: torch.dtype, parts: Json, **hub: Any) -> Any:
    """A diffusers `StableDiffusionPipeline`; `parts` replace components."""
    import transformers
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    index, _ = StableDiffusionPipeline.load_config(str(source), return_unused_kwargs=True, **hub)
    encoder = getattr(transformers, index["text_encoder"][1])
    for part, kind in {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": encoder}.items():
        if part not in parts:  # the pipeline would load it, but not say which weights it has made anew
            parts[part] = _load_part(source, kind, subfolder=part, dtype=dtype, **hub)
    return StableDiffusionPipeline.from_pretrained(str(source), dtype=dtype, **parts, **hub)


def _load_part(source: Path | str, kind: Any, *, dtype: torch.dtype, subfolder: str = "", **hub: Any) -> Any:
    """A model of diffusers or transformers.

    Raises:
        UserError: some of its weights are not in the file.
    """
    if isinstance(source, Path):  # of the hub's, without a folder, the variant in full precision
        hub["variant"] = _variant(source / subfolder)
    model, told = kind.from_pretrained(
        str(source),
        dtype=dtype,
        use_safetensors=True,  # None would fall back to pickled weights
        output_loading_info=True,
        **({"subfolder": subfolder} if subfolder else {}),
        **hub,
    )
    single_file.check_complete(f"{source}/{subfolder}".rstrip("/"), told["missing_keys"], told["unexpected_keys"])
    return model


def _check_scaling(vae: Any, config: ModelConfig) -> None:
    """
    Raises:
        UserError: an autoencoder's latents have another scale than those that the model knows.
    """
    file, published = _config_folder(config) / "vae" / "config.json", 0.18215
    own = _read_json(file).get("scaling_factor", published) if file.is_file() else published
    if vae.config.scaling_factor != own:
        raise UserError(
            f"the autoencoder {config.vae!r} has scaling_factor {vae.config.scaling_factor}, the model {config.path!r} "
            f"{own}: it is for another kind of model (SDXL?)"
        )


def _load_unet(name: str, *, dtype: torch.dtype) -> Any:
    """A UNet by itself, or out of a pipeline."""
    from diffusers import UNet2DConditionModel

    folder = _unet_folder(name)
    settings: dict[str, Any] = {"kind": UNet2DConditionModel, "dtype": dtype}
    if _local(name):
        return _load_part(folder, **settings)
    inside = "unet" if folder.name == "unet" else ""
    return _load(_load_part, name, "", UNET_CONFIG, subfolder=inside, **settings)


def _variant(folder: Path) -> str | None:
    """What diffusers must be told of weights that are there in half precision alone."""
    names = [file.name for file in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16." in name for name in names) else None


def identity(config: ModelConfig) -> Json:
    """What tells one model from another without loading it: the files' contents, or the hub's id and revision.

    Of a file larger than a few MB its size and some pieces count.
    """
    return {
        "path": _content(config.path) or [config.path, config.revision],
        "vae": _content(config.vae) or config.vae,
        **({"unet": _content(config.unet) or config.unet} if config.unet else {}),
        "prediction": config.prediction,
        "dtype": config.dtype,
        "autocast": config.autocast,
    }


def _content(path: str) -> str | None:
    local = _local(path)
    if local is None:
        return None
    summary = hashlib.sha256()
    for file in [local] if local.is_file() else sorted(local.rglob("*")):
        if file.is_file() and file.suffix in (".safetensors", ".json", ".txt"):
            size = file.stat().st_size
            summary.update(f"{file.relative_to(local)} {size}\n".encode())
            with file.open("rb") as opened:
                for place in sorted({0, max(0, size // 2 - PIECE), max(0, size - PIECE)}):
                    opened.seek(place)
                    summary.update(opened.read(PIECE))
    return summary.hexdigest()[:32]
