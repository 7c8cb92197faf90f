"""
The network's half of the data: fetch pretraining shards, or any file, and never leave half a file behind.

    python -m nanochat.dataset -n 24        # 24 training shards and the last one, which is validation

Every file is written under a temporary name, checked (length against Content-Length, parquet's magic at both ends) and
renamed; what is there and whole is not fetched again, so an interrupted download is continued by the same command. The
validation shard is always the last of the published set: a run that later fetches more shards keeps its validation text,
where nanochat's October 2025 loader would train on it. That there is no network is found out in seconds.

Reading shards is nanochat/shards.py; its names are importable from here too.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal
from urllib.parse import urlsplit

from nanochat.common import UserError, base_dir, print0, progress
from nanochat.config import cli, flag
from nanochat.shards import Shards, ShardTexts, Texts, mixed_texts, open_shards, open_texts, texts

__all__ = ["Shards", "ShardTexts", "Texts", "mixed_texts", "open_shards", "open_texts", "texts"]

SHARD = "shard_{:05d}.parquet"


@dataclass(frozen=True, slots=True)
class Published:
    """A shuffled text corpus on the Hub, cut into shards."""

    url: str
    last_shard: int


PUBLISHED = {
    "fineweb-edu": Published(
        "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main", last_shard=1822
    ),
    "climbmix": Published(
        "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main", last_shard=6542
    ),
}
DEFAULT_CORPUS = "fineweb-edu"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a download waits for what."""

    connect_seconds: float = 5.0
    read_seconds: float = 30.0
    """without a single byte"""
    attempts: int = 6
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0

    def wait_seconds(self, attempt: int, retry_after: str | None) -> float:
        """Twice as long each time, or what the server asks for, within bounds."""
        wait = self.first_wait_seconds * 2 ** (attempt - 1)
        if retry_after and retry_after.isdigit():
            wait = max(wait, float(retry_after))
        return min(wait, self.longest_wait_seconds)


class _TryAgain(Exception):
    """A failure that may pass by itself."""

    def __init__(self, why: str, retry_after: str | None = None) -> None:
        super().__init__(why)
        self.retry_after = retry_after


# ---- is there a network? -------------------------------------------------------------------------------------------


def reachable(url: str, *, seconds: float = 4.0) -> bool:
    """Whether somebody answers at `url`'s host, or at the proxy that leads there. Asked once per process and host."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return _answers(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), seconds)


@functools.lru_cache(maxsize=64)
def _answers(host: str, port: int, seconds: float) -> bool:
    connected = threading.Event()

    def knock() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
        except OSError:
            return  # nobody there: the event stays unset
        connected.set()

    # A thread of its own, because a name server that does not answer is not bounded by the socket's timeout.
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(seconds)
    return connected.is_set()


# ---- one file ------------------------------------------------------------------------------------------------------


def shown(url: str) -> str:
    """An address for a message: without the user, password and query, which may be what opens it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def fetch_bytes(url: str, *, patience: Patience = Patience(attempts=3)) -> bytes:
    """The body at `url`, whole. Raises UserError, in seconds where there is no network."""
    if not reachable(url):
        raise UserError(f"{shown(url)}: nobody answers there; check the network, or bring the file yourself")
    buffer = io.BytesIO()
    _persist(lambda: _receive(url, buffer, patience), url, patience)
    return buffer.getvalue()


