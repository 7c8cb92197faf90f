"""What the policy thinks of A..E: read at the answer position, before any letter is sampled.

The answer position is the token after the final `Answer:` of a completion. Where a completion has none, the words are
appended to what was generated, and the share of such cases is reported: their letters are an opinion that the model was
never going to voice. Letters are read at the token that the tokenizer emits there (" A" or "A": Tokenizer.letter_ids).

Two distances from the reference, named because they are often confused:

- letter KL is exact: KL(policy || reference) over the question's letters, in nats; only the completion was sampled.
- sequence KL is estimated from the sampled tokens, in nats per token, averaged within each completion: k1 is unbiased
  and may be negative, k3 is unbiased and never negative. Both hold for completions sampled from the present policy, so
  measure BEFORE the update. `rl/kl_sequence_{mean,std,hist}` is k3.

Legend: N answers, L letters, V vocabulary, D model dimension.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.policy_gradient import batch_logprobs, kl_estimates
from nanochat.rl import Episode, question_text
from nanochat.shared_prefix import microbatches
from nanochat.statistics import entropy
from nanochat.tracking import Histogram

if TYPE_CHECKING:
    from nanochat.gpt import GPT
    from nanochat.tokenizer import Tokenizer

KLMode = Literal["letter", "sequence", "both"]
Metric = float | int | Histogram

CUE = "Answer:"
# As the marking does it (tasks/answers.py), on bytes: completions need not be valid UTF-8.
_MARKER = re.compile(rb"(?i)(?<![a-z0-9_])answer\**[ \t]*:")


def answer_position(tokenizer: Tokenizer, completion_ids: Sequence[int]) -> tuple[list[int], bool]:
    """The completion up to and with its last `Answer:`, and whether that had to be appended.

    `completion_ids` without the stop token. Where the colon ends inside a token, that token is cut: the next one must
    stand directly after the colon.
    """
    pieces = [tokenizer.token_bytes_of(token) for token in completion_ids]
    text = b"".join(pieces)
    found = list(_MARKER.finditer(text))
    if not found:
        cue = CUE if not text or text.endswith(b"\n") else f"\n{CUE}"
        return [*completion_ids, *tokenizer.encode(cue)], True
    end, length = found[-1].end(), 0
    for index, piece in enumerate(pieces):
        if length + len(piece) == end:
            return list(completion_ids[: index + 1]), False
        if length + len(piece) > end:
            rest = piece[: end - length].decode("utf-8", errors="replace")
            return [*completion_ids[:index], *tokenizer.encode(rest)], False
        length += len(piece)
    raise AssertionError(f"no token reaches byte {end} of {length}")


def answer_sequences(tokenizer: Tokenizer, episodes: Sequence[Episode]) -> tuple[list[list[int]], list[bool]]:
    """Prompt and completion up to the answer position of every episode, and which had `Answer:` appended."""
    sequences, appended = [], []
    for episode in episodes:
        ids = episode.completion.ids
        answer, was_appended = answer_position(tokenizer, ids if episode.completion.truncated else ids[:-1])
        sequences.append([*episode.prompt_ids, *answer])
        appended.append(was_appended)
    return sequences, appended


@torch.no_grad()
def letter_logits(
    model: GPT,
    sequences: Sequence[Sequence[int]],
    letter_ids: Sequence[Sequence[int]],
    *,
    token_budget: int = 8192,
) -> Tensor:
    """Logits (N, L) of each question's letters after its sequence; -inf where a question has fewer letters.

    Alike lengths share a batch, padded on the right.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    width = max(map(len, letter_ids))
    result = torch.full((len(sequences), width), float("-inf"))
    while order:
        size = max(
            1, token_budget // len(sequences[order[-1]])
        )  # the longest first: if memory fails, then at once
        batch, order = order[-size:], order[:-size]
        lengths = torch.tensor([len(sequences[i]) for i in batch])
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
        hidden = model.hidden(ids.to(model.device))  # (batch, T, D)
        logits = model.logits(hidden[torch.arange(len(batch)), lengths - 1]).cpu()  # (batch, V)
        for row, i in enumerate(batch):
            result[i, : len(letter_ids[i])] = logits[row, list(letter_ids[i])]
    return result


