"""`model.compile`: the same gradients and edits; what computes something else is found out; the model is put back."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch

from dragdiff import Editor, EditSample, Request
from dragdiff.config import load_config
from dragdiff.errors import UserError
from dragdiff.modules import lora
from dragdiff.modules.backbone import StableDiffusion, channels_last
from dragdiff.modules.compilation import TOLERANCE, Compilation, difference, is_plain, relative_error
from dragdiff.modules.denoiser import Denoiser
from dragdiff.study.plan import determinants

SETTINGS = ["drag.features=[up_blocks.0]", "control.start_layer=up_blocks.1", "cache.enabled=false"]
SETTINGS += ["lora.resolution=32", "lora.lr=0.01"]


def aot_eager(function):
    """All of `torch.compile` but the generation of code, which takes long."""
    return torch.compile(function, backend="aot_eager")


def detached(function):
    """A compiler that loses the gradient of a block's input."""
    return lambda x, *args, **kwargs: function(x.detach(), *args, **kwargs)


def halved(function):
    """A compiler that is wrong about the output."""
    return lambda *args, **kwargs: 0.5 * function(*args, **kwargs)


def failing(function):
    raise RuntimeError("no compiler here\nnor there")


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    """With attention at one size only, so that there is little to compile."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).requires_grad_(False)
    return pipeline


@pytest.fixture
def backbone(pipeline):
    return StableDiffusion(pipeline)


def sample(seed=0):
    image = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return EditSample(image, "a cat", [[[16, 16], [48, 48]]])


def config(*overrides, compiled=True):
    return load_config(["debug"], [*SETTINGS, f"model.compile={compiled}", *overrides])


def edited(backbone, *overrides, compiled=True):
    return Editor(config(*overrides, compiled=compiled), backbone).edit(sample()).image.astype(int)


def probe_gradient(backbone, *, blocks, need_output, guidance=1.0):
    """Of features, and the output if needed, by the latent."""
    with torch.no_grad():
        embeddings = backbone.embed(["a cat"]).expand(2 if guidance > 1 else 1, 1, -1, -1)
    latent = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0), requires_grad=True)
    denoiser = Denoiser(backbone, embeddings, guidance=guidance)
    output, maps = denoiser.with_features(latent, torch.tensor(500), [0], blocks=blocks, need_output=need_output)
    assert (output is not None) == need_output
    values = [*maps] if output is None else [*maps, output]
    torch.stack([value.square().sum() for value in values]).sum().backward()
    return latent.grad


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [aot_eager, torch.compile])
def test_gradients_and_edit_are_those_of_eager(backbone, compiler):
    backbone.compilation = Compilation(compiler)
    probes = [
        {"blocks": ["up_blocks.1"], "need_output": False},
        {"blocks": ["up_blocks.0", "up_blocks.1"], "need_output": True},
    ]
    if compiler is aot_eager:
        probes.append({"blocks": ["up_blocks.0"], "need_output": True, "guidance": 7.5})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="model.compile")
        for probe in probes:
            expected = probe_gradient(backbone, **probe)
            with backbone.compiled():
                found = probe_gradient(backbone, **probe)
            assert relative_error(found, expected) < 1e-4
        assert np.abs(edited(backbone, "lora.steps=0") - edited(backbone, "lora.steps=0", compiled=False)).max() <= 1
    assert backbone.compilation.enabled


@pytest.mark.slow
def test_what_was_compiled_serves_later_edits_and_a_lora_is_trained_with_it(backbone):
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    def counting(function):
        return torch.compile(function, backend=backend)

    for steps in (0, 3):
        expected = edited(backbone, f"lora.steps={steps}", compiled=False)
        backbone.compilation = Compilation(counting)
        found = [edited(backbone, f"lora.steps={steps}")]
        assert (count := len(calls)) > 0
        found.append(edited(backbone, f"lora.steps={steps}"))
        backbone.compilation = Compilation(counting)  # what another model of this kind has; it compares anew
        found.append(edited(backbone, f"lora.steps={steps}"))
        assert len(calls) == count
        assert max(np.abs(image - expected).max() for image in found) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 2])
def test_a_batch_that_shrinks(backbone, steps):
    """Its pictures' own LoRAs are beside the network, in replaced forwards: the blocks that have them stay eager."""

    def run(compiled):
        settings = config(f"lora.steps={steps}", compiled=compiled)
        lengths = [dataclasses.replace(settings, drag=dataclasses.replace(settings.drag, steps=n)) for n in (1, 2, 3)]
        return Editor(settings, backbone).edit_batch([Request(sample(n), own) for n, own in enumerate(lengths)])

    expected = run(compiled=False)
    backbone.compilation = Compilation(aot_eager)
    for found, result in zip(run(compiled=True), expected, strict=True):
        assert found.steps == result.steps
        assert np.abs(found.image.astype(int) - result.image.astype(int)).max() <= 1
    assert backbone.compilation.enabled


