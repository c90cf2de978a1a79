"""Every way to find and load a model, and what is said where that can not work."""

import json
import re
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from dragdiff.backbones import single_file
from dragdiff.backbones.loading import check_model, identity, load_backbone, structure
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.config import load_config
from dragdiff.errors import UserError


def settings(path, *overrides: str):
    return load_config(overrides=[f"model.path={path}", "model.device=cpu", *overrides]).model


# ------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def copy(tiny_sd, tmp_path) -> Path:
    """A copy of the model to spoil."""
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def drop(copy: Path, part: str) -> None:
    change(copy / "model_index.json", **{part: [None, None]})


def only_bin(copy: Path, part: str) -> None:
    weights = next((copy / part).glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))


SPOILED = {
    "no model_index.json": (lambda c: (c / "model_index.json").unlink(), "no model_index.json in it"),
    "an index that is no JSON": (lambda c: (c / "model_index.json").write_text("{"), "cannot read .*model_index"),
    "an index that is a list": (lambda c: (c / "model_index.json").write_text("[]"), "cannot read .*model_index"),
    "SDXL": (lambda c: change(c / "model_index.json", _class_name="StableDiffusionXLPipeline"), "XLPipeline: only"),
    "SDXL's UNet": (lambda c: change(c / "unet" / "config.json", addition_embed_type="text_time"), "not supported yet"),
    "inpainting": (lambda c: change(c / "unet" / "config.json", in_channels=9), "9 latent channels .* inpainting"),
    "16 channels": (lambda c: change(c / "vae" / "config.json", latent_channels=16), "autoencoder has 16"),
    "predicts the sample": (
        lambda c: change(c / "scheduler" / "scheduler_config.json", prediction_type="sample"),
        "only epsilon and v_prediction",
    ),
    "flow matching": (
        lambda c: FlowMatchEulerDiscreteScheduler().save_pretrained(c / "scheduler"),
        "FlowMatchEulerDiscreteScheduler: only",
    ),
    "no tokenizer": (lambda c: drop(c, "tokenizer"), "has no tokenizer"),
    "no text encoder's folder": (lambda c: shutil.rmtree(c / "text_encoder"), "has no text_encoder"),
    "no UNet configuration": (lambda c: (c / "unet" / "config.json").unlink(), "no config.json"),
    "pickled weights": (lambda c: only_bin(c, "unet"), r"unet has no \.safetensors file; pickled"),
    "a pickled autoencoder": (lambda c: only_bin(c, "vae"), r"vae has no \.safetensors file; pickled"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_can_not_work_is_said_before_weights_are_loaded(copy, what, monkeypatch):
    spoil, said = SPOILED[what]
    spoil(copy)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    for look in (check_model, load_backbone):
        with pytest.raises(UserError, match=said) as caught:
            look(settings(copy))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_damaged_weights_are_said_in_one_line(copy, part):
    weights = next((copy / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the model") as caught:
        load_backbone(settings(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("gone", [1, 3])
def test_a_part_whose_weights_are_not_all_there_is_incomplete(copy, part, gone, tiny_sd):
    (file,) = (copy / part).glob("*.safetensors")
    weights = load_file(file)
    names = sorted(weights)[-gone:]
    save_file({name: value for name, value in weights.items() if name not in names}, file, metadata={"format": "pt"})
    said = rf"model/{part} is incomplete: it lacks {gone} of .* e\.g\. '\S+'; download it again"
    with pytest.raises(UserError, match=said) as caught:
        load_backbone(settings(copy))
    assert names[0].removeprefix("text_model.") in str(caught.value)
    if part != "text_encoder":
        with pytest.raises(UserError, match=said):
            load_backbone(settings(tiny_sd, f"model.{part}={copy / part}"))


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_weights_of_another_program_are_not_made_anew(copy, part):
    (file,) = (copy / part).glob("*.safetensors")
    weights = {f"foo.{name}": value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{part} is incomplete: it lacks {len(weights)} of .*\(what is 'foo\."):
        load_backbone(settings(copy))


def test_an_autoencoder_with_another_scaling_factor_is_refused(copy, tiny_sd):
    change(copy / "vae" / "config.json", scaling_factor=0.13025)
    with pytest.raises(UserError, match=r"model/vae' has scaling_factor 0\.13025, the model .* 0\.18215: .*SDXL"):
        load_backbone(settings(tiny_sd, f"model.vae={copy / 'vae'}"))
    load_backbone(settings(copy, f"model.vae={copy / 'vae'}"))


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["model.path=./nowhere"], "model.path is 'nowhere': no such file or folder"),
        (["model.path=/a/b/c.safetensors"], "no such file or folder"),
        (["model.vae=~/no/vae"], "model.vae is .*: no such file or folder"),
        (["model.unet=./nowhere"], "model.unet is 'nowhere': no such folder"),
        (["model.device=tpu9"], "it must be auto, cpu"),
        (["model.device=cuda"], "use model.device=auto"),
        (["model.device=cuda:7"], "use model.device=auto"),
        (["model.autocast=fp16"], "needs CUDA"),
    ],
)
def test_bad_settings(tiny_sd, overrides, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        check_model(settings(tiny_sd, *overrides))


def test_pickled_files_are_never_read(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"x")
    with pytest.raises(UserError, match=r"only \.safetensors files are read"):
        check_model(settings(file))


# ------------------------------------------------------------------------------------------- folders


@dataclass
class Network:
    cache: Path  # the hub's, empty at first
    attempts: list = field(default_factory=list)


@pytest.fixture
def no_network(monkeypatch, tmp_path) -> Network:
    """No connection can be made."""
    network = Network(tmp_path / "hub")

    def refuse(*args, **kwargs):
        network.attempts.append(args)
        raise OSError("no network here")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(network.cache))
    return network


def same_weights(one: StableDiffusion, other: StableDiffusion) -> bool:
    def states(backbone):
        return [(name, value) for part in backbone.modules for name, value in part.state_dict().items()]

    pairs = zip(states(one), states(other), strict=True)
    return all(a == b and torch.equal(value, expected) for (a, value), (b, expected) in pairs)


def test_a_folder_needs_no_network(tiny_sd, backbone, no_network):
    assert same_weights(load_backbone(settings(tiny_sd)), backbone)
    assert not no_network.attempts


def test_a_folder_of_half_precision_weights_alone(copy, backbone):
    for weights in copy.rglob("*.safetensors"):
        weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    assert same_weights(load_backbone(settings(copy)), backbone)


def test_another_autoencoder(copy, tiny_sd, tmp_path):
    weights = load_file(copy / "vae" / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: 2 * value for name, value in weights.items()}, copy / "vae" / "diffusion_pytorch_model.safetensors"
    )
    changed = load_backbone(settings(tiny_sd, f"model.vae={copy / 'vae'}")).pipeline.vae.state_dict()
    assert all(torch.equal(changed[name], 2 * value) for name, value in weights.items())
    shutil.rmtree(copy / "vae")
    (copy / "vae").mkdir()
    load_backbone(settings(copy, f"model.vae={tiny_sd / 'vae'}"))  # the model's own is not even looked at
    with pytest.raises(UserError, match=r"no config\.json"):
        check_model(settings(tiny_sd, f"model.vae={tmp_path}"))


# ------------------------------------------------------------------------------------------- another UNet


@pytest.fixture
def other_unet(copy, tiny_sd, tmp_path) -> Path:
    """A pipeline's folder of which nothing but the UNet is there, with weights of its own."""
    for part in copy.iterdir():
        if part.name != "unet":
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    return copy


def doubled(one: StableDiffusion, other: StableDiffusion) -> bool:
    """Whether the weights of the one's UNet are twice those of the other's, and all the rest is the same."""
    ours, theirs = one.network.state_dict(), other.network.state_dict()
    rest = zip(one.modules[1:], other.modules[1:], strict=True)
    return all(torch.equal(value, 2 * theirs[name]) for name, value in ours.items()) and all(
        torch.equal(a, b) for mine, its in rest for a, b in zip(mine.parameters(), its.parameters(), strict=True)
    )


@pytest.mark.parametrize("place", ["", "unet"])
def test_another_unet_by_itself_or_in_a_pipelines_folder(place, other_unet, tiny_sd, backbone, no_network):
    loaded = load_backbone(settings(tiny_sd, f"model.unet={other_unet / place}"))
    assert doubled(loaded, backbone) and not no_network.attempts
    assert loaded.feature_block("mid_block") is loaded.network.mid_block


def test_another_unet_with_a_model_whose_own_is_not_there(other_unet, tiny_sd, backbone, tmp_path):
    model = Path(shutil.copytree(tiny_sd, tmp_path / "without"))
    next((model / "unet").glob("*.safetensors")).unlink()
    assert doubled(load_backbone(settings(model, f"model.unet={other_unet}")), backbone)
    with pytest.raises(UserError, match=r"unet has no \.safetensors file"):
        check_model(settings(model))


def test_another_unet_of_half_precision_weights_alone(other_unet, tiny_sd, backbone):
    weights = next((other_unet / "unet").glob("*.safetensors"))
    weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    assert doubled(load_backbone(settings(tiny_sd, f"model.unet={other_unet}")), backbone)


@pytest.mark.parametrize("place", ["", "unet"])
def test_another_unet_in_the_hubs_cache_needs_no_network(place, other_unet, tiny_sd, backbone, no_network):
    put_into_cache(no_network.cache, "someone/unet", other_unet / place)
    assert doubled(load_backbone(settings(tiny_sd, "model.unet=someone/unet")), backbone)
    assert not no_network.attempts
    with pytest.raises(UserError, match=r"the hub does not answer.*hf download someone/other"):
        check_model(settings(tiny_sd, "model.unet=someone/other"))


def test_another_unet_beside_a_single_file(other_unet, checkpoint, backbone, tiny_configs, no_network, tmp_path):
    save_file(checkpoint, tmp_path / "tiny.safetensors")
    loaded = load_backbone(settings(tmp_path / "tiny.safetensors", f"model.unet={other_unet}"))
    assert doubled(loaded, backbone) and not no_network.attempts


def test_the_structure_is_that_of_the_unet_that_will_be_used(tiny_sd, tmp_path):
    small = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    UNet2DConditionModel(**small, **kinds, cross_attention_dim=32).save_pretrained(tmp_path / "two")
    chosen = settings(tiny_sd, f"model.unet={tmp_path / 'two'}")
    found, loaded = structure(chosen), load_backbone(chosen)
    assert found.feature_strides == loaded.feature_strides
    assert list(found.feature_strides) == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert found.self_attention_layers == loaded.self_attention_layers


def test_unets_that_can_not_be_used_are_said_before_weights_are_loaded(other_unet, tiny_sd, tmp_path, monkeypatch):
    file = next((other_unet / "unet").glob("*.safetensors"))
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    for unet, said in ((file, "no such folder; give one in diffusers' format"), (tmp_path / "empty", "no config.json")):
        with pytest.raises(UserError, match=said):
            load_backbone(settings(tiny_sd, f"model.unet={unet}"))
    config = other_unet / "unet" / "config.json"
    for change_of, said in (({"in_channels": 9}, "9 latent channels"), ({"cross_attention_dim": 8}, "another model")):
        before = config.read_text()
        change(config, **change_of)
        with pytest.raises(UserError, match=said) as caught:
            load_backbone(settings(tiny_sd, f"model.unet={other_unet}"))
        assert "\n" not in str(caught.value)
        config.write_text(before)
    only_bin(other_unet, "unet")
    with pytest.raises(UserError, match=r"no \.safetensors file; pickled"):
        load_backbone(settings(tiny_sd, f"model.unet={other_unet}"))


def test_a_damaged_unet_is_said_in_one_line(other_unet, tiny_sd):
    weights = next((other_unet / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot load the model.*with the UNet") as caught:
        load_backbone(settings(tiny_sd, f"model.unet={other_unet}"))
    assert "\n" not in str(caught.value)


def test_another_unet_is_another_model(other_unet, tiny_sd):
    own, other = (identity(settings(tiny_sd, *more)) for more in ([], [f"model.unet={other_unet}"]))
    assert other != own and "unet" not in own  # what was known of a model before is still known
    file = next((other_unet / "unet").glob("*.safetensors"))
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    assert identity(settings(tiny_sd, f"model.unet={other_unet}")) not in (own, other)
    assert identity(settings(tiny_sd, "model.unet=someone/unet"))["unet"] == "someone/unet"


# ------------------------------------------------------------------------------------------- the hub


def put_into_cache(cache: Path, name: str, folder: Path) -> None:
    """As `hf download` leaves a model there."""
    root = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")


def test_a_model_in_the_hubs_cache_needs_no_network(tiny_sd, backbone, no_network):
    put_into_cache(no_network.cache, "someone/tiny", tiny_sd)
    put_into_cache(no_network.cache, "someone/vae", tiny_sd / "vae")
    assert same_weights(load_backbone(settings("someone/tiny", "model.vae=someone/vae")), backbone)
    assert structure(settings("someone/tiny")).feature_strides == backbone.feature_strides
    assert not no_network.attempts


def test_a_hub_model_is_checked_like_a_folder(copy, no_network):
    change(copy / "model_index.json", _class_name="FluxPipeline")
    put_into_cache(no_network.cache, "someone/flux", copy)
    with pytest.raises(UserError, match="FluxPipeline: only"):
        check_model(settings("someone/flux"))


@pytest.mark.parametrize("cached", ["nothing", "a tokenizer", "configurations"])
def test_a_hub_that_does_not_answer_is_given_up_soon(tiny_sd, no_network, tmp_path, cached):
    if cached != "nothing":
        without = ["*.safetensors"] if cached == "configurations" else ["unet", "vae", "model_index.json"]
        part = shutil.copytree(tiny_sd, tmp_path / "part", ignore=shutil.ignore_patterns(*without))
        put_into_cache(no_network.cache, "someone/tiny", part)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"the hub does not answer.*hf download someone/tiny") as caught:
        load_backbone(settings("someone/tiny"))
    assert time.perf_counter() - start < 15 and "\n" not in str(caught.value)
    assert no_network.attempts


def test_what_is_no_hub_id(no_network):
    with pytest.raises(UserError, match="no file, folder or hub id"):
        check_model(settings("a model"))


# ------------------------------------------------------------------------------------------- single files


def original_names(names, part: str) -> dict[str, str]:
    """diffusers' names of Stable Diffusion 1.x weights -> those of the original checkpoints."""
    return {name: (unet_name if part == "unet" else vae_name)(name) for name in names}


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def unet_name(name: str) -> str:
    for ours, theirs in {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }.items():
        if name.startswith(ours):
            return name.replace(ours, theirs)
    if match := re.match(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.(.*)", name):
        block, kind, index, rest = match.groups()
        place = 3 * int(block) + int(index) + 1
        if kind == "downsamplers":
            return f"input_blocks.{3 * int(block) + 3}.0.op{rest.removeprefix('conv')}"
        name = f"input_blocks.{place}.{int(kind == 'attentions')}.{rest}"
    elif match := re.match(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.(.*)", name):
        block, kind, index, rest = match.groups()
        if kind == "upsamplers":
            return f"output_blocks.{3 * int(block) + 2}.{1 if block == '0' else 2}.{rest}"
        name = f"output_blocks.{3 * int(block) + int(index)}.{int(kind == 'attentions')}.{rest}"
    elif match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = match.groups()
        name = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{rest}"
    if "transformer_blocks" not in name:
        for ours, theirs in RESNET.items():
            name = re.sub(rf"\.{ours}\.", f".{theirs}.", name)
    return name


def vae_name(name: str) -> str:
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
    for ours, theirs in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    return name.replace("conv_shortcut", "nin_shortcut")


@pytest.fixture(scope="module")
def checkpoint(backbone) -> dict[str, torch.Tensor]:
    """The small model in the layout of the original Stable Diffusion 1.x checkpoints."""
    unet, vae, text = (part.state_dict() for part in backbone.modules)
    weights = {f"model.diffusion_model.{unet_name(name)}": value.clone() for name, value in unet.items()}
    for name, value in vae.items():
        attention = ".attentions." in name and "group_norm" not in name and value.ndim == 2
        weights[f"first_stage_model.{vae_name(name)}"] = (value[..., None, None] if attention else value).clone()
    for name, value in text.items():
        inner = name.removeprefix("text_model.")
        weights[f"cond_stage_model.transformer.text_model.{inner}"] = value.clone()
    return weights


@pytest.fixture
def tiny_configs(tiny_sd, backbone, monkeypatch, tmp_path):
    """The shipped configurations, shrunk."""
    shutil.copytree(tiny_sd, tmp_path / "configs" / "sd1", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(single_file, "SHIPPED", tmp_path / "configs")
    monkeypatch.setattr(single_file, "clip_tokenizer", lambda *, pad_token: backbone.pipeline.tokenizer)


def test_a_single_file_needs_no_network(checkpoint, backbone, tiny_configs, no_network, tmp_path):
    file = tmp_path / "tiny.safetensors"
    save_file(checkpoint, file)
    assert single_file.family(file) == "sd1"
    loaded = load_backbone(settings(file))
    assert same_weights(loaded, backbone) and not no_network.attempts
    with torch.no_grad():
        ours, theirs = (model.condition(["a cat"])["encoder_hidden_states"] for model in (loaded, backbone))
        assert torch.equal(ours, theirs)
    assert torch.equal(loaded.scheduler(50).alphas_cumprod, backbone.scheduler(50).alphas_cumprod)
    assert structure(settings(file)).self_attention_layers == backbone.self_attention_layers


def test_a_single_file_autoencoder(checkpoint, backbone, tiny_sd, tiny_configs, no_network, tmp_path):
    file = tmp_path / "vae.safetensors"
    prefix = "first_stage_model."
    save_file({name.removeprefix(prefix): v for name, v in checkpoint.items() if name.startswith(prefix)}, file)
    assert same_weights(load_backbone(settings(tiny_sd, f"model.vae={file}")), backbone)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.weight",
        "model.diffusion_model.input_blocks.3.0.op.bias",
        "first_stage_model.decoder.up.1.upsample.conv.weight",
        "first_stage_model.encoder.conv_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_single_file_that_lacks_a_weight_is_incomplete(checkpoint, tiny_configs, tmp_path, name):
    save_file({key: value for key, value in checkpoint.items() if key != name}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors is incomplete: it lacks \d of .* e\.g\. '\S+'; download"):
        load_backbone(settings(tmp_path / "x.safetensors"))


def test_a_single_file_without_an_autoencoder_and_one_given(checkpoint, backbone, tiny_sd, tiny_configs, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({name: value for name, value in checkpoint.items() if not name.startswith("first_stage")}, file)
    with pytest.raises(UserError, match=r"lacks the autoencoder: give one, e\.g\. model\.vae="):
        check_model(settings(file))
    given = settings(file, f"model.vae={tiny_sd / 'vae'}")
    check_model(given)
    assert structure(given).self_attention_layers == backbone.self_attention_layers
    assert same_weights(load_backbone(given), backbone)


@pytest.mark.parametrize(
    "theirs", ["cond_stage_model.transformer.", "cond_stage_model.", "cond_stage_model.clip_l.transformer.text_model."]
)
def test_other_names_of_the_text_encoder(checkpoint, backbone, tiny_configs, tmp_path, theirs):
    ours, file = "cond_stage_model.transformer.text_model.", tmp_path / "x.safetensors"
    save_file({name.replace(ours, theirs): value for name, value in checkpoint.items()}, file)
    assert single_file.family(file) == "sd1"
    assert same_weights(load_backbone(settings(file)), backbone)


@pytest.mark.parametrize(
    "marks, metadata, predicted",
    [
        ({"v_pred": torch.zeros(0)}, {}, "v_prediction"),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({}, {}, "epsilon"),
    ],
)
def test_a_checkpoint_may_say_what_it_predicts(checkpoint, tiny_configs, tmp_path, marks, metadata, predicted):
    file = tmp_path / "x.safetensors"
    save_file(checkpoint | marks, file, metadata)
    assert load_backbone(settings(file)).prediction_type == predicted
    assert load_backbone(settings(file, "model.prediction=epsilon")).prediction_type == "epsilon", "what is set wins"


def test_a_checkpoint_may_say_that_its_schedule_ends_in_pure_noise(checkpoint, backbone, tiny_configs, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(checkpoint | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    assert load_backbone(settings(file)).scheduler(50).alphas_cumprod[-1] < 1e-6
    assert backbone.scheduler(50).alphas_cumprod[-1] > 1e-3


CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def test_other_single_files_are_refused(checkpoint, tmp_path):
    file = tmp_path / "a.safetensors"
    text = "cond_stage_model."
    inpainting = torch.zeros(16, 9, 3, 3)
    for weights, said in (
        ({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, "no Stable Diffusion checkpoint"),
        (checkpoint | {"conditioner.embedders.0.x": torch.zeros(1)}, "SDXL"),
        (checkpoint | {FIRST: inpainting}, "9 latent channels: inpainting"),
        ({name: value for name, value in checkpoint.items() if not name.startswith(text)}, "lacks the text encoder"),
    ):
        save_file(weights, file)
        with pytest.raises(UserError, match=said):
            check_model(settings(file))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read"):
        check_model(settings(file))


def test_a_single_file_of_stable_diffusion_2_must_be_told_what_it_predicts(checkpoint, tmp_path):
    weights = {
        name.replace("cond_stage_model.transformer.", "cond_stage_model.model."): v for name, v in checkpoint.items()
    }
    file = tmp_path / "sd2.safetensors"
    save_file(weights, file)
    with pytest.raises(UserError, match=r"model\.prediction=v_prediction"):
        check_model(settings(file))
    check_model(settings(file, "model.prediction=v_prediction"))
    save_file(weights | {"v_pred": torch.zeros(0)}, file)
    check_model(settings(file))


@pytest.mark.parametrize("kind, context, heads", [("sd1", 768, 8), ("sd2", 1024, [5, 10, 20, 20])])
def test_the_shipped_configurations(kind, context, heads):
    folder = single_file.SHIPPED / kind
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    sizes = {"sd1": 859_520_964, "sd2": 865_910_724}
    assert sum(p.numel() for p in unet.parameters()) == sizes[kind]
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert (unet.config.cross_attention_dim, unet.config.attention_head_dim) == (context, heads)


def test_the_shipped_tokenizer_is_clips():
    tokenizer = single_file.clip_tokenizer(pad_token="!")
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer(["Hello, World"], padding="max_length", max_length=8).input_ids
    assert padded == [[49406, 3306, 267, 1002, 49407, 0, 0, 0]]
