"""The web page's server. All that is asked of it is checked here; the work is done by `runs.Queue`."""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import hmac
import io
import ipaddress
import json
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dragdiff.assets import EXAMPLES
from dragdiff.config import UIConfig, to_yaml
from dragdiff.data import readers
from dragdiff.data.sample import EditSample, load_image
from dragdiff.errors import UserError
from dragdiff.ui.form import GENERATED_WITH, Form, check_length
from dragdiff.ui.runs import Queue, Run
from dragdiff.ui.visitors import Picture, Visitor, Visitors

STATIC = Path(__file__).parent / "static"
VISITOR, TOKEN = "dragdiff_visitor", "dragdiff_token"
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
SAMPLE_FILES = re.compile(
    r"(edit|points|prompt)\.json|meta_data\.pkl|mask\.png|(image|original|original_image|origin_image)\.(png|jpe?g|webp)"
)
MARKERS = (".json", ".pkl")  # one of these makes pictures a sample
RESULT_FILES = re.compile(r"edited\.png|comparison\.png|trajectory\.gif|source\.png|preview-\d{4}\.png")
DOWNLOADED = ("edited.png", "comparison.png", "trajectory.gif", "metrics.json")
TELL_EVERY = 0.1  # s between looks at what has changed
ALIVE_EVERY = 15.0  # s between signs of life on a stream


