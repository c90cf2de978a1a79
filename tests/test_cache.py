"""The cache of stages: keys, whole entries, broken ones, two writers, no place to write."""

import json
import multiprocessing
import os
import random
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dragdiff import cache
from dragdiff.config import load_config
from dragdiff.data.sample import EditSample
from dragdiff.editor import Editor
from dragdiff.errors import UserError
from dragdiff.modules.loading import load_backbone


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


# ------------------------------------------------------------------------------------------- room


def save_bytes(size, folder):
    (folder / "data").write_bytes(bytes(size))


def load_bytes(folder):
    try:
        return len((folder / "data").read_bytes())
    except OSError as error:
        raise UserError("gone") from error


@pytest.mark.parametrize("seed", range(5))
def test_what_was_not_used_for_longest_goes(seed, tmp_path):
    """Against a list that is kept in order; two stages share the limit."""
    rng, limit = np.random.default_rng(seed), 1000
    stages = {name: cache.StageCache(tmp_path / name, limit_mb=limit / 2**20) for name in ("lora", "inversion")}
    model: list[tuple[str, str, int]] = []  # last used last
    for moment in range(60):
        stage, key = str(rng.choice(list(stages))), f"k{rng.integers(8)}"
        known = [entry for entry in model if entry[:2] == (stage, key)]
        assert stages[stage].find(key, load=load_bytes) == (known[0][2] if known else None)
        size = known[0][2] if known else int(rng.integers(100, 400))
        if not known:
            stages[stage].put(key, size, save=save_bytes)
        model = [entry for entry in model if entry[:2] != (stage, key)] + [(stage, key, size)]
        while sum(entry[2] for entry in model) > limit:
            model.pop(0)
        os.utime(tmp_path / stage / key, (moment, moment))  # file systems' clocks are coarse
        assert {(p.parent.name, p.name) for p in tmp_path.glob("*/*")} == {entry[:2] for entry in model}


