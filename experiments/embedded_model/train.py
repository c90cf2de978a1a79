"""Train the embedded model: a small latent diffusion pipeline on procedural scenes, in diffusers' format.

    python experiments/embedded_model/train.py                  # all stages, about 2 hours on 2 CPU cores
    python experiments/embedded_model/train.py --devices 1 --accelerator gpu

Stages: render scenes -> autoencoder -> encode -> text encoder and UNet together -> export. Each stage resumes from
what is in `--work`, so the same command goes on after an interruption. The result, `dragdiff/assets/embedded-sd`, is
loaded like any Stable Diffusion folder.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: data-parallel workers of one thread beat one of two

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dragdiff.data.scenes import RENDERERS, caption, render, sample_parameters

ROOT = Path(__file__).resolve().parents[2]
MAX_TOKENS = 40
TRAINING_SEED = 10_000_000  # a random stream of its own: no held-out scene is drawn from it


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


def render_dataset(work: Path, count: int) -> None:
    """Images (count, 64, 64, 3) uint8 and their captions, half of each family, on disk."""
    if (work / "captions.json").exists():
        return
    images = np.lib.format.open_memmap(work / "images.npy", mode="w+", dtype=np.uint8, shape=(count, 64, 64, 3))
    captions: list[str] = []
    rng = np.random.default_rng(TRAINING_SEED)
    chunk = 500
    for start in range(0, count, chunk):
        family = list(RENDERERS)[(start // chunk) % len(RENDERERS)]
        n = min(chunk, count - start)
        parameters = sample_parameters(family, rng, n)
        images[start : start + n] = render(family, parameters)
        captions += [caption(family, parameters, i) for i in range(n)]
    images.flush()
    (work / "captions.json").write_text(json.dumps(captions))


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------ training


class StepwiseModule(L.LightningModule):
    """Draws its batch from (rank, step), so that a resumed run goes on with the same data; warm-up, hold, decay."""

    def __init__(self, batch_size: int, lr: float, steps: int) -> None:
        super().__init__()
        self.batch_size, self.lr, self.steps = batch_size, lr, steps

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.global_step * 64 + self.global_rank + 1)

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.lr, betas=(0.9, 0.99), weight_decay=1e-3)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / 200, max(0.02, (self.steps - step) / (0.3 * self.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Autoencoder(StepwiseModule):
    """KL autoencoder at a quarter of the resolution: L1 + 2 MSE + 5e-4 KL."""

    def __init__(self, images: np.ndarray, **kwargs) -> None:
        super().__init__(**kwargs)
        self.images = images
        self.vae = AutoencoderKL(
            block_out_channels=(16, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=64,
            mid_block_add_attention=False,
        )

    def training_step(self, _: int) -> torch.Tensor:
        generator = self.generator()
        index = torch.randint(len(self.images), (self.batch_size,), generator=generator).numpy()
        x = to_tensor(self.images[np.sort(index)]).to(self.device)
        posterior = self.vae.encode(x).latent_dist
        y = self.vae.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample
        mse = F.mse_loss(y, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        self.log("psnr", 10 * torch.log10(4 / mse), prog_bar=True)
        self.log("kl", kl)
        return F.l1_loss(y, x) + 2 * mse + 5e-4 * kl


class Denoiser(StepwiseModule):
    """Text encoder and UNet on cached latents: epsilon MSE, weighted by the square root of min-SNR-5, with an EMA."""

    def __init__(
        self,
        mean: torch.Tensor,
        std: torch.Tensor,
        tokens: torch.Tensor,
        empty: torch.Tensor,
        vocabulary: int,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.mean, self.std, self.tokens, self.empty = mean, std, tokens, empty
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=64,
                intermediate_size=256,
                projection_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=vocabulary - 2,
                eos_token_id=vocabulary - 1,
                pad_token_id=vocabulary - 1,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(40, 80, 112, 128),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            layers_per_block=1,
            cross_attention_dim=64,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        self.nets = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
        self.ema = AveragedModel(self.nets, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        self.ema.requires_grad_(False)
        self.scheduler = sd_scheduler()

    def training_step(self, _: int) -> torch.Tensor:
        generator = self.generator()
        index = torch.randint(len(self.mean), (self.batch_size,), generator=generator)
        mean, std = self.mean[index].float(), self.std[index].float()
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        t = torch.randint(1000, (self.batch_size,), generator=generator)
        tokens = self.tokens[index]
        dropped = torch.rand(self.batch_size, generator=generator) < 0.1
        tokens = torch.where(dropped[:, None], self.empty, tokens).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, t)
        alpha = self.scheduler.alphas_cumprod[t]
        snr = alpha / (1 - alpha)
        weight = (snr.clamp(max=5) / snr).sqrt().to(self.device)
        text = self.nets["text_encoder"](tokens).last_hidden_state
        predicted = self.nets["unet"](noisy.to(self.device), t.to(self.device), text).sample
        error = (predicted - noise.to(self.device)).square().mean(dim=(1, 2, 3))
        self.log("mse", error.mean(), prog_bar=True)
        return (weight * error).mean()

    def on_train_batch_end(self, *_) -> None:
        self.ema.update_parameters(self.nets)


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
    checkpoint = ModelCheckpoint(work / name, save_last=True, every_n_train_steps=250, save_top_k=0)
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        max_steps=module.steps,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        callbacks=[checkpoint],
        logger=CSVLogger(work / "logs", name=name, flush_logs_every_n_steps=50),
        log_every_n_steps=50,
        enable_progress_bar=args.progress,
        enable_model_summary=False,
    )
    last = work / name / "last.ckpt"
    steps = DataLoader(range(module.steps), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, steps, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), work / f"{name}.pt")


# ------------------------------------------------------------------------------------------------ stages


@torch.no_grad()
def encode_dataset(vae: AutoencoderKL, work: Path) -> None:
    """The posterior's mean and std for each image, scaled so that latents have unit variance."""
    if (work / "latents.pt").exists():
        return
    images = np.load(work / "images.npy", mmap_mode="r")
    vae = vae.eval()
    means, stds = [], []
    for start in range(0, len(images), 100):
        posterior = vae.encode(to_tensor(images[start : start + 100])).latent_dist
        means.append(posterior.mean.half())
        stds.append(posterior.std.half())
    mean, std = torch.cat(means), torch.cat(stds)
    factor = float(1.0 / (mean.float().var() + std.float().square().mean()).sqrt())
    torch.save(
        {"mean": (mean * factor).half(), "std": (std * factor).half(), "scaling_factor": factor},
        work / "latents.pt",
    )


