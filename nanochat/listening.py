"""
How the server listens: uvicorn's settings, and the patience that uvicorn lacks.

uvicorn waits for the headers of a request for as long as the client likes, so a few thousand connections that send a byte a
minute take every file descriptor. Here a connection that has not brought its headers in time is closed. What comes after
the headers is guards.py's: the body has a time limit of its own.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.guards import App

HEADER_SECONDS = 10.0
MAX_HEADER_BYTES = 65_536


class PatientProtocol(H11Protocol):
    """HTTP/1.1 whose patience with the headers ends; a connection that waits between two requests is uvicorn's to close."""

    header_seconds = HEADER_SECONDS
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        # asyncio does this only to sockets that name TCP as their protocol, which an accepted one need not. Without it
        # each small write waits for the client's word on the one before, which may take 40 ms: a token late, every token.
        with suppress(OSError):  # not a TCP socket
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self.conn.trailing_data[0]:  # the beginning of a request
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.header_seconds, self.transport.close)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def server_settings(app: App, **more: Any) -> uvicorn.Config:
    """The server's settings. No access log: it would say who asked when. Errors are logged, without a conversation's words."""
    settings: dict[str, Any] = {
        "http": PatientProtocol, "log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 3,
        "server_header": False, "h11_max_incomplete_event_size": MAX_HEADER_BYTES,
    }  # fmt: skip
    return uvicorn.Config(app, **settings | more)
