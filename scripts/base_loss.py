"""
How well the base model predicts text: bits per byte on the training and the validation shards, and a few samples.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss

Bits per byte do not depend on the vocabulary, so models with different tokenizers compare. Validation far above training
means that the model has begun to learn its text by heart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nanochat.config import StageConfig, cli

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "If 5*x + 3 = 13, then x is",
)


@dataclass(frozen=True)
class Config(StageConfig):
    """Bits per byte of a base model."""

    source: Literal["base", "mid"] = "base"
    """stage of the checkpoint"""
    step: int | None = None
    """step of the checkpoint; by default the newest"""
    device_batch_size: int = 32
    """rows of one batch on one device"""
    split_tokens: int = 10_485_760
    """tokens of each split to look at"""


def main(config: Config) -> None:
    """Measure both splits and print samples."""
    from nanochat.checkpoint_manager import load_model
    from nanochat.common import compute_cleanup, compute_init, print0
    from nanochat.engine import Engine
    from nanochat.supervised import text_bpb
    from nanochat.tracking import open_run

    world = compute_init(config.device_type, config.dtype, config.seed)
    model, tokenizer, meta = load_model(
        config.source, world=world, model_tag=config.model_tag, step=config.step
    )
    with open_run("base_loss", config, world) as tracker:
        results: dict[str, Any] = {"step": meta["step"]}
        for split in ("train", "val"):
            bpb = text_bpb(
                model,
                tokenizer,
                world,
                split=split,
                num_tokens=config.split_tokens,
                batch_size=config.device_batch_size,
                sequence_len=model.config.sequence_len,
            )
            if bpb is None:
                tracker.note("skipped", f"base_loss: no {split} text on disk, so no bits per byte")
            else:
                results[f"{split}_bpb"] = bpb
                print0(f"{split} bits per byte: {bpb:.4f}")
        prompts = [tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]
        completions = Engine(model, tokenizer).generate(
            prompts, max_tokens=16, temperature=0.0, seeds=range(len(prompts)), use_tools=False
        )
        rows = [
            {"prompt": prompt, "completion": tokenizer.decode(group[0].ids)}
            for prompt, group in zip(PROMPTS, completions, strict=True)
        ]
        for row in rows:
            print0(f"{row['prompt']}|{row['completion']!r}")
        tracker.table("samples", meta["step"], rows)
        tracker.finish(results)
    compute_cleanup(world)


if __name__ == "__main__":
    main(cli(Config))