def export(work: Path, destination: Path) -> None:
    """Write the EMA weights as an fp16 safetensors pipeline."""
    latents = torch.load(work / "latents.pt")
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    denoiser = build_denoiser(work, tokenizer, batch_size=1, lr=0, steps=1)
    path = work / "denoiser.pt"
    state = (
        torch.load(path)
        if path.exists()
        else torch.load(work / "denoiser" / "last.ckpt", weights_only=False)["state_dict"]
    )
    denoiser.load_state_dict(state)
    nets = denoiser.ema.module
    vae = load_vae(work)
    vae.register_to_config(scaling_factor=latents["scaling_factor"])
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


def load_vae(work: Path) -> AutoencoderKL:
    module = Autoencoder(np.zeros((1, 64, 64, 3), np.uint8), batch_size=1, lr=0, steps=1)
    module.load_state_dict(torch.load(work / "autoencoder.pt"))
    return module.vae


def build_denoiser(work: Path, tokenizer: CLIPTokenizer, **kwargs) -> Denoiser:
    latents = torch.load(work / "latents.pt")
    captions = json.loads((work / "captions.json").read_text())
    unique = sorted(set(captions))
    encoded = tokenizer(unique, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    row = {text: i for i, text in enumerate(unique)}
    tokens = encoded[[row[text] for text in captions]]
    empty = tokenizer([""], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    return Denoiser(latents["mean"], latents["std"], tokens, empty, len(tokenizer), **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "embedded_model", help="checkpoints and logs")
    parser.add_argument("--destination", type=Path, default=ROOT / "dragdiff" / "assets" / "embedded-sd")
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=4400, help="of the text encoder and UNet")
    parser.add_argument(
        "--batch", type=int, default=24, help="scenes a device and step (the autoencoder: a third of it)"
    )
    parser.add_argument("--devices", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--only", choices=["autoencoder", "denoiser", "export"], help="one stage")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.accelerator == "cpu" else 4)
    L.seed_everything(0, verbose=False)
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)

    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if first:  # the other ranks are started by the Trainer, after this
        render_dataset(work, args.scenes)
        if not (work / "tokenizer" / "tokenizer_config.json").exists():
            captions = sorted(set(json.loads((work / "captions.json").read_text())))
            build_tokenizer(captions, work / "tokenizer")
    if args.only in (None, "autoencoder") and not (work / "autoencoder.pt").exists():
        images = np.load(work / "images.npy", mmap_mode="r")
        fit(
            Autoencoder(images, batch_size=args.batch // 3, lr=2e-3, steps=args.vae_steps),
            work,
            "autoencoder",
            args,
        )
    if args.only in (None, "denoiser") and not (work / "denoiser.pt").exists():
        if first:
            encode_dataset(load_vae(work), work)
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        module = build_denoiser(work, tokenizer, batch_size=args.batch, lr=1e-3, steps=args.steps)
        fit(module, work, "denoiser", args)
    if args.only in (None, "export") and first:
        export(work, args.destination)


if __name__ == "__main__":
    main()
