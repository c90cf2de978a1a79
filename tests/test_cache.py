"""The cache of stages: keys, whole entries, broken ones, two writers, no place to write."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from dragdiff import cache
from dragdiff.backbones.loading import load_backbone
from dragdiff.config import load_config
from dragdiff.data.sample import EditSample
from dragdiff.editor import Editor
from dragdiff.errors import UserError
from dragdiff.modules.images import to_tensor


def save(value, folder):
    (folder / "value.json").write_text(json.dumps(value))


def load(folder):
    try:
        return json.loads((folder / "value.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder}") from error


def get(folder, key="k", make=lambda: [1, 2], save=save, load=load):
    return cache.StageCache(folder).get(key, make=make, save=save, load=load)


def never():
    raise AssertionError("made again")


# ------------------------------------------------------------------------------------------- entries


def test_made_once(tmp_path):
    assert get(tmp_path / "new" / "folder") == [1, 2]
    assert get(tmp_path / "new" / "folder", make=never) == [1, 2]
    assert get(tmp_path / "new" / "folder", key="other", make=lambda: 3) == 3
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["k", "other"]


def test_no_folder_keeps_nothing(tmp_path):
    made = []
    for _ in range(2):
        get(None, make=lambda: made.append(1))
    assert made == [1, 1]


@pytest.mark.parametrize("content", ["", "[1, 2", None])
def test_broken_entry_is_made_again(content, tmp_path):
    (tmp_path / "k").mkdir()
    if content is not None:
        (tmp_path / "k" / "value.json").write_text(content)
    with pytest.warns(UserWarning, match="broken and is made again"):
        assert get(tmp_path) == [1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get(tmp_path, make=never) == [1, 2]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, ZeroDivisionError])
def test_interrupted_write_leaves_nothing(stop, tmp_path):
    def half(value, folder):
        (folder / "value.json").write_text("[1,")
        raise stop

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert get(tmp_path, save=half) == [1, 2]
            assert stop is OSError
        except stop:
            assert stop is not OSError
    assert list(tmp_path.iterdir()) == []
    assert get(tmp_path) == [1, 2]


def test_failed_making_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError, match="made again"):
        get(tmp_path / "c", make=never)
    assert not (tmp_path / "c").exists()


def test_unwritable_cache_only_warns(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.warns(UserWarning, match="cannot write the cache") as caught:
        assert get(file / "below") == [1, 2]
    assert "\n" not in str(caught[0].message)


def test_damage_anywhere_is_found(tmp_path):
    """Also what would still load: a flipped bit, a file that is gone."""
    get(tmp_path)
    files = sorted((tmp_path / "k").iterdir())
    assert len(files) == 2
    for file in files:
        whole = file.read_bytes()
        for damaged in (whole[:-1], whole[:1] + bytes([whole[1] ^ 2]) + whole[2:], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.warns(UserWarning, match="broken and is made again"):
                assert get(tmp_path) == [1, 2]
            assert file.read_bytes() == whole


def test_entry_that_goes_while_it_is_read_is_made_again_silently(tmp_path):
    def vanish(folder):
        shutil.rmtree(folder)
        return load(folder)

    get(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get(tmp_path, make=lambda: 3, load=vanish) == 3


def test_entry_that_cannot_be_read_now_stays(tmp_path):
    def refused(folder):
        raise PermissionError(13, "Permission denied")

    get(tmp_path)
    with pytest.warns(UserWarning, match="cannot read the cache entry.*Permission denied"):
        assert get(tmp_path, make=lambda: 3, load=refused) == 3
    assert get(tmp_path, make=never) == [1, 2]


def test_entry_that_another_has_made_anew_meanwhile_stays(tmp_path):
    tries = []

    def first_damaged(folder):
        tries.append(folder)
        if len(tries) == 1:
            raise UserError("damaged")
        return load(folder)

    get(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get(tmp_path, make=never, load=first_damaged) == [1, 2]
    assert len(tries) == 2
    assert get(tmp_path, make=never) == [1, 2]


def test_entries_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        get(tmp_path, make=lambda: {"x": torch.ones(3)}, save=cache.save_tensors, load=cache.load_tensors)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "k", *(tmp_path / "k").iterdir()]}
    assert modes == {"k": 0o755, cache.TENSORS: 0o644, cache.CHECKSUM: 0o644}


# ------------------------------------------------------------------------------------------- limit


def hexadecimal(number):
    return f"{number:032x}"


def fill(value, folder):
    (folder / "value.json").write_text(json.dumps(value).ljust(1000))


ONE = 1064  # bytes of such an entry, with its checksum


def kept(root):
    return {path.name for stage in cache.STAGES for path in (root / stage).glob("*")}


def test_least_recently_used_goes_first(tmp_path):
    """Against a list that is kept in order of use; over two stages."""
    rng, order = np.random.default_rng(0), []
    for _ in range(150):
        number = int(rng.integers(9))
        stage = cache.STAGES[number % 2]
        made = []
        store = cache.StageCache(tmp_path / stage, limit=5 * ONE + 10)
        make = lambda number=number, made=made: made.append(1) or number  # noqa: E731
        assert store.get(hexadecimal(number), make=make, save=fill, load=load) == number
        assert bool(made) == (number not in order)
        full = number not in order and len(order) == 5
        order = [*(other for other in order if other != number), number]
        order = order[-4:] if full else order  # a tenth of the limit is then free
        assert kept(tmp_path) == {hexadecimal(number) for number in order}
        time.sleep(0.005)  # beyond the resolution of a file's time


def test_lower_limit_holds_after_the_next_write_and_spares_what_is_not_ours(tmp_path):
    for number in range(8):
        cache.StageCache(tmp_path / "lora").put(hexadecimal(number), number, save=fill)
    strange = [tmp_path / "lora" / "mine", tmp_path / "photos" / hexadecimal(1)]
    for folder in strange:
        folder.mkdir(parents=True)
        (folder / "big").write_bytes(bytes(10 * ONE))
    cache.StageCache(tmp_path / "prompt", limit=3 * ONE).put(hexadecimal(9), 9, save=fill)
    assert len(kept(tmp_path) - {"mine"}) == 2  # and a tenth of the limit is free
    assert hexadecimal(9) in kept(tmp_path)
    assert all((folder / "big").is_file() for folder in strange)


def test_too_large_is_used_but_not_kept(tmp_path):
    small = cache.StageCache(tmp_path / "lora", limit=2 * ONE)
    small.put(hexadecimal(1), 1, save=fill)
    with pytest.warns(UserWarning, match="used but not kept: it is larger"):
        assert small.get(hexadecimal(2), make=lambda: [0] * 3000, save=fill, load=load) == [0] * 3000
    assert kept(tmp_path) == {hexadecimal(1)}


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    left = tmp_path / "inversion" / f"{hexadecimal(1)}.partial-x"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    cache.StageCache(tmp_path / "lora", limit=9 * ONE).put(hexadecimal(2), 2, save=fill)
    assert kept(tmp_path) == {hexadecimal(2)}


def _use(root, seed):
    warnings.simplefilter("error")
    rng = random.Random(seed)
    while True:
        number = rng.randrange(12)
        store = cache.StageCache(root / rng.choice(cache.STAGES), limit=4 * ONE)
        value = store.get(hexadecimal(number), make=lambda number=number: number, save=fill, load=load)
        assert value == number


def test_writers_readers_and_kills(tmp_path):
    """Users of one small cache, some killed at any moment: the others see no error and no wrong value."""
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking a process that has threads

        def begin(seed):
            user = context.Process(target=_use, args=(tmp_path, seed))
            user.start()
            return user

        lasting = [begin(0), begin(1)]
        try:
            for seed in range(2, 32):
                victim = begin(seed)
                time.sleep(rng.uniform(0.02, 0.12))
                victim.kill()
                victim.join()
                assert victim.exitcode == -signal.SIGKILL  # it had met no error until then
                assert all(user.is_alive() for user in lasting)
        finally:
            for user in lasting:
                user.kill()
                user.join()
    cache.StageCache(tmp_path / "lora", limit=4 * ONE).put(hexadecimal(99), 99, save=fill)
    files = [path for stage in cache.STAGES for path in (tmp_path / stage).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4 * ONE
    assert not any(".partial-" in name for name in kept(tmp_path))


def _write(folder, barrier, number):
    def make():
        barrier.wait(timeout=30)  # both have missed
        return [number]

    assert get(folder, make=make) == [number]


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking a process that has threads
        writers = [context.Process(target=_write, args=(tmp_path, barrier, number)) for number in (1, 2)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["k"]
    assert get(tmp_path, make=never) in ([1], [2])


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "dragdiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / ".cache" / "dragdiff"


# ------------------------------------------------------------------------------------------- keys


def test_digest_tells_inputs_apart():
    picture = np.arange(12, dtype=np.uint8).reshape(3, 4)
    inputs = [
        {"a": 1},
        {"a": 2},
        {"b": 1},
        {"a": "1"},
        {"a": None},
        {"a": picture},
        {"a": picture.reshape(4, 3)},
        {"a": picture.astype(np.int8)},
        {"a": picture[::-1]},
        {"a": 1, "b": 2},
        {"a": [1, 2]},
        {"a": {"b": 2}},
    ]
    assert len({cache.digest(**entry) for entry in inputs}) == len(inputs)
    assert cache.digest(a=1, b=2) == cache.digest(b=2, a=1)
    assert cache.digest(a=picture[:, ::2]) == cache.digest(a=np.ascontiguousarray(picture[:, ::2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_fingerprint_sees_one_changed_bit(dtype):
    module = torch.nn.Linear(5, 3).to(dtype)
    before = cache.fingerprint(module)
    assert cache.fingerprint(module) == before
    with torch.no_grad():
        module.weight[1, 2] = torch.nextafter(module.weight[1, 2].float(), torch.tensor(9.0)).to(dtype)
        module.weight[1, 2] += 0.01
    assert cache.fingerprint(module) != before


class _Keys:
    """Stands in for the cache and hands back the key."""

    def find(self, key, **_):
        return key


@pytest.fixture(scope="module")
def key_of(tiny_pipeline):
    """The LoRA's key for some settings and a changed sample."""
    backbone = load_backbone(load_config(overrides=[f"model.path={tiny_pipeline}", "model.device=cpu"]).model)
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    sample = EditSample(picture, "a cat", [[[3, 4], [10, 12]]])

    def key(*overrides, change=None, **changes):
        editor = Editor(load_config(overrides=[f"model.path={tiny_pipeline}", *overrides]), backbone)
        editor.caches["lora"] = _Keys()
        if change:
            change(backbone)
        return editor.finetune(replace(sample, **changes))

    key.picture = picture
    return key


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "lora.steps=81",
        "lora.rank=8",
        "lora.alpha=8",
        "lora.lr=0.001",
        "lora.weight_decay=0",
        "lora.batch_size=2",
        "lora.resolution=256",
        "lora.crop=pixel",
        "model.autocast=bf16",
    ],
)
def test_lora_key_changes_with(override, key_of):
    assert key_of(override) != key_of()


