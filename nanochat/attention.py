"""Where the model looks: attention recomputed from q and k on a fixed probe, never on training passes.

Fast attention keeps no probabilities, so a probe wraps gpt's `attend` hook, records q and k (after rotation, norm and
scale), and computes softmax(q k / sqrt(hd)) again for the rows of interest. tests/test_attention.py holds that against
scaled_dot_product_attention to 1e-5 with windows, grouped heads and padding.

Which rows: entropy, first-token mass and distance are averaged over the rows from the prompt's last token to the answer
position. The entropy of row t can be at most log(t + 1), so averaging over a prompt's early rows, as is often done,
mostly measures its length; beside the raw figure stands the one divided by log(visible keys), which is 1 for even
attention. Option masses are read at the answer position, the row that predicts the letter.

Views: PNG, and a standalone HTML page by DeepMind's treescope (`uv sync --inexact --extra interp`).

Legend: B sequences, T time, R rows of interest, H query heads, G key heads of size hd, D model dimension.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.gpt import causal_attend, norm
from nanochat.letters import answer_sequences
from nanochat.rl import Episode

if TYPE_CHECKING:
    from nanochat.gpt import GPT, Attend
    from nanochat.tokenizer import Tokenizer

_SPECIAL = re.compile(rb"\A<\|\w+\|>\Z")
MAX_MAP = 256  # tokens a side: an HTML page of 512 x 512 x 6 heads would weigh 8 MB


class Recorder:
    """An Attend that passes everything on to another and keeps q and k of chosen layers."""

    def __init__(self, attend: Attend, layers: Collection[int] | None = None) -> None:
        self.attend = attend
        self.layers = layers
        self.queries: dict[int, Tensor] = {}  # layer -> (B, T, H, hd)
        self.keys: dict[int, Tensor] = {}  # layer -> (B, T, G, hd)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.layers is None or layer in self.layers:
            self.queries[layer], self.keys[layer] = q.detach(), k.detach()
        return self.attend(layer, q, k, v)


def attention_probabilities(
    q: Tensor, k: Tensor, *, window: int | None = None, lengths: Tensor | None = None, first_row: int = 0
) -> Tensor:
    """Causal attention (B, H, R, T) in fp32 of q (B, T, H, hd), k (B, T, G, hd) for the rows from `first_row` on.

    lengths (B,): real tokens of rows padded on the right; padding attends to nothing and gets nothing, all zeros.
    """
    size = k.size(1)
    k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
    scores = torch.einsum("brhd,bthd->bhrt", q[:, first_row:].float(), k.float()) / math.sqrt(q.size(-1))
    row = torch.arange(first_row, size, device=q.device)
    behind = row[:, None] - torch.arange(size, device=q.device)[None, :]
    hidden = (behind < 0) | (behind >= (window or size))  # (R, T)
    probabilities = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    if lengths is not None:
        probabilities = probabilities * (row < lengths.to(q.device)[:, None])[:, None, :, None]
    return probabilities


def option_spans(tokenizer: Tokenizer, prompt_ids: Sequence[int], letters: Sequence[str]) -> dict[str, range]:
    """Which tokens of the prompt make up each option's line, `- text=A` or `A) text`; what is not found is left out."""
    # A special token ends a line: the last option may stand directly before <|user_end|>.
    pieces = [_SPECIAL.sub(b"\n", tokenizer.token_bytes_of(token)) for token in prompt_ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    text = b"".join(pieces)
    spans = {}
    for letter in letters:
        name = re.escape(letter.encode())
        line = re.compile(rb"(?m)^(?:[-*][ \t]+.*=[ \t]*%b[ \t]*|\(?%b[).:][^\n]*)$" % (name, name))
        if found := list(line.finditer(text)):
            first = int(np.searchsorted(ends, found[-1].start(), side="right"))
            last = int(np.searchsorted(ends, found[-1].end(), side="left"))
            spans[letter] = range(first, last + 1)
    return spans


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """What `attention_telemetry` found."""

    metrics: dict[str, float]
    heads: list[dict[str, float]]
    """rows of the table attn/heads: one per layer and head"""
    maps: dict[int, np.ndarray]
    """layer -> (H, T, T) of the first sequence: first, middle and last layer, cropped to MAX_MAP"""
    tokens: list[str]
    """the words beside the maps"""


@dataclass(frozen=True, slots=True)
class _Probe:
    """The batch that is looked at."""

    ids: Tensor  # (B, T)
    lengths: Tensor  # (B,) of prompt and completion up to the answer position
    starts: Tensor  # (B,) the prompt's last token
    spans: list[dict[str, range]]
    episodes: Sequence[Episode]


@torch.no_grad()
def attention_telemetry(model: GPT, tokenizer: Tokenizer, episodes: Sequence[Episode]) -> AttentionReport:
    """Everything about attention on a few episodes, under the names of the dashboards. No collective."""
    assert episodes, "the attention probe needs at least one episode"
    probe = _probe(model, tokenizer, episodes)
    recorder = Recorder(causal_attend(model.config))
    residuals: list[Tensor] = []  # of each block, at the answer position: (B, D)
    last = torch.arange(len(episodes)), probe.lengths - 1
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: residuals.append(output[last]))
        for block in model.blocks
    ]
    try:
        model.hidden(probe.ids, attend=recorder)
    finally:
        for hook in hooks:
            hook.remove()
    heads: list[dict[str, float]] = []
    masses: dict[str, list[float]] = {}
    for layer in range(model.config.n_layer):
        rows, found = _look(recorder, layer, model.config.window(layer), probe)
        heads += rows
        for name, values in found.items():
            masses.setdefault(name, []).extend(values)
    metrics = _means(heads) | {name: float(np.mean(values)) for name, values in masses.items()}
    metrics |= _logit_lens(model, tokenizer, residuals, episodes)
    size = min(int(probe.lengths[0]), MAX_MAP)
    layers = sorted({0, model.config.n_layer // 2, model.config.n_layer - 1})
    maps = {layer: _map(recorder, layer, model.config.window(layer), size) for layer in layers}
    return AttentionReport(
        metrics, heads, maps, [tokenizer.decode([i]) for i in probe.ids[0, :size].tolist()]
    )


def _probe(model: GPT, tokenizer: Tokenizer, episodes: Sequence[Episode]) -> _Probe:
    sequences, _ = answer_sequences(tokenizer, episodes)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=model.device)
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    starts = torch.tensor([len(e.prompt_ids) - 1 for e in episodes], device=model.device)
    spans = [option_spans(tokenizer, e.prompt_ids, e.conversation.get("letters", ())) for e in episodes]
    return _Probe(ids.to(model.device), lengths, starts, spans, episodes)


def _look(
    recorder: Recorder, layer: int, window: int | None, probe: _Probe
) -> tuple[list[dict[str, float]], dict[str, list[float]]]:
    """One layer: a row per head, and every sequence's option masses at the answer position, heads averaged."""
    first = int(probe.starts.min())
    p = attention_probabilities(
        recorder.queries[layer], recorder.keys[layer], window=window, lengths=probe.lengths, first_row=first
    )  # (B, H, R, T)
    row = torch.arange(first, p.size(-1), device=p.device)
    behind = row[:, None] - torch.arange(p.size(-1), device=p.device)
    counted = (row >= probe.starts[:, None]) & (row < probe.lengths[:, None])  # (B, R)
    visible = (row + 1).clamp(max=window or p.size(-1))
    entropies = -torch.special.xlogy(p, p).sum(-1)  # (B, H, R)
    even = torch.log(visible.float()).clamp(min=1e-9)
    measures = {
        "entropy": entropies,
        "entropy_normalised": entropies / even,
        "bos_mass": p[..., 0],
        "mean_distance": (p * behind.clamp(min=0)).sum(-1),
    }
    weight = counted[:, None, :] / counted.sum()
    table = {name: (values * weight).sum((0, 2)).tolist() for name, values in measures.items()}  # (H,)
    heads = [
        {"layer": layer, "head": head, **{name: column[head] for name, column in table.items()}}
        for head in range(p.size(1))
    ]
    answer = p[torch.arange(len(p)), :, probe.lengths - 1 - first].mean(1).cpu()  # (B, T)
    masses: dict[str, list[float]] = {}
    for mass, spans, episode in zip(answer, probe.spans, probe.episodes, strict=True):
        for letter, span in spans.items():
            value = mass[span.start : span.stop].sum().item()
            masses.setdefault(f"attn/option_mass/{letter}", []).append(value)
            if letter == episode.gold:
                masses.setdefault("attn/gold_option_mass", []).append(value)
    return heads, masses


def _means(heads: Sequence[dict[str, float]]) -> dict[str, float]:
    def mean(name: str, rows: Sequence[dict[str, float]]) -> float:
        return float(np.mean([row[name] for row in rows]))

    metrics = {
        "attn/entropy_mean": mean("entropy", heads),
        "attn/entropy_normalised_mean": mean("entropy_normalised", heads),
        "attn/bos_mass": mean("bos_mass", heads),
        "attn/mean_distance": mean("mean_distance", heads),
    }
    for layer in sorted({int(row["layer"]) for row in heads}):
        rows = [row for row in heads if row["layer"] == layer]
        metrics[f"attn/entropy_layer/{layer}"] = mean("entropy", rows)
        metrics[f"attn/entropy_normalised_layer/{layer}"] = mean("entropy_normalised", rows)
    return metrics


def _logit_lens(
    model: GPT, tokenizer: Tokenizer, residuals: Sequence[Tensor], episodes: Sequence[Episode]
) -> dict[str, float]:
    """The gold letter's probability among the letters if the model stopped after each block."""
    asked = [i for i, e in enumerate(episodes) if e.conversation.get("letters") and e.gold]
    letters = {i: list(episodes[i].conversation["letters"]) for i in asked}
    ids = {i: tokenizer.letter_ids(names) for i, names in letters.items()}
    metrics = {}
    for layer, residual in enumerate(residuals):
        logits = model.logits(norm(residual))  # (B, V)
        gold = [
            torch.softmax(logits[i, ids[i]], -1)[letters[i].index(str(episodes[i].gold))].item()
            for i in asked
        ]
        if gold:
            metrics[f"attn/logit_lens_gold_prob/{layer}"] = float(np.mean(gold))
    return metrics


def _map(recorder: Recorder, layer: int, window: int | None, size: int) -> np.ndarray:
    q, k = recorder.queries[layer][:1, :size], recorder.keys[layer][:1, :size]
    result: np.ndarray = attention_probabilities(q, k, window=window)[0].cpu().numpy()
    return result


def heatmap_png(probabilities: np.ndarray, tokens: Sequence[str], *, title: str, max_heads: int = 8) -> bytes:
    """A picture of (H, T, T): one square per head, rows look at columns, darker is more.

    Faint lines stand where a line of the text ends. Painted by hand: matplotlib would take five seconds to import and one per picture, more than all other telemetry.
    """
    heads = probabilities[:max_heads, :, :, None]
    # The square root lifts faint attention: most of it is below 5 %.
    pixels = 255 - np.sqrt(heads) * (255 - np.array([8.0, 48.0, 107.0]))  # (H, T, T, 3): white to dark blue
    ends = [place for place, token in enumerate(tokens) if "\n" in token]
    pixels[:, ends] *= 0.93
    pixels[:, :, ends] *= 0.93
    zoom = max(1, 240 // len(tokens))
    pixels = np.pad(
        pixels.repeat(zoom, 1).repeat(zoom, 2), [(0, 0), (4, 4), (4, 4), (0, 0)], constant_values=255
    )
    columns = min(4, len(pixels))
    rows, size = -(-len(pixels) // columns), pixels.shape[1]
    pixels = np.pad(pixels, [(0, rows * columns - len(pixels)), (0, 0), (0, 0), (0, 0)], constant_values=255)
    grid = pixels.reshape(rows, columns, size, size, 3).swapaxes(1, 2).reshape(rows * size, columns * size, 3)
    return _png(grid.round().astype(np.uint8), title)


def _png(pixels: np.ndarray, title: str) -> bytes:
    """(height, width, 3) bytes as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    lines = np.pad(pixels.reshape(height, -1), [(0, 0), (1, 0)])  # every line begins with its filter: 0, none
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    text = b"Title\0" + title.encode("latin-1", errors="replace")
    body = [(b"IHDR", header), (b"tEXt", text), (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in body)


def treescope_package() -> Any:
    """What draws the HTML view. Raises UserError where it is not installed."""
    try:
        import treescope
    except ImportError:
        raise UserError(
            "the HTML view needs treescope: uv sync --inexact --extra interp, or leave --attn_html off"
        ) from None
    return treescope


def attention_html(maps: dict[int, np.ndarray], tokens: Sequence[str]) -> str:
    """A standalone page by treescope: (layers, H, T, T) with sliders for layer and head, the words on both sides.

    numpy arrays only: treescope 0.1.10 fails on any torch tensor from torch 2.13 on.
    """
    treescope = treescope_package()
    layers = sorted(maps)
    names = [_visible(token) for token in tokens]
    figure: Any = treescope.render_array(
        np.stack([maps[layer] for layer in layers]).astype(np.float32),
        sliders=[0, 1],
        rows=[2],
        columns=[3],
        axis_labels={0: "layer", 1: "head", 2: "looks from", 3: "looks at"},
        axis_item_labels={0: [f"layer {layer}" for layer in layers], 2: names, 3: names},
        vmin=0.0,
        vmax=1.0,
        around_zero=False,
        truncate=False,
    )
    # The notebook form of the figure: render_to_html(figure) would show its repr, with the picture folded away.
    return f'<!doctype html><meta charset="utf-8"><title>attention</title>{figure._repr_html_()}\n'


def _visible(token: str) -> str:
    """A token as a label, white space shown."""
    return token.replace("\n", "\u21b5").replace(" ", "\u00b7") or "\u2205"
