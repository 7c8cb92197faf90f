"""The loss of reinforcement learning: which tokens are trained, how much each counts, and in which direction.

What reads oddly and is meant so:

- The loss is a SUM over tokens; the step divides once by a number that all ranks agree on (`loss_normalizer`). Divided
  per microbatch, as nanochat does it, a short wrong answer counts ten times as much per token as a long right one and
  the figure depends on the batch size of the device.
- The probability is that of the distribution that was sampled: the temperature is inside the loss.
- With one update per rollout the ratio is exactly 1 and nothing can be clipped: the loss is -advantage * log p, as in
  REINFORCE. Its value says nothing about progress; look at the reward.
- KL to the reference is the k2 term, half the squared log-ratio. Its value is only near the KL, but its gradient is the
  KL's, where k3 has the better value and the wrong gradient. Entropy is exact, over the whole vocabulary.

Loss kinds: `dapo` is the mean over all live completion tokens of the step (arXiv 2503.14476); `dr_grpo` divides by the
number of live completions times the longest completion allowed, so that length buys nothing (arXiv 2503.20783); `grpo`
is the mean over completions of each one's own token mean (arXiv 2402.03300). Live: in a group whose answers are neither
all right nor all wrong, and, with `mask_truncated`, not cut off by the token limit.

Legend: N trained tokens, D model dimension, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanochat.common import UserError, World
from nanochat.rl import is_live
from nanochat.shared_prefix import RLBatch, microbatches
from nanochat.train import NonFiniteGuard, optimizer_step

if TYPE_CHECKING:
    from nanochat.gpt import GPT
    from nanochat.optim import MuonAdamW
    from nanochat.rl import Episode

LossKind = Literal["dapo", "dr_grpo", "grpo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Every number that the gradient of an RL step depends on, but the episodes."""

    loss: LossKind = "dapo"
    temperature: float = 1.0
    updates_per_rollout: int = 1
    clip_low: float = 0.2
    """the ratio is clipped below 1 - clip_low; used only with updates_per_rollout > 1"""
    clip_high: float = 0.28
    """and above 1 + clip_high: higher than low, so that rare tokens can grow (DAPO's clip-higher)"""
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    mask_truncated: bool = False
    max_completion_tokens: int = 0
    """the denominator of dr_grpo"""

    def __post_init__(self) -> None:
        if self.loss not in ("dapo", "dr_grpo", "grpo"):
            raise UserError(f"--loss={self.loss} is not known; use dapo, dr_grpo or grpo")
        if not self.temperature > 0:
            raise UserError(f"--temperature={self.temperature}: rollouts need a temperature above 0; try 1.0")
        if self.updates_per_rollout < 1:
            raise UserError(f"--updates_per_rollout={self.updates_per_rollout}: use 1 or more")
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise UserError(
                f"--clip_low={self.clip_low} --clip_high={self.clip_high}: use 0.2 and 0.28, or near"
            )
        if self.kl_coef < 0:
            raise UserError(f"--kl_coef={self.kl_coef} would reward drifting away; use 0 or more")
        if self.loss == "dr_grpo" and self.max_completion_tokens < 1:
            raise UserError(
                "--loss=dr_grpo divides by the longest completion allowed; give max_completion_tokens"
            )

    @property
    def clips(self) -> bool:
        return self.updates_per_rollout > 1


def trained_episodes(groups: Sequence[Sequence[Episode]], objective: Objective) -> list[list[Episode]]:
    """The live groups, less what the objective leaves out, with at least one sampled token per episode."""
    kept = [
        [
            e
            for e in group
            if any(e.completion.mask) and not (objective.mask_truncated and e.completion.truncated)
        ]
        for group in groups
        if is_live(group)
    ]
    return [group for group in kept if group]


def token_weight(num_tokens: int, objective: Objective) -> float:
    """What one token of a completion with `num_tokens` trained tokens counts in the sum."""
    return 1.0 / num_tokens if objective.loss == "grpo" else 1.0


