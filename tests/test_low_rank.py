"""A projection with a low-rank update for each picture, against the sum of both as it is written."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dragdiff.modules.low_rank import can_merge, project, updated
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


def scales(pictures: int) -> Tensor:
    return torch.arange(1.0, pictures + 1, dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("between", [(), (TOKENS,), (2, TOKENS)])
@pytest.mark.parametrize("pictures", [1, 2, 3, 6])
@pytest.mark.parametrize("biased", [True, False])
def test_each_row_has_its_pictures_update(pictures, biased, between):
    inputs, weight, bias, down, up = made(pictures, between=between)
    given = (inputs, weight, bias if biased else None, down, up, scales(pictures))
    assert can_merge(*given[:4]) == (pictures < 6 or between != ())  # a single row is less than the weight
    expected = naive(*given)
    torch.testing.assert_close(project(*given), expected, rtol=1e-12, atol=1e-12)
    output = F.linear(*given[:3])
    torch.testing.assert_close(updated(output, inputs, *given[3:]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("between", [(), (TOKENS,), (2, TOKENS)])
@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("wants", [(0,), (3,), (4,), (3, 4), (0, 3, 4)])  # inputs; down; up
def test_its_gradients_are_those_of_the_sum(pictures, wants, between):
    given = made(pictures, between=between)
    for number in wants:
        given[number].requires_grad_()
    assert can_merge(*given[:4])
    wanted = [given[number] for number in wants]
    noise = torch.randn((OUT, ROWS, *between), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise.movedim(0, -1)  # in another order in memory
    found = torch.autograd.grad(project(*given, scales(pictures)), wanted, noise)
    expected = torch.autograd.grad(naive(*given, scales(pictures)), wanted, noise)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *_: project(*given, scales(pictures)), wanted)


@pytest.mark.parametrize("pictures", [1, 3])
def test_its_output_may_be_changed_in_place(pictures):
    """As a projection's own may: by an attention that scales its query."""
    inputs, weight, _, down, up = made(pictures)
    output = project(inputs, weight, None, down.requires_grad_(), up, 1.0)
    output *= 2
    output.sum().backward()
    expected = torch.autograd.grad(2 * naive(inputs, weight, None, down, up, 1.0).sum(), down)
    torch.testing.assert_close(down.grad, *expected)


def test_a_weight_that_is_exchanged_before_the_gradient_does_not_change_it():
    given = made(1)
    given[0].requires_grad_()
    given[1] = nn.Parameter(given[1], requires_grad=False)
    (expected,) = torch.autograd.grad(naive(*given, 1.0).sum(), given[0])
    output = project(*given, 1.0)
    given[1].data = torch.zeros_like(given[1])
    torch.testing.assert_close(torch.autograd.grad(output.sum(), given[0]), (expected,))


def test_an_update_finer_than_the_weights_precision_is_not_lost():
    """In half precision it would vanish in the weight, of which it is a thousandth."""
    weight, signs = torch.ones((OUT, IN), dtype=torch.bfloat16), torch.tensor([1.0, -1, 1, -1])
    down, up = 5e-4 * signs.expand(1, RANK, IN), torch.ones((1, OUT, RANK))
    assert torch.equal(weight + (up @ down)[0].bfloat16(), weight)
    inputs = signs.bfloat16().expand(ROWS, IN)
    assert not can_merge(inputs, weight, None, down)
    found = project(inputs, weight, None, down, up, 1.0)
    torch.testing.assert_close(found.float(), torch.full((ROWS, OUT), 4e-3), rtol=1e-2, atol=0)


def test_where_it_does_not_merge_it_is_the_same_sum():
    given = made(2, dtype=torch.float32)
    expected = naive(*given, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not can_merge(*given[:4])
        mixed = project(*given, 0.5)
    torch.testing.assert_close(mixed.float(), expected, rtol=0.05, atol=0.1)
    assert can_merge(*given[:4])


@pytest.mark.parametrize("number", [1, 2])  # weight; bias
def test_a_gradient_of_the_projections_own_is_not_lost(number):
    given = made(2)
    given[number].requires_grad_()
    assert not can_merge(*given[:4])
    found = torch.autograd.grad(project(*given, 0.5).sum(), given[number])
    torch.testing.assert_close(found, torch.autograd.grad(naive(*given, 0.5).sum(), given[number]))
    with torch.no_grad():
        assert can_merge(*given[:4])


def test_it_does_not_merge_where_float32_is_not_computed_in_float32():
    given = made(1, dtype=torch.float32)[:4]
    assert can_merge(*given)
    try:
        torch.set_float32_matmul_precision("high")
        assert not can_merge(*given)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert can_merge(*given)


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
    base, down = ours[0].base_layer, ours[0].lora_A["default"].weight[None]
    assert can_merge(inputs, base.weight, base.bias, down) == (dtype == torch.float32)
    torch.testing.assert_close(ours(inputs), theirs(inputs))
    gradients = [{n: p.grad for n, p in network.named_parameters() if "lora_" in n} for network in (ours, theirs)]
    assert len(gradients[0]) == 2 and all(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


def test_an_owners_layer_computes_as_it_does():
    """What hooks, a replaced forward or a class of its own make of a projection stays in its output."""

    class Doubled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    def hooked() -> nn.Linear:
        layer = nn.Linear(IN, OUT)
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        return layer

    def replaced() -> nn.Linear:
        layer = nn.Linear(IN, OUT)
        own = layer.forward
        layer.forward = lambda inputs: 2 * own(inputs)
        return layer

    inputs = torch.randn((ROWS, TOKENS, IN), generator=torch.Generator().manual_seed(1))
    for kind in (lambda: Doubled(IN, OUT), hooked, replaced):
        torch.manual_seed(0)
        base = kind()
        config = LoraConfig(r=RANK, target_modules=["0"])  # which begins as no update
        config._register_custom_module({nn.Linear: MergedLinear, Doubled: MergedLinear})
        adapted = inject_adapter_in_model(config, nn.Sequential(base))
        assert type(adapted[0]) is MergedLinear
        with torch.no_grad():
            torch.testing.assert_close(adapted(inputs), 2 * F.linear(inputs, base.weight, base.bias))
