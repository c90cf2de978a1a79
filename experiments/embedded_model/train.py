"""Train the embedded model's successor: a small latent diffusion pipeline on scenes of 128 px, in diffusers' format.

    python experiments/embedded_model/train.py                         # all stages, on one CPU core
    python experiments/embedded_model/train.py --only export           # the weights so far, into --checkpoint
    python experiments/embedded_model/train.py --accelerator gpu

Stages: tokenizer -> autoencoder -> encode scenes -> text encoder and UNet together -> export. Each stage resumes from
what is in `--work`, so the same command goes on after an interruption. Where `--work` is empty, it goes on from the
weights in `--checkpoint` (fp16, written by the last stage): with their autoencoder and tokenizer, and with text encoder
and UNet as far as they were trained. The result is loaded like any Stable Diffusion folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: one thread, so that other work has the other cores

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from scenes import RENDERERS, UNIT, caption, render, sample_parameters
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parents[2]
MAX_TOKENS = 48  # the longest caption has 45
CHANNELS = 4  # of the latent
TRAINING_SEED = 10_000_000  # random streams of their own: no held-out scene is drawn from them
SHARD = 2000  # scenes drawn from one stream, half of each family
LAYOUT = 0.65  # how often a caption says where parts are
DROPPED = 0.1  # how often it is empty, for guidance


# ------------------------------------------------------------------------------------------------ data


def build_tokenizer(captions: list[str], folder: Path) -> None:
    """A byte-level BPE tokenizer, trained until each word of the captions is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(captions, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learned["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [letter + "</w>" for letter in alphabet]
    words = [merge.replace(" ", "") for merge in merges]
    tokens = [*dict.fromkeys([*alphabet, *endings, *words]), "<|startoftext|>", "<|endoftext|>"]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = special | {"model_max_length": MAX_TOKENS, "tokenizer_class": "CLIPTokenizer"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def draw_shard(shard: int, pictures: bool = True) -> tuple[np.ndarray | None, list[tuple[str, str]]]:
    """Pictures (SHARD, 128, 128, 3) uint8 if asked for, and for each its captions with and without the layout."""
    rng = np.random.default_rng([TRAINING_SEED, shard])
    images: list[np.ndarray] = []
    captions: list[tuple[str, str]] = []
    for family in RENDERERS:
        n = SHARD // len(RENDERERS)
        parameters = sample_parameters(family, rng, n)
        if pictures:
            images.append(render(family, parameters))
        captions += [(caption(family, parameters, i), caption(family, parameters, i, layout=False)) for i in range(n)]
    return np.concatenate(images) if pictures else None, captions


def render_pictures(work: Path, count: int) -> np.ndarray:
    """`count` pictures for the autoencoder, (count, 128, 128, 3) uint8, on disk."""
    path = work / "pictures.npy"
    if not path.exists():
        partial = work / "pictures.partial"
        images = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(count, UNIT, UNIT, 3))
        for shard in range(-(-count // SHARD)):
            images[shard * SHARD : (shard + 1) * SHARD] = draw_shard(shard)[0][: count - shard * SHARD]
        images.flush()
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------ training


class StepwiseModule(L.LightningModule):
    """Draws its batch from (rank, step), so that a resumed run goes on with the same data; warm-up, hold, decay; EMA.

    Args:
        nets: what is trained.
        lr: peak learning rate.
        steps: in all, `first_step` included: the last 30 % of them decay.
        first_step: steps already behind the weights that this run began with.
    """

    def __init__(
        self, nets: dict[str, torch.nn.Module], batch_size: int, lr: float, steps: int, first_step: int = 0
    ) -> None:
        super().__init__()
        self.nets = torch.nn.ModuleDict(nets)
        self.ema = AveragedModel(self.nets, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        self.ema.requires_grad_(False)
        self.batch_size, self.lr, self.steps, self.first_step = batch_size, lr, steps, first_step
        self.register_buffer("seconds", torch.zeros((), dtype=torch.float64))  # of CPU time, in this run

    @property
    def step(self) -> int:
        return self.first_step + self.global_step

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.step * 64 + self.global_rank + 1)

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.lr, betas=(0.9, 0.99), weight_decay=1e-3)

        def factor(step: int) -> float:
            left = (self.steps - self.first_step - step) / (0.3 * self.steps)
            return min(1.0, (step + 1) / 200, max(0.02, left))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, *_) -> None:
        self._started = time.process_time()

    def on_train_batch_end(self, *_) -> None:
        self.seconds += time.process_time() - self._started
        self.ema.update_parameters(self.nets)


class Autoencoder(StepwiseModule):
    """KL autoencoder at an eighth of the resolution: L1 + 2 MSE + 1e-4 KL.

    While the learning rate holds it sees crops of 64 px, four for the price of a picture; then whole pictures.
    """

    CROP = 64

    def __init__(self, images: np.ndarray, vae: AutoencoderKL, **kwargs) -> None:
        super().__init__({"vae": vae}, **kwargs)
        self.images = images

    def batch(self) -> torch.Tensor:
        """(B, 3, S, S) in [-1, 1]."""
        generator = self.generator()
        cropped = self.step < 0.7 * self.steps
        n = self.batch_size if cropped else self.batch_size // 2
        index = torch.randint(len(self.images), (n,), generator=generator).tolist()
        if not cropped:
            return to_tensor(self.images[sorted(index)])
        corners = torch.randint((UNIT - self.CROP) // 8 + 1, (n, 2), generator=generator).mul(8).tolist()
        crops = [
            self.images[i, top : top + self.CROP, left : left + self.CROP]
            for i, (top, left) in zip(index, corners, strict=True)
        ]
        return to_tensor(np.stack(crops))

    def training_step(self, _: int) -> torch.Tensor:
        x = self.batch().to(self.device)
        vae = self.nets["vae"]
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        mse = F.mse_loss(y, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log("psnr", 10 * torch.log10(4 / mse), prog_bar=True)
        self.log("kl", kl)
        return F.l1_loss(y, x) + 2 * mse + 1e-4 * kl


class Denoiser(StepwiseModule):
    """Text encoder and UNet on cached latents: epsilon MSE, weighted by the square root of min-SNR-5.

    Args:
        mean, std: (N, 4, 16, 16) float16, the posterior of each scene's scaled latent.
        tokens: (N, 2, T), of each scene's captions with and without its layout.
        empty: (1, T), of the empty caption.
        text_encoder, unet: trained together.
    """

    def __init__(
        self,
        mean: torch.Tensor,
        std: torch.Tensor,
        tokens: torch.Tensor,
        empty: torch.Tensor,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        **kwargs,
    ) -> None:
        super().__init__({"text_encoder": text_encoder, "unet": unet}, **kwargs)
        self.mean, self.std, self.tokens, self.empty = mean, std, tokens, empty
        self.scheduler = sd_scheduler()

    def training_step(self, _: int) -> torch.Tensor:
        generator = self.generator()
        index = torch.randint(len(self.mean), (self.batch_size,), generator=generator)
        mean, std = self.mean[index].float(), self.std[index].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(1000, (self.batch_size,), generator=generator)
        plain = (torch.rand(self.batch_size, generator=generator) > LAYOUT).long()
        dropped = torch.rand(self.batch_size, generator=generator) < DROPPED
        tokens = torch.where(dropped[:, None], self.empty, self.tokens[index, plain]).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, t)
        alpha = self.scheduler.alphas_cumprod[t]
        snr = alpha / (1 - alpha)
        weight = (snr.clamp(max=5) / snr).sqrt().to(self.device)
        text = self.nets["text_encoder"](tokens).last_hidden_state
        predicted = self.nets["unet"](noisy.to(self.device), t.to(self.device), text).sample
        error = (predicted - noise.to(self.device)).square().mean(dim=(1, 2, 3))
        self.log("mse", error.mean(), prog_bar=True)
        return (weight * error).mean()


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder whose signal survives its depth.

    Convolutions keep the variance and residual branches begin at zero: PSNR after 120 steps 17.5 instead of 15.2 dB.
    """
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=UNIT,
        mid_block_add_attention=False,
    )
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
    with torch.no_grad():  # a posterior of little noise
        vae.quant_conv.weight[CHANNELS:] *= 0.1
        vae.quant_conv.bias[CHANNELS:] = -4.0
    return vae


def new_nets(vocabulary: int) -> dict[str, torch.nn.Module]:
    """An untrained text encoder and UNet, the latter of Stable Diffusion's shape."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=96,
            intermediate_size=384,
            projection_dim=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=UNIT // 8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 96, 128, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return {"text_encoder": text_encoder, "unet": unet}


def sd_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def fit(module: StepwiseModule, work: Path, name: str, args: argparse.Namespace) -> None:
    checkpoint = ModelCheckpoint(work / name, save_last=True, train_time_interval=timedelta(minutes=10), save_top_k=0)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        max_steps=module.steps - module.first_step,
        gradient_clip_val=1.0,
        callbacks=[checkpoint],
        logger=CSVLogger(work / "logs", name=name, flush_logs_every_n_steps=50),
        log_every_n_steps=25,
        enable_progress_bar=args.progress,
        enable_model_summary=False,
    )
    last = work / name / "last.ckpt"
    steps = DataLoader(range(module.steps), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, steps, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    trainer.save_checkpoint(last)
    (work / f"{name}.done").touch()


def trained(work: Path, stage: str) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
    """The EMA weights of each net in a stage's last checkpoint of this work folder; its steps and CPU hours."""
    last = work / stage / "last.ckpt"
    weights: dict[str, dict[str, torch.Tensor]] = {}
    if not last.exists():
        return weights, {"steps": 0, "hours": 0.0}
    checkpoint = torch.load(last, map_location="cpu", weights_only=False)
    for key, value in checkpoint["state_dict"].items():
        if key.startswith("ema.module."):
            net, name = key.removeprefix("ema.module.").split(".", 1)
            weights.setdefault(net, {})[name] = value
    return weights, {"steps": checkpoint["global_step"], "hours": float(checkpoint["state_dict"]["seconds"]) / 3600}


def before(work: Path, name: str) -> dict[str, float]:
    """Steps and CPU hours of a stage that are behind the weights which this work folder began with."""
    path = work / "start" / "progress.json"
    return (json.loads(path.read_text()) if path.exists() else {}).get(name, {"steps": 0, "hours": 0.0})


# ------------------------------------------------------------------------------------------------ stages


def load_vae(work: Path) -> AutoencoderKL:
    """The autoencoder as far as it is trained, else as this work folder began."""
    start = work / "start" / "vae"
    vae = AutoencoderKL.from_pretrained(start).float() if start.exists() else new_vae()
    for weights in trained(work, "autoencoder")[0].values():
        vae.load_state_dict(weights)
    return vae


def load_nets(work: Path, vocabulary: int) -> dict[str, torch.nn.Module]:
    """Text encoder and UNet as far as they are trained, else as this work folder began."""
    start = work / "start"
    if (start / "unet").exists():
        text_encoder = CLIPTextModel.from_pretrained(start / "text_encoder").float()
        nets = {"text_encoder": text_encoder, "unet": UNet2DConditionModel.from_pretrained(start / "unet").float()}
    else:
        nets = new_nets(vocabulary)
    for net, weights in trained(work, "denoiser")[0].items():
        nets[net].load_state_dict(weights)
    return nets


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, work: Path, count: int) -> None:
    """The posterior's mean and std for each scene, shard by shard, scaled so that latents have unit variance."""
    vae, factor = vae.eval(), work / "scaling_factor.json"
    (work / "latents").mkdir(exist_ok=True)
    if not factor.exists() and before(work, "denoiser")["steps"]:
        factor.write_text(json.dumps(vae.config.scaling_factor))
    for shard in range(-(-count // SHARD)):
        path = work / "latents" / f"{shard:04d}.pt"
        if path.exists():
            continue
        images, captions = draw_shard(shard)
        posteriors = [vae.encode(to_tensor(images[start : start + 50])).latent_dist for start in range(0, SHARD, 50)]
        mean, std = (torch.cat([getattr(p, name) for p in posteriors]) for name in ("mean", "std"))
        if not factor.exists():
            factor.write_text(json.dumps(float(1.0 / (mean.var() + std.square().mean()).sqrt())))
        scale = json.loads(factor.read_text())
        content = {"mean": (mean * scale).half(), "std": (std * scale).half(), "captions": captions}
        torch.save(content, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)


def build_denoiser(work: Path, tokenizer: CLIPTokenizer, **kwargs) -> Denoiser:
    def tokenise(captions: list[str]) -> torch.Tensor:
        return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids

    shards = [torch.load(path) for path in sorted((work / "latents").glob("*.pt"))]
    tokens = [tokenise([text for pair in shard["captions"] for text in pair]).unflatten(0, (-1, 2)) for shard in shards]
    return Denoiser(
        torch.cat([shard["mean"] for shard in shards]),
        torch.cat([shard["std"] for shard in shards]),
        torch.cat(tokens),
        tokenise([""]),
        **{name: net.train() for name, net in load_nets(work, len(tokenizer)).items()},
        **kwargs,
    )


def export(work: Path, destination: Path) -> None:
    """Write the weights so far, fp16 safetensors, with the `progress.json` that a run goes on from.

    A whole pipeline, or autoencoder and tokenizer alone until text encoder and UNet are begun.
    """
    tokenizer, vae = CLIPTokenizer.from_pretrained(work / "tokenizer"), load_vae(work)
    if (work / "scaling_factor.json").exists():
        vae.register_to_config(scaling_factor=json.loads((work / "scaling_factor.json").read_text()))
    if (work / "denoiser" / "last.ckpt").exists() or before(work, "denoiser")["steps"]:
        nets = load_nets(work, len(tokenizer))
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=nets["text_encoder"],
            tokenizer=tokenizer,
            unet=nets["unet"],
            scheduler=sd_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.to(dtype=torch.float16)
        pipeline.save_pretrained(destination, safe_serialization=True)
    else:  # an untrained UNet is not worth its megabytes
        tokenizer.save_pretrained(destination / "tokenizer")
        vae.half().save_pretrained(destination / "vae")
    progress: dict[str, object] = {"training_seed": TRAINING_SEED}
    for name in ("autoencoder", "denoiser"):
        now, total = trained(work, name)[1], before(work, name)
        progress[name] = {"steps": total["steps"] + now["steps"], "hours": round(total["hours"] + now["hours"], 2)}
    (destination / "progress.json").write_text(json.dumps(progress, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "embedded_model_128", help="of the run")
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint", help="fp16 weights")
    parser.add_argument("--pictures", type=int, default=20_000, help="that the autoencoder sees")
    parser.add_argument("--vae-steps", type=int, default=30_000)
    parser.add_argument("--vae-batch", type=int, default=4, help="crops of 64 px a step")
    parser.add_argument("--scenes", type=int, default=100_000, help="that text encoder and UNet see")
    parser.add_argument("--steps", type=int, default=60_000, help="of text encoder and UNet")
    parser.add_argument("--batch", type=int, default=24, help="scenes a step")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--only", choices=["autoencoder", "denoiser", "export"], help="one stage")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.accelerator == "cpu" else 4)
    L.seed_everything(0, verbose=False)
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)

    fresh = not (work / "tokenizer").exists()
    if fresh and (args.checkpoint / "progress.json").exists():
        shutil.copytree(args.checkpoint, work / "start")
        shutil.copytree(work / "start" / "tokenizer", work / "tokenizer")
    elif fresh:
        pairs = [pair for shard in range(10) for pair in draw_shard(shard, pictures=False)[1]]
        build_tokenizer(sorted({text for pair in pairs for text in pair}), work / "tokenizer")
    steps = before(work, "autoencoder")["steps"]
    if args.only in (None, "autoencoder") and steps < args.vae_steps and not (work / "autoencoder.done").exists():
        images = render_pictures(work, args.pictures)
        settings = {"batch_size": args.vae_batch, "lr": 1e-3, "steps": args.vae_steps, "first_step": steps}
        fit(Autoencoder(images, load_vae(work).train(), **settings), work, "autoencoder", args)
    steps = before(work, "denoiser")["steps"]
    if args.only in (None, "denoiser") and steps < args.steps and not (work / "denoiser.done").exists():
        encode_scenes(load_vae(work), work, args.scenes)
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        settings = {"batch_size": args.batch, "lr": 1e-3, "steps": args.steps, "first_step": steps}
        fit(build_denoiser(work, tokenizer, **settings), work, "denoiser", args)
    if args.only in (None, "export"):
        export(work, args.checkpoint)


if __name__ == "__main__":
    main()
