"""Mixed precision, run through on a CPU in bf16: whole edits stay finite and near those in fp32."""

import numpy as np
import pytest
import torch

from dragdiff import Editor, EditSample
from dragdiff.backbones.loading import load_backbone
from dragdiff.callbacks import DragCallback
from dragdiff.config import load_config
from dragdiff.stages import adapters

# bf16 has 8 bits of mantissa: each operation of a forward is off by up to 2^-8 of its result. Of sums over a network's
# layers that leaves some per cent; a wrong scale, or a gradient that was lost, is off by its whole size.
ROUNDING = 0.1
SETTINGS = {
    "dragdiffusion": ["drag.steps=4"],
    "dragnoise": ["drag.steps=4"],
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
    assert watched.types == {torch.float32}
    assert watched_mixed.types == {torch.bfloat16}  # it was on
    assert mixed.steps == plain.steps == len(watched_mixed.losses) > 0
    assert np.isfinite(watched_mixed.losses).all()
    # the first step starts from the same latent but for the LoRA; from the second on handles may differ
    assert watched_mixed.losses[0] == pytest.approx(watched.losses[0], rel=ROUNDING, abs=1e-3)
    for path, up in lora.up.items():
        assert lora_mixed.up[path].dtype == torch.float32
        assert torch.isfinite(lora_mixed.up[path]).all()
        # AdamW's steps are about lr in each entry, whatever the gradient's size
        assert 0 < lora_mixed.up[path].abs().max() < 2 * up.abs().max()
    # a drag by Adam may go apart where rounding decides a sign: by lr a step, of latents of size 1
    difference = np.abs(mixed.image.astype(int) - plain.image).mean()
    assert difference < 255 * ROUNDING