def test_lora_key_changes_with_the_sample(key_of):
    other = key_of.picture.copy()
    other[5, 5, 0] ^= 1
    assert len({key_of(), key_of(image=other), key_of(prompt="a dog")}) == 3


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_lora_key_changes_with_the_weights(part, key_of):
    def nudge(backbone):
        with torch.no_grad():
            next(getattr(backbone.pipeline, part).parameters()).flatten()[0] += 1

    assert key_of(change=nudge) != key_of(change=nudge)


def test_lora_key_changes_with_what_the_model_predicts(key_of):
    before = key_of()

    def predicts(kind):
        return lambda backbone: setattr(backbone, "prediction_type", kind)

    assert key_of(change=predicts("v_prediction")) != before
    assert key_of(change=predicts("epsilon")) == before


@pytest.mark.parametrize(
    "override",
    [
        "drag.lr=0.5",
        "drag.steps=3",
        "ddim.strength=0.5",
        "ddim.steps=20",
        "control.enabled=false",
        "output.folder=elsewhere",
        "cache.folder=elsewhere",
        "logger.kind=csv",
        "data.max_size=512",
    ],
)
def test_lora_key_does_not_change_with(override, key_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert key_of(override) == key_of()


def test_lora_key_does_not_change_with_points_or_mask(key_of):
    mask = np.zeros((32, 48), bool)
    mask[3:20, 5:9] = True
    assert key_of(points=[[[1, 1], [2, 2]]], mask=mask, name="other") == key_of()


def test_folder_of_the_cache(tiny_pipeline, tmp_path):
    def folder(*overrides):
        config = load_config(overrides=[f"model.path={tiny_pipeline}", *overrides])
        return Editor(config, _Anything()).caches["lora"].folder

    class _Anything:
        device = torch.device("cpu")
        self_attention_layers = ("up_blocks.2.attn1",)
        feature_strides = {"up_blocks.2": 1}  # noqa: RUF012

    assert folder(f"cache.folder={tmp_path}") == tmp_path / "lora"
    assert folder() == cache.default_folder() / "lora"
    assert folder("cache.enabled=false") is None
    assert Path.home() / "x" / "lora" == folder("cache.folder=~/x")


# ------------------------------------------------------------------------------------------- what edits share


@pytest.fixture
def edits(tiny_pipeline, tmp_path):
    """Editors on one model, the stages that they compute, and a sample."""
    fixed = [f"model.path={tiny_pipeline}", "model.device=cpu", "lora.batch_size=1", "lora.resolution=32"]
    fixed += ["ddim.steps=6", "drag.steps=2", "output.frames_every=0", f"cache.folder={tmp_path}"]
    backbone = load_backbone(load_config(overrides=fixed).model)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sample = EditSample(picture, "a cat", [[[20, 20], [40, 30]]])
    computed: list[str] = []

    def note(stage, done, total, text):
        if done == 0:
            computed.append(stage)

    def config(*overrides):
        return load_config(overrides=[*fixed, *overrides])

    return Editor(config(), backbone, report=note), config, sample, computed


def test_second_edit_of_a_picture_only_drags_and_denoises(edits):
    editor, config, sample, computed = edits
    settings = config("lora.steps=2")
    first = editor.reconfigured(settings).edit(sample)
    assert computed == ["LoRA", "inversion", "drag", "denoise", "decode"]
    computed.clear()
    again = editor.reconfigured(settings).edit(sample)
    assert computed == ["drag", "denoise", "decode"]
    assert np.array_equal(first.image, again.image)

    pipeline, forwards = editor.backbone.pipeline, []
    parts = {"text": pipeline.text_encoder, "encode": pipeline.vae.encoder, "unet": pipeline.unet}
    hooks = [part.register_forward_pre_hook(lambda *_, n=name: forwards.append(n)) for name, part in parts.items()]
    moved = editor.reconfigured(settings).edit(replace(sample, points=[[[10, 10], [50, 50]]]))
    for hook in hooks:
        hook.remove()
    assert forwards == ["unet"] * (moved.steps + 2 * 4)  # the drag's; denoising source and edit, 4 steps
    assert moved.steps == 2
    other = editor.reconfigured(config("lora.steps=2", "cache.enabled=false"))
    alone = other.edit(replace(sample, points=[[[10, 10], [50, 50]]]))
    assert np.array_equal(moved.image, alone.image)


@pytest.mark.parametrize(
    "override", ["ddim.steps=8", "ddim.strength=0.5", "lora.steps=3", "lora.steps=0", "data.max_size=40", "seed=1"]
)
def test_inversion_is_computed_for_what_it_depends_on(override, edits):
    editor, config, sample, computed = edits
    editor.reconfigured(config("lora.steps=2")).edit(sample)
    computed.clear()
    editor.reconfigured(config("lora.steps=2", override)).edit(sample)
    assert "inversion" in computed


def adapter_strength(pipeline, value):
    for layer in pipeline.unet.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_scale("default", value)


def steps_offset(pipeline, value):
    pipeline.scheduler.register_to_config(steps_offset=value)


def freeu(pipeline, value):
    pipeline.unet.enable_freeu(s1=value, s2=value, b1=1.0, b2=1.0)


def processor(pipeline, value):
    pipeline.unet.set_attn_processor(value())


def tiling(pipeline, value):
    pipeline.vae.use_tiling = value


def scaling_factor(pipeline, value):
    pipeline.vae.register_to_config(scaling_factor=value)


def padding(pipeline, value):
    pipeline.tokenizer.pad_token = value


def text_encoders_rounding(pipeline, value):
    pipeline.text_encoder.config.layer_norm_eps = value


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (adapter_strength, (0.5, 1.0)),
        (steps_offset, (1, 0)),
        (freeu, (0.9, 0.5)),
        (processor, (AttnProcessor2_0, AttnProcessor)),
        (tiling, (False, True)),
        (scaling_factor, (0.18, 0.2)),
        (padding, ("<|endoftext|>", "<|startoftext|>")),
        (text_encoders_rounding, (1e-5, 1e-6)),
    ],
)
def test_inversion_is_computed_for_each_state_of_an_owners_model(change, values, edits):
    """Also for what is no weight."""
    editor, config, sample, computed = edits
    editor = editor.reconfigured(config("lora.steps=0"))
    pipeline = editor.backbone.pipeline
    if change is adapter_strength:
        inject_adapter_in_model(LoraConfig(target_modules=["to_q"], init_lora_weights=False), pipeline.unet)
    made = []
    for value in (*values, values[0]):
        change(pipeline, value)
        computed.clear()
        editor.edit(sample)
        made.append("inversion" in computed)
    assert made == [True, True, False]


