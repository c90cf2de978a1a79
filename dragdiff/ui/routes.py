"""What the web page asks of its server. All that is sent is checked here; the work is done by `runs.Queue`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dragdiff.aliases import Json
from dragdiff.assets import EXAMPLES
from dragdiff.config import Config, UIConfig, check_fit
from dragdiff.data import readers
from dragdiff.data.sample import EditSample, load_image
from dragdiff.errors import UserError
from dragdiff.ui import files
from dragdiff.ui.form import GENERATED_WITH, Form, check_length
from dragdiff.ui.runs import Queue, Run
from dragdiff.ui.visitors import Picture, Visitor, Visitors

STATIC = Path(__file__).parent / "static"
VISITOR = "dragdiff_visitor"  # its cookie
RESULT_FILES = re.compile(r"edited\.png|comparison\.png|trajectory\.gif|source\.png|preview-\d{4}\.png")
TELL_EVERY = 0.1  # s between looks at what has changed
ALIVE_EVERY = 15.0  # s between signs of life on a stream


class Page:
    """The routes, and what they share. A `UserError` that one raises is told to the visitor, see `_own`."""

    def __init__(self, settings: UIConfig, folder: Path) -> None:
        """
        Args:
            folder: where visitors' pictures and results are kept.

        Raises:
            UserError: a model, a method or a folder of samples that is to be offered is not there.
        """
        self.settings, self.form = settings, Form(settings)
        self.queue = Queue(threads=settings.threads, minutes=settings.max_minutes)
        self.visitors = Visitors(folder, settings.keep_hours * 3600)
        self.ending: Callable[[], bool] = lambda: False  # whether the server is on its way out: streams end
        self.samples = {f"example:{path.name}": path for path in sorted(EXAMPLES.iterdir()) if path.is_dir()}
        for root in settings.samples:
            folders = readers.find_samples(root)
            for sample, name in zip(folders, readers.sample_names(folders, root), strict=True):
                self.samples.setdefault(f"{Path(root).name}:{name}", sample)
        Image.MAX_IMAGE_PIXELS = int(settings.max_megapixels * 1e6)  # of this process, which decodes only uploads

    # ------------------------------------------------------------------------------- what the page asks at its start

    async def index(self, request: Request) -> Response:
        """The page itself; who comes without a visitor's cookie becomes a new one."""
        response = FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-store"})
        if self.visitors.get(request.cookies.get(VISITOR, "")) is None:
            secret, _ = self.visitors.new()
            response.set_cookie(VISITOR, secret, httponly=True, samesite="strict")
        return response

    async def start(self, request: Request, visitor: Visitor) -> Response:
        """What can be chosen and set here, and how much: nothing of it depends on the visitor."""
        return JSONResponse(
            {
                "models": list(self.form.models),
                "presets": list(self.form.presets),
                "methods": self.form.offered(),
                "samples": list(self.samples),
                "limits": {
                    "megabytes": self.settings.max_upload_mb,
                    "keepHours": self.settings.keep_hours,
                    "together": min(self.settings.queue, self.settings.queue_each),
                },
            }
        )

    async def values(self, request: Request, visitor: Visitor) -> Response:
        """A method's settings with a model and preset, and, once that is loaded, what it offers for some of them."""
        query = request.query_params
        values = self.form.values(query)
        return JSONResponse({"values": values, "choices": self.queue.choices.get(self.form.paths[query["model"]], {})})

    # ------------------------------------------------------------------------------- pictures and samples

    async def open(self, request: Request, visitor: Visitor) -> Response:
        """A picture, a zip of samples, or the files of a sample: multipart; or {"sample": NAME} of those offered.

        Of a zip with several samples the answer is {"samples": [NAME, ...]}; with one of them as `sample` it is opened.
        """
        if request.headers.get("content-type", "").startswith("application/json"):
            name = _text(await _body(request), "sample")
            if name not in self.samples:
                raise UserError(f"there is no sample {name[:80]!r} here")
            return JSONResponse(await run_in_threadpool(self._open_offered, visitor, self.samples[name]))
        async with request.form(max_files=20, max_fields=5) as form:
            parts = [part for part in form.values() if isinstance(part, UploadFile)]
            uploaded = [(Path(part.filename or "").name, await part.read()) for part in parts]
            wanted = form.get("sample")
        if not isinstance(wanted, str):
            wanted = None
        return JSONResponse(await run_in_threadpool(self._open_files, visitor, uploaded, wanted))

    def _open_offered(self, visitor: Visitor, folder: Path) -> Json:
        return self._opened(visitor, readers.read_sample(folder, folder.name))

    def _open_files(self, visitor: Visitor, uploaded: list[tuple[str, bytes]], wanted: str | None) -> Json:
        found = files.read_upload(uploaded, wanted, self.settings.max_upload_mb)
        if isinstance(found, list):
            return {"samples": found}
        if isinstance(found, EditSample):
            return self._opened(visitor, found)
        return {"picture": _as_json(visitor.add_picture(*found))}

    def _opened(self, visitor: Visitor, sample: EditSample) -> Json:
        mask = None if sample.mask is None else files.mask_url(np.array(sample.mask))
        picture = visitor.add_picture(sample.image, sample.name)
        points = sample.points.tolist()
        return {"picture": _as_json(picture), "prompt": sample.prompt, "points": points, "mask": mask}

    async def picture(self, request: Request, visitor: Visitor) -> Response:
        """One of the visitor's pictures as PNG."""
        return FileResponse(visitor.picture(request.path_params["id"]).file)

    async def export(self, request: Request, visitor: Visitor) -> Response:
        """The edit as it stands on the canvas, zipped, in our format or DragBench's."""
        body = await _body(request)

        def make() -> tuple[bytes, str]:
            sample, _ = self._sample(visitor, body)
            return files.export(sample, dragbench=body.get("format") == "dragbench"), sample.name

        return _download(*await run_in_threadpool(make))

    # ------------------------------------------------------------------------------- runs

    async def add_run(self, request: Request, visitor: Visitor) -> Response:
        """Queue an edit, or the making of a picture (`kind` is "generate"); the oldest results go where many are.

        With a second method as `against` the same edit is queued by that one, too, with its own published settings and
        those of the visitor's that it reads.
        """
        runs = await run_in_threadpool(self._new_runs, visitor, await _body(request))
        return JSONResponse({"id": runs[0].id})

    def _new_runs(self, visitor: Visitor, body: Json) -> list[Run]:
        kind = body.get("kind", "edit")
        if kind not in ("edit", "generate"):
            raise UserError("the request is malformed: reload the page")
        chosen = [self.form.chosen(body).name]
        if kind == "edit" and body.get("against"):
            chosen.append(self.form.chosen(body, "against").name)
            if chosen[0] == chosen[1]:
                raise UserError(f"{chosen[0]} can't be compared with itself: choose another method")
        runs: list[Run] = []
        try:
            for name in chosen:
                runs.append(self._new_run(visitor, kind, body | {"method": name}))
            for run in runs:
                run.together = [run.id for run in runs]
            self.queue.add(*runs, most=self.settings.queue, most_each=self.settings.queue_each)
        except Exception:
            for run in runs:
                shutil.rmtree(run.folder, ignore_errors=True)
            raise
        visitor.runs |= {run.id: run for run in runs}
        for old in [run for run in visitor.runs.values() if run.ended][: -self.settings.runs_each]:
            visitor.remove_run(old)
        return runs

    def _new_run(self, visitor: Visitor, kind: str, body: Json) -> Run:
        """A run by the method that the body names; with a folder, but not in the queue."""
        sample, request = None, {}
        if kind == "generate":
            config = self.form.config(body, prompt=_text(body, "prompt"), **{"generate.enabled": True})
        else:
            sample, picture = self._sample(visitor, body)
            body, config = self._edit_config(body, sample, picture)
            self.form.chosen(body).check(sample)
            working = sample.resized(config.data.max_size)  # may get too small
            check_fit(config, working.height, working.width)
            request = {"points": sample.points.tolist(), "name": sample.name, "generated": bool(picture.generated)}
        request |= {key: body.get(key) for key in ("model", "preset", "method", "prompt")}
        request["settings"] = self.form.changes(body)
        request["doubts"] = " ".join(sample.doubts()) if sample else ""
        folder = visitor.new_folder()
        if sample is not None:
            Image.fromarray(sample.image).save(folder / "source.png")
        return Run(kind, config, request, folder, visitor.folder / "cache", sample)

    def _edit_config(self, body: Json, sample: EditSample, picture: Picture) -> tuple[Json, Config]:
        """What counts of a request for an edit, and the config that it amounts to."""
        config = self.form.config(body)
        if picture.generated is None:
            return body, config
        made = picture.generated  # it comes out again only with what it was made with
        mine = {k: v for k, v in self.form.changes(body).items() if not k.startswith(GENERATED_WITH)}
        theirs = {k: v for k, v in made["settings"].items() if k.startswith(GENERATED_WITH)}
        body = body | {"model": made["model"], "preset": made["preset"], "settings": mine | theirs}
        return body, self.form.config(body, prompt=sample.prompt, **{"generate.enabled": True})

    def _sample(self, visitor: Visitor, body: Json) -> tuple[EditSample, Picture]:
        picture = visitor.picture(body.get("picture"))
        prompt = picture.generated["prompt"] if picture.generated else _text(body, "prompt")
        pixels = np.asarray(Image.open(picture.file).convert("RGB"))
        sample = EditSample(pixels, prompt, body.get("points") or [], files.read_mask(body.get("mask")), picture.name)
        return sample, picture

    async def command(self, request: Request, visitor: Visitor) -> Response:
        """The line for a terminal that does the same, and its settings as YAML."""
        body = await _body(request)
        name = visitor.picture(body["picture"]).name if body.get("picture") else "edit"
        return JSONResponse(self.form.command(body, name))

    async def cancel(self, request: Request, visitor: Visitor) -> Response:
        """Take a run out of the queue, or end it within one step."""
        self.queue.cancel(visitor.run(request.path_params["id"]))
        return JSONResponse({})

    async def finish(self, request: Request, visitor: Visitor) -> Response:
        """End a run's drag, and denoise what there is."""
        self.queue.finish(visitor.run(request.path_params["id"]))
        return JSONResponse({})

    async def remove(self, request: Request, visitor: Visitor) -> Response:
        """Forget a run that is over, with its files."""
        run = visitor.run(request.path_params["id"])
        if not run.ended:
            raise UserError("this run is not over: cancel it first")
        visitor.remove_run(run)
        return JSONResponse({})

    async def use(self, request: Request, visitor: Visitor) -> Response:
        """Put a run's picture on the canvas: its source with points and mask; its result with the mask, to drag on from
        there; or what it generated."""
        run, what = visitor.run(request.path_params["id"]), (await _body(request)).get("what")
        return JSONResponse(await run_in_threadpool(self._used, visitor, run, what))

    def _used(self, visitor: Visitor, run: Run, what: object) -> Json:
        if what == "source" and run.sample is not None:
            opened = self._opened(visitor, run.sample)
            if run.config.generate.enabled:
                self._mark_generated(visitor, opened, run)
            return opened
        file = run.folder / ("generated.png" if run.kind == "generate" else "edited.png")
        if not file.is_file():
            raise UserError("this run has no picture")
        if run.sample is not None:
            name = f"{run.sample.name.removesuffix('-edited')}-edited"
            return self._opened(visitor, EditSample(load_image(file), run.sample.prompt, [], run.sample.mask, name))
        opened = {"picture": _as_json(visitor.add_picture(load_image(file), "generated")), "prompt": run.config.prompt}
        self._mark_generated(visitor, opened, run)
        return opened

    def _mark_generated(self, visitor: Visitor, opened: Json, run: Run) -> None:
        made = {"model": run.request["model"], "preset": run.request["preset"], "prompt": run.config.prompt}
        # another method has other published values of what all of them read
        made["settings"] = run.request["settings"] | {"ddim.steps": run.config.ddim.steps}
        id = opened["picture"]["id"]
        visitor.pictures[id] = dataclasses.replace(visitor.pictures[id], generated=made)
        opened["picture"] = _as_json(visitor.pictures[id])

    async def file(self, request: Request, visitor: Visitor) -> Response:
        """One of the pictures that a run has made."""
        run, name = visitor.run(request.path_params["id"]), request.path_params["name"]
        if name == "generated.png" or RESULT_FILES.fullmatch(name):
            path = run.folder / name
            if path.is_file():
                return FileResponse(path)
        raise HTTPException(404)

    async def result(self, request: Request, visitor: Visitor) -> Response:
        """All that a run has made, with the edit and the config that repeat it."""
        run = visitor.run(request.path_params["id"])
        if run.sample is None or run.status != "done":
            raise UserError("this run has no result to download")
        content = await run_in_threadpool(files.results, run.sample, run.config, run.folder)
        return _download(content, f"{run.sample.name}-edited")

    async def events(self, request: Request, visitor: Visitor) -> Response:
        """Server-sent events: the visitor's runs that have changed, which are gone, and whose model has been loaded."""

        async def stream() -> AsyncIterator[str]:
            told: dict[str, tuple[int, int]] = {}
            loaded: list[str] = []
            said = time.monotonic()
            yield "retry: 1000\n\n"
            while not self.ending():
                runs = dict(visitor.runs)
                changed = []
                for run in runs.values():
                    ahead = self.queue.ahead(run)
                    if told.get(run.id) != (run.version, ahead):
                        told[run.id] = (run.version, ahead)
                        changed.append(run.as_json(ahead))
                gone = [id for id in told if id not in runs]
                for id in gone:
                    del told[id]
                now, before = time.monotonic(), loaded
                loaded = [name for name, path in self.form.paths.items() if path in self.queue.choices]
                if changed or gone or loaded != before or now - said > ALIVE_EVERY:
                    said, visitor.seen = now, self.visitors.clock()
                    yield f"data: {json.dumps({'runs': changed, 'gone': gone, 'loaded': loaded})}\n\n"
                await asyncio.sleep(TELL_EVERY)

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    # ------------------------------------------------------------------------------- all together

    def routes(self) -> list[Route | Mount]:
        """All that the server answers."""
        post = ["POST"]
        return [
            Route("/", self.index),
            Route("/api/start", self._own(self.start)),
            Route("/api/values", self._own(self.values)),
            Route("/api/open", self._own(self.open), methods=post),
            Route("/api/pictures/{id}", self._own(self.picture)),
            Route("/api/export", self._own(self.export), methods=post),
            Route("/api/command", self._own(self.command), methods=post),
            Route("/api/events", self._own(self.events)),
            Route("/api/runs", self._own(self.add_run), methods=post),
            Route("/api/runs/{id}/cancel", self._own(self.cancel), methods=post),
            Route("/api/runs/{id}/finish", self._own(self.finish), methods=post),
            Route("/api/runs/{id}/remove", self._own(self.remove), methods=post),
            Route("/api/runs/{id}/use", self._own(self.use), methods=post),
            Route("/api/runs/{id}/result.zip", self._own(self.result)),
            Route("/api/runs/{id}/{name}", self._own(self.file)),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]

    def _own(
        self, endpoint: Callable[[Request, Visitor], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint for a known visitor; what they did wrong comes back as {"error": ...}."""

        async def handle(request: Request) -> Response:
            visitor = self.visitors.get(request.cookies.get(VISITOR, ""))
            if visitor is None:
                return JSONResponse({"error": "the server does not know this page any more: reload it"}, 401)
            try:
                return await endpoint(request, visitor)
            except UserError as error:
                return JSONResponse({"error": str(error)}, 400)
            except UnicodeEncodeError:  # JSON can say half of a surrogate pair
                return JSONResponse({"error": "a text holds something that is no character: write it again"}, 400)

        return handle


async def _body(request: Request) -> Json:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise UserError("the request is malformed: reload the page")
    return body


def _text(body: Json, key: str) -> str:
    value = body.get(key) or ""
    if not isinstance(value, str):
        raise UserError(f"the {key} must be text")
    check_length(key, value)
    return value


def _download(content: bytes, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{files.plain_name(name)}.zip"'}
    return Response(content, media_type="application/zip", headers=headers)


def _as_json(picture: Picture) -> Json:
    size = {"width": picture.width, "height": picture.height}
    return {"id": picture.id, "name": picture.name, "generated": picture.generated is not None} | size