def loss_normalizer(groups: Sequence[Sequence[Episode]], objective: Objective, world: World) -> float:
    """What the summed loss is divided by: the same number on all ranks, 0 when no group of the step is live."""
    lengths = [sum(e.completion.mask) for group in trained_episodes(groups, objective) for e in group]
    total = torch.tensor([sum(lengths), len(lengths)], dtype=torch.int64, device=world.device)
    num_tokens, num_episodes = world.sum(total).tolist()
    if objective.loss == "dr_grpo":
        return float(num_episodes * objective.max_completion_tokens)
    return float(num_tokens if objective.loss == "dapo" else num_episodes)


def policy_gradient_loss(
    model: GPT, batch: RLBatch, *, objective: Objective, meter: LossMeter | None = None
) -> Tensor:
    """The batch's contribution to the loss, a weighted sum over its tokens; divide by `loss_normalizer`."""
    hidden = batch.hidden(model)  # (N, D)
    temperature = objective.temperature
    if objective.clips or objective.kl_coef:
        logprobs = model.token_logprobs(hidden, batch.targets, temperature=temperature)  # (N,)
        loss = (token_losses(logprobs, batch, objective) * batch.weights).sum()
    else:  # a sum of log-probabilities with known factors: its gradient costs one product of the head less
        scale = batch.advantages * batch.weights
        loss, logprobs = model.weighted_loss(hidden, batch.targets, scale, temperature=temperature)
    if objective.entropy_coef:
        entropies = token_entropies(model, hidden, temperature)
        loss = loss - objective.entropy_coef * (entropies * batch.weights).sum()
    if meter is not None:
        meter.update(logprobs.detach(), batch, objective)
    return loss


def token_losses(logprobs: Tensor, batch: RLBatch, objective: Objective) -> Tensor:
    """What each token loses, (N,): -A log p on policy; -min(ratio A, clipped ratio A) with old samples; plus KL."""
    if not objective.clips:
        losses, age = -batch.advantages * logprobs, torch.ones_like(logprobs)
    else:
        ratio = torch.exp(logprobs - batch.sampler_logprobs)
        bounded = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
        losses = -torch.minimum(ratio * batch.advantages, bounded * batch.advantages)
        age = (
            ratio.detach()
        )  # keeps the KL's expectation under the present policy once samples are an update old
    if objective.kl_coef:
        assert batch.reference_logprobs is not None, (
            "kl_coef needs the reference's log-probabilities in the batch"
        )
        losses = losses + objective.kl_coef * age * 0.5 * (logprobs - batch.reference_logprobs).square()
    return losses


def token_entropies(model: GPT, hidden: Tensor, temperature: float, *, chunk: int = 128) -> Tensor:
    """Entropy in nats of the next-token distribution at every row of `hidden` (N, D) -> (N,), chunk by chunk."""

    def entropy(rows: Tensor) -> Tensor:
        logp = torch.log_softmax(model.logits(rows) / temperature, dim=-1)  # (chunk, V)
        return -(logp.exp() * logp).sum(-1)

    return torch.cat([checkpoint(entropy, rows, use_reentrant=False) for rows in hidden.split(chunk)])


@torch.no_grad()
def batch_logprobs(model: GPT, batch: RLBatch, *, temperature: float) -> Tensor:
    """Log-probability (N,) of every trained token under `model`, for the reference and for telemetry."""
    return model.token_logprobs(batch.hidden(model), batch.targets, temperature=temperature)


def kl_estimates(logprobs: Tensor, reference_logprobs: Tensor) -> dict[str, Tensor]:
    """Schulman's three estimators of KL(policy || reference), one value per sample of the policy.

    See http://joschu.net/blog/kl-approx.html. k1 is unbiased and can be negative, k2 is biased with the right gradient, k3 is unbiased and never negative.
    """
    log_ratio = logprobs - reference_logprobs
    return {"k1": log_ratio, "k2": 0.5 * log_ratio.square(), "k3": torch.expm1(-log_ratio) + log_ratio}


