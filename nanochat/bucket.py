"""
A run in a Google Cloud Storage bucket: everything that it made, and a manifest that says when it is whole.

    gs://BUCKET/runs/RUN/<folder>/<file>        as under the base directory
    gs://BUCKET/runs/RUN/manifest.json          size and SHA-256 of every file, written last: the commit mark

A run without its manifest was not finished and is not fetched. What the bucket has with the same CRC-32C is not sent again,
so the same command goes on where it was cut off. google-cloud-storage is imported where the network begins, which a
dry run does not reach.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nanochat.checkpoints import STAGES, file_sha256
from nanochat.common import UserError
from nanochat.run_files import check_run_name, now

MANIFEST, FORMAT = "manifest.json", "nanochat-run-1"
DATA = ("aqua", "identity_conversations.jsonl")
FOLDERS = (*STAGES.values(), "tokenizer", "report", "runs", "finished")
UNFINISHED = (".unfinished", ".part", ".tmp")
CHUNK = 8 << 20  # resumable: a broken connection costs one chunk


@dataclass(frozen=True, slots=True)
class RunFile:
    """One file of a run: its name within the run, and where it lies here."""

    name: str
    path: Path

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size


def files_of(base: Path, run: str, *, exclude_data: bool) -> list[RunFile]:
    """What belongs to a run: checkpoints of all four stages, tokenizer, report, its own logs and metrics, AQuA's rows."""
    check_run_name(run)
    found = list(_walk(base, exclude_data))
    others = f"runs/{run}/"
    return [file for file in found if not file.name.startswith("runs/") or file.name.startswith(others)]


def _walk(base: Path, exclude_data: bool) -> Iterator[RunFile]:
    for top in (*FOLDERS, *(() if exclude_data else DATA)):
        root = base / top
        paths = [root] if root.is_file() else sorted(root.rglob("*"))
        for path in paths:
            hidden = any(part.startswith(".") for part in path.relative_to(base).parts)
            # A link could lead anywhere on this machine, and what is unfinished is nobody's result.
            if path.is_file() and not path.is_symlink() and not hidden and not path.name.endswith(UNFINISHED):
                yield RunFile(path.relative_to(base).as_posix(), path)


def manifest_of(run: str, files: list[RunFile]) -> dict[str, Any]:
    """The manifest as data; reads every file."""
    entries = {file.name: {"bytes": file.num_bytes, "sha256": file_sha256(file.path)} for file in files}
    return {"format": FORMAT, "run": run, "written": now(), "files": entries}


def bucket_name(address: str) -> str:
    """The bucket in gs://BUCKET. Raises UserError for anything else."""
    name = address.removeprefix("gs://").rstrip("/")
    if not address.startswith("gs://") or not name or "/" in name:
        raise UserError(f"--bucket={address}: write gs://NAME, without a folder")
    return name


def open_bucket(address: str) -> Any:
    """A bucket of google-cloud-storage; at STORAGE_EMULATOR_HOST without credentials, for tests."""
    try:
        from google.auth.credentials import AnonymousCredentials
        from google.auth.exceptions import DefaultCredentialsError
        from google.cloud import storage
    except ImportError:
        raise UserError(
            "google-cloud-storage is missing; install it with: uv sync --inexact --extra gcs"
        ) from None
    name = bucket_name(address)
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return storage.Client(project="emulated", credentials=AnonymousCredentials()).bucket(name)
    try:
        return storage.Client(project=os.environ.get("GCP_PROJECT_ID") or None).bucket(name)
    except DefaultCredentialsError:
        raise UserError(
            "no Google credentials; run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
        ) from None
    except OSError as error:
        raise UserError(f"no Google project is known ({error}); set GCP_PROJECT_ID") from None


def crc32c(path: Path) -> str:
    """The checksum that Google keeps of a file, as it writes it (base64)."""
    import base64

    import google_crc32c

    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum.update(block)
    return base64.b64encode(checksum.digest()).decode()


def upload(bucket: Any, run: str, files: list[RunFile]) -> tuple[int, int]:
    """Send what is missing or different, the manifest last; (sent, already there). Raises UserError when one fails."""
    prefix = f"runs/{run}/"
    there = {blob.name: blob.crc32c for blob in _ask(lambda: list(bucket.list_blobs(prefix=prefix)))}
    manifest = manifest_of(run, files)
    sent = 0
    for file in files:
        name = prefix + file.name
        if there.get(name) == crc32c(file.path):
            continue
        blob = bucket.blob(name, chunk_size=CHUNK)
        _ask(lambda blob=blob, file=file: blob.upload_from_filename(str(file.path), checksum="crc32c"))
        print(f"sent {file.name} ({file.num_bytes / 1e6:,.1f} MB)", flush=True)
        sent += 1
    text = json.dumps(manifest, indent=1)
    _ask(lambda: bucket.blob(prefix + MANIFEST).upload_from_string(text, content_type="application/json"))
    return sent, len(files) - sent


def _ask(action: Any) -> Any:
    """Do what may fail on Google's side or on the way; one line when it does."""
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.resumable_media import DataCorruption

    try:
        return action()
    except (GoogleAPIError, GoogleAuthError, DataCorruption, OSError) as error:
        raise UserError(
            f"the bucket: {' '.join(str(error).split())[:300]}; what was sent stays, the same command goes on"
        ) from None


def read_manifest(bucket: Any, run: str) -> dict[str, dict[str, Any]]:
    """The files of a whole run, by name. Raises UserError for a run that is not there or not whole."""
    from google.api_core.exceptions import NotFound

    blob = bucket.blob(f"runs/{check_run_name(run)}/{MANIFEST}")
    try:
        record = json.loads(blob.download_as_bytes())
    except NotFound:
        raise UserError(
            f"run {run} is not in gs://{bucket.name}, or its upload never ended; upload it again"
        ) from None
    except ValueError:
        raise UserError(f"the manifest of run {run} is damaged; upload the run again") from None
    record = record if isinstance(record, dict) else {}
    if record.get("format") != FORMAT:
        raise UserError(f"the manifest of run {run} is of format {record.get('format')!r}, not {FORMAT}")
    files = record.get("files")
    for name, entry in files.items() if isinstance(files, dict) else [("no files", None)]:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name:
            raise UserError(f"the manifest of run {run} names {name}, which lies outside the run")
        entry = entry if isinstance(entry, dict) else {}
        if not (parts.parts and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)):
            raise UserError(f"the manifest of run {run} is damaged at {name}; upload the run again")
    assert isinstance(files, dict)
    return files


def fetch(bucket: Any, run: str, folder: Path, *, prefixes: tuple[str, ...] = ()) -> tuple[int, int]:
    """Bring a run's files into `folder` and verify each by its SHA-256; (fetched, already there)."""
    fetched = kept = 0
    for name, entry in read_manifest(bucket, run).items():
        if prefixes and not name.startswith(prefixes):
            continue
        path = folder / name
        if path.is_file() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]:
            kept += 1
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.part")
        blob = bucket.blob(f"runs/{run}/{name}", chunk_size=CHUNK)
        try:
            _ask(lambda blob=blob, beside=beside: blob.download_to_filename(str(beside)))
            digest = file_sha256(beside)
            if digest != entry["sha256"]:
                raise UserError(
                    f"{name} is not what was uploaded (SHA-256 {digest[:12]}..., not {entry['sha256'][:12]}...)"
                )
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        fetched += 1
    return fetched, kept
