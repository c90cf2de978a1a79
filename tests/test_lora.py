"""LoRA: put beside the weights, trained, written, read in every common format, merged; all of it put back."""

import copy
import json
import re
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TRACES
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from lightning.pytorch.loggers import CSVLogger
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file

from dragdiff import Editor, EditSample
from dragdiff.backbones import lora_file
from dragdiff.backbones.loading import DTYPES
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.config import load_config
from dragdiff.errors import UserError
from dragdiff.models.lora_finetune import crops, seeded_noise
from dragdiff.modules import lora
from dragdiff.modules.images import to_tensor
from dragdiff.stages import adapters

TARGETS = StableDiffusion.lora_targets
RANK, ALPHA = 4, 2.0
FORWARD = 1e-5  # of float64 forwards whose weights passed through float32; their outputs reach 3


@pytest.fixture(scope="module")
def unet(tiny_sd) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_sd / "unet", use_safetensors=True).eval()


def fingerprint(unet) -> list:
    """Everything of a module tree that an adapter could change."""
    tree = [(name, id(module), sorted(vars(module)), module.training) for name, module in unet.named_modules()]
    weights = [(n, id(p), p.data_ptr(), p.requires_grad, p.clone()) for n, p in unet.named_parameters()]
    return [tree, [w[:4] for w in weights], [w[4] for w in weights]]


def assert_unchanged(unet, before: list) -> None:
    after = fingerprint(unet)
    assert after[:2] == before[:2]
    assert all(torch.equal(now, then) for now, then in zip(after[2], before[2], strict=True))


