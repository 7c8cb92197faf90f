"""
The CORE metric of a base model: 22 in-context tasks, each centred so that guessing is 0, then averaged.

    python -m scripts.base_eval --max_per_task=100
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval

Needs nanochat's eval_bundle in the base dir; without it the stage says where to get it and ends well, because a model can
be trained without CORE. Source: DataComp-LM, arXiv 2406.11794.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.config import StageConfig, cli


@dataclass(frozen=True)
class Config(StageConfig):
    """CORE of a base model."""

    step: int | None = None
    """step of the checkpoint; by default the newest"""
    max_per_task: int = -1
    """most questions of each task; -1: all"""


def main(config: Config) -> None:
    """Evaluate and print one line for each task."""
    from nanochat.checkpoint_manager import load_model
    from nanochat.common import base_dir, compute_cleanup, compute_init, print0, write_atomic
    from nanochat.core_eval import BundleMissing, evaluate_core
    from nanochat.tracking import open_run

    world = compute_init(config.device_type, config.dtype, config.seed)
    model, tokenizer, meta = load_model("base", world=world, model_tag=config.model_tag, step=config.step)
    with open_run("base_eval", config, world) as tracker:
        try:
            result = evaluate_core(model, tokenizer, world, max_per_task=config.max_per_task)
        except BundleMissing as error:
            tracker.note("skipped", str(error))
            tracker.finish({"step": meta["step"]})
        else:
            print0(result.table())
            if world.main:
                write_atomic(base_dir() / "base_eval" / f"base_model_{meta['step']:06d}.csv", result.csv())
            centered = {score.label: score.centered for score in result.scores}
            tracker.finish({"step": meta["step"], **centered, "core": result.core})
    compute_cleanup(world)


if __name__ == "__main__":
    main(cli(Config))