@pytest.mark.parametrize(
    ("compiler", "words"), [(detached, "off by"), (halved, "off by 0.5"), (failing, "no compiler here nor there")]
)
def test_what_can_not_be_trusted_is_not_used(backbone, compiler, words):
    backbone.compilation = Compilation(compiler)
    expected = edited(backbone, "lora.steps=0", compiled=False)
    with pytest.warns(UserWarning, match=words) as said:
        found = edited(backbone, "lora.steps=0")
    assert len([warning for warning in said if "model.compile" in str(warning.message)]) == 1
    np.testing.assert_array_equal(found, expected)
    assert not backbone.compilation.enabled
    with warnings.catch_warnings():  # it is said once
        warnings.filterwarnings("error", message="model.compile")
        edited(backbone, "lora.steps=0")


def test_a_lost_gradient_of_a_lora_is_seen(backbone):
    block = backbone.network.down_blocks[0].attentions[0].transformer_blocks[0]
    args = (torch.randn(2, 4, 8),)
    kwargs = {"encoder_hidden_states": torch.randn(2, 3, 8), "attention_mask": None}

    def forgets(*args, **kwargs):
        with torch.no_grad():
            return block.forward(*args, **kwargs)

    with lora.injected(backbone.network, backbone.lora_targets, rank=2, alpha=2, seed=0):
        weights = list(block.parameters())
        assert difference(block.forward, block.forward, weights, args, kwargs) == (0, TOLERANCE[torch.float32])
        assert difference(forgets, block.forward, weights, args, kwargs)[0] == 1  # nothing is left of the gradient


def test_a_block_with_loras_beside_it_is_not_plain(backbone):
    block = backbone.network.down_blocks[0].attentions[0].transformer_blocks[0]
    with lora.injected(backbone.network, backbone.lora_targets, rank=2, alpha=2, seed=0):
        assert is_plain(block)  # these are part of what is compiled
        adapter = lora.extract(lora.parameters(backbone.network), scale=1.0)
    with lora.beside(backbone.network, lora.Rows.of([adapter, None])):
        assert not is_plain(block)
    assert is_plain(block)


def test_relative_error():
    one = torch.tensor([3.0, 4.0])
    assert relative_error(one, one) == relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.zeros(2), one) == 1
    assert relative_error(one, torch.zeros(2)) == torch.inf
    assert relative_error(torch.tensor([torch.nan, 0]), one) == torch.inf
    assert math.isnan(relative_error(one, torch.tensor([torch.nan, 0])))


def test_what_is_not_finite_says_nothing_about_the_compiler(backbone):
    backbone.compilation = Compilation(aot_eager)
    latent, embeddings = (
        torch.full((1, 4, 8, 8), torch.nan),
        torch.randn(1, 16, backbone.network.config.cross_attention_dim),
    )
    with warnings.catch_warnings(), torch.no_grad(), backbone.compiled():
        warnings.filterwarnings("error", message="model.compile")
        assert backbone.predict(latent, torch.tensor(5), embeddings).isnan().all()
    assert backbone.compilation.enabled and not backbone.compilation._trusted


def test_memory_running_out_is_not_taken_for_a_compiler_that_fails(backbone):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    backbone.compilation = Compilation(lambda function: full)
    with pytest.raises(torch.OutOfMemoryError):
        Editor(config("lora.steps=0"), backbone)._edit_batch([Request(sample())])
    assert backbone.compilation.enabled


def test_the_network_is_put_back_after_an_error(backbone):
    own, slot = object(), "_compiled_call_impl"
    blocks = [backbone.network.down_blocks[0].attentions[0].transformer_blocks[0]]
    vars(blocks[0])[slot] = own  # a pipeline's owner may have compiled a block
    before = [dict(vars(module)) for module in backbone.network.modules()]
    try:
        with pytest.raises(ZeroDivisionError), backbone.compiled():
            assert vars(blocks[0])[slot] is not own
            raise ZeroDivisionError
        assert [dict(vars(module)) for module in backbone.network.modules()] == before
    finally:
        del vars(blocks[0])[slot]


def test_channels_last_changes_rounding_alone_and_is_put_back(backbone):
    network = backbone.network
    weights = [(weight, weight.clone(), weight.stride()) for weight in network.parameters()]
    probe = {"blocks": ["up_blocks.0"], "need_output": True}
    expected = probe_gradient(backbone, **probe)
    with channels_last(network):
        kernel = network.conv_in.weight
        assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
        assert relative_error(probe_gradient(backbone, **probe), expected) < 1e-5
    for (weight, value, stride), now in zip(weights, network.parameters(), strict=True):
        assert now is weight and torch.equal(now, value) and now.stride() == stride


def test_settings():
    usual, compiled = config(compiled=False), config()
    assert determinants(usual) == determinants(compiled)  # a study does not edit twice for it
    with pytest.raises(UserError, match="does not go with"):
        config("model.memory=low")
