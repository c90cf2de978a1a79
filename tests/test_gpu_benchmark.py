"""benchmarks/gpu.py, on a CPU: its parts find what they say, and neither failure nor time takes one with another."""

import importlib
import json
import multiprocessing
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("gpu")


class Beside:
    """As `Worker`, in a thread: with the parts of the test."""

    made = 0

    def __init__(self, settings):
        Beside.made += 1
        self.gpu = importlib.import_module("gpu")
        self.connection, theirs = multiprocessing.Pipe()
        self.process = SimpleNamespace(join=lambda: None, exitcode=-9)
        threading.Thread(target=self.work, args=(theirs, settings), daemon=True).start()

    def work(self, theirs, settings):
        try:
            self.gpu.work(theirs, settings)
        except (EOFError, SystemExit):
            theirs.close()

    def end(self):
        self.connection.close()


@pytest.fixture
def run(gpu, monkeypatch, tmp_path):
    """Runs parts given by name, within some seconds; what was written at last, and how often."""

    def run(parts, seconds):
        monkeypatch.setattr(gpu, "PARTS", parts)
        monkeypatch.setattr(gpu, "Worker", Beside)
        monkeypatch.setattr(gpu, "LEAST", 0.01)
        written, out = [], tmp_path / "gpu.json"

        def save(results):
            gpu.write(results, out)
            written.append(json.loads(out.read_text()))

        Beside.made = 0
        gpu.measure(gpu.load_gpu([f"minutes={seconds / 60}", "device=cpu"]), save)
        return written, out

    return run


def found(value):
    def part(bench):
        yield {"forward_seconds": value}

    return part


def failing(bench):
    yield {"forward_seconds": 1.0}
    raise RuntimeError("CUDA error: an illegal memory access")


def dying(bench):
    yield {"forward_seconds": 1.0}
    raise SystemExit


def slow(bench):
    yield {"forward_seconds": 3.0}
    time.sleep(60)


def test_a_part_that_fails_is_told_and_the_next_run_in_a_new_process(run):
    written, out = run({"one": failing, "two": dying, "three": found(2.0)}, 60)
    parts = written[-1]["parts"]
    assert parts["one"]["state"] == "failed"
    assert "illegal memory access" in parts["one"]["why"]
    assert parts["one"]["found"] == {"forward_seconds": 1.0}  # what it had found is kept
    assert parts["two"] | {"seconds": 0} == {
        "state": "failed",
        "why": "its process ended with -9",
        "seconds": 0,
        "found": {"forward_seconds": 1.0},
    }
    assert parts["three"]["state"] == "done"
    assert parts["three"]["found"] == {"forward_seconds": 2.0}
    assert Beside.made == 3
    assert "illegal memory access" in out.with_suffix(".md").read_text()
    assert not list(out.parent.glob("*.new"))


def test_results_are_written_after_each_one(run):
    written, _ = run({"one": found(1.0), "two": found(2.0)}, 60)
    assert [list(results["parts"]) for results in written[:2]] == [["one"], ["one"]]
    assert written[0]["parts"]["one"]["found"] == {"forward_seconds": 1.0}
    assert Beside.made == 1


def test_the_time_ends_a_part_and_leaves_out_those_after_it(run):
    began = time.monotonic()
    written, _ = run({"one": slow, "two": found(1.0)}, 2)
    assert time.monotonic() - began < 30
    parts = written[-1]["parts"]
    assert (parts["one"]["state"], parts["one"]["found"]) == ("stopped", {"forward_seconds": 3.0})
    assert (parts["two"]["state"], parts["two"]["why"]) == ("skipped", "no time was left")


