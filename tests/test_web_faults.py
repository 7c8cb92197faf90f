"""Clients that vanish, dawdle, send rubbish or too much; a line that is full; and the API held to its own description."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanochat.guards import MAX_BODY_BYTES, Access
from nanochat.listening import PatientProtocol
from tests.talking import endless_model, make_host, serving

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(make_host(), Access(body_seconds=1.0)) as address:
        yield address


@pytest.fixture
def endless() -> Iterator[str]:
    """A server with two rows, of a model that has forgotten how to stop, and room for three in line."""
    with serving(make_host(model=endless_model(pause=0.02), max_rows=2, max_waiting=3)) as address:
        yield address


def worker(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/stats").json()["workers"][0]


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to pass in thirty seconds")


def raw(url: str, data: bytes, *, seconds: float = 10.0) -> bytes:
    """What the server answers to these bytes."""
    address = url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=seconds) as connection:
        connection.sendall(data)
        got = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while more := connection.recv(65536):
                got += more
        return got


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# --- clients that vanish ---------------------------------------------------------------------------------------------


def test_who_leaves_in_the_middle_of_a_stream_or_a_reply_frees_the_rows(url: str) -> None:
    known = worker(url)["cancelled"]
    ask = {**HELLO, "temperature": 2.0, "top_k": 0, "n": 8, "max_tokens": 250, "seed": 5}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ask, "stream": True}) as reply:
        next(reply.iter_lines())
    wait_until(lambda: worker(url)["rows"] == 0)
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=ask, timeout=httpx.Timeout(10, read=0.1))
    wait_until(lambda: worker(url)["rows"] == 0)
    told = worker(url)
    assert told["cancelled"] - known >= 1 and told["waiting"] == 0 and told["failed"] == 0


def test_who_leaves_the_line_is_not_served(endless: str) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            reply = stack.enter_context(
                httpx.stream(
                    "POST", f"{endless}/v1/chat/completions", json={**HELLO, "stream": True, "temperature": 1}
                )
            )
            next(reply.iter_lines())
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{endless}/v1/chat/completions", json=HELLO, timeout=httpx.Timeout(10, read=0.05))
        wait_until(lambda: worker(endless)["waiting"] == 0)
    wait_until(lambda: worker(endless)["rows"] == 0)


# --- a full line and a busy engine -----------------------------------------------------------------------------------


def test_a_full_line_is_429_with_the_time_to_come_again_and_health_answers_meanwhile(endless: str) -> None:
    statuses: list[int] = []
    retry: list[str] = []

    def ask() -> None:
        body = {**HELLO, "n": 2, "max_tokens": 40, "temperature": 1.0}
        reply = httpx.post(f"{endless}/v1/chat/completions", json=body, timeout=120)
        statuses.append(reply.status_code)
        if reply.status_code == 429:
            retry.append(reply.headers["retry-after"])
            assert reply.json()["error"]["type"] == "rate_limit_error"

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    wait_until(lambda: 429 in statuses)
    assert httpx.get(f"{endless}/health").json()["ready"]
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429} and len(statuses) == 12
    assert statuses.count(200) >= 3
    assert all(1 <= int(seconds) <= 60 for seconds in retry)


# --- rubbish, too much, too slow -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x00\xff\x16\x03\x01 rubbish\r\n\r\n", b"400"),
        (post("/v1/chat/completions", b"{]", "Content-Length: 2", "Connection: close"), b"400"),
        (post("/v1/chat/completions", b"\xff\xfe\x00", "Content-Length: 3", "Connection: close"), b"400"),
        (post("/v1/chat/completions", b"[" * 90_000, "Content-Length: 90000", "Connection: close"), b"400"),
        (post("/chat/completions", b"7", "Content-Length: 1", "Connection: close"), b"400"),
        (post("/v1/completions", b"", f"Content-Length: {MAX_BODY_BYTES + 1}", "Connection: close"), b"413"),
        (
            post(
                "/v1/completions", (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 20, "Transfer-Encoding: chunked"
            ),
            b"413",
        ),
        (post("/v1/chat/completions", b'{"mess', "Content-Length: 100"), b"408"),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", b"4"),
    ],
    ids=[
        "no HTTP",
        "no JSON",
        "no UTF-8",
        "deep",
        "no object",
        "huge",
        "huge in chunks",
        "slow",
        "huge header",
    ],
)
def test_rubbish_is_refused_and_the_server_goes_on(url: str, data: bytes, status: bytes) -> None:
    try:
        got = raw(url, data)
    except ConnectionError:  # refused while we were still sending
        got = b"HTTP/1.1 " + status
    assert got.split(b" ", 2)[1].startswith(status), got[:200]
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_bytes_one_by_one_and_connections_that_say_nothing_hold_nobody_up(url: str) -> None:
    address = url.removeprefix("http://").split(":")
    idle = [socket.create_connection((address[0], int(address[1]))) for _ in range(50)]
    began = time.monotonic()
    assert httpx.post(f"{url}/v1/chat/completions", json=HELLO, timeout=30).status_code == 200
    assert time.monotonic() - began < 20
    for connection in idle:
        connection.close()


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_headers_that_do_not_come_end_the_connection(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.5)
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with serving(make_host()) as url:
        for before in (b"", whole):  # the second request of a connection is no other than the first
            if before and not sent:
                continue  # one that waits between two requests is kept for longer
            began = time.monotonic()
            got = raw(url, before + sent)
            # After a whole request the patience is uvicorn's, five seconds, until another byte comes.
            assert 0.4 < time.monotonic() - began < (8 if before else 4)
            assert got.count(b"HTTP/1.1 200") == bool(before)


def test_an_answer_may_take_longer_than_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.3)
    with serving(make_host(model=endless_model(pause=0.1))) as url:
        reply = httpx.post(f"{url}/v1/chat/completions", json={**HELLO, "max_tokens": 12}, timeout=30)
        assert reply.json()["usage"]["completion_tokens"] == 12


def test_no_word_of_a_conversation_is_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    secret = "xylophone"
    with serving(make_host()) as url:
        asked = {"messages": [{"role": "user", "content": secret}]}
        for path in ("/v1/chat/completions", "/chat/completions", "/chat/vote"):
            httpx.post(f"{url}{path}", json=asked, timeout=60)
            httpx.post(f"{url}{path}", json=asked | {"temperature": secret})
        httpx.post(f"{url}/v1/completions", json={"prompt": secret}, timeout=60)
        raw(
            url,
            post("/v1/chat/completions", json.dumps(asked).encode()[:-9], "Content-Length: 500"),
            seconds=0.2,
        )
    written = capfd.readouterr()
    assert secret not in written.out + written.err + caplog.text


# --- the API's own description ---------------------------------------------------------------------------------------

# What JSON Schema cannot say (turns alternate, a prompt fits the context) is a 400 to a request that fits the schema.
SCHEMATHESIS = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "429"]
"""


@pytest.mark.slow
def test_schemathesis_finds_nothing(url: str, tmp_path: Path) -> None:
    """It makes requests up from the app's own OpenAPI, right and wrong ones, and looks at every answer."""
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    words = ["--config-file", str(tmp_path / "schemathesis.toml"), "run", f"{url}/openapi.json"]
    words += [
        "--phases=examples,coverage,fuzzing",
        "--max-examples=12",
        "--seed=1",
        "--generation-database=none",
    ]
    words += ["--request-timeout=60", "--no-color"]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *words],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "POST /v1/chat/completions" in done.stdout or "operations" in done.stdout.lower()
