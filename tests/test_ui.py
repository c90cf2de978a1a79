"""The web page: its server under bad input, and the whole of it in a real browser."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from dragdiff import assets, methods
from dragdiff.config import UIConfig, load_ui
from dragdiff.data import readers
from dragdiff.data.sample import EditSample
from dragdiff.errors import UserError
from dragdiff.methods.method import Stage
from dragdiff.ui import runs
from dragdiff.ui.app import make_app
from dragdiff.ui.files import mask_url
from dragdiff.ui.form import Form
from dragdiff.ui.runs import Run
from dragdiff.ui.visitors import Visitors

CHROMIUM = shutil.which("chromium")
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(autouse=True)
def _pixel_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # the server sets its own


@pytest.fixture
def app(tmp_path):
    """Its queue is not started: runs wait."""
    return make_app(UIConfig(max_upload_mb=0.5, max_megapixels=0.1), tmp_path / "ui")


@pytest.fixture
def client(app) -> TestClient:
    return visitor(app)


def visitor(app) -> TestClient:
    client = TestClient(app, base_url="http://127.0.0.1")
    assert client.get("/").status_code == 200
    return client


def png(width=64, height=48) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def opened(client: TestClient, content: bytes, name="cat.png"):
    return client.post("/api/open", files={"file": (name, content)})


def edit(client: TestClient, **changes):
    picture = opened(client, png()).json()["picture"]["id"]
    return {"model": "embedded", "picture": picture, "prompt": "a", "points": [[[3, 4], [30, 20]]]} | changes


def test_what_a_visitor_may_set_is_what_the_dataclasses_say_and_nothing_of_the_machine():
    form = Form(UIConfig())
    keys = {field["key"] for field in form.describe("dragdiffusion")}
    assert {"drag.lr", "drag.features", "lora.steps", "control.start_layer", "model.vae", "seed"} <= keys
    assert not keys & {"model.path", "lora.path", "output.folder", "cache.folder", "sample", "logger.kind", "prompt"}
    assert "lora.path" in {field["key"] for field in Form(UIConfig(loras=["a"])).describe("fastdrag")}
    assert form.values({"model": "embedded"})["drag.lr"] == 0.05
    assert form.values({"model": "sd15"})["data.max_size"] == 512
    assert set(form.presets) >= {"reference", "debug"} and "sd15" not in form.presets
    own, fast = (form.config({"model": "embedded", "preset": preset}) for preset in ("", "fast"))
    assert (fast.drag.lr, fast.lora.steps) == (own.drag.lr, own.lora.steps)  # what was chosen for that model stays
    assert fast.ddim.steps < own.ddim.steps


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.path", "/etc", "can't be set"),
        ("lora.path", "../../secret", "can't be set"),
        ("output.folder", "/tmp/x", "can't be set"),
        ("model.vae", "/etc/passwd", "choose one"),
        ("drag.lr", -1, "must be in (0, 1000]"),
        ("drag.steps", "many", "whole number"),
        ("generate.width", 4096, "pixels"),
        ("generate.width", 10**6, "must be in"),
        ("drag.grid_scale", 0.01, "feature grid"),
    ],
)
def test_settings_that_are_not_a_visitors_are_refused(client, key, value, words):
    answer = client.post("/api/runs", json=edit(client, settings={key: value}))
    assert answer.status_code == 400 and words in answer.json()["error"]


def test_each_method_has_the_form_that_it_says_itself():
    form = Form(UIConfig())
    assert [method["name"] for method in form.offered()] == list(methods.NAMES)
    fast = next(method for method in form.offered() if method["name"] == "fastdrag")
    assert fast["summary"] == methods.find("fastdrag").summary and fast["note"] and "mask" in fast["uses"]
    keys = [field["key"] for field in fast["fields"]]
    assert keys[:2] == ["fastdrag.blend", "fastdrag.fill"] and "drag.grid_scale" in keys and "drag.lr" not in keys
    assert "nearest" in fast["fields"][0]["choices"] and "LazyDrag" in fast["fields"][0]["explanation"]
    good, own = (form.values({"model": "embedded", "method": name}) for name in ("gooddrag", "dragdiffusion"))
    assert good["ddim.strength"] == 0.75 and good["gooddrag.reach"] == 2.0  # the paper's, and the model's overlay's
    assert own["ddim.strength"] == 0.7 and "gooddrag.reach" not in own
    set_here = {"drag.lr": 0.5, "fastdrag.blend": "nearest", "ddim.steps": 20}
    request = {"model": "embedded", "method": "fastdrag", "settings": set_here}
    assert form.changes(request) == {"fastdrag.blend": "nearest", "ddim.steps": 20}
    assert (form.config(request).own.blend, form.config(request).ddim.steps) == ("nearest", 20)
    line = form.command(request, "x")["line"]
    assert line.endswith("sample=x method=fastdrag fastdrag.blend=nearest ddim.steps=20")
    assert "method" not in form.command(request | {"method": "dragdiffusion"}, "x")["line"]


def test_a_method_that_the_server_was_not_started_with_is_refused(tmp_path):
    client = visitor(make_app(UIConfig(methods=["fastdrag", "dragdiffusion"]), tmp_path / "ui"))
    assert [method["name"] for method in client.get("/api/start").json()["methods"]] == ["fastdrag", "dragdiffusion"]
    assert client.get("/api/values?model=embedded").json()["values"]["ddim.steps"] == 10  # the first is the default
    harm = tmp_path / "harm.py"
    harm.write_text(f"open({str(tmp_path / 'done')!r}, 'w')")
    for name in ("gooddrag", "nothing", str(harm), "../harm", "dragdiff.methods.gooddrag"):
        answers = [
            client.post("/api/runs", json=edit(client, method=name)),
            client.post("/api/runs", json=edit(client, against=name)),
            client.post("/api/command", json=edit(client, method=name)),
            client.get("/api/values", params={"model": "embedded", "method": name}),
        ]
        assert {answer.status_code for answer in answers} == {400}
        assert all("not offered here: choose from fastdrag, drag" in answer.json()["error"] for answer in answers)
    for settings in ({"method": "gooddrag"}, {"gooddrag.reach": 2}):
        assert "can't be set" in client.post("/api/runs", json=edit(client, settings=settings)).json()["error"]
    assert not (tmp_path / "done").exists()


def test_a_method_of_the_servers_owner_is_offered_by_its_name_as_it_says_itself(tmp_path):
    shipped = methods.find("dragdiffusion")
    stages = lambda config: [Stage("wish", 2, 1.0, 1), Stage("decode", 1, 3.0, 0)]  # noqa: E731
    mine = dataclasses.replace(shipped, name="mine", needs=(), uses=(), reads=("ddim",), stages=stages)
    settings = UIConfig(methods=[methods.bring(mine)])
    app = make_app(settings, tmp_path)
    [offered] = Form(settings).offered()
    keys = {field["key"] for field in offered["fields"]}
    assert offered["name"] == "mine" and "ddim.steps" in keys and not any(key.startswith("lora.") for key in keys)
    client = visitor(app)
    assert client.post("/api/runs", json=edit(client, method="mine", points=[])).status_code == 200  # it needs none
    [run] = next(iter(app.state.page.visitors)).runs.values()
    assert run.as_json(0)["stages"] == ["wish", "decode"] and run.request["method"] == "mine"
    run.told({"stage": "wish", "done": 0, "total": 2, "note": ""}, 0.0)
    run.told({"stage": "wish", "done": 2, "total": 2, "note": ""}, 4.0)
    assert run.seconds_left() == pytest.approx(3 * 4.0)


@pytest.mark.slow
def test_a_method_in_a_file_runs_in_the_models_process_and_its_download_repeats_it(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "methods.md").read_text("utf-8")
    (tmp_path / "shift.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    offered = ["dragdiffusion", str(tmp_path / "shift.py")]
    app = make_app(UIConfig(models=["embedded"], methods=offered, threads=1), tmp_path / "ui")
    with TestClient(app, base_url="http://127.0.0.1") as client:
        client.get("/")
        settings = {"ddim.steps": 4, "ddim.strength": 0.5, "shift.radius": 7}
        run = client.post("/api/runs", json=edit(client, method="shift", settings=settings)).json()["id"]
        known = next(iter(app.state.page.visitors)).runs[run]
        deadline = time.monotonic() + 120
        while not known.ended and time.monotonic() < deadline:
            time.sleep(0.1)
        assert known.status == "done", known.message
        with zipfile.ZipFile(io.BytesIO(client.get(f"/api/runs/{run}/result.zip").content)) as files:
            assert "method: shift.py" in files.read("cat/config.yaml").decode()
            assert files.read("cat/shift.py").decode() == (tmp_path / "shift.py").read_text()


def test_a_text_of_a_visitors_is_never_a_reference_to_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    text = "${oc.env:SECRET}"
    settings = {"generate.negative_prompt": text, "drag.features": [text]}
    config = Form(UIConfig()).config({"model": "embedded", "settings": settings}, prompt=text)
    assert (config.generate.negative_prompt, config.prompt, config.drag.features) == (text, text, [text])


def test_uploads_are_limited_and_encoded_anew(client):
    answer = opened(client, png()).json()["picture"]
    assert (answer["width"], answer["height"], answer["name"]) == (64, 48, "cat")
    assert client.get(f"/api/pictures/{answer['id']}").headers["content-type"] == "image/png"
    assert "not an image" in opened(client, b"<script>alert(1)</script>").json()["error"]
    assert "pixels" in opened(client, png(400, 300)).json()["error"]
    assert opened(client, bytes(2**20)).status_code == 413
    named = opened(client, png(), "../../../etc/<b>.png").json()["picture"]["name"]
    assert re.fullmatch(r"[\w.-]+", named)
    small = opened(client, png(8, 8)).json()["picture"]["id"]
    assert "16 px" in client.post("/api/runs", json=edit(client, picture=small)).json()["error"]


def test_hostile_zips_are_refused(client, tmp_path):
    def zipped(files):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return buffer.getvalue()

    assert "no sample" in opened(client, zipped({"../../evil.txt": b"x"}), "a.zip").json()["error"]
    bomb = zipped({"a/edit.json": b"{}", "a/image.png": bytes(20 * 2**20)})
    assert "larger" in opened(client, bomb, "a.zip").json()["error"]
    climbing = zipped({"../../../edit.json": b"{}", "../../../image.png": png()})
    assert "has no prompt" in opened(client, climbing, "a.zip").json()["error"]
    assert str(tmp_path) not in opened(client, climbing, "a.zip").text
    evil = zipped({"s/meta_data.pkl": b"cos\nsystem\n(S'touch /tmp/x'\ntR.", "s/original_image.png": png()})
    assert "refused" in opened(client, evil, "s.zip").json()["error"]


def test_whatever_is_sent_is_answered_with_what_is_wrong(app):
    client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    client.get("/")
    good = edit(client)
    junk = [None, -1, 10**400, "x", "\ud800", "x" * 10**5, [], {"a": []}, [[[1, 2], ["a", {}]]]]
    keys = ["model", "preset", "method", "against", "settings", "prompt", "points", "mask", "picture", "kind"]
    bodies = [good | {key: value} for key in keys for value in junk]
    readers = {key: method for method, keys in app.state.page.form.keys.items() for key in keys}  # of each key, one
    settings = [
        good | {"method": method, "settings": {key: value}}
        for key, method in readers.items()
        for value in (10**400, "\ud800", {"a": []})
    ]
    samples = [{"sample": value} for value in junk]
    for path, sent in {
        "/api/runs": bodies,
        "/api/export": bodies,
        "/api/command": settings,
        "/api/open": samples,
    }.items():
        for body in sent:
            answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
            told = answer.headers["content-type"] == "application/zip" or isinstance(answer.json(), dict)
            assert answer.status_code in (200, 400) and told, (path, str(body)[:200])
    for content in (b"", b"{", b"[" * 10**5, b"\xff"):
        assert client.post("/api/runs", content=content).status_code == 400
    assert client.post("/api/open", content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 400
    damaged = io.BytesIO()
    with zipfile.ZipFile(damaged, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("edit.json", json.dumps({"prompt": "a", "points": []}))
        archive.writestr("image.png", png())
    for place in range(0, len(damaged.getvalue()), 199):
        content = bytearray(damaged.getvalue())
        content[place] ^= 0xFF
        assert opened(client, bytes(content), "a.zip").status_code in (200, 400)


@pytest.mark.parametrize("kind", ["plain", "dragbench"])
def test_an_edit_that_is_saved_and_opened_again_is_the_same(client, kind):
    mask = np.zeros((48, 64), np.uint8)
    mask[10:20, 30:50] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    body = edit(client, mask=url, format=kind)
    again = opened(client, client.post("/api/export", json=body).content, "cat.zip").json()
    assert again["points"] == body["points"] and again["prompt"] == "a" and again["picture"]["name"] == "cat"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(again["mask"].split(",")[1])))), mask)
    pictures = [client.get(f"/api/pictures/{id}").content for id in (body["picture"], again["picture"]["id"])]
    assert pictures[0] == pictures[1]


def test_nobody_sees_what_is_another_visitors(app, client):
    body = edit(client)
    run = client.post("/api/runs", json=body).json()["id"]
    assert client.get(f"/api/runs/{run}/source.png").status_code == 200
    other = visitor(app)
    assert other.get(f"/api/pictures/{body['picture']}").status_code == 400
    assert other.get(f"/api/runs/{run}/source.png").status_code == 400
    assert other.post(f"/api/runs/{run}/cancel", json={}).status_code == 400
    assert "open it again" in other.post("/api/runs", json=body).json()["error"]
    stranger = TestClient(app, base_url="http://127.0.0.1")
    assert stranger.get("/api/start").status_code == 401


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/api/runs/x/..%2f..%2fedited.png"])
def test_no_path_leads_out_of_the_folders(client, path):
    answer = client.get(path)
    assert answer.status_code in (400, 404) and "import" not in answer.text
    assert "no sample" in client.post("/api/open", json={"sample": "../../etc"}).json()["error"]


def test_runs_wait_in_order_and_not_without_end(app, client):
    page, other = app.state.page, visitor(app)
    first, second = (c.post("/api/runs", json=edit(c)).json()["id"] for c in (client, other))
    queued = {run.id: run for one in page.visitors for run in one.runs.values()}
    assert [page.queue.ahead(queued[id]) for id in (first, second)] == [0, 1]
    for _ in range(4):
        assert client.post("/api/runs", json=edit(client)).status_code == 200
    assert "5 of your runs" in client.post("/api/runs", json=edit(client)).json()["error"]
    client.post(f"/api/runs/{first}/cancel", json={})
    assert queued[first].status == "cancelled" and page.queue.ahead(queued[second]) == 0


def test_points_where_nothing_may_change_are_said_of_a_run(app, client):
    mask = np.zeros((48, 64), bool)
    mask[:, 40:] = True
    body = edit(client) | {"mask": mask_url(mask)}
    assert client.post("/api/runs", json=body).status_code == 200
    (run,) = [run for one in app.state.page.visitors for run in one.runs.values()]
    assert "Is the mask inverted?" in run.as_json(0)["request"]["doubts"]


def test_two_methods_on_one_drag_wait_together_or_not_at_all(app, client):
    settings = {"drag.lr": 0.3, "ddim.steps": 20}
    body = edit(client, method="fastdrag", against="dragdiffusion", settings=settings)
    first = client.post("/api/runs", json=body).json()["id"]
    page = app.state.page
    mine = next(iter(page.visitors)).runs
    assert [run.request["method"] for run in mine.values()] == ["fastdrag", "dragdiffusion"]
    assert all(run.as_json(0)["together"] == list(mine) and next(iter(mine)) == first for run in mine.values())
    fast, own = mine.values()
    assert fast.request["settings"] == {"ddim.steps": 20} and own.request["settings"] == settings
    assert (fast.config.lora.steps, own.config.drag.lr, own.config.ddim.steps) == (0, 0.3, 20)
    assert np.array_equal(fast.sample.image, own.sample.image) and np.array_equal(fast.sample.points, own.sample.points)
    assert "itself" in client.post("/api/runs", json=edit(client, against="dragdiffusion")).json()["error"]
    assert client.post("/api/runs", json=body).status_code == 200
    folders = len(list(fast.folder.parent.iterdir()))
    assert "5 of your runs" in client.post("/api/runs", json=body).json()["error"]  # one place is left, they want two
    assert len(mine) == 4 and len(list(fast.folder.parent.iterdir())) == folders
    assert client.post("/api/runs", json=edit(client)).status_code == 200
    assert client.get("/api/start").json()["limits"]["together"] == 5
    page.settings.queue_each = 1
    assert "at most 1 may wait" in client.post("/api/runs", json=body).json()["error"]
    assert client.get("/api/start").json()["limits"]["together"] == 1


def test_a_result_is_dragged_on_with_its_prompt_and_mask(app, client):
    mask = np.zeros((48, 64), bool)
    mask[10:20, 30:50] = True
    body = edit(client, mask=mask_url(mask))
    run = client.post("/api/runs", json=body).json()["id"]
    use = f"/api/runs/{run}/use"
    assert "no picture" in client.post(use, json={"what": "result"}).json()["error"]
    known = next(iter(app.state.page.visitors)).runs[run]
    (known.folder / "edited.png").write_bytes(png(64, 48))
    for _ in range(2):
        again = client.post(use, json={"what": "result"}).json()
        assert (again["prompt"], again["points"], again["mask"]) == ("a", [], body["mask"])
        assert again["picture"]["name"] == "cat-edited"
        edited = client.get(f"/api/pictures/{again['picture']['id']}").content
        assert np.array_equal(Image.open(io.BytesIO(edited)), Image.open(io.BytesIO(png(64, 48))))
        body = {"model": "embedded", "picture": again["picture"]["id"], "prompt": "a", "mask": again["mask"]}
        run = client.post("/api/runs", json=body | {"points": [[[1, 2], [3, 4]]]}).json()["id"]
        known, use = next(iter(app.state.page.visitors)).runs[run], f"/api/runs/{run}/use"
        (known.folder / "edited.png").write_bytes(png(64, 48))


def test_a_generated_picture_is_dragged_by_any_method_with_what_it_was_made_with(app, client):
    made = {"model": "embedded", "prompt": "a sun", "kind": "generate"}
    run = client.post("/api/runs", json=made | {"settings": {"seed": 7}}).json()["id"]
    known = next(iter(app.state.page.visitors)).runs
    (known[run].folder / "generated.png").write_bytes(png(64, 64))
    picture = client.post(f"/api/runs/{run}/use", json={"what": "result"}).json()["picture"]["id"]
    body = edit(client, method="fastdrag", against="gooddrag") | {"picture": picture}
    assert client.post("/api/runs", json=body).status_code == 200
    for edited in list(known.values())[1:]:
        config = edited.config
        assert (config.generate.enabled, config.seed, config.ddim.steps, config.prompt) == (True, 7, 50, "a sun")


def test_other_pages_and_names_are_refused(app, client):
    assert client.post("/api/runs", json={}, headers={"Origin": "http://evil.example"}).status_code == 403
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:80"):
        assert client.get("/", headers={"Host": host}).status_code == 403
    odd = (
        "user@127.0.0.1:80",
        "evil.com@127.0.0.1",
        "127.0.0.1#evil.com",
        "localhost:abc",
        "localhost:",
        "[",
        "",
        "a b",
    )
    for host in (*odd, "localhost/x", "localhost?x", "127.0.0.1\\evil.com", "localhost:123456"):
        assert client.get("/", headers={"Host": host}).status_code == 400, host
    for host in ("localhost", "LocalHost:7860", "127.0.0.1:1", "[::1]:7860", "[::1]"):
        assert client.get("/", headers={"Host": host}).status_code == 200, host
    assert client.post("/api/runs", content=b"{}", headers={"Content-Length": "²".encode()}).status_code == 411
    assert client.put("/api/runs").status_code == 405
    assert client.post("/api/runs", content=b"[1]").status_code == 400
    headers = client.get("/").headers
    assert "default-src 'self'" in headers["content-security-policy"]


def test_open_to_others_it_wants_the_token(tmp_path):
    app = make_app(UIConfig(host="0.0.0.0", token="right"), tmp_path)
    client = TestClient(app, base_url="http://box:7860")
    assert client.get("/").status_code == client.get("/?token=wrong").status_code == 401
    assert client.get("/api/start").status_code == 401
    assert client.get("/?token=right").status_code == 200  # after a redirect, by the cookie
    assert client.get("/api/start").status_code == 200


def test_the_gone_take_their_pictures_with_them(tmp_path):
    now = [0.0]
    visitors = Visitors(tmp_path, 10, clock=lambda: now[0])
    secret, somebody = visitors.new()
    file = somebody.add_picture(np.zeros((16, 16, 3), np.uint8), "a").file
    for _ in range(25):
        somebody.add_picture(np.zeros((16, 16, 3), np.uint8), "b")
    assert not file.exists() and len(list(file.parent.iterdir())) == 20
    now[0] = 9
    assert visitors.get(secret) is somebody
    now[0] = 18
    visitors.forget_the_gone()
    assert somebody.folder.exists()
    for name in ("visitor-before", "mine"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    now[0] = 20
    visitors.forget_the_gone()
    assert not somebody.folder.exists() and visitors.get(secret) is None
    assert [folder.name for folder in tmp_path.iterdir()] == ["mine"]  # what an earlier server left is gone too


def test_time_left_is_what_the_steps_to_come_cost_at_the_pace_so_far(tmp_path):
    config = Form(UIConfig()).config({"model": "embedded"})
    run = Run("edit", config, {}, tmp_path, tmp_path)
    assert run.seconds_left() is None
    run.told({"stage": "inversion", "done": 0, "total": 35, "note": ""}, 0.0)
    run.told({"stage": "inversion", "done": 5, "total": 35, "note": ""}, 5.0)
    assert run.seconds_left() == pytest.approx(30 + (80 * 2.3 + 8) + 35 * 2 + 3)  # 8 previews; decoding counts as 3
    run.told({"stage": "drag", "done": 0, "total": 80, "note": ""}, 5.0)
    run.told({"stage": "drag", "done": 40, "total": 80, "note": ""}, 5.0 + (80 * 2.3 + 8))  # twice as slow
    assert run.seconds_left() == pytest.approx(2 * ((80 * 2.3 + 8) / 2 + 35 * 2 + 3))
    fast = Run("edit", Form(UIConfig()).config({"model": "embedded", "method": "fastdrag"}), {}, tmp_path, tmp_path)
    fast.told({"stage": "inversion", "done": 0, "total": 7, "note": ""}, 0.0)
    fast.told({"stage": "inversion", "done": 7, "total": 7, "note": ""}, 7.0)
    fast.told({"stage": "drag", "done": 0, "total": 1, "note": ""}, 7.0)
    fast.told({"stage": "drag", "done": 1, "total": 1, "note": ""}, 9.0)  # no forward: it says nothing of the rest
    assert fast.seconds_left() == pytest.approx(7 * 2 + 3)
    for step in range(1000):
        run.told({"step": step, "handles": [[step, 0]], "preview": False}, 6.0)
    assert len(run.way) <= 400 and run.way[0] == (0, [[0, 0]]) and run.way[-1] == (999, [[999, 0]])


def test_a_sample_is_read_outside_of_the_event_loop(client, monkeypatch):
    """A slow disk holds up one visitor, not all."""
    read, here = readers.read_sample, []

    def slow(*arguments):
        with contextlib.suppress(RuntimeError):
            here.append(asyncio.get_running_loop())
        return read(*arguments)

    monkeypatch.setattr(readers, "read_sample", slow)
    assert client.post("/api/open", json={"sample": "example:sun"}).status_code == 200 and not here


def test_mistakes_at_the_start_are_said(tmp_path):
    assert load_ui([], ["port=0"]).port == 0
    assert load_ui([], []).methods == list(methods.NAMES)
    for override in ("models=[]", "port=99999", "modles=[a]"):
        with pytest.raises(UserError):
            load_ui([], [override])
    with pytest.raises(UserError, match="name at least one"):
        make_app(UIConfig(methods=[]), tmp_path)
    with pytest.raises(UserError, match="did you mean 'gooddrag'"):
        make_app(UIConfig(methods=["dragdiffusion", "goodrag"]), tmp_path)
    with pytest.raises(UserError, match="no config file"):
        make_app(UIConfig(models=["nothing"]), tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        make_app(UIConfig(samples=["/nowhere"]), tmp_path)


# ------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "dragdiff.ui", "port=0", "models=[embedded]", "threads=1", "max_upload_mb=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            said = process.communicate(timeout=30)[1]
    assert said == "" and process.returncode == 143  # no traceback, no note on leaked semaphores


@pytest.fixture(scope="module")
def page_address(server) -> Iterator[str]:
    found = re.search(r"http://([\d.:]+)\S+", server.stdout.readline())
    assert found
    yield found[0]
    page = HTTPConnection(found[1], timeout=10)  # somebody listens when the server is told to end
    page.request("GET", "/")
    answer = page.getresponse()
    answer.read()
    page.request("GET", "/api/events", headers={"Cookie": answer.headers["Set-Cookie"].partition(";")[0]})
    server.stream = page.getresponse()  # kept, so that it stays open
    assert server.stream.readline() == b"retry: 1000\n"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("NOT RUN: there is no chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)


@pytest.fixture
def new_page(browser, page_address):
    """Opens the page as a new visitor; at the end no script may have failed."""
    from playwright.sync_api import expect

    errors: list[str] = []
    contexts = []

    def open_page(width=1280, height=900, **kind):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **kind))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "filechooser", lambda _: None
        )  # so that choosers are looked for from now on, not from a moment too late
        page.goto(page_address)
        expect(page.locator("#hint")).to_contain_text("Click the part", timeout=30000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def at(page, x, y):
    """Where a px of the 64 x 64 px example is on the screen."""
    box = page.locator("#canvas").bounding_box()
    scale = (min(box["width"], box["height"]) - 24) / 64
    return box["x"] + box["width"] / 2 + (x + 0.5 - 32) * scale, box["y"] + box["height"] / 2 + (y + 0.5 - 32) * scale


def zoomed(page, x, y, centre, wheel):
    """As `at`, after the wheel was turned with the mouse at `centre`."""
    (cx, cy), (px, py), k = centre, at(page, x, y), math.exp(-wheel * 0.0015)
    return cx + (px - cx) * k, cy + (py - cy) * k


def pairs(page):
    values = [float(field.input_value()) for field in page.locator("#pairs input").all()]
    return np.reshape(values, (-1, 2, 2)).tolist()


def stroke(page, *places):
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def quick(page):
    """Settings that run every stage in a second."""
    page.click("#settings summary")
    page.select_option("#preset", "debug")
    page.click("#settings summary")


def downloaded(page, button, folder):
    """A zip that the page gives, unpacked."""
    with page.expect_download() as download:
        page.click(button)
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(folder)
    return next(path.parent for path in folder.rglob("*.*") if path.name in ("edit.json", "meta_data.pkl"))


@pytest.mark.slow
def test_points_and_mask_by_mouse_reach_the_run_in_px_of_the_picture(new_page, tmp_path):
    from playwright.sync_api import expect

    page = new_page()
    page.click("#clear-mask")
    page.mouse.click(*at(page, 16, 13))
    page.mouse.click(*at(page, 28, 17))
    centre = at(page, 40, 40)
    page.mouse.move(*centre)
    page.mouse.wheel(0, -500)
    page.wait_for_timeout(100)
    page.mouse.click(*zoomed(page, 33, 35, centre, -500))
    page.mouse.click(*zoomed(page, 45, 47, centre, -500))
    assert pairs(page) == [[[16, 13], [28, 17]], [[33, 35], [45, 47]]]
    stroke(page, zoomed(page, 45, 47, centre, -500), zoomed(page, 41, 38, centre, -500))  # moves the point
    assert pairs(page)[1] == [[33, 35], [41, 38]]
    page.keyboard.press("Control+z")  # all of the way at once
    assert pairs(page)[1] == [[33, 35], [45, 47]]
    page.keyboard.press("Control+Shift+z")
    page.mouse.click(*zoomed(page, 33, 35, centre, -500), button="right")
    assert pairs(page) == [[[16, 13], [28, 17]]]
    page.click("#undo")
    page.check("[value=brush]")
    page.fill("#size", "9")
    stroke(page, zoomed(page, 31, 35, centre, -500), zoomed(page, 47, 35, centre, -500))
    page.check("[value=eraser]")
    page.mouse.click(*zoomed(page, 31, 35, centre, -500))
    quick(page)
    page.click("#drag")
    expect(page.locator("#state")).to_contain_text("Done", timeout=60000)
    folder = downloaded(page, "#result a", tmp_path)
    assert json.loads((folder / "edit.json").read_text())["points"] == [[[16, 13], [28, 17]], [[33, 35], [41, 38]]]
    rows, columns = np.indices((64, 64))
    to_line = np.hypot(rows - 35, columns - columns.clip(31, 47))
    erased = np.hypot(rows - 35, columns - 31)
    mask = np.asarray(Image.open(folder / "mask.png")) > 127
    assert mask[(to_line < 3.5) & (erased > 5.5)].all() and not mask[(to_line > 5.5) | (erased < 3.5)].any()
    assert len(json.loads((folder / "metrics.json").read_text())["points"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "dragbench"])
def test_an_edit_saved_on_the_page_opens_there_as_it_was(new_page, tmp_path, kind):
    from playwright.sync_api import expect

    page = new_page()
    page.mouse.click(*at(page, 16, 13))
    page.mouse.click(*at(page, 28, 17))
    page.select_option("#format", kind)
    page.click("#invert-mask")
    first = downloaded(page, "#export", tmp_path / "first")
    page.set_input_files("#folder", first)
    expect(page.locator("#pairs li")).to_have_count(1)
    second = downloaded(page, "#export", tmp_path / "second")
    assert {file.name: file.read_bytes() for file in first.iterdir()} == {
        file.name: file.read_bytes() for file in second.iterdir()
    }
    sample = readers.read_sample(first)
    assert sample.points.tolist() == [[[16, 13], [28, 17]]] and not sample.mask[13, 16] and sample.mask[60, 5]


@pytest.mark.slow
def test_of_several_samples_the_person_chooses(new_page, tmp_path):
    from playwright.sync_api import expect

    for name, x in (("a", 5), ("b", 9)):
        readers.write_folder(
            EditSample(np.zeros((64, 64, 3), np.uint8), name, [[[x, 1], [2, 3]]]), tmp_path / "s" / name
        )
    page = new_page()
    archive = shutil.make_archive(str(tmp_path / "both"), "zip", tmp_path / "s")
    for selector, path in (("#file", archive), ("#folder", tmp_path / "s")):
        page.set_input_files(selector, path)
        expect(page.locator("#choose option")).to_have_count(3)
        for name, x in (("b", 9), ("a", 5)):
            page.select_option("#choose", label=name if selector == "#file" else f"s/{name}")
            expect(page.locator("#prompt")).to_have_value(name)
            assert pairs(page) == [[[x, 1], [2, 3]]]
    page.set_input_files("#file", tmp_path / "s" / "a" / "image.png")
    expect(page.locator("#choice")).to_be_hidden()
    client = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": [str(tmp_path / "s")], "dragOperationsMask": 1}
        client.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})
    page.select_option("#choose", "s/b")
    expect(page.locator("#prompt")).to_have_value("b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text("x")
    page.set_input_files("#folder", tmp_path / "empty")
    expect(page.locator("#error")).to_contain_text("no sample in this folder")


@pytest.mark.slow
def test_keyboard_alone_opens_places_and_drags(new_page, tmp_path):
    from playwright.sync_api import expect

    (tmp_path / "x.png").write_bytes(png())
    page = new_page()

    def tab_to(id):
        for _ in range(40):
            if page.evaluate("() => document.activeElement.id") == id:
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab never reaches {id}")

    tab_to("open")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(tmp_path / "x.png")
    expect(page.locator("#prompt")).to_have_value("")
    tab_to("canvas")
    page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert pairs(page) == [[[22, 23], [26, 23]]]  # from the middle, 32, 24
    tab_to("drag")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_contain_text(re.compile("step|Waiting|Begins|Loading"))
    tab_to("cancel")
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_contain_text("Cancelled", timeout=30000)
    page.locator("#tab-edit").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#wish")).to_be_visible()


@pytest.mark.slow
def test_the_form_follows_the_method_and_keeps_what_was_set(new_page):
    from playwright.sync_api import expect

    page = new_page()
    page.click("#settings summary")
    for key, value in (("drag.lr", "0.5"), ("ddim.strength", "0.5")):
        page.fill(f"[id='field-{key}']", value)
        page.locator(f"[id='field-{key}']").blur()
    page.locator("#method summary").focus()
    page.keyboard.press("Enter")
    for key in ("Tab", *["ArrowDown"] * methods.NAMES.index("fastdrag")):
        page.keyboard.press(key)
    expect(page.locator("#chosen")).to_have_text("fastdrag (2024)")
    expect(page.locator("[id='field-fastdrag.blend']")).to_be_visible()
    assert page.evaluate("() => document.activeElement.value") == "fastdrag"
    assert page.locator("[id='field-ddim.strength']").input_value() == "0.5"
    assert page.locator("[id='field-ddim.steps']").input_value() == "10"
    expect(page.locator("[id='field-drag.lr']")).to_have_count(0)
    page.select_option("[id='field-fastdrag.blend']", "nearest")
    page.click("#command summary")
    expect(page.locator("#line")).to_contain_text("method=fastdrag ddim.strength=0.5 fastdrag.blend=nearest")
    page.get_by_role("radio", name="gooddrag").check()
    expect(page.locator("[id='field-drag.lr']")).to_have_value("0.5")
    expect(page.locator("#line")).to_contain_text("method=gooddrag drag.lr=0.5 ddim.strength=0.5")
    assert "fastdrag" not in page.locator("#line").inner_text()
    expect(page.locator("#methods label")).to_contain_text([methods.find(name).summary for name in methods.NAMES])
    page.click("#method summary")
    expect(page.locator("#about")).to_contain_text("Note: its authors used the autoencoder")


@pytest.mark.slow
def test_what_a_method_does_not_use_is_not_shown(new_page):
    from playwright.sync_api import expect

    page = new_page()

    def without(route):
        answer = route.fetch()
        start = answer.json()
        first, second, *_ = start["methods"]
        first |= {"uses": [], "needs": []}
        route.fulfill(response=answer, json=start | {"methods": [first, second]})

    page.route("**/api/start", without)
    page.reload()
    expect(page.locator("#drag")).to_be_enabled(timeout=30000)  # it needs no points
    expect(page.locator("#about")).to_contain_text("It uses no mask.")
    for control in ("#clear-mask", "#invert-mask", "[value=brush]", "#prompt"):
        expect(page.locator(control)).to_be_hidden()
    page.select_option("#against", "dragnoise")  # that does
    page.check("[value=brush]")
    expect(page.locator("#prompt")).to_be_visible()
    expect(page.locator("#drag")).to_be_disabled()
    page.select_option("#against", "")
    expect(page.locator("[value=points]")).to_be_checked()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_two_methods_drag_side_by_side_and_a_result_is_dragged_on(new_page, page_address, tmp_path, width):
    from playwright.sync_api import expect

    page = new_page(width, 844)
    quick(page)
    page.click("#method summary")
    page.get_by_role("radio", name="fastdrag").check()
    expect(page.locator("[id='field-ddim.steps']")).to_have_value("4")
    page.locator("#canvas").scroll_into_view_if_needed()
    page.mouse.click(*at(page, 16, 13))
    page.mouse.click(*at(page, 28, 17))
    if width > 800:  # by itself first
        page.click("#drag")
        expect(page.locator("#state")).to_contain_text("No handle was tracked", timeout=60000)
        expect(page.locator("#result .slider img").first).to_be_visible()
        expect(page.locator("#curve-box")).to_be_hidden()
    page.select_option("#against", "dragdiffusion")
    page.click("#drag")
    expect(page.locator("#state")).to_have_text("Both have ended.", timeout=60000)
    fast, own = page.locator("#result figure").all()
    expect(fast.locator("strong")).to_have_text("fastdrag")
    expect(own.locator("strong")).to_have_text("dragdiffusion")
    expect(fast.locator("figcaption")).to_contain_text(re.compile(r"Done: [\d.]+ s. No handle was tracked"))
    expect(own.locator("figcaption")).to_contain_text(re.compile(r"2 steps, all steps done, [\d.]+ s. Pair 1: 12.6 → "))
    assert (fast.locator("svg").count(), own.locator("svg").count()) == (0, 1)
    (a, b) = (figure.locator("img").bounding_box() for figure in (fast, own))
    assert (a["y"], a["width"]) == pytest.approx((b["y"], b["width"]), abs=0.1) and a["x"] + a["width"] < b["x"]
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width

    shown = page.request.get(page_address + own.locator("img").get_attribute("src").lstrip("/")).body()
    before = downloaded(page, "#export", tmp_path / "before")
    own.locator("button:text('Drag on from here')").click()
    expect(page.locator("#pairs li")).to_have_count(0)
    after = downloaded(page, "#export", tmp_path / "after")
    assert np.array_equal(Image.open(after / "image.png"), Image.open(io.BytesIO(shown)))
    assert (after / "mask.png").read_bytes() == (before / "mask.png").read_bytes()
    told = json.loads((after / "edit.json").read_text())
    assert told["points"] == [] and told["prompt"] == json.loads((before / "edit.json").read_text())["prompt"] != ""
    page.mouse.click(*at(page, 28, 17))  # the canvas is in view again
    page.mouse.click(*at(page, 30, 20))
    assert pairs(page) == [[[28, 17], [30, 20]]]


@pytest.mark.slow
def test_a_generated_picture_is_dragged_and_text_stays_text(new_page, page_address):
    from playwright.sync_api import expect

    page = new_page()
    quick(page)
    page.click("#tab-generate")
    prompt = "a <img src=x onerror=alert(1)> sun"
    page.fill("#wish", prompt)
    page.fill("[id='wish-generate.guidance']", "2")
    page.fill("[id='wish-seed']", "5")
    page.click("#make")
    expect(page.locator("#made img")).to_be_visible(timeout=60000)
    page.click("#made button:text('Drag it')")
    expect(page.locator("#prompt")).to_be_disabled()
    expect(page.locator("#prompt")).to_have_value(prompt)
    page.mouse.click(*at(page, 16, 13))
    page.mouse.click(*at(page, 28, 17))
    page.click("#drag")
    expect(page.locator("#state")).to_contain_text("Done", timeout=60000)
    assert page.locator("#field-seed").input_value() == "5"
    page.click("#tab-compare")
    expect(page.locator("#history li")).to_have_count(2)
    made, source = (
        page.request.get(page_address + page.locator(image).get_attribute("src").lstrip("/")).body()
        for image in ("#made img", "#result img[alt=source]")
    )
    assert np.array_equal(Image.open(io.BytesIO(made)), Image.open(io.BytesIO(source)))


@pytest.mark.slow
def test_settings_offer_what_the_loaded_model_has(new_page):
    from playwright.sync_api import expect

    page = new_page()
    page.click("#settings summary")
    unet = json.loads((Path(assets.__file__).parent / "embedded-sd" / "unet" / "config.json").read_text())
    blocks = len(unet["down_block_types"]) + 1 + len(unet["up_block_types"])
    expect(page.locator("[id='field-drag.features'] input")).to_have_count(blocks, timeout=30000)
    assert page.locator("[id='field-drag.tracker'] option").all_inner_texts() == ["nearest"]
    page.locator("[id='field-drag.features']").get_by_label("mid_block").check()
    page.click("#command summary")
    expect(page.locator("#line")).to_contain_text("drag.features=[")
    expect(page.locator("#line")).to_contain_text("mid_block")
    page.click("#reset")
    expect(page.locator("#line")).not_to_contain_text("mid_block")


@pytest.mark.slow
def test_touch_places_points_and_two_fingers_zoom(new_page):
    page = new_page(400, 850, has_touch=True, is_mobile=True, device_scale_factor=2)
    page.locator("#canvas").scroll_into_view_if_needed()
    page.touchscreen.tap(*at(page, 16, 13))
    page.touchscreen.tap(*at(page, 28, 17))
    assert pairs(page) == [[[16, 13], [28, 17]]]
    (ax, ay), (bx, by) = at(page, 20, 20), at(page, 40, 20)
    client = page.context.new_cdp_session(page)

    def touch(kind, *places):
        points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(places)]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (ax, ay))
    touch("touchStart", (ax, ay), (bx, by))
    touch("touchMove", (ax, ay), (2 * bx - ax, by))  # twice as far apart, the first stays
    touch("touchEnd")
    x, y = at(page, 28, 17)
    page.touchscreen.tap(ax + 2 * (x - ax), ay + 2 * (y - ay))  # on the point: nothing new
    x, y = at(page, 22, 24)
    page.touchscreen.tap(ax + 2 * (x - ax), ay + 2 * (y - ay))
    page.touchscreen.tap(ax + 2 * (x - ax), ay + 2 * (y - ay) + 30)
    (hx, hy), target = pairs(page)[1]
    assert abs(hx - 22) <= 1 and abs(hy - 24) <= 1 and target[0] == hx and target[1] > hy


@pytest.mark.slow
def test_when_the_models_process_dies_it_is_said_and_the_next_run_works(new_page, server):
    import psutil
    from playwright.sync_api import expect

    page = new_page()
    page.mouse.click(*at(page, 16, 13))
    page.mouse.click(*at(page, 28, 17))
    page.click("#drag")
    expect(page.locator("#state")).to_contain_text(re.compile("^(inversion|drag): step"), timeout=60000)
    page.set_viewport_size({"width": 400, "height": 850})  # the phone is turned
    expect(page.locator("#progress")).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 400
    for child in psutil.Process(server.pid).children(recursive=True):
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    expect(page.locator("#state")).to_contain_text("the model's process ended (exit code -9)", timeout=10000)
    quick(page)
    page.click("#drag")
    expect(page.locator("#state")).to_contain_text("Done", timeout=60000)
    assert pairs(page) == [[[16, 13], [28, 17]]]


def test_no_path_on_the_wire_leads_out(server, page_address):
    host, port = re.search(r"//([\d.]+):(\d+)", page_address).groups()
    for path in (
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/%2e%2e/config.py",
        "//etc/passwd",
        "/../x",
    ):
        connection = HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status in (401, 404) and b"import" not in answer.read()


@pytest.mark.slow
def test_a_run_that_takes_too_long_is_ended_even_where_it_does_not_react(tmp_path, monkeypatch):
    import psutil

    app = make_app(UIConfig(models=["embedded"], max_minutes=0.002, threads=1), tmp_path / "ui")
    with TestClient(app, base_url="http://127.0.0.1") as client:
        client.get("/")
        for suspended in (False, True):
            while not multiprocessing.active_children():
                time.sleep(0.05)
            [worker] = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
            if suspended:
                monkeypatch.setattr(runs, "PATIENCE", 1.0)
                worker.suspend()
            run = client.post("/api/runs", json=edit(client, settings={"lora.steps": 10**5})).json()["id"]
            known = next(iter(app.state.page.visitors)).runs[run]
            deadline = time.monotonic() + 60
            while not known.ended and time.monotonic() < deadline:
                time.sleep(0.05)
            assert known.status == "failed" and "longer than 0.002 minutes" in known.message
        assert not worker.is_running()


@pytest.mark.slow
def test_the_first_drag_is_two_clicks_and_a_button_and_others_wait(new_page):
    from playwright.sync_api import expect

    page = new_page()
    expect(page.locator("#drag")).to_be_disabled()
    page.mouse.click(*at(page, 16, 13))
    expect(page.locator("#hint")).to_contain_text("where it should go")
    page.mouse.click(*at(page, 28, 17))
    values = [field.input_value() for field in page.locator("#pairs input").all()]
    assert values == ["16", "13", "28", "17"]
    page.click("#undo")
    expect(page.locator("#pairs li")).to_have_count(0)
    page.click("#redo")
    expect(page.locator("#pairs li")).to_have_count(1)
    page.click("#drag")

    other = new_page(400, 850)
    assert other.evaluate("() => document.documentElement.scrollWidth") <= 400
    other.select_option("#samples", "example:tower")
    expect(other.locator("#pairs li")).to_have_count(1)
    other.click("#drag")
    expect(other.locator("#state")).to_contain_text("1 run before", timeout=30000)
    other.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"not a picture"})
    expect(other.locator("#error")).to_contain_text("not an image")
    other.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": bytes(2**21)})
    expect(other.locator("#error")).to_contain_text("larger than 1 MB")

    expect(page.locator("#state")).to_contain_text(re.compile("^drag: step"), timeout=120000)
    expect(page.locator("#live")).to_be_visible(timeout=30000)
    shown, ends = set(), time.monotonic() + 60  # pictures of the latent, with the handle on its way
    while len(shown) < 3 and time.monotonic() < ends:
        shown.add(page.evaluate("() => document.querySelector('#live').toDataURL()"))
        page.wait_for_timeout(100)
    assert len(shown) == 3
    page.reload()  # the run goes on, and the page finds it again
    expect(page.locator("#state")).to_contain_text(re.compile("^(drag|denoise): step|^Done"), timeout=30000)
    expect(page.locator("#state")).to_contain_text("all handles arrived", timeout=120000)
    expect(page.locator("#result .slider img").first).to_be_visible()
    page.click("#tab-compare")
    page.click("#history button:text('Compare')")
    page.select_option("#view select[aria-label=View]", "Difference")
    expect(page.locator("#view .difference")).to_be_visible()
    expect(page.locator("#history li")).to_have_count(1)  # not the other's

    expect(other.locator("#state")).to_contain_text(re.compile("^drag: step"), timeout=120000)
    began = time.monotonic()
    other.click("#cancel")
    expect(other.locator("#state")).to_contain_text("Cancelled", timeout=10000)
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_what_is_downloaded_repeats_the_run(new_page, tmp_path):
    from playwright.sync_api import expect

    from dragdiff.cli import main_edit

    page = new_page()
    page.select_option("#samples", "example:tower")
    expect(page.locator("#pairs li")).to_have_count(1)
    page.click("#settings summary")
    page.fill("[id='field-drag.steps']", "3")
    page.locator("[id='field-drag.steps']").blur()
    page.click("#command summary")
    expect(page.locator("#line")).to_contain_text("python edit.py configs/embedded.yaml sample=tower drag.steps=3")
    page.click("#drag")
    expect(page.locator("#state")).to_contain_text("Done: 3 steps", timeout=120000)
    with page.expect_download() as download:
        page.click("#result a")
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extractall(tmp_path)
    shown = np.asarray(Image.open(tmp_path / "tower" / "edited.png"))
    assert readers.read_sample(tmp_path / "tower").points.shape == (1, 2, 2)
    assert main_edit(["embedded", f"sample={tmp_path / 'tower'}", "drag.steps=3", f"output.folder={tmp_path}/o"]) == 0
    again = np.asarray(Image.open(tmp_path / "o" / "tower" / "edited.png"))
    assert np.abs(shown.astype(int) - again).max() <= 1
    assert json.loads((tmp_path / "tower" / "metrics.json").read_text())["steps"] == 3