def forward(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn((1, 4, 8, 8), generator=generator, dtype=torch.float32).to(unet.dtype)
    context = torch.randn((1, 77, unet.config.cross_attention_dim), generator=generator).to(unet.dtype)
    with torch.no_grad():
        return unet(latent, torch.tensor(500), context).sample


def trainable(unet, targets=TARGETS, *, rank=RANK, alpha=ALPHA, seed=0, pictures=1):
    return lora.trainable(unet, targets, rank=rank, alpha=alpha, seed=seed, pictures=pictures)


def trained(unet, *, rank=RANK, alpha=ALPHA, std=0.01) -> lora.LoRA:
    """A LoRA whose up-projections are not zero."""
    generator = torch.Generator().manual_seed(1)
    with trainable(unet, rank=rank, alpha=alpha) as ((weights,), current):
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.data.normal_(std=std, generator=generator)
        return current(0)


def updates(adapter: lora.LoRA) -> dict[str, torch.Tensor]:
    return {path: adapter.scale[path] * adapter.up[path] @ adapter.down[path] for path in adapter.down}


def assert_same_updates(one: lora.LoRA, other: lora.LoRA) -> None:
    ours, theirs = updates(one), updates(other)
    assert ours.keys() == theirs.keys()
    for path, update in ours.items():
        torch.testing.assert_close(theirs[path], update, rtol=1e-5, atol=1e-9)


# ------------------------------------------------------------------------------------------- what is trained


def test_a_stable_diffusion_1_unet_at_rank_16_has_3188736_trainable_parameters():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        with trainable(unet, rank=16, alpha=16):
            assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 3_188_736


@pytest.mark.parametrize("pictures", [1, 3])
def test_it_is_on_the_four_projections_of_every_attention_and_nowhere_else(unet, pictures):
    attentions = [n for n, m in unet.named_modules() if n.endswith(("attn1", "attn2"))]
    expected = {f"{name}.{target}" for name in attentions for target in TARGETS}
    with trainable(unet, pictures=pictures) as (_, current):
        wanted = {name for name, p in unet.named_parameters() if p.requires_grad}
        assert len(wanted) == 2 * len(expected) * pictures and all(".lora_" in name for name in wanted)
        assert {n for n, m in unet.named_modules() if isinstance(m, LoraLayer)} == expected
        found = [current(picture) for picture in range(pictures)]
    assert all(adapter.down.keys() == adapter.up.keys() == expected for adapter in found)
    assert len(expected) == 2 * 16 * 4


def test_it_starts_as_the_reference_does_from_its_seed_alone(unet):
    state = torch.get_rng_state()
    downs = []
    for seed in (3, 3, 4):
        with trainable(unet, seed=seed, pictures=2) as (weights, _):
            assert not any(w.any() for own in weights for n, w in own.items() if "lora_B" in n)
            first, second = (
                torch.cat([w.detach().flatten() for n, w in own.items() if "lora_A" in n]) for own in weights
            )
            assert torch.equal(first, second)  # whatever is trained beside it
            downs.append(first)
        torch.rand(3)  # the global generator's state does not matter
    assert torch.equal(downs[0], downs[1]) and not torch.equal(downs[0], downs[2])
    assert downs[0].std().item() == pytest.approx(1 / RANK, rel=0.02)
    assert abs(downs[0].mean().item()) < 0.01
    torch.set_rng_state(state)
    with trainable(unet, seed=3):
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("pictures", [1, 3])
def test_the_network_is_put_back_exactly(unet, pictures):
    before = fingerprint(unet)
    next(unet.parameters()).requires_grad_(False)
    mixed = fingerprint(unet)
    with trainable(unet, pictures=pictures):
        pass
    assert_unchanged(unet, mixed)
    with pytest.raises(ZeroDivisionError), trainable(unet, pictures=pictures):
        raise ZeroDivisionError
    assert_unchanged(unet, mixed)
    with pytest.raises(ValueError), trainable(unet, rank=-1, pictures=pictures):  # peft refuses it
        pass
    assert_unchanged(unet, mixed)
    next(unet.parameters()).requires_grad_(True)
    assert_unchanged(unet, before)


def test_a_network_with_adapters_of_its_own_is_refused_and_left_alone(unet):
    adapter = trained(unet)
    with trainable(unet):
        before = fingerprint(unet)
        with pytest.raises(UserError, match="adapters"), trainable(unet, rank=2, alpha=2):
            pass
        assert_unchanged(unet, before)
        with lora.merged(unet, adapter):  # an edit may still use one on top of them
            pass
        assert_unchanged(unet, before)


# ------------------------------------------------------------------------------------------- merging


def test_merged_is_the_unmerged_forward(unet):
    """In float64, where rounding can't hide a wrong update (nor another processor's rounding look like one)."""
    unet = copy.deepcopy(unet).double()
    generator = torch.Generator().manual_seed(1)
    plain = forward(unet)
    with trainable(unet) as ((weights,), current):
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.data.normal_(std=0.01, generator=generator)
        separate = forward(unet)
        adapter = current(0)
    with lora.merged(unet, adapter):
        merged = forward(unet)
    assert (separate - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, separate, rtol=0, atol=FORWARD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_come_back_bit_for_bit(unet, dtype):
    unet = copy.deepcopy(unet).to(dtype)
    adapter = trained(unet)
    path = next(iter(adapter.down))
    before = fingerprint(unet)
    expected = (unet.get_parameter(f"{path}.weight").float() + updates(adapter)[path]).to(dtype)
    with lora.merged(unet, adapter):
        assert torch.equal(unet.get_parameter(f"{path}.weight"), expected)
    assert_unchanged(unet, before)
    with pytest.raises(ZeroDivisionError), lora.merged(unet, adapter):
        raise ZeroDivisionError
    assert_unchanged(unet, before)


def test_no_lora_is_no_change(unet):
    before = fingerprint(unet)
    with lora.merged(unet, None):
        assert_unchanged(unet, before)


@pytest.mark.parametrize("channels", [(16, 32, 64), (16, 32, 64, 32)])
def test_the_lora_of_another_model_is_refused_and_nothing_changes(unet, channels):
    count = len(channels)
    other = UNet2DConditionModel(
        block_out_channels=channels,
        norm_num_groups=8,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",) * count,
        up_block_types=("CrossAttnUpBlock2D",) * count,
    )
    before = fingerprint(other)
    with pytest.raises(UserError, match="another model") as caught, lora.merged(other, trained(unet)):
        pass
    assert "\n" not in str(caught.value)
    assert_unchanged(other, before)


# ------------------------------------------------------------------------------------------- files


def test_the_file_works_in_a_diffusers_pipeline(unet, tiny_sd, tmp_path):
    unet = copy.deepcopy(unet).double()
    adapter = trained(unet, std=0.02)
    with lora.merged(unet, adapter):
        ours = forward(unet)
    path = lora_file.save(adapter, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"] == [path.name]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, use_safetensors=True, safety_checker=None)
    pipeline.load_lora_weights(tmp_path)
    config = pipeline.unet.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (RANK, ALPHA)
    torch.testing.assert_close(forward(pipeline.unet.double()), ours, rtol=0, atol=FORWARD)


def test_ranks_and_alphas_that_differ_survive(unet, tiny_sd, tmp_path):
    unet = copy.deepcopy(unet).double()
    adapter = trained(unet)
    path = next(iter(adapter.down))
    adapter.down[path], adapter.up[path] = adapter.down[path][:2].clone(), adapter.up[path][:, :2].clone()
    adapter.scale[path] = 3.0
    read = lora_file.load(lora_file.save(adapter, tmp_path))
    assert read.scale == adapter.scale
    assert_same_updates(adapter, read)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, use_safetensors=True, safety_checker=None)
    pipeline.load_lora_weights(tmp_path)
    with lora.merged(unet, adapter):
        torch.testing.assert_close(forward(pipeline.unet.double()), forward(unet), rtol=0, atol=FORWARD)


def test_an_alpha_that_the_rank_does_not_divide_survives(unet, tmp_path):
    adapter = trained(unet, rank=11, alpha=15)
    assert 15 / 11 * 11 != 15
    read = lora_file.load(lora_file.save(adapter, tmp_path))
    assert read.scale == adapter.scale == dict.fromkeys(adapter.down, 15 / 11)


def test_a_failed_write_leaves_the_old_file(unet, tmp_path, monkeypatch):
    lora_file.save(trained(unet), tmp_path)
    old = (tmp_path / lora_file.FILE_NAME).read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        lora_file.save(trained(unet, std=0.2), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [lora_file.FILE_NAME]
    assert (tmp_path / lora_file.FILE_NAME).read_bytes() == old


def old_processor_name(path: str, part: str) -> str:
    module, projection = path.split(".to_")
    return f"unet.{module}.processor.to_{projection.removesuffix('.0')}_lora.{part}.weight"


FORMATS = {
    "diffusers, peft names": lambda path, part: f"unet.{path}.lora_{'A' if part == 'down' else 'B'}.weight",
    "diffusers 0.2x": lambda path, part: f"unet.{path}.lora.{part}.weight",
    "diffusers 0.1x": old_processor_name,
    "saved by a UNet alone": lambda path, part: old_processor_name(path, part).removeprefix("unet."),
    "the reference": lambda path, part: f"unet.unet.{path}.lora.{part}.weight",
    "kohya": lambda path, part: f"lora_unet_{path.replace('.', '_')}.lora_{part}.weight",
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_updates(unet, tmp_path, name):
    adapter = trained(unet, alpha=RANK)  # most formats know no alpha: the scale is 1
    weights = {FORMATS[name](path, "down"): value for path, value in adapter.down.items()}
    weights |= {FORMATS[name](path, "up"): value for path, value in adapter.up.items()}
    assert len(weights) == 2 * len(adapter.down)
    save_file(weights, tmp_path / "a.safetensors")
    assert_same_updates(adapter, lora_file.load(tmp_path / "a.safetensors"))


def test_kohyas_alphas_count(unet, tmp_path):
    adapter = trained(unet)
    kohya = FORMATS["kohya"]
    weights = {kohya(path, "down"): value for path, value in adapter.down.items()}
    weights |= {kohya(path, "up"): value for path, value in adapter.up.items()}
    weights |= {kohya(path, "x").replace(".lora_x.weight", ".alpha"): torch.tensor(ALPHA) for path in adapter.down}
    save_file(weights, tmp_path / "a.safetensors")
    assert_same_updates(adapter, lora_file.load(tmp_path / "a.safetensors"))


def test_rank_stabilised_scale(unet, tmp_path):
    adapter = trained(unet)
    weights = {FORMATS["diffusers, peft names"](path, "down"): value for path, value in adapter.down.items()}
    weights |= {FORMATS["diffusers, peft names"](path, "up"): value for path, value in adapter.up.items()}
    metadata = {"unet.r": RANK, "unet.lora_alpha": 6, "unet.use_rslora": True}
    save_file(weights, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    assert set(lora_file.load(tmp_path / "a.safetensors").scale.values()) == {6 / RANK**0.5}


def file_with(adapter: lora.LoRA, folder: Path, **metadata) -> Path:
    """As diffusers writes it, with metadata of one's own."""
    file = lora_file.save(adapter, folder)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    about = {"r": RANK, "lora_alpha": 6, "peft_type": "LORA", "target_modules": targets} | metadata
    about = {f"unet.{key}": value for key, value in about.items()}
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": json.dumps(about)})
    return file


@pytest.mark.parametrize(
    "patterns", [{"to_q": 8}, {r"down_blocks.*\.to_[kq]": 8, "to_k": 1}, {"attn1.to_out.0": 2}, {}]
)
def test_patterns_of_alpha_are_read_as_diffusers_does(unet, tiny_sd, tmp_path, patterns):
    adapter = trained(unet)
    read = lora_file.load(file_with(adapter, tmp_path, alpha_pattern=patterns))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, use_safetensors=True, safety_checker=None)
    pipeline.load_lora_weights(tmp_path)
    theirs = {path: pipeline.unet.get_submodule(path).scaling["default_0"] for path in adapter.down}
    assert read.scale == pytest.approx(theirs)
    assert len(set(theirs.values())) == 1 + len(patterns)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("place", ["the folder", "its file"])
def test_pefts_own_folder(unet, tmp_path, rslora, place):
    from peft import LoraConfig, get_peft_model

    network = copy.deepcopy(unet)
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 1}, use_rslora=rslora
    )
    wrapped = get_peft_model(network, config)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path)
    read = lora_file.load(tmp_path if place == "the folder" else tmp_path / "adapter_model.safetensors")
    theirs = forward(wrapped)
    with lora.merged(unet, read):
        torch.testing.assert_close(forward(unet), theirs, rtol=0, atol=1e-4)
    assert set(read.scale.values()) == {6 / (2**0.5 if rslora else 2), 1 / (2**0.5 if rslora else 2)}


@pytest.mark.parametrize(
    "odd",
    [
        {"lora_alpha": None},
        {"lora_alpha": "four"},
        {"lora_alpha": [4]},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"alpha_pattern": ["to_q"]},
        {"alpha_pattern": {"to_q(": 4}},
        {"alpha_pattern": {"to_q": None}},
    ],
)
def test_odd_metadata_are_said_in_one_line(unet, tmp_path, odd):
    with pytest.raises(UserError, match=r"the metadata of the LoRA .* are odd: .* a number for \S+ ") as caught:
        lora_file.load(file_with(trained(unet), tmp_path, **odd))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{"])
def test_metadata_that_are_no_object_are_said_in_one_line(unet, tmp_path, text):
    file = lora_file.save(trained(unet), tmp_path)
    save_file(load_file(file), file, {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=r"the metadata of the LoRA|cannot read the LoRA") as caught:
        lora_file.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "end, kind",
    [
        ("hada_w1_a", "a LoHa"),
        ("lokr_w1", "a LoKr"),
        ("dora_scale", "a DoRA"),
        ("lora_magnitude_vector", "a DoRA"),
        ("oft_blocks", "an OFT"),
        ("lora_mid.weight", "a LoCon in Tucker form"),
        ("diff", "a full difference"),
    ],
)
def test_other_adapters_are_named(tmp_path, end, kind):
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    weights = {f"{stem}.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
    save_file(weights | {f"{stem}.{end}": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors is {kind}.*, not a LoRA: only plain LoRAs") as caught:
        lora_file.load(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_the_references_own_file():
    adapter = lora_file.load(TRACES / "lora_bs4")
    raw = load_file(TRACES / "lora_bs4" / lora_file.FILE_NAME)
    assert len(adapter.down) * 2 == len(raw) and set(adapter.scale.values()) == {1.0}
    for path, down in adapter.down.items():
        assert torch.equal(down, raw[f"unet.unet.{path}.lora.down.weight"])
        assert torch.equal(adapter.up[path], raw[f"unet.unet.{path}.lora.up.weight"])


def test_a_text_encoders_part_is_left_out_and_said(unet, tmp_path):
    adapter = trained(unet, alpha=RANK)
    file = lora_file.save(adapter, tmp_path)
    text = {f"text_encoder.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(load_file(file) | text, tmp_path / "both.safetensors")
    with pytest.warns(UserWarning, match="text encoder"):
        assert_same_updates(adapter, lora_file.load(tmp_path / "both.safetensors"))


NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
BAD = {
    "not a LoRA": {"conv_in.weight": torch.ones(4, 4)},
    "another kind of adapter": {f"{NAME}.lokr_w1": torch.ones(2, 2), f"{NAME}.lora_A.weight": torch.ones(2, 4)},
    "a DoRA": {f"{NAME}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    | {f"{NAME}.lora_magnitude_vector": torch.ones(4)},
    "half of a pair": {f"{NAME}.lora_A.weight": torch.ones(2, 4)},
    "ranks that differ": {f"{NAME}.lora_A.weight": torch.ones(2, 4), f"{NAME}.lora_B.weight": torch.ones(4, 3)},
    "foreign kohya names": {"lora_unet_x.lora_down.weight": torch.ones(2, 2), "lora_unet_x.hada_w1": torch.ones(2)},
    "an alpha alone": {"lora_unet_mid_block_attentions_0.alpha": torch.tensor(1.0)},
    "text encoder only": {f"text_encoder.layers.0.q_proj.lora_{part}.weight": torch.ones(2, 2) for part in "AB"},
}


@pytest.mark.filterwarnings("ignore:only the UNet's part")
@pytest.mark.parametrize("what", BAD)
def test_what_is_no_plain_lora_is_refused_in_one_line(tmp_path, what):
    save_file(BAD[what], tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        lora_file.load(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value) and "a.safetensors" in str(caught.value)


def test_missing_and_damaged_files_are_refused_in_one_line(unet, tmp_path):
    file = lora_file.save(trained(unet), tmp_path / "good")
    damaged = tmp_path / "damaged.safetensors"
    for length in (0, 5, 2000, file.stat().st_size - 1):
        damaged.write_bytes(file.read_bytes()[:length])
        with pytest.raises(UserError, match="cannot read the LoRA") as caught:
            lora_file.load(damaged)
        assert "\n" not in str(caught.value)
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="no LoRA at"):
            lora_file.load(missing)


# ------------------------------------------------------------------------------------------- training

SETTINGS = ["lora.resolution=64", "lora.batch_size=2", f"lora.rank={RANK}", f"lora.alpha={ALPHA}", "lora.lr=1e-2"]
PICTURE = np.random.default_rng(0).integers(0, 255, (64, 89, 3)).astype(np.uint8)
SAMPLE = EditSample(PICTURE, "a cat", [[[10, 10], [20, 20]]], None, "noise")


def editor(backbone, *overrides: str) -> Editor:
    return Editor(load_config(overrides=["cache.enabled=false", *SETTINGS, *overrides]), backbone)


def naive_training(backbone, start: lora.LoRA, crops, *, steps: int, draw, lr: float, decay: float) -> lora.LoRA:
    """The same training by hand: hooks add the update to each projection, torch's AdamW, one loop."""
    paths = list(start.down)
    downs = [start.down[path].clone().requires_grad_() for path in paths]
    ups = [start.up[path].clone().requires_grad_() for path in paths]
    hooks = [
        backbone.network.get_submodule(path).register_forward_hook(
            lambda module, args, output, a=a, b=b, s=start.scale[path]: output + s * F.linear(F.linear(args[0], a), b)
        )
        for path, a, b in zip(paths, downs, ups, strict=True)
    ]
    optimizer = torch.optim.AdamW([*downs, *ups], lr=lr, weight_decay=decay)
    alphas = backbone.scheduler(50).alphas_cumprod
    context = backbone.condition([SAMPLE.prompt])["encoder_hidden_states"].detach()
    for step in range(steps):
        random = draw(step)
        rows = [crops(corner) for corner in random.corners]
        mean, std = (torch.cat(parts) for parts in zip(*rows, strict=True))
        latent = mean + std * random.posterior
        alpha = alphas[random.timesteps][:, None, None, None]
        noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * random.noise
        output = backbone.network(noisy, random.timesteps, context.expand(2, -1, -1)).sample
        velocity = alpha.sqrt() * random.noise - (1 - alpha).sqrt() * latent
        target = random.noise if backbone.prediction_type == "epsilon" else velocity
        optimizer.zero_grad()
        ((output - target) ** 2).mean().backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()
    weights = zip(paths, downs, ups, strict=True)
    parts = [(path, down.detach(), up.detach()) for path, down, up in weights]
    return lora.LoRA({p: d for p, d, _ in parts}, {p: u for p, _, u in parts}, start.scale)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_training_is_a_plain_loop(backbone, tmp_path, prediction):
    backbone = StableDiffusion(backbone.pipeline, prediction=prediction)
    ours = editor(backbone, "lora.steps=3", "lora.save_every=3").finetune(SAMPLE, folder=tmp_path)
    start = lora_file.load(tmp_path / "step-0000")
    mean, std = (part.detach() for part in backbone.encode(to_tensor(PICTURE)))

    def crops(corner):
        top, left = corner
        return mean[:, :, top : top + 8, left : left + 8], std[:, :, top : top + 8, left : left + 8]

    draw = seeded_noise(seed=42, batch_size=2, latent_shape=(4, 8, 8), slack=(0, 3), train_timesteps=1000)
    wants = [p.requires_grad for p in backbone.network.parameters()]
    backbone.network.requires_grad_(False)
    theirs = naive_training(backbone, start, crops, steps=3, draw=draw, lr=1e-2, decay=1e-2)
    for parameter, want in zip(backbone.network.parameters(), wants, strict=True):
        parameter.requires_grad_(want)
    moved = max((ours.up[path] - start.up[path]).abs().max() for path in ours.up)
    assert moved > 0.02  # three steps of lr 0.01
    parts = [(ours.down, theirs.down), (ours.up, theirs.up)]
    differences = [(one[path] - other[path]).abs().flatten() for one, other in parts for path in one]
    assert torch.cat(differences).max() < 1e-6


def test_draws_depend_on_seed_and_step_alone():
    settings = {"batch_size": 64, "latent_shape": (4, 2, 2), "slack": (0, 3), "train_timesteps": 1000}
    draw = seeded_noise(seed=1, **settings)
    first, again = draw(5), seeded_noise(seed=1, **settings)(5)
    assert first.corners == again.corners and torch.equal(first.noise, again.noise)
    assert {top for top, _ in first.corners} == {0} and {left for _, left in first.corners} == {0, 1, 2, 3}
    for other in (draw(6), seeded_noise(seed=2, **settings)(5)):
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.timesteps, other.timesteps)
    assert not torch.equal(first.noise, first.posterior)
    assert 0 <= first.timesteps.min() < 100 and 900 < first.timesteps.max() < 1000


@pytest.mark.parametrize("size", [(50, 77), (77, 50), (128, 128), (64, 89), (33, 200)])
def test_crops_are_of_the_resized_picture(backbone, size):
    image = np.random.default_rng(1).integers(0, 255, (*size, 3)).astype(np.uint8)
    short, long = min(size), max(size)
    resized = (64, int(64 * long / short)) if size[0] <= size[1] else (int(64 * long / short), 64)
    picture = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR))
    with torch.no_grad():
        posterior, shape, slack = crops(backbone, image, resolution=64, encode_each=True)
        assert shape == (4, 8, 8)
        if short == long:
            corners = [(0, 0)]
            assert slack == (0, 0)
        else:
            assert slack == (resized[0] - 64, resized[1] - 64)
            corners = [(0, 0), slack, (slack[0] // 2, slack[1] // 2)]
        mean, std = posterior(corners)
        naive = [backbone.encode(to_tensor(picture[top : top + 64, left : left + 64])) for top, left in corners]
        torch.testing.assert_close(mean, torch.cat([m for m, _ in naive]), rtol=0, atol=1e-5)
        torch.testing.assert_close(std, torch.cat([s for _, s in naive]), rtol=0, atol=1e-5)

        posterior, shape, slack = crops(backbone, image, resolution=64, encode_each=False)
        whole, _ = backbone.encode(to_tensor(picture))
        assert shape == (4, 8, 8) and slack == (whole.shape[2] - 8, whole.shape[3] - 8)
        top, left = slack
        assert torch.equal(posterior([slack])[0], whole[:, :, top : top + 8, left : left + 8])


def test_crops_of_the_latent_differ_from_latents_of_crops_near_borders_only():
    """With a real-sized receptive field it is an approximation: checked where a small autoencoder can show it."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
    ).eval()
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):  # its statistics are of the whole picture
            module.forward = lambda x: x
    pixels = to_tensor(PICTURE)
    with torch.no_grad():
        cut = vae.encode(pixels).latent_dist.mean[:, :, :, 4:36]
        own = vae.encode(pixels[:, :, :, 8:72]).latent_dist.mean
    difference = (cut - own).abs().amax(dim=(0, 1, 2))
    assert difference[8:-8].max() < 1e-5 < difference[[0, -1]].min()


@pytest.fixture(scope="module")
def unbroken(backbone, tmp_path_factory) -> tuple[lora.LoRA, Path]:
    folder = tmp_path_factory.mktemp("unbroken")
    logger = CSVLogger(folder, name="", version="log")
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    before = fingerprint(backbone.network)
    final = editor(backbone, "lora.steps=5", "lora.save_every=2").finetune(SAMPLE, folder=folder, logger=logger)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    assert_unchanged(backbone.network, before)
    return final, folder


def test_files_are_kept_on_the_way(unbroken):
    final, folder = unbroken
    steps = sorted(path.name for path in folder.glob("step-*"))
    assert steps == ["step-0000", "step-0002", "step-0004"]
    kept = [lora_file.load(folder / step) for step in steps]
    assert not any(up.any() for up in kept[0].up.values())
    path = next(iter(final.up))
    assert not torch.equal(kept[1].up[path], kept[2].up[path])
    assert set(kept[2].scale.values()) == {ALPHA / RANK}


def test_the_checkpoint_holds_the_lora_alone(unbroken):
    final, folder = unbroken
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
    read = lora.extract(checkpoint["state_dict"], scale=ALPHA / RANK)
    assert len(checkpoint["state_dict"]) == 2 * len(final.down)
    assert all(torch.equal(read.up[path], final.up[path]) for path in final.up)
    weights = sum(value.numel() for value in checkpoint["state_dict"].values())
    assert (folder / "last.ckpt").stat().st_size < 4 * 3 * weights * 2  # weights and two moments, and room for names


def test_losses_are_logged_each_step(unbroken):
    _, folder = unbroken
    lines = (folder / "log" / "metrics.csv").read_text().split()
    column = lines[0].split(",").index("lora/loss")
    assert len(lines) == 6 and all(float(line.split(",")[column]) > 0 for line in lines[1:])


@pytest.mark.parametrize("stopped_at", [2, 3, 5])
def test_a_resumed_run_ends_where_an_unbroken_one_does(backbone, unbroken, tmp_path, stopped_at):
    final, _ = unbroken
    editor(backbone, f"lora.steps={stopped_at}", "lora.save_every=2").finetune(SAMPLE, folder=tmp_path)
    torch.rand(7)  # what else the process drew does not matter
    resumed = editor(backbone, "lora.steps=5", f"lora.resume={tmp_path / 'last.ckpt'}").finetune(SAMPLE)
    for path in final.down:
        assert torch.equal(resumed.down[path], final.down[path]) and torch.equal(resumed.up[path], final.up[path])


@pytest.mark.parametrize(
    "change, said",
    [
        (["lora.rank=2"], "lora.rank"),
        (["lora.lr=1e-3"], "lora.lr"),
        (["seed=1"], "seed"),
        (["lora.steps=4"], "lora.steps"),
    ],
)
def test_a_run_with_other_settings_can_not_be_resumed(backbone, unbroken, change, said):
    resume = f"lora.resume={unbroken[1] / 'last.ckpt'}"
    with pytest.raises(UserError, match=said) as caught:
        editor(backbone, "lora.steps=9", resume, *change).finetune(SAMPLE)
    assert "\n" not in str(caught.value)


def test_another_picture_can_not_be_resumed(backbone, unbroken):
    other = EditSample(255 - PICTURE, "a cat", [[[10, 10], [20, 20]]], None, "noise")
    with pytest.raises(UserError, match="image"):
        editor(backbone, "lora.steps=9", f"lora.resume={unbroken[1] / 'last.ckpt'}").finetune(other)


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint", "cut", "foreign"])
def test_a_missing_or_damaged_checkpoint_is_refused_in_one_line(backbone, unbroken, tmp_path, content):
    file = tmp_path / "last.ckpt"
    if content == "cut":
        file.write_bytes((unbroken[1] / "last.ckpt").read_bytes()[:5000])
    elif content == "foreign":
        torch.save({"state_dict": {}}, file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"lora\.resume") as caught:
        editor(backbone, "lora.steps=9", f"lora.resume={file}").finetune(SAMPLE)
    assert "\n" not in str(caught.value)


class Gradients(L.Callback):
    """Which parameters of a network had a gradient, and of which type they are."""

    def __init__(self, network) -> None:
        self.network, self.names, self.types = network, set(), set()

    def on_after_backward(self, trainer, module) -> None:
        for name, parameter in self.network.named_parameters():
            if parameter.grad is not None or parameter.requires_grad:
                self.names.add(name)
                self.types.add(parameter.dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_the_lora_is_trained_in_single_precision(tiny_sd, monkeypatch, dtype):
    own = editor(None, f"model.path={tiny_sd}", "model.device=cpu", f"model.dtype={dtype}", "lora.steps=2")
    assert own.backbone.network.dtype == DTYPES[dtype]
    seen = Gradients(own.backbone.network)
    fit = adapters.fit
    monkeypatch.setattr(adapters, "fit", lambda m, *, callbacks, **kw: fit(m, callbacks=[*callbacks, seen], **kw))
    result = own.finetune(SAMPLE)
    assert seen.types == {torch.float32} and all(".lora_" in name for name in seen.names)
    assert len(seen.names) == 2 * len(result.down)
    assert all(up.dtype == torch.float32 and torch.isfinite(up).all() for up in result.up.values())
    # the middle of an 8 x 8 latent is one position, which attends to itself whatever its query and key are
    alone = re.compile(r"mid_block.*attn1\.to_[qk]")
    assert all(up.any() for path, up in result.up.items() if not alone.match(path))
