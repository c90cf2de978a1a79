"""`model.memory=low`: the same results, and a model that is left as it was."""

import dataclasses

import numpy as np
import pytest
import torch

from dragdiff import Editor, EditSample
from dragdiff.backbones.stable_diffusion import gradient_checkpointing
from dragdiff.config import load_config
from dragdiff.study.plan import determinants


def states(network):
    return [getattr(module, "gradient_checkpointing", None) for module in network.modules()]


@pytest.mark.parametrize("masked", [True, False])
def test_low_memory_gives_the_same_edit_bit_for_bit(backbone, masked):
    config = load_config(["debug"], ["lora.steps=0"])
    low = dataclasses.replace(config, model=dataclasses.replace(config.model, memory="low"))
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), dtype=bool)
    mask[8:56, 8:56] = True
    sample = EditSample(image, "a cat", [[[16, 16], [48, 48]]], mask=mask if masked else None)
    before = states(backbone.network)
    normal = Editor(config, backbone).edit(sample)
    saving = Editor(low, backbone).edit(sample)
    np.testing.assert_array_equal(saving.image, normal.image)
    np.testing.assert_array_equal(saving.trajectory, normal.trajectory)
    assert states(backbone.network) == before
    assert determinants(low) == determinants(config)  # a study does not edit twice for it


def test_with_a_lora_it_is_the_same_but_for_rounding(backbone):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sample = EditSample(image, "a cat", [[[16, 16], [48, 48]]])
    pictures = []
    for memory in ("normal", "low"):
        settings = ["lora.resolution=64", "lora.lr=0.01", "lora.steps=3", f"model.memory={memory}"]
        pictures.append(Editor(load_config(["debug"], settings), backbone).edit(sample).image.astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.5


def test_less_is_kept_for_the_backward_pass_and_gradients_are_equal(backbone):
    def gradient():
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        latent = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0), requires_grad=True)
        condition = {name: value.detach() for name, value in backbone.condition(["a cat"]).items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = backbone.predict(latent, torch.tensor(500), condition)
        output.square().sum().backward()
        return latent.grad, kept

    usual, much = gradient()
    with gradient_checkpointing(backbone.network):
        saved, little = gradient()
    assert torch.equal(saved, usual)
    assert little < 0.5 * much


def test_the_flag_is_put_back_after_an_error(backbone):
    before = states(backbone.network)
    with pytest.raises(ZeroDivisionError), gradient_checkpointing(backbone.network):
        assert states(backbone.network) != before
        raise ZeroDivisionError
    assert states(backbone.network) == before