def fetch_file(
    url: str, path: Path, *, check: Callable[[Path], str | None], patience: Patience = Patience()
) -> None:
    """Bring `url` to `path`: beside it first, renamed when it is whole and `check` finds no fault with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.{os.getpid()}-{threading.get_ident()}.part"

    def attempt() -> None:
        with beside.open("wb") as file:
            _receive(url, file, patience)
            file.flush()
            os.fsync(file.fileno())
        if fault := check(beside):
            raise _TryAgain(fault)
        os.replace(beside, path)

    try:
        _persist(attempt, url, patience)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "the disk is full; free some space and run the same command again" if full else str(error)
        raise UserError(f"{path}: {cure}") from None
    finally:
        beside.unlink(missing_ok=True)


def _persist(attempt: Callable[[], None], url: str, patience: Patience) -> None:
    """Call `attempt` until it succeeds or patience ends."""
    for number in range(1, patience.attempts + 1):
        try:
            return attempt()
        except _TryAgain as error:
            if number == patience.attempts:
                raise UserError(
                    f"{shown(url)}: {error}, {number} times; run the same command again later"
                ) from None
            time.sleep(patience.wait_seconds(number, error.retry_after))


def _receive(url: str, file: IO[bytes], patience: Patience) -> None:
    """One attempt to bring the whole body of `url` into `file`, from its beginning."""
    import requests

    file.seek(0)
    file.truncate()
    timeout = (patience.connect_seconds, patience.read_seconds)
    try:
        # identity: a body that is compressed on the way has another length than it says
        reply = requests.get(url, stream=True, timeout=timeout, headers={"Accept-Encoding": "identity"})
        with closing(reply):
            _refuse_status(url, reply.status_code, reply.headers.get("Retry-After"))
            for chunk in reply.iter_content(chunk_size=1 << 20):
                file.write(chunk)
            said = reply.headers.get("Content-Length")
    except (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
    ):
        raise UserError(f"{shown(url)} is not an address; correct NANOCHAT_BASE_URL or --base_url") from None
    except requests.RequestException as error:
        raise _TryAgain(f"the connection failed ({type(error).__name__})") from None
    if said is not None and said.isdigit() and file.tell() != int(said):
        raise _TryAgain(f"{file.tell():,} bytes came of {int(said):,}")


def _refuse_status(url: str, status: int, retry_after: str | None) -> None:
    if status in (408, 425, 429) or status >= 500:
        raise _TryAgain(f"the server answers {status}", retry_after)
    if status != 200:
        raise UserError(
            f"{shown(url)}: the server answers {status}; check the address (NANOCHAT_BASE_URL, --base_url)"
        )


# ---- shards --------------------------------------------------------------------------------------------------------


def parquet_fault(path: Path) -> str | None:
    """What is wrong with a parquet file at first sight: both its ends must bear the magic word."""
    with path.open("rb") as file:
        begins, size = file.read(4), file.seek(0, 2)
        file.seek(max(0, size - 4))
        ends = file.read(4)
    return (
        None
        if begins == ends == b"PAR1" and size >= 12
        else f"what came is not a whole parquet file ({size:,} bytes)"
    )


def download(
    num_shards: int,
    *,
    directory: Path | None = None,
    base_url: str = PUBLISHED[DEFAULT_CORPUS].url,
    last_shard: int = PUBLISHED[DEFAULT_CORPUS].last_shard,
    num_workers: int = 4,
    patience: Patience = Patience(),
) -> int:
    """
    Fetch training shards 0 .. num_shards - 1 and the validation shard; return how many were missing.

    Shards that fail do not stop the others; they are named in one UserError at the end.
    """
    if not 1 <= num_shards <= last_shard:
        raise UserError(f"-n {num_shards}: there are 1 to {last_shard} training shards to choose from")
    folder = directory or base_dir() / "base_data"
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    names = [SHARD.format(number) for number in (*range(num_shards), last_shard)]
    missing = [name for name in names if not (folder / name).exists() or parquet_fault(folder / name)]
    print0(f"{len(names) - len(missing)} of {len(names)} shards are in {folder}; {len(missing)} to fetch")
    if missing and not reachable(base_url):
        raise UserError(
            f"{shown(base_url)}: nobody answers there; check the network, or set NANOCHAT_DATA_DIR to local data"
        )
    failed = []
    with ThreadPoolExecutor(max_workers=num_workers) as pool:
        url = base_url.rstrip("/")
        jobs = {
            pool.submit(
                fetch_file, f"{url}/{name}", folder / name, check=parquet_fault, patience=patience
            ): name
            for name in missing
        }
        for job in progress(as_completed(jobs), total=len(jobs), description="shards"):
            if isinstance(error := job.exception(), UserError):
                failed.append(f"{jobs[job]}: {error}")
            elif error is not None:
                raise error
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} shards could not be fetched ({min(failed)})")
    return len(missing)


def _sweep(folder: Path) -> None:
    """Remove what a killed download left; a part younger than ten minutes may belong to a running one."""
    for part in folder.glob(".*.part"):
        if time.time() - part.stat().st_mtime > 600:
            part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Config:
    """Download pretraining shards."""

    num_files: int = flag(24, "-n", help="training shards to have; the validation shard comes on top")
    num_workers: int = flag(4, "-w", help="downloads at a time")
    corpus: Literal["fineweb-edu", "climbmix"] = "fineweb-edu"
    """which published corpus"""
    base_url: str = ""
    """folder of the shards on the network; by default NANOCHAT_BASE_URL, else the corpus"""
    directory: str = ""
    """where to put them; by default base_data in the base dir"""


def main(config: Config) -> None:
    """Bring the shards and look at what is there."""
    published = PUBLISHED[config.corpus]
    folder = Path(config.directory) if config.directory else base_dir() / "base_data"
    count = published.last_shard if config.num_files < 0 else config.num_files
    url = config.base_url or os.environ.get("NANOCHAT_BASE_URL") or published.url
    download(
        count, directory=folder, base_url=url, last_shard=published.last_shard, num_workers=config.num_workers
    )
    there = open_shards(folder)
    print0(f"{folder}: {len(there.train)} training shards, validation {there.validation.path.name}")


if __name__ == "__main__":
    main(cli(Config))
