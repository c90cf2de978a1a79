"""Connections to the page's server: how many there may be, how long one may say nothing, and what the log keeps."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # from a connection's first byte, or its opening, to the end of a request's header
BODY_SECONDS = 120.0  # from there to the end of the body
MOST = 500
QUIET_SECONDS = 60.0  # in which the log has the same line once


class Connection(H11Protocol):
    """A connection that is closed where no request comes; the longest without one makes room for a new one."""

    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Wait for its first request."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            idle = [other for other in self.connections if getattr(other, "waiting", None) and other is not self]
            (min(idle, key=lambda other: other.waiting.when()) if idle else self).transport.abort()  # type: ignore[union-attr]
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Wait on, where that was less than a request's header."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self.waiting is None:
            self.waiting = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None


def most_connections() -> int:
    """Half of the files that this process may have open: what it reads and writes needs the others."""
    try:
        import resource
    except ImportError:  # Windows
        return MOST
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if allowed == resource.RLIM_INFINITY else max(1, min(MOST, allowed // 2))


class Quiet(logging.Filter):
    """Leaves out a line that was logged a moment ago: strangers can't fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is logged."""
        now, key = time.monotonic(), record.msg
        if now - self._said.get(key, -QUIET_SECONDS) < QUIET_SECONDS:
            return False
        if len(self._said) > 100:
            self._said.clear()
        self._said[key] = now
        return True
