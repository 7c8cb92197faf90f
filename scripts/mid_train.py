"""
Mid-training: from a text model to one that knows conversations, multiple choice and the calculator.

    python -m scripts.mid_train
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --device_batch_size=16

Everything said is trained on, questions included. A 50,000 row slice of AQuA stands beside SmolTalk, MMLU, GSM8K and
conversations about who the model is; what cannot be had is left out and said so. The surprising choice: conversations
share rows, yet none sees its neighbours and none is cut, so a packed row teaches what its conversations would teach alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanochat.config import ConversationConfig, cli


@dataclass(frozen=True)
class Config(ConversationConfig):
    """Mid-train the base model."""

    aqua_train_examples: int = 50_000
    """rows of AQuA, or all there are"""
    eval_tokens: int = 1_048_576
    """tokens of pretraining text in one validation"""


def main(config: Config) -> None:
    """Train on the mixture, validate on text, save."""
    from functools import partial

    from nanochat.checkpoint_manager import load_model
    from nanochat.checkpoints import find_tag
    from nanochat.common import compute_cleanup, compute_init
    from nanochat.dataloader import conversation_batches
    from nanochat.schedule import trapezoid
    from nanochat.stage import open_stage, tell
    from nanochat.supervised import grad_accum_steps, optimizer_for, supervised_steps, text_bpb
    from nanochat.train import compile_model, compiles, next_token_loss, train_steps
    from tasks.catalog import assemble, at_most, mid_parts, problems

    world = compute_init(config.device_type, config.dtype, config.seed)
    model, tokenizer, parent = load_model(
        "base", phase="train", world=world, model_tag=config.model_tag, step=config.step
    )
    mixture, notes = assemble(
        [*problems(config), *at_most(mid_parts(config.seed), config.other_examples)], seed=config.seed
    )
    sequence_len = model.config.sequence_len if config.max_seq_len < 0 else config.max_seq_len
    shape: dict[str, Any] = {
        "batch_size": config.device_batch_size,
        "sequence_len": sequence_len,
        "world": world,
    }
    grad_accum = grad_accum_steps(config, sequence_len, world)
    if compiles(config.compile, world):
        compile_model(model)
    optimizer = optimizer_for(model, config, world)
    tag = config.model_tag or find_tag("base")
    with open_stage("mid", config, world, tag=tag, parent=parent, tokenizer=tokenizer.fingerprint) as stage:
        tell(stage.tracker, notes)
        stage.restore(model, optimizer)
        bpb = stage.remembered("val_bpb").get("val_bpb")
        batches = conversation_batches(
            mixture, tokenizer, seed=config.seed, mask="all", state=stage.data_state, **shape
        )
        num_steps = supervised_steps(config, batches, grad_accum, world)
        schedule = partial(trapezoid, num_steps=num_steps, warmdown=config.warmdown_ratio)
        for step in train_steps(
            model,
            optimizer,
            batches,
            next_token_loss,
            num_steps=num_steps,
            grad_accum=grad_accum,
            schedule=schedule,
            world=world,
            start=stage.start,
            guard=stage.guard,
            max_grad_norm=config.max_grad_norm,
        ):
            stage.report(step, num_steps, model, sequence_len)
            if step.due(config.eval_every):
                bpb = text_bpb(model, tokenizer, split="val", num_tokens=config.eval_tokens, **shape)
                stage.log(step.index, {} if bpb is None else {"val/bpb": bpb})
            if stage.saves(step):
                stage.save(step.index, model, optimizer, data_state=batches.state(), val_bpb=bpb)
        tell(
            stage.tracker,
            [("skipped", f"mid: {n:,} conversations {why}") for why, n in batches.skipped.items()],
        )
        stage.tracker.finish({"conversations": len(mixture), "steps": num_steps, "val_bpb": bpb})
    compute_cleanup(world)


if __name__ == "__main__":
    main(cli(Config))
