"""
Pretrain the base model: predict the next token of plain text, from random weights.

    python -m scripts.base_train --depth=4 --max_seq_len=512 --device_batch_size=4 --total_batch_size=2048
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20

`--depth` is the one number that matters: it sets width, heads, the scale of the learning rates and, unless
`--num_iterations` says otherwise, how many tokens to train on (20 for each parameter, as Chinchilla found,
arXiv 2203.15556).

The surprising choice is for models of half a million parameters: `--drill_iterations` spends the first steps on a
look-up drill (a list of options, then each value with its letter), and `--synthetic_share` mixes documents of our own
writing into the text. Without the drill such a model does not learn in minutes to match a value to its letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError
from nanochat.config import TrainConfig, cli

if TYPE_CHECKING:
    from torch import Tensor

    from nanochat.architecture import GPTConfig
    from nanochat.dataloader import Batch
    from nanochat.gpt import GPT


DRILL_TOKENS = 64  # of a drill page at least, so that there are enough of them


@dataclass(frozen=True)
class Config(TrainConfig):
    """Pretrain the base model."""

    depth: int = 20
    """layers; the width is 64 times this"""
    n_embd: int | None = None
    """width, where it is not 64 times the depth"""
    n_head: int | None = None
    """heads, where they are not of size 128"""
    n_kv_head: int | None = None
    """key-value heads; fewer than heads is grouped-query attention"""
    smear: int = 0
    """preceding tokens whose embeddings are mixed into each position"""
    window_pattern: str = "L"
    """one letter a layer, repeated: L sees all, S a quarter of the row"""
    max_seq_len: int = 2048
    """tokens of a row"""
    target_param_data_ratio: float = 20.0
    """tokens to train on for each parameter, where --num_iterations is -1"""
    warmup_ratio: float = 0.0
    """share of the steps in which the learning rate rises"""
    warmdown_ratio: float = 0.4
    """share of the steps, at the end, in which it falls"""
    final_lr_frac: float = 0.0
    """learning rate of the last step as a fraction of the highest"""
    max_grad_norm: float = 1.0
    """gradients longer than this are shortened to it; 0: none are"""
    eval_tokens: int = 10_485_760
    """tokens of one validation"""
    synthetic_share: float = 0.0
    """share of the documents that are of our own writing"""
    isolate: bool = False
    """documents that share a row do not see each other; worth it where they are short"""
    drill_iterations: int = 0
    """first steps, which train on the look-up drill"""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"--depth={self.depth}: a model has at least one layer")
        if not 0 <= self.synthetic_share <= 1:
            raise UserError(f"--synthetic_share={self.synthetic_share} is a share; use 0 to 1")


def main(config: Config) -> None:
    """Train, evaluate and save."""
    from functools import partial

    from nanochat.common import compute_cleanup, compute_init, print0
    from nanochat.curriculum import InTurn
    from nanochat.dataloader import conversation_batches, document_batches
    from nanochat.gpt import GPT
    from nanochat.schedule import trapezoid
    from nanochat.stage import open_stage, tell
    from nanochat.supervised import grad_accum_steps, optimizer_for, text_bpb
    from nanochat.tokenizer import load_tokenizer
    from nanochat.train import compile_model, compiles, next_token_loss, train_steps
    from tasks.catalog import left_out, pretraining_texts
    from tasks.prose import Drill

    world = compute_init(config.device_type, config.dtype, config.seed)
    tokenizer = load_tokenizer()
    model = GPT(model_config(config, tokenizer.vocab_size), dtype=world.dtype).to(world.device)
    grad_accum = grad_accum_steps(config, config.max_seq_len, world)
    step_tokens = config.device_batch_size * config.max_seq_len * grad_accum * world.size
    num_steps = config.num_iterations
    if num_steps < 0:
        num_steps = max(1, int(config.target_param_data_ratio * model.num_params()) // step_tokens)
    print0(f"{model.num_params():,} parameters, {num_steps:,} steps of {step_tokens:,} tokens")
    if compiles(config.compile, world):
        compile_model(model)
    optimizer = optimizer_for(model, config, world)
    schedule = partial(
        trapezoid,
        num_steps=num_steps,
        warmup=config.warmup_ratio,
        warmdown=config.warmdown_ratio,
        final=config.final_lr_frac,
    )
    texts, notes = pretraining_texts(synthetic_share=config.synthetic_share, seed=config.seed)
    shape: dict[str, Any] = {
        "batch_size": config.device_batch_size,
        "sequence_len": config.max_seq_len,
        "world": world,
    }
    tag = config.model_tag or f"d{config.depth}"
    with open_stage("base", config, world, tag=tag, tokenizer=tokenizer.fingerprint) as stage:
        tell(stage.tracker, notes)
        stage.restore(model, optimizer)
        bpb = stage.remembered("val_bpb").get("val_bpb")
        state = stage.data_state or {}
        batches: Any = document_batches(texts, tokenizer, **shape, state=state.get("then", stage.data_state))
        if config.drill_iterations:
            tokens = config.drill_iterations * step_tokens
            pages = Drill(size=max(1, tokens // DRILL_TOKENS), seed=config.seed)
            drill = conversation_batches(
                pages, tokenizer, **shape, seed=config.seed, state=state.get("first")
            )
            batches = InTurn(
                drill, batches, num_rows=tokens // config.max_seq_len, world=world, state=stage.data_state
            )
        for step in train_steps(
            model,
            optimizer,
            batches,
            partial(document_loss, bos=tokenizer.bos_id) if config.isolate else next_token_loss,
            num_steps=num_steps,
            grad_accum=grad_accum,
            schedule=schedule,
            world=world,
            start=stage.start,
            guard=stage.guard,
            max_grad_norm=config.max_grad_norm,
        ):
            stage.report(step, num_steps, model, config.max_seq_len)
            measured = step.due(config.eval_every)
            if measured:
                bpb = text_bpb(model, tokenizer, split="val", num_tokens=config.eval_tokens, **shape)
                stage.log(step.index, {} if bpb is None else {"val/bpb": bpb})
            if stage.saves(step):
                best = -bpb if measured and bpb is not None else None  # an older value is of other weights
                stage.save(
                    step.index, model, optimizer, data_state=batches.state(), best_value=best, val_bpb=bpb
                )
        missing = sorted({line for lines in world.gather(left_out(texts)) for line in lines})
        tell(stage.tracker, [("skipped", f"base: {line}") for line in missing])
        stage.tracker.finish(
            {
                "parameters": model.num_params(),
                "steps": num_steps,
                "tokens": num_steps * step_tokens,
                "val_bpb": bpb,
            }
        )
    compute_cleanup(world)


def document_loss(model: GPT, batch: Batch, *, bos: int) -> Tensor:
    """Cross entropy summed over the batch's targets, each document (it begins with BOS) seeing only itself."""
    segments = (batch.inputs == bos).cumsum(1) if batch.segments is None else batch.segments
    loss: Tensor = model(batch.inputs, batch.targets, segments=segments)
    return loss


def model_config(config: Config, vocab_size: int) -> GPTConfig:
    """The architecture that the flags describe."""
    from nanochat.architecture import GPTConfig

    return GPTConfig.for_depth(
        config.depth,
        vocab_size=vocab_size,
        sequence_len=config.max_seq_len,
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_kv_head=config.n_kv_head,
        smear=config.smear,
        window_pattern=config.window_pattern,
    )


if __name__ == "__main__":
    main(cli(Config))