def letter_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(policy || reference) over the letters, exact, in nats: (N, L), (N, L) -> (N,)."""
    logp, logq = torch.log_softmax(logits.double(), -1), torch.log_softmax(reference_logits.double(), -1)
    return (logp.exp() * (logp - logq).nan_to_num(nan=0.0)).sum(-1)  # a letter that is not there: -inf - -inf


def margin(logits: Tensor) -> Tensor:
    """Top letter minus runner-up in logits: (N, L) -> (N,)."""
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def sequence_kl(
    policy: GPT, reference: GPT, episodes: Sequence[Episode], *, temperature: float, token_budget: int = 8192
) -> dict[str, list[float]]:
    """k1 and k3 of every episode, averaged over its sampled tokens; in the order of `episodes`."""
    groups: dict[tuple[int, ...], list[Episode]] = {}
    for episode in episodes:
        if episode.num_tokens:
            groups.setdefault(episode.prompt_ids, []).append(episode)
    found: dict[int, dict[str, float]] = {}
    smear = policy.config.smear
    for batch in microbatches(list(groups.values()), token_budget=token_budget, smear=smear):
        batch = batch.to(policy.device)
        logprobs, reference_logprobs = (
            batch_logprobs(model, batch, temperature=temperature).cpu().double()
            for model in (policy, reference)
        )
        owner = batch.owner.cpu()
        counts = torch.bincount(owner, minlength=len(batch.episodes))
        for name, values in kl_estimates(logprobs, reference_logprobs).items():
            means = torch.bincount(owner, values, minlength=len(counts)) / counts
            for episode, value in zip(batch.episodes, means.tolist(), strict=True):
                found.setdefault(id(episode), {})[name] = value
    return {name: [found[id(e)][name] for e in episodes if id(e) in found] for name in ("k1", "k3")}


@dataclass(frozen=True, slots=True)
class LetterReport:
    """What `letter_telemetry` found."""

    metrics: dict[str, Metric]
    hardest: list[dict[str, Any]]
    """rows of the table rl/hardest, lowest margin first"""


def letter_telemetry(
    policy: GPT,
    reference: GPT | None,
    tokenizer: Tokenizer,
    episodes: Sequence[Episode],
    *,
    mode: KLMode = "both",
    temperature: float = 1.0,
    num_hardest: int = 16,
    token_budget: int = 8192,
) -> LetterReport:
    """Everything of the letters under the names of issue and dashboards; without a reference, no KL.

    On this process alone, no collective. `temperature` is the one that the episodes were sampled with; letters are
    read at temperature 1.
    """
    if mode not in get_args(KLMode):
        raise UserError(f"--kl_mode={mode} is not known; use {', '.join(get_args(KLMode))}")
    asked = [e for e in episodes if e.conversation.get("letters") and e.gold]
    metrics: dict[str, Metric] = {}
    if reference is not None and mode != "letter" and episodes:
        metrics |= _sequence_metrics(policy, reference, episodes, temperature, token_budget)
    if not asked:
        return LetterReport(metrics, [])
    sequences, appended = answer_sequences(tokenizer, asked)
    names = [list(e.conversation["letters"]) for e in asked]
    ids = [tokenizer.letter_ids(row) for row in names]
    logits = letter_logits(policy, sequences, ids, token_budget=token_budget)
    if reference is not None and mode != "sequence":
        before = letter_logits(reference, sequences, ids, token_budget=token_budget)
        metrics.update(_spread("rl/kl_letter", letter_kl(logits, before).tolist()))
    predicted = [row[i] for row, i in zip(names, logits.argmax(-1).tolist(), strict=True)]
    gold = [str(e.gold) for e in asked]
    places = torch.tensor([row.index(g) for row, g in zip(names, gold, strict=True)])
    probability = torch.softmax(logits, -1).gather(1, places.unsqueeze(1))
    margins = margin(logits).tolist()
    metrics.update(_spread("rl/letter_margin", margins))
    metrics["rl/letter_prob_gold_mean"] = probability.mean().item()
    metrics["rl/answer_appended_rate"] = sum(appended) / len(appended)
    metrics.update(_counts("rl/letter_pred_counts", predicted, names))
    metrics["rl/letter_pred_entropy"] = entropy(list(Counter(predicted).values()))
    metrics.update(_counts("rl/gold_counts", gold, names))
    rows = sorted(zip(margins, asked, predicted, strict=True), key=lambda row: row[0])
    return LetterReport(metrics, [_hard_row(*row) for row in rows[:num_hardest]])


def _sequence_metrics(
    policy: GPT, reference: GPT, episodes: Sequence[Episode], temperature: float, token_budget: int
) -> dict[str, Metric]:
    estimates = sequence_kl(policy, reference, episodes, temperature=temperature, token_budget=token_budget)
    named = {"": estimates["k3"], "_k1": estimates["k1"], "_k3": estimates["k3"]}
    return {
        key: value
        for name, values in named.items()
        for key, value in _spread(f"rl/kl_sequence{name}", values).items()
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, Metric]:
    """Mean, population standard deviation and histogram."""
    if not values:
        return {}
    column = torch.tensor(values, dtype=torch.float64)
    mean, std = column.mean().item(), column.std(correction=0).item()
    return {f"{name}_mean": mean, f"{name}_std": std, f"{name}_hist": Histogram.of(values)}


def _counts(name: str, found: Sequence[str], names: Sequence[Sequence[str]]) -> Mapping[str, Metric]:
    counts = Counter(found)
    return {f"{name}/{letter}": counts[letter] for letter in sorted({x for row in names for x in row})}


def _hard_row(value: float, episode: Episode, predicted: str) -> dict[str, Any]:
    return {
        "margin": value,
        "question": question_text(episode.conversation),
        "options": _options(episode),
        "model letter": predicted,
        "gold letter": episode.gold,
        "completion": episode.text,
    }


def _options(episode: Episode) -> str:
    letters = episode.conversation["letters"]
    texts = episode.conversation.get("options") or [""] * len(letters)
    return " | ".join(f"{letter}) {text}" for letter, text in zip(letters, texts, strict=True))
