"""Who may come to the web page at all."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dragdiff.config import UIConfig
from dragdiff.ui.connections import BODY_SECONDS

ASKS_FOR_TOKEN = Path(__file__).parent / "static" / "token.html"
HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?", re.ASCII)
TOKEN = "dragdiff_token"  # its cookie
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"


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

        deadline = asyncio.get_running_loop().time() + BODY_SECONDS

        async def receive_in_time() -> Message:
            try:
                async with asyncio.timeout_at(deadline):
                    return await receive()
            except TimeoutError:
                return {"type": "http.disconnect"}

        refusal = self._refusal(Request(scope))
        # a stream listens as long as it lasts for its visitor to go
        await (refusal or self.app)(scope, receive_in_time if scope["method"] == "POST" else receive, answer)

    def _refusal(self, request: Request) -> Response | None:
        headers = Headers(scope=request.scope)
        host = headers.get("host", "")
        named = HOST.fullmatch(host)
        if named is None:
            return JSONResponse({"error": "the Host header must be a name, or a name and a port"}, 400)
        if self.loopback and not is_loopback(named["name"].strip("[]").lower()):  # DNS rebinding
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
        return FileResponse(ASKS_FOR_TOKEN, 401)


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode("utf-8", "replace"))
