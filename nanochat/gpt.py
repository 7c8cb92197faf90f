"""The model: a decoder-only transformer, and nothing about training or sampling.

Rotary positions, queries and keys normalised after rotation, relu-squared MLP, an output head of its own, a
soft cap on the logits; no biases and no learned norm scales. Every number that changes the function stands in
GPTConfig (architecture.py), so a checkpoint's own config decides what it computes.

The one surprising choice is `attend`. A block computes q, k and v and hands them to a function it was given:

    attend(layer, q (B,T,H,hd), k (B,T,Hkv,hd), v (B,T,Hkv,hd)) -> (B,T,H,hd)

Causal training, packed conversations, a key-value cache, prompts shared by many samples, a probe that looks at
attention: each is such a function, and the model knows of none of them.

Parameters are fp32; each weight is cast to the compute dtype where it is used (no autocast).

Shapes: B batch, T time, D model width, H query heads, G key-value heads, hd head size, V vocabulary, N positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import head
from nanochat.architecture import GPTConfig as GPTConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without learned scales."""
    return F.rms_norm(x, (x.size(-1),))


def rope_tables(config: GPTConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine for `positions` (B,T), each (B,T,1,hd/2); computed anew, so no length is too long."""
    exponents = (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    )
    angles = positions.float().unsqueeze(-1) * (1.0 / config.rope_base**exponents)  # (B,T,hd/2)
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    if config.rope_bf16:
        cos, sin = cos.bfloat16(), sin.bfloat16()
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + hd/2]) of x (B,T,H,hd) clockwise by their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)


def segment_positions(segments: Tensor) -> Tensor:
    """Positions (B,T) that restart at 0 with each run of equal values in segments (B,T)."""
    index = torch.arange(segments.size(1), device=segments.device).expand_as(segments)
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def preceding(ids: Tensor, count: int, segments: Tensor | None = None) -> Tensor:
    """The `count` ids before each position of ids (B,T), nearest first: (B,T,count), -1 where there is none."""
    columns = []
    for back in range(1, count + 1):
        column = F.pad(ids, (back, 0), value=-1)[:, : ids.size(1)]
        if segments is not None:
            # -2 is no segment's number, so a position before the row never counts as the same conversation.
            there = F.pad(segments, (back, 0), value=-2)[:, : ids.size(1)]
            column = torch.where(there == segments, column, -1)
        columns.append(column)
    return torch.stack(columns, dim=-1)


def causal_mask(length: int, window: int | None, segments: Tensor | None, device: torch.device) -> Tensor:
    """True where a query (row) may look at a key (column): (T,T), or (B,1,T,T) with segments."""
    index = torch.arange(length, device=device)
    behind = index[:, None] - index[None, :]
    mask = behind >= 0
    if window is not None:
        mask = mask & (behind < window)
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def causal_attend(config: GPTConfig, segments: Tensor | None = None) -> Attend:
    """Attention for training on whole rows: each token sees itself and those before it, in its own segment."""
    masks: dict[int | None, Tensor] = {}  # by window, so that layers share them; lives for one forward

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = config.window(layer)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B,H,T,hd)
        grouped = q.size(1) != k.size(1)
        if segments is None and (window is None or window >= q.size(2)):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            if window not in masks:
                masks[window] = causal_mask(q.size(2), window, segments, q.device)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[window], enable_gqa=grouped)
        return y.transpose(1, 2)  # (B,T,H,hd)

    return attend


class Linear(nn.Module):
    """A matrix (out, in) without bias, cast to its input's dtype at use."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """The four matrices of attention; what happens between them is `attend`'s."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim, self.qk_scale = config.head_dim, config.qk_scale
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_proj = Linear(config.n_head * config.head_dim, config.n_embd)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, ready to attend."""
        q = self.c_q(x).unflatten(-1, (-1, self.head_dim))  # (B,T,H,hd)
        k = self.c_k(x).unflatten(-1, (-1, self.head_dim))  # (B,T,G,hd)
        v = self.c_v(x).unflatten(-1, (-1, self.head_dim))  # (B,T,G,hd)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        if self.qk_scale != 1.0:
            q, k = q * self.qk_scale, k * self.qk_scale
        return q, k, v


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return self.after(x, attend(layer, *self.before(x, cos, sin)))

    # Around attention every position is by itself: two functions of tensors alone, which can be compiled.

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of states x (B,T,D)."""
        return self.attn.project(norm(x), cos, sin)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's output (B,T,D) from its input and what attention gave (B,T,H,hd)."""
        x = x + self.attn.c_proj(attended.flatten(-2))
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = dtype
        self.fused_head = False  # True: compile the head's elementwise part
        self.transformer = nn.ModuleDict(
            {
                "wte": Linear(config.n_embd, config.vocab_size),  # used as a table: row i is token i
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        if config.smear:
            self.smear = Linear(config.n_embd, config.smear)  # row j weighs the embedding j + 1 tokens back
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw the weights from torch's global generator.

        tensor                         distribution                    why
        wte                            normal, std 1                   a norm follows; AdamW's rates assume this size
        c_q c_k c_v, c_fc              uniform, std 1 / sqrt(fan in)   keeps unit variance; no outliers, unlike a normal
        attn.c_proj, mlp.c_proj        0                               every block starts as the identity
        lm_head                        normal, std 0.001               the first loss is log V, yet gradient flows back
        smear                          0.3                             starts as mixing, not as something to discover
        """
        if self.device.type == "meta":
            return  # a checkpoint will fill it; drawing on meta would only import half of torch
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):
                weight.zero_()
            elif name == "smear.weight":
                weight.fill_(0.3)
            elif name == "transformer.wte.weight":
                weight.normal_(std=1.0)
            elif name == "lm_head.weight":
                weight.normal_(std=0.001)
            else:
                bound = (3 / weight.size(1)) ** 0.5  # uniform on +-bound has std bound / sqrt(3)
                weight.uniform_(-bound, bound)

    @property
    def embeddings(self) -> Tensor:
        """The table (V,D) of token embeddings."""
        return cast(Linear, self.transformer["wte"]).weight

    @property
    def blocks(self) -> list[Block]:
        return cast("list[Block]", self.transformer["h"])

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def num_params(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations for forward and backward of one token in a row of `length`.

        6 per matrix weight, and 12 * H * hd per layer and visible token, the mask's half not taken off: the
        convention of PaLM (appendix B, https://arxiv.org/abs/2204.02311), so that MFU compares with nanochat's.
        """
        config = self.config
        matrices = self.num_params() - self.embeddings.numel()
        windows = [config.window(layer) or length for layer in range(config.n_layer)]
        return 6.0 * matrices + 12.0 * config.n_embd * sum(min(length, window) for window in windows)

    def embed(self, ids: Tensor, context: Tensor | None = None) -> Tensor:
        """Embeddings (B,T,D) of ids (B,T), the preceding tokens of `context` (B,T,k) mixed in."""
        table = self.embeddings
        x = F.embedding(ids, table).to(self.compute_dtype)
        if self.config.smear:
            context = preceding(ids, self.config.smear) if context is None else context
            for back in range(self.config.smear):
                token = context[..., back]
                share = self.smear.weight[back] * (token >= 0).unsqueeze(
                    -1
                )  # nothing stands before the first token
                x = x + (F.embedding(token.clamp(min=0), table) * share).to(self.compute_dtype)
        return x

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        context: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """Final states (B,T,D) of ids (B,T), ready for the head.

        positions (B,T): default 0..T-1. context (B,T,smear): the ids before each position, nearest first, -1
        where there is none; default the row itself. attend: default causal over the row.
        """
        if positions is None:
            positions = torch.arange(ids.size(1), device=ids.device).unsqueeze(0)
        cos, sin = rope_tables(self.config, positions, self.compute_dtype)
        attend = attend or causal_attend(self.config)
        x = norm(self.embed(ids, context))
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, cos, sin, attend)
        return norm(x)

    def packed_hidden(
        self, ids: Tensor, segments: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Final states of rows that hold several conversations, each computed as if it stood alone.

        segments (B,T): the conversation's number within its row, -1 on padding.
        """
        if segments is None:
            return self.hidden(ids, positions=positions)
        positions = segment_positions(segments) if positions is None else positions
        context = preceding(ids, self.config.smear, segments) if self.config.smear else None
        return self.hidden(
            ids, positions=positions, context=context, attend=causal_attend(self.config, segments)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits (...,V) in fp32 of states (...,D)."""
        return self.config.softcap * torch.tanh(self.lm_head(hidden).float() / self.config.softcap)

    def token_logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk: int | None = None
    ) -> Tensor:
        """Log-probability (N,) in fp32 of targets (N,) at states (N,D); any function of it can be differentiated."""
        weight, softcap = self.lm_head.weight, self.config.softcap
        return head.token_logprobs(
            hidden, weight, targets, softcap=softcap, temperature=temperature, chunk=chunk
        )

    def weighted_loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        scale: Tensor | None = None,
        *,
        temperature: float = 1.0,
        chunk: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-sum(scale * log-probability) over targets >= 0, and the log-probabilities (N,), detached.

        Cheaper than token_logprobs where the loss is such a sum and scale (N,; default 1) is known beforehand.
        """
        return head.weighted_loss(
            hidden,
            self.lm_head.weight,
            targets,
            scale,
            softcap=self.config.softcap,
            temperature=temperature,
            chunk=chunk,
            fuse=self.fused_head,
        )

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits (B,T,V) of ids (B,T); with targets (B,T) the cross entropy summed over targets >= 0."""
        hidden = self.packed_hidden(ids, segments, positions)
        if targets is None:
            return self.logits(hidden)
        return self.weighted_loss(hidden.flatten(0, 1), targets.flatten())[0]
