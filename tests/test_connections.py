"""Connections to the page's server that say nothing, too little, or break off."""

from __future__ import annotations

import logging
import socket
import threading
import time

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from dragdiff.config import UIConfig
from dragdiff.ui import connections, guard
from dragdiff.ui.app import _gone, _unexpected
from dragdiff.ui.connections import Connection, Quiet

GET = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n"


@pytest.fixture
def port(monkeypatch):
    """Of a server that answers a request with its body's length; its limits are short."""
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr(guard, "BODY_SECONDS", 1.0)
    monkeypatch.setattr(connections, "most_connections", lambda: 10)

    async def length(request: Request) -> Response:
        return Response(str(len(await request.body())))

    handlers = {Exception: _unexpected, ClientDisconnect: _gone}
    app = Starlette(routes=[Route("/", length, methods=["GET", "POST"])], exception_handlers=handlers)
    app.add_middleware(guard.Guard, settings=UIConfig())
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", http=Connection, timeout_graceful_shutdown=1))
    opened = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
    thread.start()
    yield opened.getsockname()[1]
    server.should_exit = True
    thread.join(20)
    opened.close()


def connected(port: int, said: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(said)
    return connection


def answer(connection: socket.socket) -> bytes:
    """All until the server closes, or the answer to a whole request."""
    said = b""
    try:
        while chunk := connection.recv(65536):
            said += chunk
            if b" 200 " in said and b"\r\n\r\n" in said:
                break
    except ConnectionResetError:
        pass
    return said


@pytest.mark.parametrize("said", [b"", GET[:20], GET + GET[:20]])
def test_a_connection_without_a_whole_header_is_closed(port, said):
    connection = connected(port, said)
    if said.startswith(GET):
        assert b" 200 " in answer(connection)
    assert b" 200 " not in answer(connection)


def test_half_a_body_is_answered_and_closed(port, capfd):
    said = answer(connected(port, POST + b"half"))
    assert b" 408 " in said and b"did not arrive" in said
    connected(port, POST + b"half").close()  # an upload that breaks off
    time.sleep(1.5)
    assert b" 200 " in answer(connected(port, POST + b"123456789"))
    assert capfd.readouterr().err == ""


def test_silent_connections_lock_nobody_out(port):
    silent = [connected(port) for _ in range(40)]
    assert b" 200 " in answer(connected(port, GET))
    for connection in silent:
        connection.close()


def test_the_log_has_a_line_once_in_a_while(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    quiet = Quiet()
    line, other = (logging.makeLogRecord({"msg": text}) for text in ("no more files", "another"))
    assert [quiet.filter(line), quiet.filter(line), quiet.filter(other)] == [True, False, True]
    now[0] = 61.0
    assert quiet.filter(line)


def test_there_are_fewer_connections_than_files():
    import resource

    assert 1 <= connections.most_connections() <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
