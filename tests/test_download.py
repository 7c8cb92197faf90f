"""Downloads from a server that misbehaves: whatever it does, nothing half-written is left and the reason is named."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from shard_files import documents, parquet_bytes

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import Patience, download, fetch_bytes, fetch_file, parquet_fault, reachable
from nanochat.shards import ShardTexts, open_shards

QUICK = Patience(
    connect_seconds=60, read_seconds=60, attempts=4, first_wait_seconds=0.01, longest_wait_seconds=0.05
)
# For servers that stall. On a crowded machine one that does not may seem to, so it is asked more often than it stalls.
BRIEF = replace(QUICK, read_seconds=0.3, attempts=20)


class Server(ThreadingHTTPServer):
    """Serves `files`; `faults[name]` lists what goes wrong, one entry per request, before all is well."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.requests[name] += 1
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else ""
        data = self.server.files.get(name)
        self.close_connection = True
        if fault.isdigit() or data is None:
            self._head(int(fault or 404), {"Content-Length": "0", "Retry-After": "1"})
        elif fault == "hang up":
            pass
        elif fault == "half a header":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")
        elif fault == "stall before headers":
            self.server.over.wait(60)
        elif fault == "html":
            self._head(200, {"Content-Length": "19"})
            self.wfile.write(b"<html>hello</html>\n")
        elif fault == "no length, cut":
            self._head(200, {})
            self.wfile.write(data[: len(data) // 2])
        else:
            self._head(200, {"Content-Length": str(len(data) + 50 * (fault == "says more"))})
            self._body(data, fault)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _body(self, data: bytes, fault: str) -> None:
        cut = {"cut at first byte": 0, "cut in the middle": len(data) // 2, "cut at the end": len(data) - 1}
        self.wfile.write(data[: cut.get(fault, len(data) // 2 if fault == "stall" else len(data))])
        if fault == "stall":
            self.wfile.flush()
            self.server.over.wait(60)


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield served
    served.over.set()
    served.shutdown()
    served.server_close()


FAULTS = [
    "429",
    "500",
    "503",
    "hang up",
    "half a header",
    "stall before headers",
    "stall",
    "cut at first byte",
    "cut in the middle",
    "cut at the end",
    "says more",
    "html",
    "no length, cut",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_survived_and_leaves_the_right_bytes(
    fault: str, server: Server, tmp_path: Path
) -> None:
    data = parquet_bytes(documents(0, 500))
    server.files["a.parquet"] = data
    server.faults["a.parquet"] = [fault, fault]
    stalls = "stall" in fault
    fetch_file(
        f"{server.url}/a.parquet",
        tmp_path / "a.parquet",
        check=parquet_fault,
        patience=BRIEF if stalls else QUICK,
    )
    assert (tmp_path / "a.parquet").read_bytes() == data
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]
    assert server.requests["a.parquet"] == 3 or (stalls and server.requests["a.parquet"] > 3)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_ends_in_one_line_and_leaves_nothing(
    fault: str, server: Server, tmp_path: Path
) -> None:
    server.files["a.parquet"] = parquet_bytes(documents(0))
    server.faults["a.parquet"] = [fault] * 10
    with pytest.raises(UserError, match=r"a\.parquet: .*, 2 times; run the same command again"):
        fetch_file(
            f"{server.url}/a.parquet",
            tmp_path / "a.parquet",
            check=parquet_fault,
            patience=replace(BRIEF if "stall" in fault else QUICK, attempts=2),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", ["401", "403", "404", "410"])
def test_a_refusal_is_not_asked_again(status: str, server: Server, tmp_path: Path) -> None:
    server.faults["a"] = [status] * 10
    with pytest.raises(UserError, match=f"answers {status}; check the address"):
        fetch_file(f"{server.url}/a", tmp_path / "a", check=lambda path: None, patience=QUICK)
    assert server.requests["a"] == 1 and not list(tmp_path.iterdir())


def test_what_opens_an_address_stands_in_no_message(server: Server, tmp_path: Path) -> None:
    server.faults["a?signature=marked"] = ["404"]
    address = server.url.replace("http://", "http://user:marked@") + "/a?signature=marked"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/a: the server answers 404") as error:
        fetch_file(address, tmp_path / "a", check=lambda path: None, patience=QUICK)
    assert "marked" not in str(error.value)


def test_an_address_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an address"):
        fetch_file("nonsense", tmp_path / "a", check=lambda path: None, patience=QUICK)


def test_waiting_doubles_obeys_the_server_and_has_an_end() -> None:
    patience = Patience(first_wait_seconds=1, longest_wait_seconds=60)
    assert [patience.wait_seconds(n, None) for n in (1, 2, 3)] == [1, 2, 4]
    assert patience.wait_seconds(1, "7") == 7
    assert patience.wait_seconds(1, "9999") == 60
    assert patience.wait_seconds(1, "Wed, 21 Oct 2015 07:28:00 GMT") == 1


def serve_shards(server: Server, train: int, last: int) -> None:
    for shard in (*range(train), last):
        server.files[f"shard_{shard:05d}.parquet"] = parquet_bytes(documents(shard))


def test_download_brings_what_is_missing_and_the_validation_shard(server: Server, tmp_path: Path) -> None:
    serve_shards(server, 4, 9)
    server.faults["shard_00001.parquet"] = ["503", "cut in the middle"]

    def bring(count: int) -> int:
        return download(count, directory=tmp_path, base_url=server.url + "/", last_shard=9, patience=QUICK)

    assert bring(2) == 3
    assert bring(2) == 0
    assert bring(4) == 2
    assert server.requests["shard_00000.parquet"] == 1
    shards = open_shards(tmp_path)
    assert len(shards.train) == 4 and shards.validation.path.name == "shard_00009.parquet"


def test_a_shard_that_was_torn_on_disk_is_fetched_again(server: Server, tmp_path: Path) -> None:
    serve_shards(server, 1, 9)
    (tmp_path / "shard_00000.parquet").write_bytes(server.files["shard_00000.parquet"][:-3])
    assert download(1, directory=tmp_path, base_url=server.url, last_shard=9, patience=QUICK) == 2
    assert parquet_fault(tmp_path / "shard_00000.parquet") is None


def test_one_failing_shard_does_not_stop_the_others_and_is_named(server: Server, tmp_path: Path) -> None:
    serve_shards(server, 3, 9)
    del server.files["shard_00001.parquet"]
    with pytest.raises(UserError, match=r"1 of 4 shards could not be fetched \(shard_00001\.parquet"):
        download(3, directory=tmp_path, base_url=server.url, last_shard=9, patience=QUICK)
    assert len(list(tmp_path.glob("*.parquet"))) == 3


def test_old_parts_of_killed_downloads_are_swept(server: Server, tmp_path: Path) -> None:
    import os

    serve_shards(server, 1, 9)
    old, young = tmp_path / ".shard_00000.parquet.1-1.part", tmp_path / ".shard_00000.parquet.2-2.part"
    for part in (old, young):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    download(1, directory=tmp_path, base_url=server.url, last_shard=9, patience=QUICK)
    assert not old.exists() and young.exists()


def test_a_number_of_shards_out_of_range_is_refused(tmp_path: Path) -> None:
    for count in (0, 10):
        with pytest.raises(UserError, match="1 to 9 training shards"):
            download(count, directory=tmp_path, base_url="http://127.0.0.1:9", last_shard=9)


def test_that_nobody_answers_is_found_out_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_time_to_wait(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s for a host where nobody answers")

    monkeypatch.setattr(time, "sleep", no_time_to_wait)
    with socket.socket() as taken:  # bound, so that nobody else is there, and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="nobody answers there"):
            download(1, directory=tmp_path, base_url=url, last_shard=9)
        with pytest.raises(UserError, match="nobody answers there"):
            fetch_bytes(url + "/file")


def test_a_name_server_that_stalls_does_not_hold_us_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def stalls(*args: object, **kwargs: object) -> None:
        answer.wait(60)
        raise OSError("no such host")

    monkeypatch.setattr(socket, "create_connection", stalls)
    assert not reachable("https://stalling.invalid", seconds=0.1)
    assert not answer.is_set(), "it was not waited for"
    answer.set()


def test_a_proxy_is_asked_instead_of_the_host(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    assert reachable("https://behind-the-proxy.invalid", seconds=60)


def test_small_files_are_fetched_whole(server: Server) -> None:
    server.files["rows.json"] = b"x" * 100_000
    server.faults["rows.json"] = ["cut in the middle"]
    assert fetch_bytes(f"{server.url}/rows.json", patience=QUICK) == b"x" * 100_000


def test_the_command_line_names_corpus_and_environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nanochat.config import cli

    serve_shards(server, 2, dataset.PUBLISHED["climbmix"].last_shard)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_URL", server.url)
    dataset.main(cli(dataset.Config, ["-n", "2", "-w", "2", "--corpus=climbmix"]))
    assert "2 training shards, validation shard_06542.parquet" in capsys.readouterr().out
    assert isinstance(ShardTexts(open_shards(tmp_path / "base_data").train)[0], str)
