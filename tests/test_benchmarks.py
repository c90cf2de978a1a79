"""benchmarks/speed.py with its tiny model: it runs, counts and compares; no figure of time is asserted."""

import importlib
import itertools
import json
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dragdiff.backbones.compilation import Compilation
from dragdiff.errors import UserError

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def speed():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # its own processes import it too
        module = importlib.import_module("speed")
        patch.setattr(module, "OVERHEAD_STEPS", 4)
        patch.setattr(module, "OVERHEAD_REPEATS", 1)
        yield module


@pytest.fixture(scope="module")
def results(speed, tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "tiny.json"
    assert speed.main(["model=tiny", "size=64", "repeats=1", "memory_peaks=false", "batch=2", f"output={file}"]) == 0
    return file


def test_every_stage_is_measured_and_a_step_costs_what_its_operations_say(speed, results):
    found = json.loads(results.read_text())
    forward = found["forward_gflop"]
    stages = found["stages"]
    assert list(stages) == list(speed.STAGES)
    assert all(stage["ratio"] > 0 for stage in stages.values())
    # no operations but the denoiser's: a row's forward, and for the denoising one more for the source
    assert stages["inversion"]["gflop"] == pytest.approx(forward, rel=0.01)
    assert stages["denoise"]["gflop"] == pytest.approx(2 * forward, rel=0.2)
    # with a mask the whole network runs forth and back, without it stops at the feature block
    assert stages["drag, no mask"]["gflop"] < stages["drag, mask"]["gflop"]
    assert 1.5 * forward < stages["drag, mask"]["gflop"] < 3 * forward
    assert stages["lora"]["gflop"] > 2 * speed.LORA_BATCH * forward * 0.8


def test_attention_is_counted_as_the_sum_of_its_products(speed):
    """On a CPU, where torch's own counter leaves it out: two products of matrices forth, five back."""
    query, key, value = (torch.randn(1, 2, tokens, 8, requires_grad=True) for tokens in (32, 16, 16))
    product = 2 * 2 * 32 * 16 * 8  # two heads; multiplication and addition
    with FlopCounterMode(display=False, custom_mapping=speed.UNCOUNTED) as counter:
        output = F.scaled_dot_product_attention(query, key, value)
        assert counter.get_total_flops() == 2 * product
        output.sum().backward()
    assert counter.get_total_flops() == (2 + 5) * product


def test_a_batch_is_compared_with_as_many_edits_one_by_one(speed, results):
    found = json.loads(results.read_text())
    assert list(found["batch"]) == ["lora", "drag, mask"]
    assert all(0 < kind["ratio_low"] <= kind["ratio"] <= kind["ratio_high"] for kind in found["batch"].values())
    assert "2 edits at once" in speed.table(found)


def test_a_batch_does_the_operations_of_its_edits(speed):
    """Also where each picture has a LoRA of its own: of rank 1, as beside the weights its products come on top."""
    settings = speed.BenchmarkConfig(model="tiny", size=64)
    edit, counts = speed.editor(settings, speed.load(settings), steps=2, adapter="", lora={"rank": 1}), []
    for count in (1, 2):
        counter, before, found = FlopCounterMode(display=False, custom_mapping=speed.UNCOUNTED), {}, {}

        def watch(name, step, total, counter=counter, before=before, found=found):
            found[name] = counter.get_total_flops() - before.get(name, 0)
            before[name] = counter.get_total_flops()

        with counter:
            speed.run_edit(edit, ["lora", "drag, mask"], settings.size, watch, count=count)
        counts.append(found)
    assert counts[0]["lora"] > counts[0]["drag, mask"] > 0  # four rows; one
    for name, alone in counts[0].items():
        assert counts[1][name] == pytest.approx(2 * alone, rel=0.05)


def test_memory_that_is_too_small_for_a_batch_is_not_timed_as_half_of_it(speed, monkeypatch):
    settings = speed.BenchmarkConfig(model="tiny", size=64)
    edit = speed.editor(settings, speed.load(settings), steps=1, adapter="")

    tried = []

    def full(job, *_, **__):
        tried.append(len(job.edits))
        raise torch.OutOfMemoryError

    monkeypatch.setattr("dragdiff.stages.dragging.drag", full)
    with pytest.raises(UserError, match="too small for 2 edits at once: set a smaller batch"):
        speed.run_edit(edit, ["drag, mask"], settings.size, lambda *_: None, count=2)
    assert tried == [2]
    with pytest.raises(torch.OutOfMemoryError):
        speed.run_edit(edit, ["drag, mask"], settings.size, lambda *_: None)


def test_an_edit_that_failed_is_said(speed, monkeypatch):
    settings = speed.BenchmarkConfig(model="tiny", size=64)
    edit = speed.editor(settings, speed.load(settings), steps=1, adapter="")

    def fails(job, *_, **__):
        for edit in list(job.edits):
            job.drop(edit, UserError("no good"))

    monkeypatch.setattr("dragdiff.stages.dragging.drag", fails)
    with pytest.raises(UserError, match="no good"):
        speed.run_edit(edit, ["drag, mask"], settings.size, lambda *_: None)


@pytest.mark.slow
def test_nothing_is_compiled_in_a_step_that_is_measured(speed):
    settings = speed.BenchmarkConfig(model="tiny", size=64, compile=True)
    backbone, graphs, counted = speed.load(settings), [], {}

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    backbone.compilation = Compilation(backbone.network, backbone.compilation.gradient, backend=backend)
    edit = speed.editor(settings, backbone, steps=3, adapter="")

    def watch(name, step, total):
        counted.setdefault(name, []).append(len(graphs))
        if step == 0:  # as before each stage
            speed.bare_forward(edit, settings.size, rows=1, autocast=False)()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="model.compile")  # that nothing is
        for measured in (["lora"], ["inversion", "drag, mask", "denoise"]):
            speed.run_edit(edit, measured, settings.size, watch)
    assert graphs
    for before, first, *later in counted.values():
        assert before <= first == later[-1]


