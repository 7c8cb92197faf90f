"""
What base, mid and sft need around their loop: how many steps, an optimizer from the flags, losses on held-out data.

A task or a text arrives as an argument; the loop itself is `train_steps` (train.py), the stage's place on disk stage.py.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Protocol

import torch

from nanochat.common import UserError, World, print0
from nanochat.config import ConversationConfig, TrainConfig
from nanochat.dataloader import ConversationBatches, conversation_batches, document_batches
from nanochat.dataset import open_texts
from nanochat.evaluate import bits_per_byte
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, make_optimizer
from nanochat.tokenizer import Tokenizer
from nanochat.train import next_token_loss


def grad_accum_steps(config: TrainConfig, sequence_len: int, world: World) -> int:
    """Microbatches of one step on each rank. Raises UserError when the total is no multiple of one round."""
    round_tokens = config.device_batch_size * sequence_len * world.size
    if config.device_batch_size < 1:
        raise UserError(f"--device_batch_size={config.device_batch_size}: a microbatch has at least one row")
    if config.total_batch_size < 0:
        return 1
    count, rest = divmod(config.total_batch_size, round_tokens)
    if rest or not count:
        raise UserError(
            f"--total_batch_size={config.total_batch_size} is no multiple of {round_tokens:,} tokens, one microbatch "
            f"(--device_batch_size={config.device_batch_size} rows of {sequence_len}) on {world.size} ranks; change one"
        )
    return count


def supervised_steps(
    config: ConversationConfig, batches: ConversationBatches, grad_accum: int, world: World
) -> int:
    """Steps that were asked for, or as many as --num_epochs passes over the conversations take."""
    if config.num_iterations >= 0:
        return config.num_iterations
    rows_per_step = config.device_batch_size * grad_accum * world.size
    return max(1, batches.rows_of(config.num_epochs) // rows_per_step)


class Rates(Protocol):
    """The flags that an optimizer is made from."""

    @property
    def matrix_lr(self) -> float: ...
    @property
    def embedding_lr(self) -> float: ...
    @property
    def unembedding_lr(self) -> float: ...
    @property
    def scalar_lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def init_lr_frac(self) -> float: ...


def optimizer_for(model: GPT, config: Rates, world: World) -> MuonAdamW:
    """Muon and AdamW at the rates of the flags, all times --init_lr_frac."""
    scale = config.init_lr_frac
    return make_optimizer(
        model,
        matrix_lr=config.matrix_lr * scale,
        embedding_lr=config.embedding_lr * scale,
        unembedding_lr=config.unembedding_lr * scale,
        scalar_lr=config.scalar_lr * scale,
        weight_decay=config.weight_decay,
        world=world,
        fuse=world.device.type == "cuda",
    )


def text_bpb(
    model: GPT,
    tokenizer: Tokenizer,
    world: World,
    *,
    split: str,
    num_tokens: int,
    batch_size: int,
    sequence_len: int,
) -> float | None:
    """Bits per byte on the first `num_tokens` of a split of the pretraining text; None where there is no text on disk."""
    try:
        texts = open_texts(split)
    except UserError as error:
        print0(f"no bits per byte: {error}")
        return None
    batches = document_batches(
        texts, tokenizer, batch_size=batch_size, sequence_len=sequence_len, world=world
    )
    count = max(1, num_tokens // (batch_size * sequence_len * world.size))
    sizes = torch.tensor(tokenizer.num_bytes())
    return bits_per_byte(model, islice(batches, count), sizes, world)


@torch.no_grad()
def conversation_loss(
    model: GPT, tokenizer: Tokenizer, task: Any, world: World, *, batch_size: int, sequence_len: int
) -> float:
    """Loss per trained token over all of `task`."""
    batches = conversation_batches(
        task, tokenizer, batch_size=batch_size, sequence_len=sequence_len, world=world, epochs=1
    )
    total = torch.zeros(2, device=world.device)
    for batch in batches:
        total[0] += next_token_loss(model, batch.to(world.device))
        total[1] += batch.num_targets
    loss, count = world.sum(total).tolist()
    return loss / count