def test_what_is_switched_off_again_is_as_what_never_was(edits):
    backbone = edits[0].backbone
    pipeline = backbone.pipeline

    def fingerprint(part):
        return cache.fingerprint(part, state=backbone.state)

    unet, vae = map(fingerprint, (pipeline.unet, pipeline.vae))
    freeu(pipeline, 0.5)
    tiling(pipeline, True)
    assert fingerprint(pipeline.unet) != unet and fingerprint(pipeline.vae) != vae
    pipeline.unet.disable_freeu()
    tiling(pipeline, False)
    assert (fingerprint(pipeline.unet), fingerprint(pipeline.vae)) == (unet, vae)


def test_an_error_in_a_report_costs_no_entry(edits):
    editor, config, sample, computed = edits
    editor = editor.reconfigured(config("lora.steps=1"))
    editor.edit(sample)

    def fails(stage, done, total, note):
        if note == "from the cache":
            raise UserError("too long")

    note, editor.report = editor.report, fails
    with pytest.raises(UserError, match="too long"):
        editor.edit(sample)
    editor.report = note
    computed.clear()
    editor.edit(sample)
    assert computed == ["drag", "denoise", "decode"]


def test_inversion_depends_on_picture_and_prompt(edits):
    editor, config, sample, computed = edits
    for other in (sample, replace(sample, prompt="a dog"), replace(sample, image=255 - sample.image)):
        computed.clear()
        editor.reconfigured(config("lora.steps=0")).edit(other)
        assert "inversion" in computed