def test_a_drag_is_timed_from_the_end_of_its_first_steps_on(speed):
    """The clock has ticked once between the end of the first two steps and that of the third."""
    settings, ticks = speed.BenchmarkConfig(model="tiny", size=64, warmup=2, steps=1), itertools.count(100)
    edit = speed.editor(settings, speed.load(settings), steps=3, adapter="")
    assert speed.step_seconds(edit, ["drag, mask"], settings, lambda: next(ticks)) == {"drag, mask": 1}


def test_the_frameworks_share_is_timed_from_the_first_step_in_both(speed):
    ticks = itertools.count(100)
    found = speed.overhead(speed.BenchmarkConfig(model="tiny", size=64), lambda: next(ticks))
    assert found["product_ms"] == found["bare_ms"] == pytest.approx(1e3 / 3)  # the clock has ticked once in three steps
    assert found["added_low"] == found["added_ms"] == found["added_high"] == 0


def test_a_bare_forward_runs_where_no_edit_has_changed_anything(speed, monkeypatch):
    def here(*args, **kwargs):
        raise AssertionError("it ran in the process of the edit")

    settings = speed.BenchmarkConfig(model="tiny", size=64, repeats=1)
    backbone = speed.load(settings)
    monkeypatch.setattr(speed, "bare_forward", here)
    clock = speed.make_clock(settings, backbone.device)
    with speed.forwards_alone(settings) as forward:
        seconds, forwards = speed.times(settings, backbone, "", ["lora", "decode"], clock, forward)
    assert all(took > 0 for name in ("lora", "decode") for took in (*seconds[name], *forwards[name]))


def test_memory_of_a_stage(speed):
    """In a process of its own: elsewhere what others have freed may go back to the system meanwhile."""
    found = speed.peaks(speed.BenchmarkConfig(model="tiny", size=64), "", ["lora"])["lora"]
    assert found["peak_mb"] >= found["loaded_mb"] > 0


def test_the_most_memory_in_use_is_seen(speed):
    highest = speed.Highest(torch.device("cpu"))
    before = psutil.Process().memory_info().rss / 2**20
    highest.start()
    held, until = np.ones(256 * 2**20, np.uint8), time.monotonic() + 10
    while highest.most < before + 192 and time.monotonic() < until:
        time.sleep(0.01)
    del held
    assert 192 < highest.stop() - before < 512


def test_two_runs_are_compared(speed, results, tmp_path, capsys):
    changed = json.loads(results.read_text())
    changed["stages"]["decode"]["ratio"] *= 2
    changed["settings"]["memory"] = "low"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(changed))
    assert speed.main(["--compare", str(results), str(other)]) == 0
    out = capsys.readouterr().out
    assert "+100.0%" in next(line for line in out.splitlines() if line.startswith("decode"))
    assert "memory (normal before, low after)" in out
    assert "batch of 2, lora" in out


def test_results_of_another_way_to_measure_are_said_to_be(speed, results):
    now, before = json.loads(results.read_text()), json.loads(results.read_text())
    for key in ("warmup", "peak_steps", "forwards"):
        del before["settings"][key]
    del before["batch"]
    assert (
        "they also differ in warmup (none before, 2 after), peak_steps (none before, 2 after), "
        "forwards (none before, alone after)"
    ) in speed.comparison(before, now)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=no/such/model/here"], "no such file or folder"),
        (["modle=tiny"], "did you mean 'model'"),
        (["stages=[dreg]", "model=tiny"], "there are lora"),
        (["output=/no/such/folder/x.json"], "there is no folder"),
        (["--compare", "none.json", "none.json"], "cannot read 'none.json'"),
        (["--compare", __file__, __file__], "holds no results"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(speed, capsys, arguments, words):
    assert speed.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
