"""Reference-latent control: what it computes, where and when, and that it leaves the model as it found it."""

import copy

import numpy as np
import pytest
import torch
from conftest import TRACES
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from dragdiff.errors import UserError
from dragdiff.modules import lora
from dragdiff.modules.attention import layers_from, mutual_self_attention


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


def test_recorded_calls_are_controlled_and_no_others(unet, layers):
    """Of four forwards with start step 2, the published code takes over these (step, call of an attention layer)."""
    before, calls = processors(unet), []
    rows, hits = random(2, 4, 16, 16), []
    for module in unet.modules():
        if hasattr(module, "processor"):
            module.set_processor(Watching(module.processor, calls))
    try:
        with mutual_self_attention(unet, layers_from(layers, "10"), start_step=2):
            for step in range(4):
                calls.clear()
                run(unet, rows)
                for call, (attn, hidden, context) in enumerate(calls):
                    cross = attn.to_k.in_features == 32 and context is not None and context.shape[1] == 77
                    controlled = context is not None and not cross
                    hits.append([step, call, int(controlled)])
                    if controlled:
                        assert torch.equal(context, hidden[[0, 0]])
    finally:
        for name, processor in before.items():
            unet.get_submodule(name).set_processor(processor)
    np.testing.assert_array_equal(hits, np.load(TRACES / "units.npz")["editor_hits"])


# --- what -----------------------------------------------------------------------------------------------------


def masactrl(attn, hidden):
    """The formula: softmax(Q K_source^T / sqrt(d)) V_source, the source being the first row of each pair."""
    rows = []
    for index, row in enumerate(hidden):
        source = hidden[index // 2 * 2]
        q, k, v = attn.to_q(row), attn.to_k(source), attn.to_v(source)
        q, k, v = (part.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for part in (q, k, v))
        weights = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        rows.append(attn.to_out[0]((weights @ v).transpose(0, 1).flatten(1)))
    return torch.stack(rows)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("groups", [1, 2])
def test_formula(unet, layers, groups, processor):
    attn = copy.deepcopy(unet.get_submodule(layers[12]))
    attn.set_processor(processor())
    network = nn.Sequential(attn)
    hidden = random(2 * groups, 20, attn.to_q.in_features)
    with torch.no_grad():
        plain = network(hidden)
        with mutual_self_attention(network, ["0"], start_step=0):
            controlled = network(hidden)
        expected = masactrl(attn, hidden)
    torch.testing.assert_close(controlled, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(controlled[::2], plain[::2], rtol=0, atol=1e-6)  # the source sees itself
    assert (controlled[1::2] - plain[1::2]).abs().max() > 0.1


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
        with mutual_self_attention(network, ["attn"], start_step=0):
            assert torch.equal(network(hidden, context), plain)


@pytest.mark.parametrize("groups", [1, 2])
def test_source_is_unchanged_and_the_edited_row_sees_it(unet, layers, groups):
    rows = random(2, 4, 16, 16).repeat(groups, 1, 1, 1)
    plain = run(unet, rows)
    with mutual_self_attention(unet, layers, start_step=0):
        controlled = run(unet, rows)
    torch.testing.assert_close(controlled[::2], plain[::2], rtol=0, atol=1e-5)
    assert (controlled[1::2] - plain[1::2]).abs().max() > 1e-2
    with mutual_self_attention(unet, layers, start_step=0):
        same = run(unet, rows[:1].expand(2, -1, -1, -1))
    torch.testing.assert_close(same[1], same[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("start_step", [0, 1, 3])
def test_start_step_counts_forwards_within_the_context(unet, layers, start_step):
    rows = random(2, 4, 16, 16)
    plain = run(unet, rows)
    for _ in range(2):  # a second use starts counting anew
        with mutual_self_attention(unet, layers_from(layers, "up_blocks.2"), start_step=start_step):
            controlled = [not torch.equal(run(unet, rows), plain) for _ in range(4)]
        assert controlled == [step >= start_step for step in range(4)]


def test_gradient_reaches_the_source(unet, layers):
    """Nothing detaches: the control is usable inside an optimisation too."""
    rows = random(2, 4, 16, 16).requires_grad_()
    with mutual_self_attention(unet, layers, start_step=0):
        output = unet(rows, torch.tensor(681), encoder_hidden_states=TEXT.expand(2, -1, -1)).sample
        output[1].square().sum().backward()
    assert rows.grad[0].abs().max() > 0


def test_composes_with_a_lora(unet, layers):
    """Controlled with LoRA layers around the projections equals controlled with the LoRA merged into them."""
    rows = random(2, 4, 16, 16)
    with lora.injected(unet, ("to_q", "to_k", "to_v", "to_out.0"), rank=4, alpha=4.0, seed=0):
        weights = lora.parameters(unet)
        with torch.no_grad():
            for index, (name, weight) in enumerate(weights.items()):
                if name.endswith(lora.UP):
                    weight.copy_(0.05 * random(*weight.shape, seed=index))
        adapter = lora.extract(weights, scale=1.0)
        with mutual_self_attention(unet, layers, start_step=0):
            separate = run(unet, rows)
    with lora.merged(unet, adapter), mutual_self_attention(unet, layers, start_step=0):
        merged = run(unet, rows)
    with mutual_self_attention(unet, layers, start_step=0):
        without = run(unet, rows)
    torch.testing.assert_close(separate, merged, rtol=0, atol=1e-4)
    assert (separate - without).abs().max() > 1e-2


# --- what is left behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(unet, layers, fails):
    before, plain = processors(unet), run(unet, random(2, 4, 16, 16))
    try:
        with mutual_self_attention(unet, layers, start_step=0):
            assert all(processors(unet)[f"{name}"] is not before[name] for name in layers)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = processors(unet)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert not unet._forward_pre_hooks
    assert torch.equal(run(unet, random(2, 4, 16, 16)), plain)


def test_fused_projections_are_refused(unet, layers):
    fused = copy.deepcopy(unet)
    fused.fuse_qkv_projections()
    before = processors(fused)
    with (
        pytest.raises(UserError, match="unfuse_qkv_projections"),
        mutual_self_attention(fused, layers, start_step=0),
    ):
        pass
    assert all(processor is before[name] for name, processor in processors(fused).items())
    assert not fused._forward_pre_hooks
