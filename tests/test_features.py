"""Features: capturing them in a forward, and reading windows of the resized map without resizing it."""

import pytest
import torch
import torch.nn.functional as F

from dragdiff.modules.features import FeatureMap, combine_guidance, forward_with_features

SIZES = [  # map, grid
    ((31, 41), (125, 165)),
    ((16, 16), (128, 128)),
    ((8, 5), (8, 5)),
    ((40, 33), (13, 7)),
    ((9, 30), (20, 11)),
    ((1, 1), (5, 3)),
    ((2, 7), (1, 1)),
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "grid"), SIZES)
def test_window_is_a_part_of_the_resized_map(size, grid):
    ours, theirs = random(1, 3, *size).requires_grad_(), random(1, 3, *size).requires_grad_()
    resized = F.interpolate(theirs, grid, mode="bilinear", align_corners=False)[0]
    everywhere = FeatureMap([ours], grid).window(torch.arange(grid[0]), torch.arange(grid[1]))
    torch.testing.assert_close(everywhere, resized, rtol=0, atol=5e-6)

    rows, cols = torch.arange(grid[0] // 3, grid[0]), torch.tensor([grid[1] - 1, 0, grid[1] // 2])  # in any order
    part, weights = FeatureMap([ours], grid).window(rows, cols), random(3, len(rows), 3, seed=1)
    torch.testing.assert_close(part, resized[:, rows][:, :, cols], rtol=0, atol=5e-6)
    (part * weights).sum().backward()
    (resized[:, rows][:, :, cols] * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_maps_of_several_blocks_are_read_side_by_side():
    maps, grid = [random(1, 3, 8, 8), random(1, 5, 16, 16, seed=1)], (32, 32)
    resized = torch.cat([F.interpolate(part, grid, mode="bilinear")[0] for part in maps])
    features = FeatureMap(maps, grid)
    torch.testing.assert_close(features.window(torch.arange(4, 9), torch.arange(30, 32)), resized[:, 4:9, 30:32])
    positions = torch.tensor([[0.0, 31.0], [7.0, 2.0], [31.0, 31.0]])
    expected = torch.stack([resized[:, 0, 31], resized[:, 7, 2], resized[:, 31, 31]])
    torch.testing.assert_close(features.at(positions), expected)


def test_half_precision_is_resized_in_full():
    low = random(1, 3, 8, 8).to(torch.bfloat16)
    window = FeatureMap([low], (16, 16)).window(torch.arange(16), torch.arange(16))
    torch.testing.assert_close(window, F.interpolate(low.float(), (16, 16), mode="bilinear")[0])


def test_positions_need_not_be_where_the_features_are():
    """Handles stay in main memory, the features may be on an accelerator."""
    elsewhere = FeatureMap([torch.empty(1, 3, 8, 8, device="meta")], (16, 16))
    assert elsewhere.at(torch.tensor([[1.0, 2.0]])).shape == (1, 3)
    assert elsewhere.window(torch.arange(3), torch.arange(4)).device.type == "meta"


def test_guidance_weighs_the_branches():
    features = random(2, 3, 4, 4)
    combined = combine_guidance(features, 3.0)
    torch.testing.assert_close(combined, torch.cat([0.4 * features[:1], 0.6 * features[1:]], dim=1))
    assert torch.equal(combine_guidance(features, 1.0)[:, 3:], features[1:])


# --- capturing ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet(backbone):
    return backbone.network.requires_grad_(False).eval()


@pytest.fixture
def forward(unet):
    """Runs the network on the tensor that it is given."""
    text = random(1, 77, 32, seed=5)
    return lambda sample: unet(sample, torch.tensor(681), encoder_hidden_states=text).sample


def hooks(network):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


@pytest.mark.parametrize("names", [["up_blocks.2"], ["up_blocks.1", "mid_block"], ["down_blocks.0"]])
def test_stopping_early_changes_no_bit(unet, forward, names):
    blocks = [unet.get_submodule(name) for name in names]
    whole, stopped = random(1, 4, 16, 16).requires_grad_(), random(1, 4, 16, 16).requires_grad_()
    output, features = forward_with_features(lambda: forward(whole), blocks, need_output=True)
    nothing, early = forward_with_features(lambda: forward(stopped), blocks, need_output=False)
    assert nothing is None
    assert torch.equal(output, forward(whole))
    assert all(torch.equal(a, b) for a, b in zip(features, early, strict=True))
    torch.stack([part.square().sum() for part in features]).sum().backward()
    torch.stack([part.square().sum() for part in early]).sum().backward()
    assert whole.grad.abs().max() > 0
    assert torch.equal(whole.grad, stopped.grad)
    assert hooks(unet) == 0


def test_features_are_the_blocks_outputs(unet, forward):
    seen = {}
    blocks = {name: unet.get_submodule(name) for name in ("up_blocks.1", "mid_block")}
    removable = [
        block.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
        for name, block in blocks.items()
    ]
    _, features = forward_with_features(lambda: forward(random(1, 4, 16, 16)), list(blocks.values()), need_output=True)
    for hook in removable:
        hook.remove()
    for name, captured in zip(blocks, features, strict=True):  # in the order asked for, not the order of execution
        assert torch.equal(captured, seen[name])


def test_nothing_runs_after_the_last_block(unet, forward):
    ran = []
    later = [unet.up_blocks[3], unet.conv_out]
    removable = [module.register_forward_pre_hook(lambda *_: ran.append(1)) for module in later]
    forward_with_features(lambda: forward(random(1, 4, 16, 16)), [unet.up_blocks[2]], need_output=False)
    assert ran == []
    forward_with_features(lambda: forward(random(1, 4, 16, 16)), [unet.up_blocks[2]], need_output=True)
    assert ran == [1, 1]
    for hook in removable:
        hook.remove()


def test_an_error_in_the_forward_comes_through_and_leaves_no_hook(unet, forward):
    def broken():
        forward(random(1, 4, 16, 16))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        forward_with_features(broken, [unet.up_blocks[2]], need_output=True)
    with pytest.raises(RuntimeError):
        forward_with_features(lambda: forward(random(1, 3, 16, 16)), [unet.up_blocks[2]], need_output=False)
    assert hooks(unet) == 0


def test_freeu_does_not_reach_back_into_captured_features(unet, forward):
    """It scales half of the channels that a decoder block is given, in place."""
    block, sample, raw = unet.mid_block, random(1, 4, 16, 16), []
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    try:
        hook = block.register_forward_hook(lambda module, args, output: raw.append(output))
        with torch.no_grad():
            _, (whole,) = forward_with_features(lambda: forward(sample), [block], need_output=True)
        hook.remove()
        _, (early,) = forward_with_features(lambda: forward(sample), [block], need_output=False)
    finally:
        unet.disable_freeu()
    assert not torch.equal(raw[0], early)  # or else this test would show nothing
    assert torch.equal(whole, early)
