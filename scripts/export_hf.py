"""
Write a checkpoint as a directory that Hugging Face transformers opens.

    python -m scripts.export_hf -i rl -o exported
    python -c "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('exported'))"

Stock transformers with its NanoChat architecture, no code of ours; what it opens is compared with our own logits before
this calls itself done. What transformers cannot compute is refused (nanochat/export_hf.py says what).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat.common import UserError
from nanochat.config import cli, flag


@dataclass(frozen=True)
class Config:
    """Export a checkpoint for transformers."""

    source: Literal["base", "mid", "sft", "rl"] = flag("rl", "-i", help="stage of the checkpoint")
    output_dir: str = flag("", "-o", help="folder to write")
    model_tag: str = flag("", "-g", help="checkpoint folder, such as d8; by default the largest")
    step: int | None = flag(None, "-s", help="checkpoint step; by default the newest")
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the written weights; bfloat16 halves the file, and logits then differ in the third digit"""


def main(config: Config) -> None:
    """Load, export, compare."""
    if not config.output_dir:
        raise UserError("-o is missing; name the folder to write, such as -o exported")
    import torch

    from nanochat.checkpoint_manager import load_model
    from nanochat.export_hf import export

    model, tokenizer, meta = load_model(
        config.source, "cpu", model_tag=config.model_tag or None, step=config.step, dtype=torch.float32
    )
    folder = Path(config.output_dir).expanduser()
    found = export(model, tokenizer, folder, dtype=getattr(torch, config.dtype))
    print(
        f"{folder}: {config.source} step {meta['step']}, {model.num_params():,} parameters, {found['megabytes']:.1f} MB; "
        f"transformers' logits differ from ours by at most {found['largest_logit_difference']:.1e}"
    )
    if model.config.rope_bf16:
        print(
            "this checkpoint was trained with cosine and sine rounded to bf16, which transformers does not do"
        )


if __name__ == "__main__":
    main(cli(Config))
