"""
Upload a run to Google Cloud Storage: checkpoints of all stages, tokenizer, report, logs, metrics.

    bash scripts/upload_to_gcs.sh --bucket gs://NAME --run-name RUN [--exclude-data] [--dry-run] [--yes]

The same command again goes on where it was cut off; manifest.json, with the hash of every file, comes last and marks the
run as whole. `python -m scripts.fetch_run` brings it back. A dry run needs neither network nor Google's package.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from nanochat.bucket import bucket_name, files_of, open_bucket, upload
from nanochat.common import UserError, base_dir
from nanochat.config import cli


@dataclass(frozen=True)
class Config:
    """Upload a run to Google Cloud Storage."""

    bucket: str = ""
    """gs://NAME; by default GCS_BUCKET"""
    run_name: str = ""
    """the run; by default RUN, WANDB_RUN or aquarat-small"""
    exclude_data: bool = False
    """leave AQuA's rows and the identity conversations out"""
    dry_run: bool = False
    """list what would be sent; no network"""
    yes: bool = False
    """do not ask"""
    auto_terminate: str = ""
    """after the upload, terminate this Lambda instance (its id) through the API; needs LAMBDA_API_KEY"""


def main(config: Config) -> None:
    """List, ask, send, perhaps terminate."""
    env = os.environ
    address = config.bucket or env.get("GCS_BUCKET") or ""
    if address and not address.startswith("gs://") and not config.bucket:
        address = f"gs://{address}"
    if not address:
        raise UserError("--bucket is missing; give --bucket gs://NAME or set GCS_BUCKET")
    bucket_name(address)
    if config.auto_terminate and not config.dry_run and not env.get("LAMBDA_API_KEY"):
        raise UserError(
            "--auto-terminate needs LAMBDA_API_KEY, since shutting down would not end the bill; or let the launcher do it: "
            "--terminate-when-done"
        )
    run = config.run_name or env.get("RUN") or env.get("WANDB_RUN") or "aquarat-small"
    files = files_of(base_dir(), run, exclude_data=config.exclude_data)
    if not files:
        raise UserError(f"there is nothing of a run under {base_dir()}; is NANOCHAT_BASE_DIR right?")
    for file in files:
        print(f"{file.num_bytes:>14,}  {file.name}")
    size = sum(file.num_bytes for file in files)
    print(f"{len(files)} files, {size / 1e6:,.1f} MB, for {address}/runs/{run}/")
    if config.dry_run:
        print("dry run: nothing was sent")
        return
    confirm(config)
    sent, there = upload(open_bucket(address), run, files)
    print(f"run {run} is whole in {address}: {sent} files sent, {there} were there already")
    if config.auto_terminate:
        from nanochat.cloud import terminate_surely
        from nanochat.lambda_cloud import LambdaCloud

        terminate_surely(LambdaCloud.from_environment(), config.auto_terminate)


def confirm(config: Config) -> None:
    """Ask on a terminal; elsewhere nobody could answer, so --yes must have been given. Raises UserError for no."""
    if config.yes:
        return
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked; add --yes")
    if input("send them? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("nothing was sent")


if __name__ == "__main__":
    main(cli(Config))
