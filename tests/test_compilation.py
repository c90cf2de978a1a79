"""`model.compile`: the same gradients and edits; what computes something else is found out; the model is put back."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dragdiff import Editor, EditSample, Request
from dragdiff.backbones.compilation import COMPILED, Compilation
from dragdiff.backbones.loading import load_backbone
from dragdiff.backbones.stable_diffusion import StableDiffusion
from dragdiff.config import Config, load_config
from dragdiff.errors import UserError
from dragdiff.study.plan import determinants

SETTINGS = ["drag.features=[up_blocks.0]", "control.start_layer=up_blocks.1", "cache.enabled=false"]
SETTINGS += ["lora.resolution=32", "lora.lr=0.01"]


def detached(graph: Any, inputs: Any) -> Any:
    """A compiler that loses the gradient."""
    return lambda *args: tuple(output.detach() for output in graph(*args))


def halved(graph: Any, inputs: Any) -> Any:
    """A compiler that is wrong about the output."""
    return lambda *args: tuple(0.5 * output for output in graph(*args))


def failing(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here\nnor there")


class Calls:
    """A compiler that changes nothing; counts graphs, and calls of them."""

    def __init__(self) -> None:
        self.graphs = self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1

        def call(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return call


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


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
def backbone(pipeline) -> StableDiffusion:
    return StableDiffusion(pipeline)


def sample(seed: int = 0) -> EditSample:
    image = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return EditSample(image, "a cat", [[[16, 16], [48, 48]]])


def config(*overrides: str, compiled: bool = True) -> Config:
    return load_config(["debug"], [*SETTINGS, f"model.compile={compiled}", *overrides])


def edited(backbone: StableDiffusion, *overrides: str, compiled: bool = True) -> np.ndarray:
    return Editor(config(*overrides, compiled=compiled), backbone).edit(sample()).image.astype(int)


def gradient(backbone: StableDiffusion, *, size: int = 8, names: tuple[str, ...] = ("up_blocks.1",)) -> Tensor:
    """Of features and output by the latent."""
    latent = torch.randn((1, 4, size, size), generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.no_grad():
        condition = backbone.condition(["a cat"])
    output, maps = backbone.with_features(
        lambda: backbone.predict(latent, torch.tensor(500), condition), names, need_output=True
    )
    torch.stack([value.square().sum() for value in (*maps, output)]).sum().backward()
    return latent.grad


def use(backbone: StableDiffusion, backend: str | Callable[..., Any]) -> None:
    backbone.compilation = Compilation(backbone.network, lambda: gradient(backbone), backend=backend)


def state(network: torch.nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in network.modules()]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_and_edit_are_those_of_eager(backbone, backend):
    use(backbone, backend)
    before = state(backbone.network)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="model.compile")
        for names in (("up_blocks.1",), ("up_blocks.0", "up_blocks.1")):
            expected = gradient(backbone, names=names)
            with backbone.compiled():
                found = gradient(backbone, names=names)
            assert (found - expected).norm() < 1e-4 * expected.norm()
        assert np.abs(edited(backbone, "lora.steps=0") - edited(backbone, "lora.steps=0", compiled=False)).max() <= 1
    assert state(backbone.network) == before


@pytest.mark.parametrize("steps", [0, 3])
def test_what_was_compiled_serves_later_edits_and_a_lora_is_trained_with_it(backbone, steps):
    expected, backend = edited(backbone, f"lora.steps={steps}", compiled=False), Calls()
    use(backbone, backend)
    found = [edited(backbone, f"lora.steps={steps}")]
    graphs, calls = backend.graphs, backend.calls
    assert graphs > 0
    found.append(edited(backbone, f"lora.steps={steps}"))
    assert backend.graphs == graphs and backend.calls > calls
    assert max(np.abs(image - expected).max() for image in found) <= 1


@pytest.mark.slow
def test_every_stage_runs_compiled(tiny_sd):
    """Of a network with blocks of three widths, whose code is compiled more often than torch does by itself."""
    backbone = load_backbone(config(f"model.path={tiny_sd}", "model.device=cpu").model)
    backbone.compilation = Compilation(backbone.network, lambda: gradient(backbone), backend=(backend := Calls()))
    before: dict[str, int] = {}
    calls: dict[str, int] = {}

    def report(stage: str, done: int, total: int, note: str) -> None:
        before.setdefault(stage, backend.calls)
        calls[stage] = backend.calls - before[stage]

    settings = config("control.enabled=false", "lora.steps=2", "drag.steps=2", "output.frames_every=0")
    Editor(settings, backbone, report=report).edit(sample())
    assert all(calls[stage] > 0 for stage in ("LoRA", "inversion", "drag", "denoise"))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_batch_that_shrinks(backbone, steps):
    """With LoRAs each of its pictures has its own, beside the network."""

    def run(compiled: bool) -> list[Any]:
        settings = config(f"lora.steps={steps}", compiled=compiled)
        lengths = [dataclasses.replace(settings, drag=dataclasses.replace(settings.drag, steps=n)) for n in (1, 2, 3)]
        return Editor(settings, backbone).edit_batch([Request(sample(n), own) for n, own in enumerate(lengths)])

    expected = run(compiled=False)
    use(backbone, "aot_eager")
    for found, result in zip(run(compiled=True), expected, strict=True):
        assert found.steps == result.steps
        assert np.abs(found.image.astype(int) - result.image.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("backend", "words"), [(detached, "off by"), (halved, "off by"), (failing, "no compiler here nor there")]
)
def test_what_can_not_be_trusted_is_not_used(backbone, backend, words):
    use(backbone, backend)
    expected = edited(backbone, "lora.steps=0", compiled=False)
    with pytest.warns(UserWarning, match=words) as said:
        found = edited(backbone, "lora.steps=0")
    assert len([warning for warning in said if "model.compile" in str(warning.message)]) == 1
    assert all("\n" not in str(warning.message) for warning in said)
    np.testing.assert_array_equal(found, expected)
    with warnings.catch_warnings():  # it is said once
        warnings.filterwarnings("error", message="model.compile")
        edited(backbone, "lora.steps=0")


def test_attention_that_is_watched_or_shared_runs_as_it_is(backbone):
    def controlled() -> Tensor:
        condition, t = backbone.condition(["a cat"]), torch.tensor(500)
        layers, random = backbone.self_attention_layers, torch.Generator().manual_seed(1)
        source, latent = (torch.randn((1, 4, 8, 8), generator=random) for _ in range(2))
        with backbone.recorded_attention(layers) as states:
            backbone.predict(source, t, condition)
        with backbone.shared_attention(layers, states):
            return backbone.predict(latent, t, condition)

    backend = Calls()
    use(backbone, backend)
    with torch.no_grad():
        expected = controlled()
    with backbone.compiled(), torch.no_grad():
        calls = backend.calls
        assert torch.equal(controlled(), expected)
        assert backend.calls == calls
        backbone.predict(torch.zeros(1, 4, 8, 8), torch.tensor(500), backbone.condition(["a cat"]))
        assert backend.calls > calls  # and compiled again


def test_memory_running_out_is_not_taken_for_a_compiler_that_fails(backbone):
    def full() -> Tensor:
        if any(vars(module).get(COMPILED) for module in backbone.network.modules()):
            raise torch.OutOfMemoryError
        return gradient(backbone)

    before = state(backbone.network)
    backbone.compilation = Compilation(backbone.network, full, backend="aot_eager")
    with pytest.raises(torch.OutOfMemoryError), backbone.compiled():
        pass
    assert state(backbone.network) == before


def test_the_network_is_put_back_after_an_error(backbone):
    use(backbone, "aot_eager")
    block = backbone.network.down_blocks[0].attentions[0].transformer_blocks[0]

    def own(*args: Any, **kwargs: Any) -> Any:  # a pipeline's owner may have compiled a block
        return block.forward(*args, **kwargs)

    vars(block)[COMPILED] = own
    before = state(backbone.network)
    try:
        with pytest.raises(ZeroDivisionError), backbone.compiled():
            assert vars(block)[COMPILED] is not own
            raise ZeroDivisionError
        assert state(backbone.network) == before
    finally:
        del vars(block)[COMPILED]


def test_settings():
    usual, compiled = config(compiled=False), config()
    assert determinants(usual) == determinants(compiled)  # a study does not edit twice for it
    with pytest.raises(UserError, match="does not go with"):
        config("model.memory=low")
