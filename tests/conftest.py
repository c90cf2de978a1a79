"""Fixtures that several test files share."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from dragdiff.backbones.loading import load_backbone
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.config import load_config

TRACES = Path(__file__).parent / "data" / "traces"
METHODS = Path(__file__).parent / "data" / "methods"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Here and in the programs that tests start: tests run beside each other, small tensors gain nothing from more."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_works():
    """Shells start background jobs with Ctrl-C ignored, and the programs that a test starts would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or writes the cache in the home folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_sd() -> Path:
    """A small random Stable Diffusion 1.x pipeline: its block structure, UNet channels 16, 32, 64, 64."""
    return TRACES / "tiny-sd"


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory) -> Path:
    """A random pipeline of Stable Diffusion 1.x's block structure, as small as it gets: for tests of all around it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("pipeline")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
        unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=8, attention_head_dim=2, **small)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **small
        )
        text = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        text_encoder = CLIPTextModel(text)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture(scope="module")
def backbone(tiny_sd) -> StableDiffusion:
    """That pipeline, loaded anew for each test file."""
    return load_backbone(load_config(overrides=[f"model.path={tiny_sd}", "model.device=cpu"]).model)
