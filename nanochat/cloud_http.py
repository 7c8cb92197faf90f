"""
One careful HTTP client for everything that rents machines: what may be asked again is asked again, and nothing else.

A failed request is one of five things, and each wants another reaction:

    CloudError                    a UserError: one line with the code, the message, the cure
    ├── Refused                   key, account, parameters, quota: asking again changes nothing
    ├── Missing                   404: that instance, key or path does not exist
    ├── NoCapacity                nobody has such a machine free now; another region, or later
    ├── Unavailable               429, 5xx, provider/*, no connection: asked again with growing waits
    └── Ambiguous                 the request left and no answer came: it may have been done

The last is why a launch is never simply repeated: the machine may be running and cost money. `Client.call` repeats
what may be repeated without harm, and `once=True` is for the one request that may not.

The transport is a function, so that tests put a fake behind it; `requests` is imported by the real one alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanochat.common import UserError


class CloudError(UserError):
    """A provider did not do what was asked; `code` is its own word for it, or the HTTP status."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class Refused(CloudError):
    """Key, account, parameters or quota: the same request will be refused again."""


class Missing(CloudError):
    """What the request names does not exist."""


class NoCapacity(CloudError):
    """No such machine is free."""


class Unavailable(CloudError):
    """A failure that may pass by itself; `seconds` is how long the server asks to be left alone."""

    def __init__(self, message: str, code: str = "", seconds: float = 0.0, *, reached: bool = True) -> None:
        super().__init__(message, code)
        self.seconds, self.reached = seconds, reached


class Ambiguous(CloudError):
    """The request left and no answer came."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered."""

    status: int
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        """The body as JSON, or None where it is none."""
        try:
            return json.loads(self.text)
        except ValueError:
            return None


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent. Its headers hold the key: never print one."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: Any
    seconds: float
    """patience with the connection and with each byte of the answer"""


class NotSent(Exception):
    """The transport could not connect: the request never left."""


class NoAnswer(Exception):
    """The request left, or may have left, and no answer came."""


Transport = Callable[[Request], Reply]
Classify = Callable[[Reply], CloudError]


class Clock(Protocol):
    """Time, so that tests need not wait for it. The module `time` is one."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...


REAL_CLOCK: Clock = time


def requests_transport(request: Request) -> Reply:
    """Send with `requests`. Redirects are not followed: the key belongs to one host."""
    import requests

    try:
        reply = requests.request(
            request.method, request.url, headers=dict(request.headers), json=request.body,
            timeout=request.seconds, allow_redirects=False,
        )  # fmt: skip
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
        raise UserError(f"{request.url} is not an address ({type(error).__name__}); correct it") from None
    except (requests.exceptions.ConnectTimeout, requests.exceptions.SSLError) as error:
        raise NotSent(type(error).__name__) from None
    except requests.exceptions.ConnectionError as error:
        # "connection refused" and "name not known" come before a byte has left; a reset in the middle does not.
        raise (
            NotSent if "NewConnectionError" in repr(error) or "NameResolution" in repr(error) else NoAnswer
        )(type(error).__name__) from None
    except requests.exceptions.RequestException as error:
        raise NoAnswer(type(error).__name__) from None
    return Reply(reply.status_code, reply.text, dict(reply.headers))


@dataclass(frozen=True, slots=True)
class Patience:
    """How often and how long a request is repeated."""

    attempts: int = 6
    first_wait_seconds: float = 2.0
    longest_wait_seconds: float = 60.0
    request_seconds: float = 60.0

    def wait_seconds(self, attempt: int, asked: float = 0.0) -> float:
        """Twice as long each time, or what the server asks for, within bounds."""
        return min(max(self.first_wait_seconds * 2 ** (attempt - 1), asked), self.longest_wait_seconds)


PATIENCE = Patience()


class Client:
    """Speaks JSON to one provider, never faster than it allows."""

    def __init__(
        self,
        base_url: str,
        key: str,
        *,
        classify: Classify,
        transport: Transport = requests_transport,
        clock: Clock = REAL_CLOCK,
        patience: Patience = PATIENCE,
        seconds_between: float = 1.0,
    ) -> None:
        if not base_url.startswith(("https://", "http://127.0.0.1:", "http://localhost:")):
            raise UserError(f"{base_url}: the key is only ever sent over https; correct the address")
        self.base_url, self.clock, self.patience = base_url.rstrip("/"), clock, patience
        self._headers = {"Authorization": f"Bearer {key}", "Accept": "application/json"}
        self._classify, self._transport = classify, transport
        self._seconds_between = seconds_between
        self._not_before = float("-inf")

    def call(self, method: str, path: str, body: Any = None, *, once: bool = False) -> Any:
        """
        The JSON that `method path` answers with.

        What is Unavailable or without an answer is repeated. With `once` a request that may have been done is not:
        no answer raises Ambiguous, a 5xx Unavailable with `reached` set, and only what cannot have been done (no
        connection, 429) is repeated here.
        """
        for attempt in range(1, self.patience.attempts + 1):
            try:
                return self._try(method, path, body)
            except (Unavailable, Ambiguous) as error:
                done_perhaps = isinstance(error, Ambiguous) or error.reached
                if (once and done_perhaps) or attempt == self.patience.attempts:
                    raise
                asked = error.seconds if isinstance(error, Unavailable) else 0.0
                self.clock.sleep(self.patience.wait_seconds(attempt, asked))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _try(self, method: str, path: str, body: Any) -> Any:
        self._keep_pace()
        url = f"{self.base_url}{path}"
        try:
            reply = self._transport(Request(method, url, self._headers, body, self.patience.request_seconds))
        except NotSent as error:
            raise Unavailable(f"{url}: no connection ({error}); check the network", reached=False) from None
        except NoAnswer as error:
            raise Ambiguous(f"{url}: the request left and no answer came ({error})") from None
        if reply.status == 429:
            asked = reply.headers.get("Retry-After", "")
            seconds = float(asked) if asked.isdigit() else 10.0
            raise Unavailable(f"{url}: too many requests (429)", "429", seconds, reached=False)
        if 200 <= reply.status < 300:
            value = reply.json()
            if value is None:
                raise Ambiguous(f"{url}: the answer {reply.status} is not JSON: {reply.text[:80]!r}")
            return value
        raise self._classify(reply)

    def _keep_pace(self) -> None:
        """Wait until the provider's limit allows the next request."""
        wait = self._not_before - self.clock.monotonic()
        if wait > 0:
            self.clock.sleep(wait)
        self._not_before = self.clock.monotonic() + self._seconds_between


def dollars(cents: int) -> str:
    """Cents as dollars: 149 is $1.49."""
    return f"${cents / 100:,.2f}"


def cents(amount: float, flag: str) -> int:
    """Dollars that a user typed as integer cents."""
    if not 0 <= amount < 1e6:
        raise UserError(
            f"{flag}={amount:g}: a price is a number and not negative; write dollars per hour, such as {flag}=3.50"
        )
    return round(amount * 100)