class Page:
    """The routes, and what they share."""

    def __init__(self, settings: UIConfig, folder: Path) -> None:
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
        response = FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-store"})
        if self.visitors.get(request.cookies.get(VISITOR, "")) is None:
            secret, _ = self.visitors.new()
            response.set_cookie(VISITOR, secret, httponly=True, samesite="strict")
        return response

    async def start(self, request: Request, visitor: Visitor) -> Response:
        return JSONResponse(
            {
                "models": list(self.form.models),
                "presets": list(self.form.presets),
                "fields": self.form.describe(),
                "samples": list(self.samples),
                "limits": {"megabytes": self.settings.max_upload_mb, "keepHours": self.settings.keep_hours},
            }
        )

    async def values(self, request: Request, visitor: Visitor) -> Response:
        query = request.query_params
        model = query.get("model", "")
        values = self.form.values(model, query.get("preset", ""))
        return JSONResponse({"values": values, "choices": self.queue.choices.get(self.form.paths[model], {})})

    # ------------------------------------------------------------------------------- pictures and samples

    async def open(self, request: Request, visitor: Visitor) -> Response:
        """A picture, a zip of samples, or the files of a sample: multipart; or {"sample": NAME} of those offered.

        Of a zip with several samples the answer is {"samples": [NAME, ...]}; with one of them as `sample` it is opened.
        """
        if request.headers.get("content-type", "").startswith("application/json"):
            name = _text(await _body(request), "sample")
            if name not in self.samples:
                raise UserError(f"there is no sample {name[:80]!r} here")
            sample = readers.read_sample(self.samples[name], self.samples[name].name)
            return JSONResponse(await run_in_threadpool(self._opened, visitor, sample))
        async with request.form(max_files=20, max_fields=5) as form:
            files = [(Path(f.filename or "").name, await f.read()) for f in form.values() if isinstance(f, UploadFile)]
            which = form.get("sample")
        return JSONResponse(await run_in_threadpool(self._open_files, visitor, files, which))

    def _open_files(self, visitor: Visitor, files: list[tuple[str, bytes]], sample: Any) -> dict[str, Any]:
        if not files:
            raise UserError("there is no file in this upload")
        limit = int(self.settings.max_upload_mb * 2**20)
        if sum(len(content) for _, content in files) > limit:
            raise UserError(f"the upload is larger than {self.settings.max_upload_mb:g} MB")
        name = _plain_name(sample if isinstance(sample, str) else Path(files[0][0]).stem)
        if len(files) == 1 and zipfile.is_zipfile(io.BytesIO(files[0][1])):
            found = _samples(files[0][1])
            if len(found) > 1 and sample not in found:
                return {"samples": list(found)}
            folder = sample if sample in found else next(iter(found))
            name = _plain_name(folder.rpartition("/")[2]) if folder else name
            files = _unzipped(files[0][1], found[folder], limit)
        with tempfile.TemporaryDirectory() as folder:
            if len(files) == 1:
                path = Path(folder) / (_plain_name(files[0][0]) or "picture")
                path.write_bytes(files[0][1])
                picture = visitor.add_picture(_without(folder, load_image, path), name)
                return {"picture": _as_json(picture)}
            if not any(file.endswith(MARKERS) for file, _ in files):
                raise UserError("these files are no sample, which needs edit.json or meta_data.pkl: open one picture")
            for file, content in files:
                if SAMPLE_FILES.fullmatch(file):
                    (Path(folder) / file).write_bytes(content)
            return self._opened(visitor, _without(folder, readers.read_sample, Path(folder), name))

    def _opened(self, visitor: Visitor, sample: EditSample) -> dict[str, Any]:
        mask = None
        if sample.mask is not None:
            buffer = io.BytesIO()
            Image.fromarray(np.array(sample.mask).astype(np.uint8) * 255).save(buffer, "PNG")
            mask = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        picture = visitor.add_picture(sample.image, sample.name)
        points = sample.points.tolist()
        return {"picture": _as_json(picture), "prompt": sample.prompt, "points": points, "mask": mask}

    async def picture(self, request: Request, visitor: Visitor) -> Response:
        return FileResponse(visitor.picture(request.path_params["id"]).file)

    async def export(self, request: Request, visitor: Visitor) -> Response:
        """The edit as it stands on the canvas, zipped, in our format or DragBench's."""
        body = await _body(request)

        def make() -> tuple[bytes, str]:
            sample, _ = self._sample(visitor, body)
            with tempfile.TemporaryDirectory() as folder:
                write = readers.write_dragbench if body.get("format") == "dragbench" else readers.write_folder
                write(sample, Path(folder) / sample.name)
                return _zipped(Path(folder), {}), sample.name

        content, name = await run_in_threadpool(make)
        return _download(content, name)

    # ------------------------------------------------------------------------------- runs

    async def add_run(self, request: Request, visitor: Visitor) -> Response:
        run = await run_in_threadpool(self._new_run, visitor, await _body(request))
        return JSONResponse({"id": run.id})

    def _new_run(self, visitor: Visitor, body: dict[str, Any]) -> Run:
        sample, kind = None, body.get("kind", "edit")
        if kind not in ("edit", "generate"):
            raise UserError("the request is malformed: reload the page")
        request = {key: body.get(key) for key in ("model", "preset", "settings", "prompt")}
        if kind == "generate":
            config = self.form.config(body, prompt=_text(body, "prompt"), **{"generate.enabled": True})
        else:
            sample, picture = self._sample(visitor, body)
            config = self._edit_config(body, sample, picture)
            request |= {"points": sample.points.tolist(), "name": sample.name, "generated": bool(picture.generated)}
            sample.resized(config.data.max_size)  # may get too small
        folder = visitor.new_folder()
        if sample is not None:
            Image.fromarray(sample.image).save(folder / "source.png")
        run = Run(kind, config, request, folder, visitor.folder / "cache", sample)
        try:
            self.queue.add(run, most=self.settings.queue, most_each=self.settings.queue_each)
        except UserError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        visitor.runs[run.id] = run
        for old in [run for run in visitor.runs.values() if run.ended][: -self.settings.runs_each]:
            visitor.remove_run(old)
        return run

    def _edit_config(self, body: dict[str, Any], sample: EditSample, picture: Picture) -> Any:
        if picture.generated is None:
            return self.form.config(body)
        self.form.config(body)
        made = picture.generated  # it comes out again only with what it was made with
        mine = {k: v for k, v in (body.get("settings") or {}).items() if not k.startswith(GENERATED_WITH)}
        theirs = {k: v for k, v in made["settings"].items() if k.startswith(GENERATED_WITH)}
        body = {"model": made["model"], "preset": made["preset"], "settings": mine | theirs}
        return self.form.config(body, prompt=sample.prompt, **{"generate.enabled": True})

    def _sample(self, visitor: Visitor, body: dict[str, Any]) -> tuple[EditSample, Picture]:
        picture = visitor.picture(body.get("picture"))
        prompt = picture.generated["prompt"] if picture.generated else _text(body, "prompt")
        pixels = np.asarray(Image.open(picture.file).convert("RGB"))
        sample = EditSample(pixels, prompt, body.get("points") or [], _mask(body.get("mask")), picture.name)
        return sample, picture

    async def command(self, request: Request, visitor: Visitor) -> Response:
        body = await _body(request)
        name = visitor.picture(body["picture"]).name if body.get("picture") else "edit"
        return JSONResponse(self.form.command(body, name))

    async def cancel(self, request: Request, visitor: Visitor) -> Response:
        self.queue.cancel(visitor.run(request.path_params["id"]))
        return JSONResponse({})

    async def finish(self, request: Request, visitor: Visitor) -> Response:
        self.queue.finish(visitor.run(request.path_params["id"]))
        return JSONResponse({})

    async def remove(self, request: Request, visitor: Visitor) -> Response:
        run = visitor.run(request.path_params["id"])
        if not run.ended:
            raise UserError("this run is not over: cancel it first")
        visitor.remove_run(run)
        return JSONResponse({})

    async def use(self, request: Request, visitor: Visitor) -> Response:
        """Put a run's picture on the canvas: its source with points and mask, its result, or what it generated."""
        run, what = visitor.run(request.path_params["id"]), (await _body(request)).get("what")
        return JSONResponse(await run_in_threadpool(self._used, visitor, run, what))

    def _used(self, visitor: Visitor, run: Run, what: Any) -> dict[str, Any]:
        if what == "source" and run.sample is not None:
            opened = self._opened(visitor, run.sample)
            if run.config.generate.enabled:
                self._mark_generated(visitor, opened, run)
            return opened
        file = run.folder / ("generated.png" if run.kind == "generate" else "edited.png")
        if not file.is_file():
            raise UserError("this run has no picture")
        name = "generated" if run.kind == "generate" else f"{run.request['name']}-edited"
        opened = {"picture": _as_json(visitor.add_picture(load_image(file), name)), "prompt": run.request["prompt"]}
        if run.kind == "generate":
            self._mark_generated(visitor, opened, run)
        return opened

    def _mark_generated(self, visitor: Visitor, opened: dict[str, Any], run: Run) -> None:
        made = {"model": run.request["model"], "preset": run.request["preset"], "prompt": run.config.prompt}
        made["settings"] = run.request["settings"] or {}
        id = opened["picture"]["id"]
        visitor.pictures[id] = dataclasses.replace(visitor.pictures[id], generated=made)
        opened["picture"] = _as_json(visitor.pictures[id])

    async def file(self, request: Request, visitor: Visitor) -> Response:
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
        sample = run.sample

        def make() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                readers.write_folder(sample, Path(folder) / sample.name)
                config = dataclasses.replace(run.config, sample=sample.name)
                if config.generate.enabled:
                    mask = f"{sample.name}/mask.png" if sample.mask is not None else ""
                    config = dataclasses.replace(config, sample="", points=sample.points.tolist(), mask=mask)
                more = {f"{sample.name}/{name}": (run.folder / name).read_bytes() for name in DOWNLOADED}
                more[f"{sample.name}/config.yaml"] = to_yaml(config).encode()
                return _zipped(Path(folder), more)

        return _download(await run_in_threadpool(make), f"{sample.name}-edited")

    async def events(self, request: Request, visitor: Visitor) -> Response:
        """Server-sent events: the visitor's runs that have changed, which are gone, and whose model has been loaded."""

        async def stream() -> AsyncIterator[str]:
            told: dict[str, Any] = {}
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


