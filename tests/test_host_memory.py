"""Weights that rest in a file, and an allocator that gives back what is freed, or keeps it."""

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from dragdiff import Editor, EditSample
from dragdiff.config import load_config
from dragdiff.modules import host_memory
from dragdiff.modules.host_memory import Resting, resting

linux = pytest.mark.skipif(sys.platform != "linux", reason="weights rest on Linux only")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def resident() -> float:
    """MB of this process."""
    return psutil.Process().memory_info().rss / 1e6


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_copies_have_the_bits_and_the_tensors_get_them_back_where_they_were(dtype):
    tensors = [
        torch.randn(300, 301).to(dtype),
        torch.randn(3).to(dtype),  # too small to rest
        torch.randn(400, 200).to(dtype).t(),  # not contiguous
        torch.randn(257, 1031).to(dtype),
    ]
    kept, places = [tensor.clone() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    rest = Resting(tensors)
    rest.sleep()
    assert [copy is tensor for copy, tensor in zip(rest.copies, tensors, strict=True)] == [False, True, True, False]
    for _ in range(2):
        assert all(torch.equal(copy, before) for copy, before in zip(rest.copies, kept, strict=True))
        rest.let_go()
    assert (tensors[0] == 0).sum() > 0.9 * tensors[0].numel()  # they rest indeed
    rest.wake()
    assert all(torch.equal(tensor, before) for tensor, before in zip(tensors, kept, strict=True))
    assert [tensor.data_ptr() for tensor in tensors] == places


@linux
def test_a_resting_module_takes_memory_only_while_it_is_used():
    module = nn.Linear(4096, 4096, bias=False)  # 67 MB
    inputs = torch.randn(2, 4096)
    with torch.no_grad():
        expected, whole = module(inputs), resident()
        with resting(module) as let_go:
            assert resident() < whole - 60
            assert torch.equal(module(inputs), expected)
            assert resident() > whole - 30
            let_go()
            assert resident() < whole - 60
        assert torch.equal(module(inputs), expected)


@linux
def test_it_wakes_after_an_error_too():
    module = nn.Linear(256, 256)
    before = module.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), resting(module):
        raise ZeroDivisionError
    assert torch.equal(module.weight, before)


