"""The LoRA's training replayed against the published DragDiffusion code (see data/traces/README.md)."""

from collections.abc import Iterator

import lightning as L
import numpy as np
import pytest
import torch
from conftest import TRACES
from PIL import Image
from safetensors.torch import load_file

from dragdiff import Editor, EditSample
from dragdiff.backbones import lora_file
from dragdiff.config import load_config
from dragdiff.models.lora_finetune import LoRAFinetune, Noise
from dragdiff.modules import lora
from dragdiff.modules.images import to_tensor
from dragdiff.stages import adapters

STEPS, BATCH, RANK, LR = 5, 4, 16, 5e-4
PROMPT = "a photo of a red circle on the hill"
FILE = TRACES / "lora_bs4" / lora_file.FILE_NAME  # as the published code saved it


@pytest.fixture(scope="module")
def trace() -> dict[str, np.ndarray]:
    with np.load(TRACES / "lora_bs4.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def final() -> lora.LoRA:
    return lora_file.load(FILE)


def random_numbers(trace: dict[str, np.ndarray], final: lora.LoRA) -> tuple[dict[str, torch.Tensor], list[Noise]]:
    """Initial down-projections and the noise of each step, drawn anew in the published code's order.

    The numbers themselves are 3 MB; those kept in the trace show that these are they.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.rand(37344)  # drawn for weights that were then loaded
        initial = {}
        for name in trace["lora_names"]:
            path = str(name).removesuffix(".lora_layer.down.weight")
            if path in final.down:
                torch.rand(final.down[path].numel() + final.up[path].numel())  # layers' own initialisation, replaced
                initial[path] = torch.empty(final.down[path].shape).normal_(std=1 / RANK)
        draws = []
        for _ in range(STEPS):
            posterior = torch.randn(BATCH, 4, 64, 64)
            noise = torch.empty(BATCH, 4, 64, 64, memory_format=torch.channels_last).normal_()
            timesteps = torch.randint(0, 1000, (BATCH,))
            draws.append(Noise([(0, 0)] * BATCH, posterior, noise, timesteps))
    first, *_, last = initial.values()
    for drawn, kept in (
        (first, trace["init_first"]),
        (last, trace["init_last"]),
        (torch.stack([draw.posterior[0, 0, 0, :8] for draw in draws]), trace["posterior_start"]),
        (torch.stack([draw.noise[0, 0, 0, :8] for draw in draws]), trace["noise_start"]),
        (torch.stack([draw.timesteps for draw in draws]), trace["timesteps"]),
    ):
        np.testing.assert_allclose(drawn, kept, atol=1e-6)
    return initial, draws


class Watch(L.Callback):
    """Puts the recorded initial weights in, then watches."""

    def __init__(self, initial: dict[str, torch.Tensor]) -> None:
        self.initial = initial
        self.losses: list[float] = []
        self.norms: list[float] = []

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, module: LoRAFinetune) -> None:
        down = {name: p for name, p in zip(module.names, module.lora, strict=True) if name.endswith(lora.DOWN)}
        assert down.keys() == {f"{path}{lora.DOWN}" for path in self.initial}
        for path, value in self.initial.items():
            down[f"{path}{lora.DOWN}"].copy_(value)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: LoRAFinetune, optimizer: object) -> None:
        self.norms.append(torch.stack([p.grad.norm() for p in module.lora]).norm().item())

    def on_train_batch_end(self, trainer: L.Trainer, module: LoRAFinetune, *_: object) -> None:
        self.losses.append(trainer.callback_metrics["lora/loss"].item())


@pytest.fixture(scope="module")
def training(backbone, tiny_sd, trace, final) -> Iterator[tuple[Watch, lora.LoRA]]:
    initial, draws = random_numbers(trace, final)
    watch = Watch(initial)
    fit = adapters.fit
    overrides = [
        f"model.path={tiny_sd}",
        "model.device=cpu",
        "cache.enabled=false",
        f"lora.steps={STEPS}",
        f"lora.batch_size={BATCH}",
        f"lora.rank={RANK}",
        f"lora.lr={LR}",
    ]
    sample = EditSample(np.asarray(Image.open(TRACES / "scene512.png")), PROMPT, [[[9, 9], [20, 9]]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "seeded_noise", lambda **_: draws.__getitem__)
        patch.setattr(adapters, "fit", lambda *args, callbacks, **kw: fit(*args, callbacks=[*callbacks, watch], **kw))
        yield watch, Editor(load_config(overrides=overrides), backbone).finetune(sample)


def test_published_file_is_read(final):
    saved = load_file(FILE)
    assert len(saved) == len(final.down) + len(final.up) == 256
    for path, down in final.down.items():
        assert final.scale[path] == 1
        assert torch.equal(down, saved[f"unet.unet.{path}.lora.down.weight"])
        assert torch.equal(final.up[path], saved[f"unet.unet.{path}.lora.up.weight"])


def test_posterior(backbone, trace):
    """Mean and standard deviation of the picture's latent, which the trace has before scaling."""
    image = to_tensor(np.asarray(Image.open(TRACES / "scene512.png")))
    with torch.no_grad():
        mean, std = backbone.encode(image)
    scale = backbone.pipeline.vae.config.scaling_factor
    np.testing.assert_allclose(mean[0, :, ::4, ::4], trace["latent_mean"] * scale, rtol=0, atol=5e-5)
    np.testing.assert_allclose(std[0, :, ::4, ::4], trace["latent_std"] * scale, rtol=0, atol=5e-5)


@pytest.mark.slow
def test_losses_and_gradients(training, trace):
    watch, _ = training
    np.testing.assert_allclose(watch.losses, trace["loss"], rtol=1e-4)
    np.testing.assert_allclose(watch.norms, trace["grad_norm"], rtol=1e-4)


@pytest.mark.slow
def test_final_weights(training, final):
    _, trained = training
    assert trained.down.keys() == final.down.keys()
    assert trained.scale == final.scale
    for actual, expected in ((trained.down, final.down), (trained.up, final.up)):
        difference = torch.cat([(actual[path] - expected[path]).abs().flatten() for path in expected])
        assert difference.max() <= 2 * LR
        # Adam's first step is of full size also for the few gradients that are zero but for rounding
        assert (difference > 1e-5).float().mean() < 0.002
