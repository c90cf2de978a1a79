"""Stable Diffusion behind the `Diffusion` interface: its structure, its parts, its schedules."""

import json
import math
import warnings

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from dragdiff.backbones.layout import structure_of
from dragdiff.backbones.loading import DTYPES, load_backbone, structure
from dragdiff.backbones.stable_diffusion import StableDiffusion, feature_strides, freeu, self_attention_layers
from dragdiff.config import load_config
from dragdiff.errors import UserError
from dragdiff.modules import ddim


def settings(path, *overrides: str):
    return load_config(overrides=[f"model.path={path}", "model.device=cpu", *overrides]).model


def make_unet(levels: int, **kwargs) -> UNet2DConditionModel:
    torch.manual_seed(0)
    defaults = {
        "block_out_channels": (8, 16, 16, 16)[:levels],
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    }
    return UNet2DConditionModel(**(defaults | kwargs)).eval()


UNETS = {
    "2 levels": lambda: make_unet(2),
    "3 levels": lambda: make_unet(3),
    "4 levels, attention everywhere": lambda: make_unet(
        4, down_block_types=("CrossAttnDownBlock2D",) * 4, up_block_types=("CrossAttnUpBlock2D",) * 4
    ),
    "Stable Diffusion 2.1's shape": lambda: make_unet(
        4, layers_per_block=2, attention_head_dim=[1, 2, 4, 4], use_linear_projection=True, upcast_attention=True
    ),
    "two transformers a block": lambda: make_unet(3, transformer_layers_per_block=2),
    "layers and transformers of each block": lambda: make_unet(
        3, layers_per_block=[1, 2, 1], transformer_layers_per_block=[1, 2, 1]
    ),
}


# ------------------------------------------------------------------------------------------- structure


def observe(unet, names) -> list[tuple[str, torch.Size]]:
    """Names and output sizes of modules in the order in which a forward of a 16 x 16 latent runs them."""
    seen = []
    hooks = [
        unet.get_submodule(name).register_forward_hook(
            lambda block, args, output, name=name: seen.append(
                (name, (output[0] if isinstance(output, tuple) else output).shape)
            )
        )
        for name in names
    ]
    with torch.no_grad():
        unet(torch.zeros(1, 4, 16, 16), torch.tensor(1), torch.zeros(1, 77, unet.config.cross_attention_dim))
    for hook in hooks:
        hook.remove()
    return seen