@linux
def test_ctrl_c_while_they_wake_leaves_none_asleep(monkeypatch):
    tensors = [torch.randn(300, 300) for _ in range(4)]
    kept, rest = [tensor.clone() for tensor in tensors], Resting(tensors)
    rest.sleep()
    let_go, calls = rest.let_go, iter(range(10))

    def interrupted():
        if next(calls) == 1:
            raise KeyboardInterrupt
        let_go()

    monkeypatch.setattr(rest, "let_go", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rest.wake()
    assert all(torch.equal(tensor, before) for tensor, before in zip(tensors, kept, strict=True))


@linux
def test_what_can_not_be_written_to_stays():
    with torch.inference_mode():
        tensor = torch.randn(300, 300)
    assert Resting([tensor]).copies[0] is tensor


def test_without_room_on_the_disk_nothing_rests(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    tensor = torch.randn(300, 300)
    before, rest = tensor.clone(), Resting([tensor])
    assert rest.copies[0] is tensor
    rest.sleep()
    rest.let_go()
    rest.wake()
    assert torch.equal(tensor, before)


@linux
def test_the_file_has_no_name_and_goes_with_the_copies(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    rest = Resting([torch.randn(300, 300)])
    (mapped,) = {line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
    assert mapped.startswith(f"{tmp_path}/") and list(tmp_path.iterdir()) == []
    del rest
    assert len(os.listdir("/proc/self/fd")) == before


def test_they_stay_awake_without_a_folder(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    tensor = torch.randn(300, 300)
    rest = Resting([tensor])
    assert rest.copies[0] is tensor
    rest.sleep()
    assert tensor.any()


@linux
@pytest.mark.parametrize("stage", ["lora", "generate"])
def test_parts_rest_while_the_network_works(backbone, monkeypatch, stage):
    monkeypatch.setattr(host_memory, "LARGE", 1)
    slept: list[int] = []
    monkeypatch.setattr(host_memory, "_drop_pages", lambda tensor: slept.append(tensor.data_ptr()))
    weights = [p.data_ptr() for p in backbone.pipeline.vae.parameters() if p.is_contiguous() and not p.is_inference()]
    settings = ["lora.steps=1", "lora.resolution=64", "cache.enabled=false", "generate.width=64", "generate.height=64"]
    editor = Editor(
        load_config(["debug"], [*settings, f"generate.enabled={str(stage == 'generate').lower()}"]), backbone
    )
    if stage == "lora":
        editor.finetune(EditSample(torch.zeros(64, 64, 3).byte().numpy(), "a cat", [[[16, 16], [48, 48]]]))
    else:
        editor.generate("a cat")
    assert set(weights) <= set(slept)


@linux
def test_parts_that_rest_give_the_same_edit(backbone, monkeypatch):
    """With a limit that lets this small model's weights rest, with a LoRA in its weights, previews and a mask."""
    sample = EditSample(torch.zeros(64, 64, 3).byte().numpy() + 90, "a cat", [[[16, 16], [48, 48]]])
    config = load_config(["debug"], ["lora.steps=1", "lora.resolution=64", "cache.enabled=false"])
    monkeypatch.setattr(host_memory, "LARGE", 2**40)
    awake = Editor(config, backbone).edit(sample)
    monkeypatch.setattr(host_memory, "LARGE", 1)
    rested: list[int] = []
    monkeypatch.setattr(host_memory, "_drop_pages", lambda tensor: (rested.append(1), tensor.zero_()))
    asleep = Editor(config, backbone).edit(sample)
    assert len(rested) > 100
    assert (asleep.image == awake.image).all()
    for (_, frame, _), (_, other, _) in zip(asleep.frames, awake.frames, strict=True):
        assert (frame == other).all()


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_each_stage_keeps_what_it_frees_unless_memory_shall_be_saved(backbone, monkeypatch, memory):
    inside: list[bool] = []
    stages: dict[str, set[bool]] = {}

    @contextlib.contextmanager
    def kept():
        inside.append(True)
        yield
        inside.pop()

    def report(stage, done, total, note):
        if done:
            stages.setdefault(stage, set()).add(bool(inside))

    monkeypatch.setattr("dragdiff.stages.kept_for_reuse", kept)
    sample = EditSample(torch.zeros(64, 64, 3).byte().numpy() + 90, "a cat", [[[16, 16], [48, 48]]])
    keys = ["lora.steps=1", "lora.resolution=64", "cache.enabled=false", f"model.memory={memory}"]
    Editor(load_config(["debug"], keys), backbone, report=report).edit(sample)
    assert stages == {name: {memory == "normal"} for name in ("LoRA", "inversion", "drag", "denoise", "decode")}
    assert not inside


@glibc
def test_freed_memory_goes_back_at_once():
    """Each in a process of its own, whose allocator nobody has set, and whose heap has no room yet to be used again."""
    code = """
import contextlib, sys
import psutil, torch
from dragdiff.modules.host_memory import freed_at_once
with freed_at_once() if sys.argv[1] == "saving" else contextlib.nullcontext():
    big = [torch.ones(20_000_000 // 4) for _ in range(2)]
    del big  # 32 MiB is where the allocator's own rule ends: blocks of this size stay with it from now on
    blocks = [torch.ones(4_000_000 // 4) for _ in range(50)]
    before = psutil.Process().memory_info().rss
    del blocks[:-1]
    print((before - psutil.Process().memory_info().rss) / 1e6)
"""

    def given_back(how: str) -> float:
        out = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout
        return float(out)

    assert given_back("saving") > 190
    assert given_back("usual") < 50


@glibc
def test_freed_memory_is_used_again():
    """Blocks of one size find room that blocks of that size have left, but not at once, as a new one asks for a little
    more; and it is given back on leaving.
    """
    code = """
import contextlib, resource, sys
import psutil, torch
from dragdiff.modules.host_memory import kept_for_reuse
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
start = psutil.Process().memory_info().rss
with kept_for_reuse() if sys.argv[1] == "kept" else contextlib.nullcontext():
    for _ in range(6):
        before = faults()
        blocks = [torch.ones(50_000_000 // 4) for _ in range(4)]
        del blocks
        found = faults() - before
print(found, (psutil.Process().memory_info().rss - start) / 1e6)
"""

    def last_round(how: str) -> list[float]:
        out = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout
        return [float(number) for number in out.split()]

    faults, left = last_round("kept")
    assert left < 50
    assert faults < last_round("usual")[0] / 5
