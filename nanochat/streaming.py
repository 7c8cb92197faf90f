"""
Answers as HTTP responses: server-sent events that end when the client leaves, and whole replies that do so too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nanochat.answering import ModelFailed, Ticket
from nanochat.guards import error_body

Result = TypeVar("Result")


class ClientLeft(Exception):
    """Nobody waits for the reply."""


def event(data: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of a ticket, which is closed however the stream ends: done, failed, or nobody listens."""

    def __init__(self, events: AsyncIterator[str], ticket: Ticket) -> None:
        super().__init__(
            _to_the_end(events),
            media_type="text/event-stream",
            headers={
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            },  # no proxy may gather what streams
        )
        self.ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.ticket.close()


async def _to_the_end(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events; an error in the middle is an event too, since the status has long been sent."""
    try:
        async for text in events:
            yield text
    except ModelFailed as error:
        yield event(error_body(str(error), kind="server_error", code="model_failed"))


async def while_listening(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. Raises ClientLeft, and stops the work, when the client goes first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # the body is read: what comes now is the disconnect
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