def check_structure(unet) -> None:
    strides = feature_strides(unet)
    expected = [(name, (16 // stride, 16 // stride)) for name, stride in strides.items()]
    assert [(name, tuple(size[2:])) for name, size in observe(unet, strides)] == expected
    every = [name for name, part in unet.named_modules() if name.endswith("attn1")]
    layers = self_attention_layers(unet)
    assert [name for name, _ in observe(unet, every)] == layers and len(layers) == len(every)
    said = structure_of(json.loads(unet.to_json_string()))  # lists, as a file holds them
    assert list(said.feature_strides.items()) == list(strides.items()) and said.self_attention_layers == layers


@pytest.mark.parametrize("kind", UNETS)
def test_strides_and_layer_order_are_what_a_forward_does(kind):
    check_structure(UNETS[kind]())


def test_stable_diffusion_1(backbone):
    check_structure(backbone.network)
    layers = backbone.self_attention_layers
    places = ["down_blocks"] * 6 + ["mid_block"] + ["up_blocks"] * 9
    assert [layer.split(".")[0] for layer in layers] == places
    assert layers[10] == "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert list(backbone.feature_strides.items())[3:] == [
        ("down_blocks.3", 8),
        ("mid_block", 8),
        ("up_blocks.0", 4),
        ("up_blocks.1", 2),
        ("up_blocks.2", 1),
        ("up_blocks.3", 1),
    ]
    assert (backbone.latent_stride, backbone.latent_channels, backbone.prediction_type) == (8, 4, "epsilon")
    assert backbone.latent_size(250, 331) == (31, 41)
    assert backbone.feature_block("up_blocks.2") is backbone.network.up_blocks[2]
    with pytest.raises(UserError, match=r"up_blocks\.4.*mid_block, up_blocks\.0, .*up_blocks\.3"):
        backbone.feature_block("up_blocks.4")


def test_the_structure_is_the_models(tiny_sd, backbone):
    found = structure(settings(tiny_sd))
    assert found.feature_strides == backbone.feature_strides
    assert found.self_attention_layers == backbone.self_attention_layers
    assert structure_of({}) == structure_of(UNet2DConditionModel().config)  # what a silent file means


# ------------------------------------------------------------------------------------------- parts


def test_encode_and_decode_are_the_autoencoders(backbone):
    images = torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = backbone.pipeline.vae
    with torch.no_grad():
        mean, std = backbone.encode(images)
        posterior = vae.encode(images).latent_dist
        assert torch.equal(mean, posterior.mean * 0.18215) and torch.equal(std, posterior.std * 0.18215)
        assert mean.shape == (2, 4, 3, 5)
        assert torch.equal(backbone.decode(mean), vae.decode(1 / 0.18215 * mean).sample)


@pytest.mark.parametrize("prompts", [["a photo of a cat"], [""], ["", "a dog, on the GRASS!"]])
def test_a_prompts_condition_is_the_pipelines(backbone, prompts):
    with torch.no_grad():
        theirs, _ = backbone.pipeline.encode_prompt(prompts, "cpu", 1, False)
        ours = backbone.condition(prompts)
    assert list(ours) == ["encoder_hidden_states"]
    assert torch.equal(ours["encoder_hidden_states"], theirs)


def test_a_long_prompt_is_cut_with_one_warning(backbone):
    prompt = "cat " * 200
    with torch.no_grad():
        with pytest.warns(UserWarning, match="the model reads the first 77") as caught:
            ours = backbone.condition([prompt])["encoder_hidden_states"]
        assert len(caught) == 1
        assert torch.equal(ours, backbone.pipeline.encode_prompt(prompt, "cpu", 1, False)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.condition(["a cat"])


def test_predict_takes_one_timestep_or_one_for_each_row(backbone):
    latents, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with torch.no_grad():
        condition = {"encoder_hidden_states": context}
        both = backbone.predict(latents, torch.tensor(500), condition)
        assert torch.equal(both, backbone.network(latents, 500, context).sample)
        assert torch.equal(both, backbone.predict(latents, torch.tensor([500, 500]), condition))
        mixed = backbone.predict(latents, torch.tensor([500, 20]), condition)
    assert torch.equal(mixed[0], both[0]) and not torch.allclose(mixed[1], both[1])


@pytest.mark.parametrize("name, dtype", DTYPES.items())
def test_precision(tiny_sd, name, dtype):
    backbone = load_backbone(settings(tiny_sd, f"model.dtype={name}"))
    assert {p.dtype for part in backbone.modules for p in part.parameters()} == {dtype}
    if name == "bf16":  # half precision is slow on a CPU
        with torch.no_grad():
            mean, std = backbone.encode(torch.zeros(1, 3, 16, 16))
            output = backbone.predict(mean, torch.tensor(1), backbone.condition([""]))
            outputs = (mean, std, output, backbone.decode(mean))
        assert {out.dtype for out in outputs} == {torch.float32} and all(out.isfinite().all() for out in outputs)


def test_freeu_is_put_back(backbone):
    unet = backbone.network
    absent = [dict(vars(block)) for block in unet.up_blocks]
    try:
        with freeu(unet, b1=1.1, b2=1.2, s1=0.9, s2=0.8):
            assert (unet.up_blocks[0].b1, unet.up_blocks[3].s2) == (1.1, 0.8)
        assert [dict(vars(block)) for block in unet.up_blocks] == absent
        unet.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5)
        own = [dict(vars(block)) for block in unet.up_blocks]
        with pytest.raises(ZeroDivisionError), freeu(unet, b1=1.1, b2=1.2, s1=0.9, s2=0.8):
            raise ZeroDivisionError
        assert [dict(vars(block)) for block in unet.up_blocks] == own
    finally:
        for block, before in zip(unet.up_blocks, absent, strict=True):
            vars(block).clear()
            vars(block).update(before)


# ------------------------------------------------------------------------------------------- schedules


def with_scheduler(backbone, scheduler, **kwargs) -> StableDiffusion:
    """The same modules in another pipeline, so that the shared one keeps its scheduler."""
    parts = {key: value for key, value in backbone.pipeline.components.items() if key != "scheduler"}
    return StableDiffusion(
        StableDiffusionPipeline(**parts, scheduler=scheduler, requires_safety_checker=False), **kwargs
    )


SD_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**SD_NOISE, skip_prk_steps=True, steps_offset=1),
        EulerDiscreteScheduler(**SD_NOISE, steps_offset=1, timestep_spacing="trailing", use_karras_sigmas=True),
        DPMSolverMultistepScheduler(**SD_NOISE, algorithm_type="sde-dpmsolver++", solver_order=3, steps_offset=1),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_every_scheduler_of_a_model_gives_the_published_schedule(backbone, scheduler):
    other = with_scheduler(backbone, scheduler)
    ours = other.scheduler(50)
    assert ours.timesteps.tolist() == list(range(981, 0, -20))
    assert not ours.config.clip_sample and not ours.config.set_alpha_to_one
    assert torch.equal(ours.alphas_cumprod, backbone.scheduler(50).alphas_cumprod)
    for kind, karras in (("dpm++2m", False), ("dpm++2m-karras", True)):
        solver = other.scheduler(20, kind)
        config = solver.config
        assert (config.algorithm_type, config.solver_order, config.use_karras_sigmas) == ("dpmsolver++", 2, karras)
        reference = DPMSolverMultistepScheduler(**SD_NOISE, use_karras_sigmas=karras)
        reference.set_timesteps(20)
        assert torch.equal(solver.timesteps, reference.timesteps) and torch.equal(solver.sigmas, reference.sigmas)


def test_more_steps_than_the_schedule_holds(backbone):
    assert int(backbone.scheduler(999).timesteps[0]) == 999
    with pytest.raises(UserError, match=r"ddim\.steps is 1000"):
        backbone.scheduler(1000)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "v_prediction, zero terminal SNR"])