def test_a_part_that_would_not_fit_is_left_out(gpu, run):
    edit = SimpleNamespace(
        config=None, method=SimpleNamespace(stages=lambda config: [SimpleNamespace(name="drag", forwards=100.0)])
    )

    def long(bench):
        bench.afford(1.0, [edit])
        yield {}

    def short(bench):
        bench.afford(1e-3, [edit])
        yield {"forward_seconds": 1.0}

    written, _ = run({"one": long, "two": short}, 60)
    parts = written[-1]["parts"]
    assert parts["one"]["state"] == "skipped"
    assert parts["one"]["why"].startswith("would take about 130 s")  # 100 forwards of a second, and what is beside
    assert parts["two"]["state"] == "done"


def test_functions_are_compared(gpu):
    functions = gpu.functions()
    for function in functions.values():
        here = function(torch.device("cpu"))
        assert all(torch.isfinite(value).all() for value in here)
        assert any(value.abs().max() > 0 for value in here)
        assert gpu.deviation(here, function(torch.device("cpu"))) == 0
    assert gpu.deviation([torch.zeros(2), torch.ones(2)], [torch.zeros(2), torch.tensor([1.0, 0.75])]) == 0.25


def test_comparisons_of_a_test_are_noted_and_raise_nothing(gpu):
    module = SimpleNamespace(near=None)

    def check():
        module.near(torch.tensor([1.0, 2.0]), np.array([1.0, 2.5]), 0.1)
        module.near([torch.zeros(2)], np.full((1, 2), 0.01), 0.1)
        assert 1 == 2, "counts differ"

    noted = gpu.watched(module, check)
    assert noted["deviation"] == 0.5
    assert noted["of_tolerance"] == pytest.approx(5)
    assert "counts differ" in noted["wrong"]
    assert module.near is None


def test_published_runs_are_replayed(gpu, monkeypatch):
    import test_published_runs
    import test_traces

    monkeypatch.setattr(test_traces, "SCENES", {})
    monkeypatch.setattr(test_published_runs, "DEVICE", "cpu")
    replays = gpu.replays(torch.device("cpu"))
    name, checks = next(replays)
    assert name.startswith("gooddrag ")
    assert "wrong" not in checks["whole run"]
    assert 0 <= checks["whole run"]["of_tolerance"] < 1


@pytest.mark.slow
def test_all_of_a_tiny_model(gpu, tmp_path, capfd):
    """As a user runs it."""
    out = tmp_path / "gpu.json"
    short = ["steps=1", "warmup=1", "repeats=1", "size=64", "minutes=9"]
    parts = "parts=[stages,fastdrag,batch-4,fp32]"
    assert gpu.main(["device=cpu", "model=tiny", *short, parts, f"output={out}"]) == 0
    results = json.loads(out.read_text())
    assert {name: part["state"] for name, part in results["parts"].items()} == {
        "stages": "done",
        "fastdrag": "done",
        "batch-4": "done",
        "fp32": "skipped",
    }
    stages, edit, batch = (results["parts"][name]["found"] for name in ("stages", "fastdrag", "batch-4"))
    assert list(stages["stages"]) == ["lora", "inversion", "drag, mask", "denoise", "decode", "drag, no mask"]
    for stage in stages["stages"].values():
        assert stage["seconds"] > 0
        assert stage["ratio"] == pytest.approx(stage["seconds"] / stage["forward_seconds"], rel=0.01)
    assert list(edit["of_stages"]) == ["inversion", "drag", "denoise", "decode"]
    assert sum(edit["of_stages"].values()) <= edit["seconds"] * 1.01
    assert edit["peak_mb"] > 0
    assert 0 < batch["ratio_low"] <= batch["ratio"] <= batch["ratio_high"] < 5
    assert "drag, mask" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["device=cpu", "parts=[stage]"], "parts names 'stage': there are numbers, stages"),
        (["device=cpu", "minutes=0"], "must be > 0"),
        (["device=cpu", "output=no/such/folder/gpu.json"], "there is no folder"),
        (["device=nowhere"], "must be auto, cpu"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(gpu, capsys, arguments, words):
    assert gpu.main(arguments) == 2
    assert words in capsys.readouterr().err