def make_app(settings: UIConfig, folder: Path) -> Starlette:
    """The server.

    Args:
        folder: where visitors' pictures and results are kept.

    Raises:
        UserError: a model, or a folder of samples, that is to be offered is not there.
    """
    page = Page(settings, folder)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        async def clean() -> None:
            while True:
                page.visitors.forget_the_gone()
                await asyncio.sleep(min(60.0, page.visitors.keep_seconds / 4))

        first = next(iter(page.form.models))
        page.queue.start(page.form.config({"model": first}))
        cleaning = asyncio.create_task(clean())
        yield
        cleaning.cancel()
        await run_in_threadpool(page.queue.close)

    app = Starlette(
        routes=page.routes(), lifespan=life, exception_handlers={Exception: _unexpected, HTTPException: _refused}
    )
    app.add_middleware(Guard, settings=settings)  # type: ignore[arg-type]
    app.state.page = page
    return app


async def _unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"the server made a mistake ({type(error).__name__}); its log says more"}, 500)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


class Guard:
    """Lets in who may come: the right host name, the right origin, the token where the page is open to others."""

    def __init__(self, app: ASGIApp, settings: UIConfig) -> None:
        self.app, self.settings = app, settings
        self.limit = int(settings.max_upload_mb * 2**20 * 1.5)  # a mask travels as base64 in JSON
        self.loopback = is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Cache-Control", "private, no-cache")
            await send(message)

        refusal = self._refusal(Request(scope))
        await (refusal or self.app)(scope, receive, answer)

    def _refusal(self, request: Request) -> Response | None:
        headers = Headers(scope=request.scope)
        host = headers.get("host", "")
        if self.loopback and not is_loopback(_hostname(host)):  # DNS rebinding
            return JSONResponse({"error": "this page is for this machine alone"}, 403)
        if request.method == "POST":
            origin = headers.get("origin")
            if origin is not None and origin.partition("://")[2] != host:
                return JSONResponse({"error": "this request comes from another page"}, 403)
            length = headers.get("content-length", "")
            if not re.fullmatch("[0-9]{1,15}", length):
                return JSONResponse({"error": "the length of the upload must be said before it"}, 411)
            if int(length) > self.limit:
                return JSONResponse({"error": f"the upload is larger than {self.settings.max_upload_mb:g} MB"}, 413)
        elif request.method not in ("GET", "HEAD"):
            return Response(status_code=405)
        if not self.settings.token:
            return None
        if _same(request.cookies.get(TOKEN, ""), self.settings.token):
            return None
        if request.url.path == "/" and _same(request.query_params.get("token", ""), self.settings.token):
            response = RedirectResponse("/", 303)
            response.set_cookie(TOKEN, self.settings.token, httponly=True, samesite="strict")
            return response
        return FileResponse(STATIC / "token.html", 401)


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hostname(host: str) -> str:
    """Of a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode("utf-8", "replace"))


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise UserError("the request is malformed: reload the page")
    return body


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key) or ""
    if not isinstance(value, str):
        raise UserError(f"the {key} must be text")
    check_length(key, value)
    return value


def _mask(given: Any) -> np.ndarray | None:
    """The page's mask, a data URL of a PNG, as (H, W) uint8."""
    if not given:
        return None
    try:
        encoded = str(given).removeprefix("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=["PNG"]) as image:
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, binascii.Error, Image.DecompressionBombError) as error:
        raise UserError("the mask can't be read: draw it again") from error