def test_entries_hold_what_they_are_by_name(edits, tmp_path):
    """The inversion's latents from the clean one on; what a prompt tells the network."""
    editor, config, sample, _ = edits
    editor.reconfigured(config("lora.steps=0")).edit(sample)
    (inversion,), (prompt,) = (list((tmp_path / stage).iterdir()) for stage in ("inversion", "prompt"))
    path = cache.load_tensors(inversion)["path"]
    assert path.shape == (5, 4, 8, 8)  # 4 of 6 steps
    with torch.no_grad():
        clean, _ = editor.backbone.encode(to_tensor(sample.image))
        condition = editor.backbone.condition([sample.prompt])
    assert torch.equal(path[0], clean[0])
    kept = cache.load_tensors(prompt)
    assert kept.keys() == condition.keys() and all(torch.equal(kept[name], condition[name]) for name in kept)


def test_another_method_finds_what_one_has_made(edits):
    editor, config, sample, computed = edits
    editor.reconfigured(config("lora.steps=2", "lora.lr=2e-4")).edit(sample)
    computed.clear()
    editor.reconfigured(config("method=dragnoise", "lora.steps=2")).edit(sample)
    assert computed == ["drag", "denoise", "decode"]


def test_broken_inversion_is_made_again(edits, tmp_path):
    editor, config, sample, _ = edits
    settings = config("lora.steps=0")
    first = editor.reconfigured(settings).edit(sample)
    (entry,) = (tmp_path / "inversion").glob(f"*/{cache.TENSORS}")
    entry.write_bytes(entry.read_bytes()[:40])
    with pytest.warns(UserWarning, match="broken and is made again"):
        again = editor.reconfigured(settings).edit(sample)
    assert np.array_equal(first.image, again.image)


