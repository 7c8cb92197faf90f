"""
Gather a release in hf_release/ and push it to the Hugging Face Hub.

    python -m scripts.sync_hf_repo --dry-run                       what would be staged and pushed; no network, no login
    python -m scripts.sync_hf_repo --no-push --checkpoint rl       the folder, to look at
    python -m scripts.sync_hf_repo --checkpoint rl --run-name RUN --repo-id ME/NAME

README.md and what it links; with --checkpoint also weights (safetensors), config, tokenizer, report and a model card with
what this run measured. A model that transformers can compute is exported for it (scripts/export_hf.py). Log in with
`hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

import glob
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.common import UserError, base_dir
from nanochat.config import cli
from nanochat.publish import (
    STAGED,
    Staged,
    card,
    linked_files,
    matching_files,
    report_files,
    run_results,
    size_of,
    stage,
)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    """Push documents and a checkpoint to the Hugging Face Hub."""

    repo_id: str = "HarleyCooper/nanochatAquaRat"
    """owner/name on the Hub"""
    repo_type: Literal["model", "dataset", "space"] = "model"
    """kind of repository"""
    readme: str = "README.md"
    """what becomes the card's text"""
    release_dir: str = "hf_release"
    """where the release is gathered"""
    extra: tuple[str, ...] = ()
    """more files, by pattern, such as 'docs/*.md'; may be repeated"""
    checkpoint: Literal["", "base", "mid", "sft", "rl"] = ""
    """stage whose checkpoint is published"""
    model_tag: str = ""
    """checkpoint folder, such as d8; by default the largest"""
    step: int | None = None
    """checkpoint step; by default the newest"""
    run_name: str = "aquarat-small"
    """run whose evaluation and report go along"""
    message: str = "Release"
    """of the commit on the Hub"""
    private: bool = False
    """make a new repository private"""
    no_push: bool = False
    """gather only"""
    dry_run: bool = False
    """say what would happen; writes nothing, needs no network and no login"""
    verbose: bool = False
    """also say which links are left out"""


def documents(config: Config, root: Path) -> tuple[str, list[Staged]]:
    """The README's text, and LICENSE, linked and extra files. Raises UserError when README or LICENSE is missing."""
    readme, license_file = root / config.readme, root / "LICENSE"
    for path in (readme, license_file):
        if not path.is_file():
            raise UserError(f"{path} is missing; a release needs it")
    linked, left_out = linked_files(readme, root)
    for why in left_out:
        if config.verbose or not why.endswith("is a folder"):
            print(f"left out: {why}")
    files = [Staged("LICENSE", license_file), *linked, *matching_files(config.extra, root)]
    return readme.read_text(encoding="utf-8"), list({file.name: file for file in files}.values())


def checkpoint_files(config: Config, scratch: Path) -> tuple[list[Staged], dict[str, Any], bool]:
    """Weights, config and tokenizer in `scratch`; the checkpoint's meta; whether transformers opens it."""
    import torch
    from safetensors.torch import save_file

    from nanochat.checkpoint_manager import load_model
    from nanochat.export_hf import check_representable, export
    from nanochat.tokenizer_files import JSON_FILE

    model, tokenizer, meta = load_model(
        config.checkpoint, "cpu", model_tag=config.model_tag or None, step=config.step, dtype=torch.float32
    )
    try:
        check_representable(model.config)
        exported = True
        export(model, tokenizer, scratch)
    except UserError as error:
        print(f"not for transformers: {error}")
        exported = False
        scratch.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: t.detach().contiguous() for name, t in model.state_dict().items()},
            scratch / "model.safetensors",
        )
        (scratch / "config.json").write_text(json.dumps(meta["model_config"], indent=2) + "\n")
    tokenizer.save(scratch / "nanochat_tokenizer")
    (scratch / "nanochat_tokenizer" / "token_bytes.pt").unlink()  # a pickle, and made anew from the JSON
    assert (scratch / "nanochat_tokenizer" / JSON_FILE).is_file()
    files = [Staged(p.relative_to(scratch).as_posix(), p) for p in sorted(scratch.rglob("*")) if p.is_file()]
    return files, meta, exported


def release(config: Config, scratch: Path, root: Path) -> list[Staged]:
    """Every file of the release, the card among them."""
    readme, files = documents(config, root)
    meta, exported, results = None, False, {}
    if config.checkpoint:
        weights, meta, exported = checkpoint_files(config, scratch)
        files = [*files, *weights]
        results = run_results(base_dir(), config.run_name, config.checkpoint, meta["step"])
        files = [*files, *report_files(base_dir(), config.run_name)]
    text = card(
        readme=readme, model_name=config.repo_id, source=config.checkpoint, meta=meta, results=results, exported=exported
    )  # fmt: skip
    return [Staged("README.md", text.encode()), *(file for file in files if file.name != "README.md")]


def push(config: Config, folder: Path, names: list[str]) -> str:
    """Upload exactly the staged files; the address of the commit. Raises UserError with what the Hub says."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    except ImportError:
        raise UserError("huggingface_hub is missing; install it with: uv sync --inexact --extra hf") from None
    hub = HfApi(token=os.environ.get("HF_TOKEN") or None)
    try:
        hub.create_repo(
            config.repo_id, repo_type=config.repo_type, private=config.private or None, exist_ok=True
        )
        done = hub.upload_folder(
            repo_id=config.repo_id, repo_type=config.repo_type, folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message=config.message,
        )  # fmt: skip
    except LocalTokenNotFoundError:
        raise UserError("no login for the Hub; run `hf auth login`, or set HF_TOKEN") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"the Hub: {' '.join(str(error).split())[:300]}; is HF_TOKEN a token that may write?"
        ) from None
    return str(getattr(done, "commit_url", done))


def main(config: Config) -> None:
    """Gather, and push unless told otherwise."""
    folder = Path(config.release_dir) if Path(config.release_dir).is_absolute() else ROOT / config.release_dir
    with tempfile.TemporaryDirectory() as scratch:
        files = release(config, Path(scratch) / "checkpoint", ROOT)
        for file in files:
            print(f"{size_of(file):>14,}  {file.name}")
        print(f"{len(files)} files, {sum(map(size_of, files)) / 1e6:,.1f} MB, for {config.repo_id}")
        if config.dry_run:
            print("dry run: nothing was written or sent")
            return
        stage(files, folder)
    names = [file.name for file in files]
    print(f"gathered in {folder} ({STAGED} lists what is ours)")
    if not config.no_push:
        print(f"pushed: {push(config, folder, names)}")


if __name__ == "__main__":
    main(cli(Config))