def _plain_name(name: str) -> str:
    """Letters, digits and a few signs, so that it may name a file anywhere."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:60].strip("._-") or "picture"


def _without(folder: str, read: Callable[..., Any], *arguments: Any) -> Any:
    """Call a reader; its message names the file, not the server's folder."""
    try:
        return read(*arguments)
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}/", "").replace(folder, "the sample")) from error


@contextmanager
def _readable_zip(content: bytes) -> Iterator[zipfile.ZipFile]:
    """
    Raises:
        UserError: damaged or encrypted, as soon as it shows.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, ValueError, NotImplementedError, EOFError) as error:
        raise UserError("the zip can't be read, it may be damaged or encrypted") from error


def _samples(content: bytes) -> dict[str, list[zipfile.ZipInfo]]:
    """The folders in a zip that are samples, with their files.

    Raises:
        UserError: there is none, or as `_readable_zip`.
    """
    folders: dict[str, list[zipfile.ZipInfo]] = {}
    with _readable_zip(content) as archive:
        for info in archive.infolist():
            folder, _, file = info.filename.rpartition("/")
            if SAMPLE_FILES.fullmatch(file):
                folders.setdefault(folder, []).append(info)
    found = {name: files for name, files in folders.items() if any(f.filename.endswith(MARKERS) for f in files)}
    if not found:
        raise UserError("there is no sample in this zip: it needs edit.json or meta_data.pkl")
    return found


def _unzipped(content: bytes, members: list[zipfile.ZipInfo], limit: int) -> list[tuple[str, bytes]]:
    """Files of a zip, in memory.

    Raises:
        UserError: they are more than `limit` bytes, or as `_readable_zip`.
    """
    files, size = [], 0
    with _readable_zip(content) as archive:
        for info in members:
            with archive.open(info) as member:
                data = member.read(limit - size + 1)
            size += len(data)
            if size > limit:
                raise UserError(f"unpacked the zip is larger than {limit / 2**20:g} MB")
            files.append((info.filename.rpartition("/")[2], data))
    return files


def _zipped(folder: Path, more: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
        for name, content in more.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _download(content: bytes, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{_plain_name(name)}.zip"'}
    return Response(content, media_type="application/zip", headers=headers)


def _as_json(picture: Picture) -> dict[str, Any]:
    size = {"width": picture.width, "height": picture.height}
    return {"id": picture.id, "name": picture.name, "generated": picture.generated is not None} | size


def serve(settings: UIConfig) -> None:
    """Run the page until Ctrl-C."""
    import socket

    import uvicorn

    if not is_loopback(settings.host) and not settings.token:
        settings = dataclasses.replace(settings, token=secrets.token_urlsafe(16))
    opened = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((settings.host, settings.port))
        opened.listen()  # who comes before the server is up waits
    except OSError as error:
        raise UserError(
            f"can't listen on {settings.host}:{settings.port} ({error.strerror or error}): choose another host or port"
        ) from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is tidied up, as after Ctrl-C
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    query = f"?token={settings.token}" if settings.token else ""
    with tempfile.TemporaryDirectory(prefix="dragdiff-ui-") as temporary:
        folder = Path(settings.folder).expanduser() if settings.folder else Path(temporary)
        app = make_app(settings, folder)
        if not is_loopback(settings.host):
            print("note: the page is open to other machines, without encryption; who has this address can use it")
        print(f"the page is at http://{host}:{opened.getsockname()[1]}/{query}  (Ctrl-C ends it)", flush=True)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, ws="none")
        )
        app.state.page.ending = lambda: server.should_exit
        server.run(sockets=[opened])
