"""Mixed precision, run through on a CPU in bf16: whole edits stay finite and near those in fp32."""

import numpy as np
import pytest
import torch

from dragdiff import Editor, EditSample
from dragdiff.backbones.loading import load_backbone
from dragdiff.callbacks import DragCallback
from dragdiff.config import load_config
from dragdiff.stages import adapters

# bf16 keeps 8 bits: an operation is off by up to 2^-9 of its result, a network's output by some per cent. A wrong
# scale, or a gradient that is lost, is off by its own size.
FIRST, LATER = 0.02, 0.25  # losses, relative: from one latent; and after updates by rounded gradients
ALIKE = (
    0.9  # cosine of what the LoRAs have learned: AdamW's steps go by the gradients' signs, of which rounding has some
)
LEVELS = 5  # of 255, mean over the picture, whose standard deviation is 39
SETTINGS = {
    "dragdiffusion": ["drag.steps=4"],
    "dragnoise": ["drag.steps=4"],
    "fastdrag": [],
    "gooddrag": ["gooddrag.levels=2", "gooddrag.trackings=2", "gooddrag.updates=1"],
}


class Watcher(DragCallback):
    """Keeps losses, and the types that autocast made of features."""

    def __init__(self):
        self.losses, self.types = [], set()

    def on_features(self, trainer, drag, features):
        self.types |= {values.dtype for values in features.maps}

    def on_update(self, trainer, drag, features):
        self.losses.append(float(drag.values["drag/loss"]))
        assert drag.value.dtype == torch.float32
        assert torch.isfinite(drag.value).all()


def edit(model, autocast, *settings):
    overrides = [f"model.path={model}", "model.device=cpu", f"model.autocast={autocast}", "cache.enabled=false"]
    short = ["ddim.steps=4", "ddim.strength=0.75", "lora.steps=3", "lora.batch_size=1", "lora.resolution=64"]
    config = load_config(overrides=[*overrides, *short, "drag.stop_distance=0", "output.frames_every=0", *settings])
    mask = np.zeros((64, 64), bool)
    mask[8:-8, 8:-8] = True
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sample, watcher = EditSample(picture, "a", [[[20, 20], [40, 24]]], mask), Watcher()
    learned, original = [], adapters.trained_loras

    def trained(*args):
        learned.extend(original(*args))
        return learned

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "trained_loras", trained)
        result = Editor(config, load_backbone(config.model)).edit(sample, callbacks=[watcher])
    return result, watcher, learned[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
def test_edit_in_mixed_precision(method, tiny_pipeline):
    settings = [f"method={method}", *SETTINGS[method]]
    plain, watched, lora = edit(tiny_pipeline, "none", *settings)
    mixed, watched_mixed, lora_mixed = edit(tiny_pipeline, "bf16", *settings)
    for path, up in lora_mixed.up.items():
        assert up.dtype == torch.float32, path
    learned, learned_mixed = (torch.cat([up.flatten() for up in own.up.values()]) for own in (lora, lora_mixed))
    assert float(learned_mixed.norm()) == pytest.approx(float(learned.norm()), rel=0.05)
    assert float(torch.cosine_similarity(learned, learned_mixed, dim=0)) > ALIKE
    assert not torch.equal(learned, learned_mixed)  # it was on
    assert np.abs(mixed.image.astype(int) - plain.image).mean() < LEVELS
    if method != "fastdrag":
        assert (watched.types, watched_mixed.types) == ({torch.float32}, {torch.bfloat16})
        assert mixed.steps == plain.steps == len(watched_mixed.losses) == 4
        assert watched_mixed.losses[0] == pytest.approx(watched.losses[0], rel=FIRST)
        assert watched_mixed.losses == pytest.approx(watched.losses, rel=LATER)
