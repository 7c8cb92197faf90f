"""
Bring a run back from Google Cloud Storage and verify every file by its hash.

    python -m scripts.fetch_run --bucket gs://NAME --run-name RUN
    python -m scripts.fetch_run --bucket gs://NAME --run-name RUN --only report,runs --to somewhere

Files that are here and right are not fetched again. A run whose upload never ended has no manifest and is refused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nanochat.bucket import fetch, open_bucket
from nanochat.common import UserError, base_dir
from nanochat.config import cli


@dataclass(frozen=True)
class Config:
    """Bring a run back from Google Cloud Storage."""

    bucket: str = ""
    """gs://NAME; by default GCS_BUCKET"""
    run_name: str = ""
    """the run"""
    to: str = ""
    """folder; by default the base dir"""
    only: str = ""
    """beginnings of names, with commas, such as report,tokenizer,chatrl_checkpoints"""


def main(config: Config) -> None:
    """Fetch and verify."""
    address = config.bucket or os.environ.get("GCS_BUCKET") or ""
    if not address or not config.run_name:
        raise UserError("--bucket and --run-name are needed; GCS_BUCKET may stand for the first")
    address = address if address.startswith("gs://") else f"gs://{address}"
    folder = Path(config.to).expanduser() if config.to else base_dir()
    prefixes = tuple(part.strip() for part in config.only.split(",") if part.strip())
    fetched, kept = fetch(open_bucket(address), config.run_name, folder, prefixes=prefixes)
    print(
        f"run {config.run_name} in {folder}: {fetched} files fetched, {kept} were there; every hash is right"
    )


if __name__ == "__main__":
    main(cli(Config))