def test_limit_may_be_lowered_or_lifted(tmp_path):
    for number in range(5):
        cache.StageCache(tmp_path).put(f"k{number}", 300, save=save_bytes)
        os.utime(tmp_path / f"k{number}", (number, number))
    assert len(list(tmp_path.iterdir())) == 5
    cache.StageCache(tmp_path, limit_mb=700 / 2**20).put("new", 300, save=save_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k4", "new"]


def test_what_is_larger_than_the_limit_is_used_but_not_kept(tmp_path):
    stage = cache.StageCache(tmp_path, limit_mb=700 / 2**20)
    stage.put("small", 300, save=save_bytes)
    with pytest.warns(UserWarning, match=r"more than cache\.limit_mb"):
        assert stage.get("large", make=lambda: 800, save=save_bytes, load=load_bytes) == 800
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_leftovers_of_killed_writers_go_and_those_of_live_ones_stay(tmp_path):
    for name, age in (("a.partial-1", 7200), ("b.partial-2", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(b"half")
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    cache.StageCache(tmp_path).put("k", 1, save=save_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.partial-2", "k"]


def test_an_entry_that_vanishes_under_its_reader_is_made_again_silently(tmp_path):
    get(tmp_path)

    def vanishing(folder):
        cache._remove(folder)
        return load(folder)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get(tmp_path, load=vanishing, make=lambda: [3]) == [3]
    assert get(tmp_path, make=never) == [3]


def _use(folder, limit, seed, ends):
    """Reads, makes and checks entries at random until the end, or until it is killed."""
    warnings.simplefilter("error")
    rng, stage = np.random.default_rng(seed), cache.StageCache(folder, limit_mb=limit / 2**20)
    while time.monotonic() < ends:
        number = int(rng.integers(12))

        def slowly(value, place):
            with open(place / "data", "wb") as file:
                for _ in range(value // 50):
                    file.write(bytes([value % 251]) * 50)
                    file.flush()

        def checked(place):
            try:
                content = (place / "data").read_bytes()
            except OSError as error:
                raise UserError("gone") from error
            assert content == bytes([len(content) % 251]) * len(content)
            return len(content)

        value = 50 * (number + 1)
        assert stage.get(f"k{number}", make=lambda value=value: value, save=slowly, load=checked) == value


def test_many_processes_at_once_some_of_them_killed(tmp_path):
    """No wrong value, no error, the limit holds, and only what a kill interrupted is left over."""
    context, limit, killed = multiprocessing.get_context("fork"), 2000, 0
    chance, ends = random.Random(0), time.monotonic() + 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking a process that has threads
        users = [context.Process(target=_use, args=(tmp_path, limit, seed, ends)) for seed in range(4)]
        for user in users:
            user.start()
        while time.monotonic() < ends - 0.5:
            time.sleep(chance.uniform(0.05, 0.3))
            victim = users.pop(0)
            victim.kill()
            victim.join()
            killed += 1
            users.append(context.Process(target=_use, args=(tmp_path, limit, 100 + killed, ends)))
            users[-1].start()
        for user in users:
            user.join(60)
    assert killed >= 10 and [user.exitcode for user in users] == [0] * 4
    whole = [path for path in tmp_path.iterdir() if ".partial-" not in path.name]
    for path in whole:
        assert len((path / "data").read_bytes()) == 50 * (int(path.name[1:]) + 1)
    old = time.time() - 7200
    for path in tmp_path.iterdir():
        if path not in whole:
            os.utime(path, (old, old))
    cache.StageCache(tmp_path, limit_mb=limit / 2**20).put("last", 50, save=save_bytes)
    assert not [path for path in tmp_path.iterdir() if ".partial-" in path.name]
    assert sum((path / "data").stat().st_size for path in tmp_path.iterdir()) <= limit


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
        editor._loras = _Keys()
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
        return Editor(config, object.__new__(_Anything))._loras.folder

    class _Anything:
        device = torch.device("cpu")
        self_attention_layers = ("up_blocks.2.attn1",)

        def feature_block(self, name):
            return None

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
    read: list[object] = []
    hook = editor.backbone.text_encoder.register_forward_pre_hook(lambda *_: read.append(1))
    again = editor.reconfigured(settings).edit(sample)
    assert computed == ["drag", "denoise", "decode"]
    assert np.array_equal(first.image, again.image)
    computed.clear()
    editor.reconfigured(settings).edit(replace(sample, points=[[[10, 10], [20, 20]]]))
    assert computed == ["drag", "denoise", "decode"] and not read
    editor.reconfigured(settings).edit(replace(sample, prompt="another"))
    hook.remove()
    assert read


@pytest.mark.parametrize(
    "override", ["ddim.steps=8", "ddim.strength=0.5", "lora.steps=3", "lora.steps=0", "data.max_size=40", "seed=1"]
)
def test_inversion_is_computed_for_what_it_depends_on(override, edits):
    editor, config, sample, computed = edits
    editor.reconfigured(config("lora.steps=2")).edit(sample)
    computed.clear()
    editor.reconfigured(config("lora.steps=2", override)).edit(sample)
    assert "inversion" in computed


def test_inversion_depends_on_picture_and_prompt(edits):
    editor, config, sample, computed = edits
    for other in (sample, replace(sample, prompt="a dog"), replace(sample, image=255 - sample.image)):
        computed.clear()
        editor.reconfigured(config("lora.steps=0")).edit(other)
        assert "inversion" in computed


def test_broken_inversion_is_made_again(edits, tmp_path):
    editor, config, sample, _ = edits
    settings = config("lora.steps=0")
    first = editor.reconfigured(settings).edit(sample)
    (entry,) = (tmp_path / "inversion").glob("*/*")
    entry.write_bytes(entry.read_bytes()[:40])
    with pytest.warns(UserWarning, match="broken and is made again"):
        again = editor.reconfigured(settings).edit(sample)
    assert np.array_equal(first.image, again.image)


def test_one_training_serves_several_numbers_of_steps(edits, tmp_path):
    """The LoRA after two of three steps is the very LoRA of two steps."""
    editor, config, sample, computed = edits
    alone = [editor.reconfigured(config(f"lora.steps={n}", "cache.enabled=false")).finetune(sample) for n in (1, 2, 3)]
    computed.clear()
    editor.share_loras([sample], [3, 1, 2])
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
    big = config("lora.steps=0", "cache.reference_mb=1")
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    editor.reconfigured(big).edit(replace(sample, image=picture))
    assert not editor._references
    editor.reconfigured(big).edit(sample)
    assert len(editor._references) == 1
