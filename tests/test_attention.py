"""Reference-latent control: what it computes, where and when, and that it leaves the model as it found it."""

import copy

import numpy as np
import pytest
import torch
from conftest import TRACES
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from dragdiff.backbones.attention import mutual_self_attention, recorded
from dragdiff.backbones.layout import layers_from
from dragdiff.config import load_config
from dragdiff.data.sample import EditSample
from dragdiff.editor import Editor
from dragdiff.errors import UserError
from dragdiff.modules import lora


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TEXT = random(1, 77, 32, seed=9)


@pytest.fixture(scope="module")
def unet(backbone):
    return backbone.network.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def layers(backbone):
    return backbone.self_attention_layers


def run(unet, rows):
    with torch.no_grad():
        return unet(rows, torch.tensor(681), encoder_hidden_states=TEXT.expand(len(rows), -1, -1)).sample


def processors(unet):
    return {name: module.processor for name, module in unet.named_modules() if hasattr(module, "processor")}


# --- where ----------------------------------------------------------------------------------------------------


def test_layers_in_order_of_execution(unet, layers):
    ran = []
    removable = [
        unet.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name in layers
    ]
    run(unet, random(1, 4, 16, 16))
    for hook in removable:
        hook.remove()
    assert ran == layers
    assert len(layers) == 16


def test_start_by_name_or_number(layers):
    assert layers_from(layers, "up_blocks.2") == layers_from(layers, "10") == layers[10:]
    assert all(name.startswith(("up_blocks.2.", "up_blocks.3.")) for name in layers[10:])
    assert layers_from(layers, layers[7]) == layers[7:]
    assert layers_from(layers, "mid_block") == layers[6:]
    assert layers_from(layers, "0") == layers


@pytest.mark.parametrize("start", ["16", "-1", "up_blocks.0", "up_blocks.22", "attn1", ""])
def test_other_starts_are_refused(layers, start):
    with pytest.raises(
        UserError, match=r"mid_block, up_blocks\.1, up_blocks\.2, up_blocks\.3 \(or a number from 0 to 15"
    ):
        layers_from(layers, start)


class Watching:
    """A processor that notes what it is given as keys and values, and passes it on."""

    def __init__(self, processor, calls):
        self.processor, self.calls = processor, calls

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        self.calls.append((attn, hidden_states, encoder_hidden_states))
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def test_recorded_calls_are_controlled_and_no_others(backbone, unet):
    """Of four denoising steps with start step 2, the published code takes over these (step, call of an attention)."""
    settings = ["ddim.steps=8", "ddim.strength=0.5", "control.start_layer='10'", "control.start_step=2"]
    quick = ["cache.enabled=false", "lora.steps=0", "drag.steps=1", "drag.lr=0.5", "output.frames_every=0"]
    before, calls = processors(unet), []

    def report(stage, done, total, note):
        if stage == "denoise" and done == 0:
            calls.clear()

    editor = Editor(load_config(overrides=["model.device=cpu", *settings, *quick]), backbone, report=report)
    for module in unet.modules():
        if hasattr(module, "processor"):
            module.set_processor(Watching(module.processor, calls))
    try:
        editor.edit(EditSample(np.zeros((128, 128, 3), np.uint8), "", [[[9, 9], [20, 20]]]))
    finally:
        for name, processor in before.items():
            unet.get_submodule(name).set_processor(processor)
    assert len(calls) == 4 * 2 * 32  # steps, source and edited, attention layers
    hits = []
    for number, (source, edited) in enumerate(
        np.reshape(np.arange(len(calls)), (4, 2, 32)).swapaxes(1, 2).reshape(-1, 2)
    ):
        step, call = divmod(number, 32)
        context = calls[edited][2]
        controlled = context is not None and context.shape[1] != 77
        assert calls[source][2] is None or calls[source][2].shape[1] == 77
        hits.append([step, call, int(controlled)])
        if controlled:
            assert torch.equal(context, calls[source][1]) and not torch.equal(context, calls[edited][1])
    np.testing.assert_array_equal(hits, np.load(TRACES / "units.npz")["editor_hits"])


# --- what -----------------------------------------------------------------------------------------------------


def masactrl(attn, edited, source):
    """The formula: softmax(Q K_source^T / sqrt(d)) V_source, row by row."""
    rows = []
    for row, other in zip(edited, source, strict=True):
        q, k, v = attn.to_q(row), attn.to_k(other), attn.to_v(other)
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        rows.append(attn.to_out[0]((weights @ v).transpose(0, 1).flatten(1)))
    return torch.stack(rows)


def controlled(unet, layers, source, edited, forward=run):
    """What the network gives for the edited rows when its layers look at the source's."""
    with recorded(unet, layers) as states:
        forward(unet, source)
    with mutual_self_attention(unet, layers, states):
        return forward(unet, edited)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("groups", [1, 2])