def test_one_training_serves_several_numbers_of_steps(edits, tmp_path):
    """The LoRA after two of three steps is the very LoRA of two steps."""
    editor, config, sample, computed = edits
    alone = [editor.reconfigured(config(f"lora.steps={n}", "cache.enabled=false")).finetune(sample) for n in (1, 2, 3)]
    computed.clear()
    rows = []
    hook = editor.backbone.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    editor.share_loras([sample, replace(sample, points=[[[1, 1], [2, 2]]])], [3, 1, 2])
    hook.remove()
    assert rows == [editor.config.lora.batch_size] * 3  # the picture once
    assert computed == ["LoRA"]
    shared = [editor.reconfigured(config(f"lora.steps={n}")).finetune(sample) for n in (1, 2, 3)]
    assert computed == ["LoRA"]
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(one.up[name], other.up[name]) for name in one.up)
        assert all(torch.equal(one.down[name], other.down[name]) for name in one.down)
        assert one.scale == other.scale
    editor.share_loras([sample], [3, 1, 2])
    assert computed == ["LoRA"]


def test_reference_branch_from_memory_gives_the_same_picture(edits):
    """For the drag's settings anything may change; for what the source's denoising depends on it is computed anew."""
    editor, config, sample, _ = edits
    forwards = []
    hook = editor.backbone.network.register_forward_pre_hook(lambda *_: forwards.append(1))

    def edit(*overrides):
        forwards.clear()
        image = editor.reconfigured(config("lora.steps=0", *overrides)).edit(sample).image
        return image, len(forwards)

    edit("cache.reference_mb=100")
    plain, plainly = edit("drag.lr=0.1")
    image, shared = edit("cache.reference_mb=100", "drag.lr=0.1")
    steps = 4  # of denoising
    assert np.array_equal(image, plain)
    assert plainly - shared == steps  # both found the inversion in the cache
    for other in ("control.start_layer=up_blocks.3", "ddim.strength=0.5"):
        image, counted = edit("cache.reference_mb=100", other)
        assert np.array_equal(image, edit(other)[0])
        assert counted > shared - 2
    hook.remove()