def test_inversion_and_sampling_come_back(kind):
    """The error of a smooth network's inversion falls with the number of steps, for each kind of prediction."""
    prediction, _, zero = kind.partition(", ")
    pipeline = type("Pipeline", (), {})()
    pipeline.unet = make_unet(2)
    pipeline.vae = type("Vae", (), {"config": AutoencoderKL(latent_channels=4, norm_num_groups=4).config})()
    pipeline.text_encoder = pipeline.tokenizer = torch.nn.Identity()
    pipeline.scheduler = PNDMScheduler(**SD_NOISE, prediction_type=prediction, steps_offset=1)
    pipeline.scheduler.register_to_config(rescale_betas_zero_snr=bool(zero))
    backbone = StableDiffusion(pipeline)
    generator = torch.Generator().manual_seed(0)
    condition = {"encoder_hidden_states": torch.randn(1, 77, 8, generator=generator)}
    latent = torch.randn(1, 4, 8, 8, generator=generator)
    errors = []
    with torch.no_grad():
        for steps in (20, 80):
            scheduler = backbone.scheduler(steps)
            count = round(0.7 * steps)
            up = ddim.invert(lambda z, t: backbone.predict(z, t, condition), latent, scheduler=scheduler, steps=count)
            assert len(up) == count + 1 and (up[-1] - latent).abs().mean() > 0.1
            down = ddim.sample(
                lambda z, t: backbone.predict(z, t, condition), up[-1], scheduler=scheduler, start=steps - count
            )
            errors.append((down[-1] - latent).abs().mean().item())
    assert errors[1] < 0.04 and errors[1] < errors[0] / 3  # a first-order method


def test_pipelines_that_can_not_be_lent(backbone):
    pipeline = backbone.pipeline
    fused = StableDiffusionPipeline(**(pipeline.components | {"unet": make_unet(2)}), requires_safety_checker=False)
    fused.unet.fuse_qkv_projections()
    with pytest.raises(UserError, match="fused"):
        StableDiffusion(fused)
    with pytest.raises(UserError, match="has no tokenizer"):
        StableDiffusion(type("Pipeline", (), {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": 1})())
    with pytest.raises(UserError, match="can be inverted"):
        with_scheduler(backbone, FlowMatchEulerDiscreteScheduler())
    assert with_scheduler(backbone, pipeline.scheduler, prediction="v_prediction").prediction_type == "v_prediction"


def overflowing(tiny_sd, factor: float, dtype: str = "fp16") -> StableDiffusion:
    """In half precision, its autoencoder's activations overflow where a factor makes them large."""
    model = load_backbone(settings(tiny_sd, f"model.dtype={dtype}"))
    with torch.no_grad():
        model.pipeline.vae.decoder.up_blocks[0].resnets[0].conv1.weight.mul_(factor)
    return model


def test_an_autoencoder_that_overflows_in_half_precision_decodes_in_single_precision(tiny_sd):
    model = overflowing(tiny_sd, 1e5)
    vae, latents = model.pipeline.vae, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    with torch.no_grad():
        assert not vae.decode(latents.half() / 0.18215).sample.isfinite().all(), "no overflow"
        picture = model.decode(latents)
        other = overflowing(tiny_sd, 1e5, "fp32")
        assert torch.allclose(picture, other.decode(latents), atol=0.05)
        with torch.autocast("cpu", dtype=torch.float16):
            assert not other.pipeline.vae.decode(latents / 0.18215).sample.isfinite().all(), "no overflow"
            assert torch.allclose(other.decode(latents), picture, atol=0.05)
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items()), "changed for good"
    assert vae.dtype == torch.float16


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_an_autoencoder_that_always_overflows_is_named(tiny_sd, dtype):
    model, latents = overflowing(tiny_sd, math.inf, dtype), torch.ones(1, 4, 8, 8)
    with torch.no_grad(), pytest.raises(UserError, match=r"the autoencoder of .*tiny-sd overflows") as caught:
        model.decode(latents)
    assert ("model.dtype=fp32" in str(caught.value)) == (dtype == "fp16")
    with torch.no_grad():
        assert not model.decode(latents * math.nan).isfinite().all(), "that is no fault of the autoencoder"
