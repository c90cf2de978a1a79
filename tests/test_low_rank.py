"""A projection with a low-rank update for each picture, against the sum of both as it is written."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dragdiff.modules.low_rank import can_merge, project
from dragdiff.modules.peft_layer import MergedLinear

ROWS, TOKENS, IN, OUT, RANK = 6, 5, 4, 3, 2


def naive(inputs: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale) -> Tensor:
    """Row by row; scale is (P, 1, 1) or a number."""
    rows = []
    for number, row in enumerate(inputs):
        picture = number % len(down)
        factor = scale[picture, 0, 0] if isinstance(scale, Tensor) else scale
        rows.append(F.linear(row, weight, bias) + factor * F.linear(F.linear(row, down[picture]), up[picture]))
    return torch.stack(rows)


def made(pictures: int, *, dtype: torch.dtype = torch.float64, between: tuple[int, ...] = (TOKENS,)) -> list[Tensor]:
    """Inputs, weight, bias, down, up."""
    generator = torch.Generator().manual_seed(pictures)
    shapes = [(ROWS, *between, IN), (OUT, IN), (OUT,), (pictures, RANK, IN), (pictures, OUT, RANK)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("between", [(), (TOKENS,), (2, TOKENS)])
@pytest.mark.parametrize("pictures", [1, 2, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_each_row_has_its_pictures_update(pictures, biased, between):
    inputs, weight, bias, down, up = made(pictures, between=between)
    scale = torch.arange(1.0, pictures + 1, dtype=torch.float64)[:, None, None]
    given = (inputs, weight, bias if biased else None, down, up, scale)
    assert can_merge(inputs, weight, down)
    torch.testing.assert_close(project(*given), naive(*given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("wants", [(0,), (3,), (4,), (3, 4), (0, 3, 4)])  # inputs; down; up
def test_its_gradients_are_those_of_the_sum(pictures, wants):
    given = made(pictures)
    scale = torch.arange(1.0, pictures + 1, dtype=torch.float64)[:, None, None]
    for number in wants:
        given[number].requires_grad_()
    wanted = [given[number] for number in wants]
    noise = torch.randn(ROWS, TOKENS, OUT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad(project(*given, scale), wanted, noise)
    expected = torch.autograd.grad(naive(*given, scale), wanted, noise)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *_: project(*given, scale), wanted)


def test_an_update_finer_than_the_weights_precision_is_not_lost():
    """In half precision it would vanish in the weight, of which it is a thousandth."""
    weight, signs = torch.ones((OUT, IN), dtype=torch.bfloat16), torch.tensor([1.0, -1, 1, -1])
    down, up = 5e-4 * signs.expand(1, RANK, IN), torch.ones((1, OUT, RANK))
    assert torch.equal(weight + (up @ down)[0].bfloat16(), weight)
    inputs = signs.bfloat16().expand(ROWS, IN)
    assert not can_merge(inputs, weight, down)
    found = project(inputs, weight, None, down, up, 1.0)
    torch.testing.assert_close(found.float(), torch.full((ROWS, OUT), 4e-3), rtol=1e-2, atol=0)


def test_where_it_does_not_merge_it_is_the_same_sum():
    given = made(2, dtype=torch.float32)
    expected = naive(*given, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_merge(given[0], given[1], given[3])
        mixed = project(*given, 0.5)
    torch.testing.assert_close(mixed.float(), expected, rtol=0.05, atol=0.1)
    given[1].requires_grad_()  # its gradient is not lost
    assert not can_merge(given[0], given[1], given[3])
    by_weight = torch.autograd.grad(project(*given, 0.5).sum(), given[1])
    torch.testing.assert_close(by_weight, torch.autograd.grad(naive(*given, 0.5).sum(), given[1]))
    with torch.no_grad():
        assert can_merge(given[0], given[1], given[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_layer_with_and_without_merging(dtype):
    """The layer that is injected gives what peft's own gives, and its gradients."""
    config = LoraConfig(r=RANK, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    torch.manual_seed(0)
    theirs = inject_adapter_in_model(config, nn.Sequential(nn.Linear(IN, OUT)).to(dtype))
    config = LoraConfig(r=RANK, lora_alpha=3, target_modules=["0"])
    config._register_custom_module({nn.Linear: MergedLinear})
    ours = inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(theirs[0].base_layer)))
    ours.load_state_dict(theirs.state_dict())
    assert type(ours[0]) is MergedLinear and type(theirs[0]) is not MergedLinear
    inputs = torch.randn((ROWS, TOKENS, IN), generator=torch.Generator().manual_seed(1)).to(dtype)
    noise = torch.randn((ROWS, TOKENS, OUT), generator=torch.Generator().manual_seed(2)).to(dtype)
    for network in (ours, theirs):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                parameter.data = parameter.data.float()
        network(inputs).backward(noise)
    assert can_merge(inputs, ours[0].base_layer.weight, ours[0].lora_A["default"].weight) == (dtype == torch.float32)
    torch.testing.assert_close(ours(inputs), theirs(inputs))
    gradients = [{n: p.grad for n, p in network.named_parameters() if "lora_" in n} for network in (ours, theirs)]
    assert len(gradients[0]) == 2 and all(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)
