"""The web page's server."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from dragdiff.config import UIConfig
from dragdiff.errors import UserError
from dragdiff.ui.connections import Connection, Quiet
from dragdiff.ui.guard import Guard, is_loopback
from dragdiff.ui.routes import Page


def make_app(settings: UIConfig, folder: Path) -> Starlette:
    """The server, for which `Page` has the routes.

    Args:
        folder: as of `Page`.

    Raises:
        UserError: as `Page`.
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
        routes=page.routes(),
        lifespan=life,
        exception_handlers={Exception: _unexpected, HTTPException: _refused, ClientDisconnect: _gone},
    )
    app.add_middleware(Guard, settings=settings)  # type: ignore[arg-type]
    app.state.page = page
    return app


async def _unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"the server made a mistake ({type(error).__name__}); its log says more"}, 500)


async def _gone(request: Request, error: Exception) -> Response:
    """The upload broke off, or took too long."""
    return JSONResponse({"error": "the upload did not arrive"}, 408, {"Connection": "close"})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


def serve(settings: UIConfig) -> None:
    """Run the page until Ctrl-C; open to other machines it has a token, which is made up where none is set.

    Raises:
        UserError: nothing can be had at its host and port, or as `make_app`.
    """
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
            uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_graceful_shutdown=1, ws="none", http=Connection
            )
        )
        for name in ("asyncio", "uvicorn.error"):
            logging.getLogger(name).addFilter(Quiet())
        app.state.page.ending = lambda: server.should_exit
        server.run(sockets=[opened])