def test_formula(unet, layers, groups, processor):
    attn = copy.deepcopy(unet.get_submodule(layers[12]))
    attn.set_processor(processor())
    source, edited = (random(groups, 20, attn.to_q.in_features, seed=seed) for seed in (0, 1))
    network = nn.Sequential(attn)
    with torch.no_grad():
        output = controlled(network, ["0"], source, edited, forward=lambda network, hidden: network(hidden))
        expected = masactrl(attn, edited, source)
        assert (output - network(edited)).abs().max() > 0.1
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_given_a_context_keeps_it(unet, layers):
    """The first attention of some models' blocks is a cross-attention (`only_cross_attention`)."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = unet.get_submodule(layers[12])

        def forward(self, hidden, context):
            return self.attn(hidden, encoder_hidden_states=context)

    network, hidden, context = Network(), random(2, 20, 32), random(2, 7, 32, seed=1)
    with torch.no_grad():
        plain = network(hidden, context)
        with recorded(network, ["attn"]) as states:
            assert torch.equal(network(hidden, context), plain)
        assert states == {}
        with mutual_self_attention(network, ["attn"], {"attn": random(2, 20, 32)}):
            assert torch.equal(network(hidden, context), plain)


@pytest.mark.parametrize("groups", [1, 2])
def test_recording_changes_nothing_and_the_edited_row_sees_the_source(unet, layers, groups):
    source, edited = (random(1, 4, 16, 16, seed=seed).repeat(groups, 1, 1, 1) for seed in (0, 1))
    plain = run(unet, source)
    with recorded(unet, layers) as states:
        assert torch.equal(run(unet, source), plain)
    assert list(states) == layers
    assert (controlled(unet, layers, source, edited) - run(unet, edited)).abs().max() > 1e-2
    torch.testing.assert_close(controlled(unet, layers, source, source), plain, rtol=0, atol=1e-5)


def test_only_the_named_layers_look_at_the_source(unet, layers):
    source, edited = random(1, 4, 16, 16), random(1, 4, 16, 16, seed=1)
    late = layers_from(layers, "up_blocks.2")
    with recorded(unet, late) as states:
        run(unet, source)
    assert list(states) == late
    with mutual_self_attention(unet, layers, states):  # those of which nothing is known see themselves
        partly = run(unet, edited)
    assert torch.equal(partly, controlled(unet, late, source, edited))
    plain = run(unet, edited)
    with mutual_self_attention(unet, layers, {}):
        assert torch.equal(run(unet, edited), plain)


def test_gradient_reaches_the_source(unet, layers):
    """Nothing detaches: the control is usable inside an optimisation too."""
    source = random(1, 4, 16, 16).requires_grad_()

    def forward(unet, rows):
        return unet(rows, torch.tensor(681), encoder_hidden_states=TEXT).sample

    controlled(unet, layers, source, random(1, 4, 16, 16, seed=1), forward).square().sum().backward()
    assert source.grad.abs().max() > 0


def test_composes_with_a_lora(unet, layers):
    """Controlled with LoRA layers around the projections equals controlled with the LoRA merged into them."""
    rows = random(1, 4, 16, 16), random(1, 4, 16, 16, seed=1)
    beside = lora.trainable(unet, ("to_q", "to_k", "to_v", "to_out.0"), rank=4, alpha=4.0, seed=0, pictures=1)
    with beside as ((weights,), current):
        with torch.no_grad():
            for index, (name, weight) in enumerate(weights.items()):
                if name.endswith(lora.UP):
                    weight.copy_(0.05 * random(*weight.shape, seed=index))
        adapter = current(0)
        separate = controlled(unet, layers, *rows)
    with lora.merged(unet, adapter):
        merged = controlled(unet, layers, *rows)
    torch.testing.assert_close(separate, merged, rtol=0, atol=1e-4)
    assert (separate - controlled(unet, layers, *rows)).abs().max() > 1e-2


# --- what is left behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("control", [recorded, lambda unet, layers: mutual_self_attention(unet, layers, {})])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(unet, layers, control, fails):
    before, plain = processors(unet), run(unet, random(2, 4, 16, 16))
    try:
        with control(unet, layers):
            assert all(processors(unet)[f"{name}"] is not before[name] for name in layers)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = processors(unet)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(run(unet, random(2, 4, 16, 16)), plain)


def test_fused_projections_are_refused(unet, layers):
    fused = copy.deepcopy(unet)
    fused.fuse_qkv_projections()
    before = processors(fused)
    with (
        pytest.raises(UserError, match="unfuse_qkv_projections"),
        mutual_self_attention(fused, layers, {}),
    ):
        pass
    assert all(processor is before[name] for name, processor in processors(fused).items())