def test_reference_branch_too_large_for_the_memory_is_not_kept(edits):
    editor, config, sample, _ = edits
    big = config("lora.steps=0", "cache.reference_mb=1", "data.max_size=512")
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    editor.reconfigured(big).edit(replace(sample, image=picture))
    assert not editor.kept["references"]
    editor.reconfigured(big).edit(sample)
    assert len(editor.kept["references"]) == 1


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m"])
def test_a_generated_picture_is_sampled_once_for_its_edits(edits, scheduler):
    editor, config, sample, computed = edits
    settings = ["generate.enabled=true", "generate.height=64", "generate.width=64", f"generate.scheduler={scheduler}"]
    other = replace(sample, points=[[[20, 20], [30, 30]]])
    editor.reconfigured(config(*settings)).edit(sample)
    assert computed.count("generate") == 1
    kept = editor.reconfigured(config(*settings, "drag.lr=0.1")).edit(other)
    assert computed.count("generate") == 1
    alone = editor.reconfigured(config(*settings, "drag.lr=0.1", "cache.enabled=false")).edit(other)
    assert np.array_equal(kept.image, alone.image) and np.array_equal(kept.sample.image, alone.sample.image)
    for change in ("seed=1", "ddim.strength=0.5", "generate.guidance=3", "generate.negative_prompt=x"):
        before = computed.count("generate")
        editor.reconfigured(config(*settings, change)).edit(sample)
        assert computed.count("generate") == before + 1


def as_file(entry: Path) -> None:
    entry.write_text("x")


def as_dangling_link(entry: Path) -> None:
    entry.symlink_to("nowhere")


def as_circle(entry: Path) -> None:
    entry.symlink_to(entry.name)


def as_pipe(entry: Path) -> None:
    os.mkfifo(entry)


def with_a_folder_inside(entry: Path) -> None:
    (entry / "x").mkdir(parents=True)
    (entry / "sha256").write_text("")


def with_a_pipe_inside(entry: Path) -> None:
    entry.mkdir()
    os.mkfifo(entry / "sha256")


def as_link_to_a_folder(entry: Path) -> None:
    (entry.parent.parent / "mine").mkdir()
    (entry.parent.parent / "mine" / "x").write_text("x")
    entry.symlink_to(entry.parent.parent / "mine")


@pytest.mark.filterwarnings("ignore:cache entry")
@pytest.mark.parametrize(
    "make",
    [as_file, as_dangling_link, as_circle, as_pipe, with_a_folder_inside, with_a_pipe_inside, as_link_to_a_folder],
)
def test_what_is_no_plain_entry_is_taken_away_and_written_again(tmp_path, make):
    store, key = cache.StageCache(tmp_path / "lora"), "0" * 32
    (tmp_path / "lora").mkdir()
    make(tmp_path / "lora" / key)
    (tmp_path / "lora" / f"{key}.partial-new").write_text("a file where a killed writer's folder would be")
    (tmp_path / "bytes").mkdir()

    def get(make):
        return store.get(
            key,
            make=make,
            save=lambda value, folder: (folder / "x").write_text(value),
            load=lambda folder: (folder / "x").read_text(),
        )

    assert get(lambda: "made") == "made"
    assert get(lambda: pytest.fail("it was not kept")) == "made"
    if make is as_link_to_a_folder:
        assert (tmp_path / "mine" / "x").read_text() == "x"