class LossMeter:
    """What the loss saw in one update, kept on the device until `metrics` asks: no host sync per microbatch."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # per microbatch (5,): tokens, |trainer - sampler|, clipped, ratio, k2
        self._largest: list[Tensor] = []
        self._has_reference = False

    def update(self, logprobs: Tensor, batch: RLBatch, objective: Objective) -> None:
        difference = logprobs - batch.sampler_logprobs
        ratio = difference.exp()
        # Only where the bound is the smaller term does clipping take the gradient away.
        up = (ratio > 1 + objective.clip_high) & (batch.advantages > 0)
        down = (ratio < 1 - objective.clip_low) & (batch.advantages < 0)
        self._has_reference = batch.reference_logprobs is not None
        reference = logprobs if batch.reference_logprobs is None else batch.reference_logprobs
        k2 = kl_estimates(logprobs, reference)["k2"]
        columns = [torch.ones_like(ratio), difference.abs(), (up | down) * float(objective.clips), ratio, k2]
        self._sums.append(torch.stack([column.sum() for column in columns]))
        self._largest.append(difference.abs().max())

    def metrics(self, world: World) -> dict[str, float]:
        """Over all ranks; empty where no rank trained a token. A collective: call it on every rank or on none."""
        local = torch.stack(self._sums).double().sum(0).tolist() if self._sums else [0.0] * 5
        largest = float(torch.stack(self._largest).max()) if self._largest else 0.0
        ranks = world.gather([*local, largest])
        has_reference = any(world.gather(self._has_reference))
        tokens, difference, clipped, ratio, k2 = (math.fsum(rank[i] for rank in ranks) for i in range(5))
        if not tokens:
            return {}
        return {
            "rl/sampler_trainer_logp_diff_mean": difference / tokens,
            "rl/sampler_trainer_logp_diff_max": max(rank[5] for rank in ranks),
            "rl/clip_fraction": clipped / tokens,
            "rl/ratio_mean": ratio / tokens,
            **({"rl/kl_k2_mean": k2 / tokens} if has_reference else {}),
        }


def update_policy(
    model: GPT,
    optimizer: MuonAdamW,
    groups: Sequence[Sequence[Episode]],
    *,
    objective: Objective,
    world: World,
    lr_scale: float = 1.0,
    token_budget: int = 2048,
    max_grad_norm: float | None = 1.0,
    reference: GPT | None = None,
    shared_prefix: bool = True,
    want_update_norm: bool = False,
    guard: NonFiniteGuard | None = None,
    step: int = 0,
) -> dict[str, float]:
    """All updates of one rollout, and what they did; a collective. Without a live group on any rank nothing moves.

    `groups` with their advantages filled in, this rank's share. Of several updates, sampler against trainer is the
    first's (later ones are meant to differ), everything else the last's. `guard` is told of every update of `step`.
    """
    normalizer = loss_normalizer(groups, objective, world)
    batches = microbatches(
        trained_episodes(groups, objective),
        token_budget=token_budget,
        smear=model.config.smear,
        weight=partial(token_weight, objective=objective),
        shared=shared_prefix,
    )
    batches = [_with_reference(reference, batch.to(world.device), objective) for batch in batches]
    metrics: dict[str, float] = {}
    for update in range(objective.updates_per_rollout if normalizer else 0):
        meter = LossMeter()
        loss_fn = partial(policy_gradient_loss, objective=objective, meter=meter)
        result = optimizer_step(
            model,
            optimizer,
            batches,
            loss_fn,
            normalizer=normalizer,
            lr_scale=lr_scale,
            world=world,
            max_grad_norm=max_grad_norm,
            want_update_norm=want_update_norm,
        )
        if guard is not None:
            guard.note(step, result, batches, last=True)
        parity = {name: value for name, value in metrics.items() if update and "logp_diff" in name}
        metrics = meter.metrics(world) | parity
        metrics |= {"train/loss": result.loss, "train/grad_norm": result.grad_norm}
        metrics["train/skipped"] = float(result.skipped)
        if want_update_norm:
            metrics["train/update_norm"] = result.update_norm
    return metrics or {"train/loss": 0.0, "train/grad_norm": 0.0, "train/update_norm": 0.0}


def _with_reference(reference: GPT | None, batch: RLBatch, objective: Objective) -> RLBatch:
    """The batch with the reference's log-probabilities, where the loss needs them."""
    if not objective.kl_coef:
        return batch
    assert reference is not None, "kl_coef needs a reference"
    logprobs = batch_logprobs(reference, batch, temperature=objective.temperature)
    return dataclasses.replace(batch, reference_logprobs=logprobs)
