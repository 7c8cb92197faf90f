"""Clients that vanish, dawdle, send rubbish or too much; a line that is full; and the API held to its own description."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.guards import MAX_BODY_BYTES, Access
from nanochat.listening import PatientProtocol
from tests.talking import PATIENCE, endless_model, http, make_host, serving, small_talk, wait_until

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(make_host()) as address:
        yield address


@pytest.fixture(scope="module")
def hasty() -> Iterator[str]:
    """A server that waits a second for a body."""
    with serving(make_host(), Access(body_seconds=1.0)) as address:
        yield address


@pytest.fixture
def endless() -> Iterator[str]:
    """A server with two rows and room for three in line, of a model that takes thirteen seconds for an answer."""
    with serving(make_host(model=endless_model(pause=0.1), max_rows=2, max_waiting=3)) as address:
        yield address


def worker(url: str) -> dict[str, Any]:
    return http.get(f"{url}/stats").json()["workers"][0]


def connect(url: str) -> socket.socket:
    address = url.removeprefix("http://").split(":")
    return socket.create_connection((address[0], int(address[1])), timeout=PATIENCE)


def raw(url: str, data: bytes) -> bytes:
    """What the server answers to these bytes until it closes the connection; TimeoutError where it never does."""
    with connect(url) as connection:
        connection.sendall(data)
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while more := connection.recv(65536):
                got += more
        return got


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += ["Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# --- clients that vanish ---------------------------------------------------------------------------------------------


def begin(url: str, **more: Any) -> socket.socket:
    """A connection on which a chat completion was asked for."""
    body = json.dumps({**HELLO, "temperature": 1.0, **more}).encode()
    connection = connect(url)
    connection.sendall(post("/v1/chat/completions", body, f"Content-Length: {len(body)}"))
    return connection


@pytest.mark.parametrize("stream", [True, False], ids=["a stream", "a reply"])
def test_who_leaves_in_the_middle_frees_the_rows(endless: str, stream: bool) -> None:
    with begin(endless, stream=stream, n=2):
        wait_until(lambda: worker(endless)["rows"] == 2)
    wait_until(lambda: worker(endless)["rows"] == 0)
    told = worker(endless)
    assert told["cancelled"] == 1 and told["waiting"] == told["failed"] == 0


def test_who_leaves_the_line_is_not_served(endless: str) -> None:
    with begin(endless, n=2):
        wait_until(lambda: worker(endless)["rows"] == 2)
        with begin(endless):
            wait_until(lambda: worker(endless)["waiting"] == 1)
        wait_until(lambda: worker(endless)["waiting"] == 0)
        told = worker(endless)
        assert told["cancelled"] == 1 and told["rows"] == 2, "it left while the others were being served"
    wait_until(lambda: worker(endless)["rows"] == 0)


# --- a full line and a busy engine -----------------------------------------------------------------------------------


def test_a_full_line_is_429_with_the_time_to_come_again_and_health_answers_meanwhile() -> None:
    gate = threading.Event()  # nobody is served before everybody has asked
    statuses: list[int] = []
    retry: list[str] = []

    def ask() -> None:
        body = {**HELLO, "n": 2, "max_tokens": 4, "temperature": 1.0}
        reply = http.post(f"{url}/v1/chat/completions", json=body)
        statuses.append(reply.status_code)
        if reply.status_code == 429:
            retry.append(reply.headers["retry-after"])
            assert reply.json()["error"]["type"] == "rate_limit_error"

    threads = [threading.Thread(target=ask) for _ in range(12)]
    with serving(make_host(model=endless_model(gate=gate), max_rows=2, max_waiting=3)) as url:
        for thread in threads:
            thread.start()
        wait_until(lambda: statuses.count(429) >= 8)
        assert http.get(f"{url}/health").json()["ready"]
        gate.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200, 429} and len(statuses) == 12
    assert 3 <= statuses.count(200) <= 4, "two rows are one of them, three wait"
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
        "huge header",
    ],
)
def test_rubbish_is_refused_and_the_server_goes_on(url: str, data: bytes, status: bytes) -> None:
    try:
        got = raw(url, data)
    except ConnectionError:  # refused while we were still sending
        got = b"HTTP/1.1 " + status
    assert got.split(b" ", 2)[1].startswith(status), got[:200]
    assert http.get(f"{url}/health").json()["status"] == "ok"


def test_a_body_that_does_not_come_is_refused(hasty: str) -> None:
    got = raw(hasty, post("/v1/chat/completions", b'{"mess', "Content-Length: 100"))
    assert got.split(b" ", 2)[1] == b"408" and b"within 1 s" in got


def test_connections_that_say_nothing_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 10 * PATIENCE)  # they stay for the whole test
    with serving(make_host()) as url, contextlib.ExitStack() as idle:
        for number in range(50):
            idle.enter_context(connect(url)).sendall(b"GET / HT"[: number % 9])
        assert http.post(f"{url}/v1/chat/completions", json=HELLO).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"])
def test_headers_that_do_not_come_end_the_connection(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 1.5)
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with serving(make_host(), timeout_keep_alive=2) as url:
        for before in (b"", whole):  # the second request of a connection is no other than the first
            if before and not sent:
                continue  # one that waits between two requests is kept for longer
            began = time.monotonic()
            got = raw(url, before + sent)  # which returns because the server hangs up
            assert time.monotonic() - began > 1.4
            assert got.count(b"HTTP/1.1 200") == bool(before)


def test_small_writes_are_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that waits for the client's word on the one before comes 40 ms late."""
    seen: list[int] = []
    watch = PatientProtocol._watch

    def look(self: PatientProtocol) -> None:
        seen.append(
            self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        )
        watch(self)

    monkeypatch.setattr(PatientProtocol, "_watch", look)
    with serving(make_host(model=small_talk())) as url:
        http.get(f"{url}/health")
    assert seen and all(seen)


def test_an_answer_may_take_longer_than_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 1.5)
    with serving(make_host(model=endless_model(pause=0.2))) as url:
        reply = http.post(f"{url}/v1/chat/completions", json={**HELLO, "max_tokens": 12})
        assert reply.json()["usage"]["completion_tokens"] == 12


def test_no_word_of_a_conversation_is_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    secret = "xylophone"
    with serving(make_host()) as url:
        asked = {"messages": [{"role": "user", "content": secret}]}
        for path in ("/v1/chat/completions", "/chat/completions", "/chat/vote"):
            http.post(f"{url}{path}", json=asked)
            http.post(f"{url}{path}", json=asked | {"temperature": secret})
        http.post(f"{url}/v1/completions", json={"prompt": secret})
        with connect(url) as connection:  # one that leaves in the middle of its words
            connection.sendall(
                post("/v1/chat/completions", json.dumps(asked).encode()[:-9], "Content-Length: 500")
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
def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    """It makes requests up from the app's own OpenAPI, right and wrong ones, and looks at every answer."""
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    words = ["--config-file", str(tmp_path / "schemathesis.toml"), "run"]
    words += [
        "--phases=examples,coverage,fuzzing",
        "--max-examples=12",
        "--seed=1",
        "--generation-database=none",
    ]
    words += ["--request-timeout=60", "--no-color"]
    with serving(make_host(model=small_talk())) as url:
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", *words, f"{url}/openapi.json"],
            capture_output=True,
            text=True,
            timeout=1800,
            cwd=tmp_path,
        )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "POST /v1/chat/completions" in done.stdout or "operations" in done.stdout.lower()
