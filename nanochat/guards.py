"""
What stands before the routes: who may ask, from where, and how much may be sent. Plain ASGI, nothing of the model.

A server on 127.0.0.1 is not private by itself: any web page that the owner visits may send requests to it, and one that
rebinds its own host name to 127.0.0.1 may read the answers. So a request with another page's Origin is refused, and a
server bound to a loopback address answers to loopback names only.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError

MAX_BODY_BYTES, BODY_SECONDS = 1_000_000, 10.0
OPEN_PATHS = ("/", "/health", "/favicon.ico")  # no key needed: nothing of the model, nothing of its users

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    api_key: str = ""
    """bearer key; empty: none is asked for"""
    host: str = "127.0.0.1"
    """the address that the server is bound to"""
    origins: tuple[str, ...] = ()
    """other pages that may ask, such as https://example.org"""
    body_seconds: float = BODY_SECONDS

    @property
    def local(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own and reachable from it alone."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, api_key: str, *, insecure: bool) -> None:
    """Raises UserError for a public interface without a key."""
    if not is_loopback(host) and not api_key and not insecure:
        raise UserError(
            f"--host={host} lets others in and NANOCHAT_API_KEY is not set: set it, use --host=127.0.0.1, or --insecure"
        )


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape. What came from a client may hold half a surrogate pair, which JSON cannot."""
    clean = message.encode("utf-8", errors="replace").decode()
    if param is not None:
        param = param.encode("utf-8", errors="replace").decode()
    return {"error": {"message": clean, "type": kind, "param": param, "code": code}}


def deepest_error(errors: Sequence[Any]) -> tuple[str, str, str]:
    """
    (field, what is wrong, pydantic's code) of the first error. Where a field may be one of several things, pydantic says
    of each why it is not that one: the reason that lies deepest is of the one that was meant.
    """

    def field(error: Any) -> list[str]:
        """`messages, 0, content`, without the names of a union's branches, such as `list[constrained-str]`."""
        parts = error["loc"][error["loc"][:1] == ("body",) :]
        if (
            error["type"] == "extra_forbidden"
        ):  # the last part is the client's own word, whatever it looks like
            return [*kept(parts[:-1]), str(parts[-1])]
        return kept(parts)

    def kept(parts: Sequence[int | str]) -> list[str]:
        return [str(part) for part in parts if isinstance(part, int) or part.isidentifier()]

    begins = field(errors[0])
    near = [error for error in errors if field(error)[: len(begins)] == begins]
    meant = max(near, key=lambda error: len(field(error)))
    told = dict.fromkeys(
        str(error["msg"]).removeprefix("Value error, ") for error in near if field(error) == field(meant)
    )
    return ".".join(field(meant)), "; or ".join(told), str(meant["type"])


class Refused(Exception):
    """A request that does not reach the routes."""

    def __init__(self, status: int, message: str, code: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class Guard:
    """The app behind it sees only requests that are allowed and whole."""

    def __init__(self, app: App, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            self._admit(scope, headers)
            body = await self._body(headers, receive)
        except Refused as refused:
            return await _refuse(refused, send)
        except ConnectionResetError:
            return None
        await self.app(scope, _replay(body, receive), send)

    def _admit(self, scope: Scope, headers: dict[str, str]) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.access.local and not is_loopback(_name_of(host)):
            raise Refused(403, "this server answers to localhost only", "host_not_allowed")
        if origin is not None and origin not in self.access.origins and origin.partition("://")[2] != host:
            raise Refused(403, "pages of other origins may not ask; see --allow_origin", "origin_not_allowed")
        asking = scope["method"] == "OPTIONS" and origin is not None  # a browser's preflight carries no key
        if self.access.api_key and scope["path"] not in OPEN_PATHS and not asking:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(key.strip().encode("latin-1"), self.access.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                raise Refused(
                    401,
                    "a key is needed: Authorization: Bearer KEY",
                    "invalid_api_key",
                    **{"www-authenticate": "Bearer"},
                )

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body, within bounds of size and time."""
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            raise Refused(
                413, f"a request may have {MAX_BODY_BYTES:,} bytes", "body_too_large", connection="close"
            )
        try:
            return await asyncio.wait_for(_read(receive), self.access.body_seconds)
        except asyncio.TimeoutError:
            raise Refused(
                408,
                f"the body did not come within {self.access.body_seconds:g} s",
                "body_too_slow",
                connection="close",
            ) from None


def _name_of(host: str) -> str:
    """`localhost:8000` and `[::1]:8000` without the port."""
    return host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise Refused(
                413, f"a request may have {MAX_BODY_BYTES:,} bytes", "body_too_large", connection="close"
            )
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand over the body once; after it, what really comes (that the client left)."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(refused: Refused, send: Send) -> None:
    body = json.dumps(error_body(str(refused), code=refused.code)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
