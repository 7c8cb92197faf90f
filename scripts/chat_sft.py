"""
Supervised fine-tuning: the model learns to answer, from conversations in which only the answers are trained on.

    python -m scripts.chat_sft
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --aqua_train_examples=20000

AQuA's rationales come first and the line `Answer: X` last, with the options of each row in an order of their own, so that
no letter is likelier than another. The loss is the mean over trained tokens of the whole step: neither the size of a
microbatch nor the number of ranks changes it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanochat.config import ConversationConfig, cli, flag

if TYPE_CHECKING:
    from tasks.common import Task


@dataclass(frozen=True)
class Config(ConversationConfig):
    """Fine-tune the mid-trained model."""

    source: str = flag("mid", help="stage of the checkpoint to start from: mid or base")
    aqua_train_examples: int = 20_000
    """rows of AQuA, or all there are"""
    aqua_val_examples: int = 254
    """rows of AQuA's validation split in one validation; -1: all"""
    total_batch_size: int = 65_536
    """tokens of one optimizer step over all ranks; -1: one microbatch on every rank, so more of them with more ranks"""
    save_tag: str = ""
    """folder of the checkpoints that are written; by default that of the start"""
    label: str = ""
    """name of this stage in the run directory; by default sft"""


def main(config: Config) -> None:
    """Train on the mixture, validate on held-out word problems, save."""
    from functools import partial

    from nanochat.checkpoint_manager import load_model
    from nanochat.checkpoints import find_tag
    from nanochat.common import compute_cleanup, compute_init
    from nanochat.dataloader import conversation_batches
    from nanochat.schedule import trapezoid
    from nanochat.stage import open_stage, tell
    from nanochat.supervised import conversation_loss, grad_accum_steps, optimizer_for, supervised_steps
    from nanochat.train import compile_model, compiles, next_token_loss, train_steps
    from tasks.catalog import assemble, at_most, problems, sft_parts

    world = compute_init(config.device_type, config.dtype, config.seed)
    model, tokenizer, parent = load_model(
        config.source, phase="train", world=world, model_tag=config.model_tag, step=config.step
    )
    mixture, notes = assemble(
        [*problems(config), *at_most(sft_parts(config.seed), config.other_examples)], seed=config.seed
    )
    held_out = validation_tasks(config)
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
    tag = config.save_tag or config.model_tag or find_tag(config.source)
    with open_stage(
        "sft",
        config,
        world,
        tag=tag,
        parent=parent,
        tokenizer=tokenizer.fingerprint,
        record=config.label,
    ) as stage:
        tell(stage.tracker, notes)
        stage.restore(model, optimizer)
        losses: dict[str, float] = stage.remembered("val/")
        batches = conversation_batches(mixture, tokenizer, seed=config.seed, state=stage.data_state, **shape)
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
                losses = {
                    f"val/loss_{task.name.lower()}": conversation_loss(model, tokenizer, task, **shape)
                    for task in held_out
                }
                stage.log(step.index, losses)
            if stage.saves(step):
                stage.save(step.index, model, optimizer, data_state=batches.state(), **losses)
        tell(
            stage.tracker,
            [("skipped", f"sft: {n:,} conversations {why}") for why, n in batches.skipped.items()],
        )
        stage.tracker.finish({"conversations": len(mixture), "steps": num_steps, **losses})
    compute_cleanup(world)


def validation_tasks(config: Config) -> list[Task]:
    """Held-out word problems: AQuA's validation split where it can be had, programs and the built-in set where trained on."""
    from tasks.catalog import open_task
    from tasks.common import limit
    from tasks.programs import Programs
    from tasks.rows import DataUnavailable

    tasks: list[Task] = []
    count = None if config.aqua_val_examples < 0 else config.aqua_val_examples
    with suppress(DataUnavailable):  # the mixture has said so already
        tasks.append(limit(open_task("AQUA", "validation", aqua_path=config.aqua_path), count))
    if config.program_examples > 0:
        with suppress(DataUnavailable):
            tasks.append(Programs("validation", size=256, seed=config.seed, path=config.aqua_path))
    if config.synthetic_examples > 0 or not tasks:
        tasks.append(limit(open_task("SYNTHETIC", "validation", seed=config.seed), 256))
    return tasks


if __name__ == "__main__":
    main(cli(Config))
