"""
A checkpoint as a directory that `transformers` opens, without code of ours: its NanoChat architecture, a fast tokenizer, a chat
template.

transformers' NanoChat is the model of October 2025. What came later and it has no word for:

    qk_scale    representable, by a detour: q and k are multiplied by s after their norm, which multiplies every attention
                logit by s^2. A head of n * hd dimensions whose q is [q, a * q, 0] and whose k is [k, 0, 0] has, after its own
                norm, the logits of ours times sqrt(n) / sqrt(1 + a^2); so a follows from s. Rotation leaves norms alone, and
                with n times the dimensions every n-th frequency is one of ours. Exact, at n = 3 for s = 1.2; the price is
                attention matrices three times as large.
    smear, windows     not representable: refused.
    rope_bf16   the rounding of cosine and sine is not representable: exported with exact ones, and said so.

Whether all this is true is not argued but measured: `export` opens what it wrote and compares logits with ours.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.common import UserError, write_atomic
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIALS, Tokenizer

TOLERANCE = 1e-4
END = "<|assistant_end|>"
WEIGHTS = "model.safetensors"
CHAT_TEMPLATE = """{{- bos_token -}}
{%- set state = namespace(preface='') -%}
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}{%- else -%}
{%- set last = namespace(kind='', text='') -%}
{%- for part in content -%}
{%- if part.type == 'text' -%}
{%- if last.kind == 'text' and last.text and part.text and not last.text.endswith('\\n') and not part.text.startswith('\\n') -%}{{- '\\n' -}}{%- endif -%}
{{- part.text -}}
{%- elif part.type == 'python' -%}{{- '<|python_start|>' + part.text + '<|python_end|>' -}}
{%- else -%}{{- '<|output_start|>' + part.text + '<|output_end|>' -}}{%- endif -%}
{%- set last.kind = part.type -%}{%- set last.text = part.text -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- if not loop.first -%}{{- raise_exception('a system message can only stand first') -}}{%- endif -%}
{%- set state.preface = text_of(message.content) + '\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{- '<|user_start|>' + state.preface + text_of(message.content) + '<|user_end|>' -}}
{%- set state.preface = '' -%}
{%- else -%}
{{- '<|assistant_start|>' + text_of(message.content) + '<|assistant_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}"""


def check_representable(config: GPTConfig) -> None:
    """Raise UserError for what transformers' NanoChat cannot compute."""
    if config.smear:
        raise UserError(
            f"this model mixes {config.smear} preceding tokens into each position (smear), which transformers' NanoChat "
            "cannot; train with --smear=0 (SMEAR=0) for a model that can be exported"
        )
    short = [
        layer for layer in range(config.n_layer) if (config.window(layer) or math.inf) < config.sequence_len
    ]
    if short:
        raise UserError(
            f"layers {short} see only {config.window_len} tokens (window_pattern), which transformers' NanoChat cannot"
        )


def widening(config: GPTConfig) -> tuple[int, float]:
    """(n, a): heads n times as wide, with `a` as the weight of q's copy, give our qk_scale; (1, 0) where it is 1."""
    if config.qk_scale == 1.0:
        return 1, 0.0
    factor = config.qk_scale**2  # of the attention logits; sqrt(n) / sqrt(1 + a^2) must equal it
    n = max(2, math.ceil(factor**2))
    return n, math.sqrt(n / factor**2 - 1)


def hf_config(config: GPTConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json."""
    n, _ = widening(config)
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": n * config.head_dim,
        "max_position_embeddings": config.sequence_len,
        "hidden_act": "relu2",
        "rms_norm_eps": torch.finfo(torch.float32).eps,  # what F.rms_norm takes when it is told nothing
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": config.softcap,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.special(END),
        "pad_token_id": tokenizer.special(END),
        "dtype": dtype,
        "nanochat": dataclasses.asdict(config),
    }


def hf_weights(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """(transformers' name, tensor) of every weight."""
    config = model.config
    yield "model.embed_tokens.weight", model.embeddings
    yield "lm_head.weight", model.lm_head.weight
    n, a = widening(config)
    for layer, block in enumerate(model.blocks):
        name, attn = f"model.layers.{layer}", block.attn
        q = _widen(attn.c_q.weight, config.n_head, n)
        if n > 1:
            q = q + a * _copied(attn.c_q.weight, config.n_head, n)
        yield f"{name}.self_attn.q_proj.weight", q
        yield f"{name}.self_attn.k_proj.weight", _widen(attn.c_k.weight, config.n_kv_head, n)
        yield f"{name}.self_attn.v_proj.weight", _widen(attn.c_v.weight, config.n_kv_head, n)
        yield f"{name}.self_attn.o_proj.weight", _widen(attn.c_proj.weight.T, config.n_head, n).T
        yield f"{name}.mlp.fc1.weight", block.mlp.c_fc.weight
        yield f"{name}.mlp.fc2.weight", block.mlp.c_proj.weight


def _places(head_dim: int, n: int, shift: int) -> Tensor:
    """Where the dimensions (hd,) of a head go in one n times as wide, so that each keeps its frequency (shift 0).

    Dimension i of a half turns by base^(-2i/hd); in a head of n * hd that is dimension n * i of its half.
    """
    half = torch.arange(head_dim // 2) * n + shift
    return torch.cat([half, half + n * head_dim // 2])


def _spread(weight: Tensor, heads: int, n: int, shift: int) -> Tensor:
    """Rows (heads * hd, D) as rows (heads * n * hd, D), the new ones zero."""
    if n == 1:
        return weight
    rows = weight.unflatten(0, (heads, -1))  # (H,hd,D)
    wide = weight.new_zeros(heads, n * rows.size(1), rows.size(2))
    wide[:, _places(rows.size(1), n, shift)] = rows
    return wide.flatten(0, 1)


def _widen(weight: Tensor, heads: int, n: int) -> Tensor:
    return _spread(weight, heads, n, 0)


def _copied(weight: Tensor, heads: int, n: int) -> Tensor:
    """The copy of q that only makes its norm longer: at frequencies that k leaves empty."""
    return _spread(weight, heads, n, 1)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Pairs in the order in which they are merged: every way to cut a token into two others, lowest rank first."""
    merges: list[tuple[bytes, bytes]] = []
    for piece, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return merges


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte, which tokenizer.json writes tokens in."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def hf_tokenizer(tokenizer: Tokenizer) -> Any:
    """The vocabulary as a PreTrainedTokenizerFast with the chat template."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import PreTrainedTokenizerFast

    letters = byte_letters()

    def spelled(piece: bytes) -> str:
        return "".join(letters[byte] for byte in piece)

    encoding = tokenizer.to_tiktoken()
    ranks = dict(encoding._mergeable_ranks)
    fast = FastTokenizer(
        models.BPE(
            vocab={spelled(piece): rank for piece, rank in ranks.items()},
            merges=[(spelled(left), spelled(right)) for left, right in merges_of(ranks)],
        )
    )
    split = pre_tokenizers.Split(Regex(tokenizer.pattern), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    fast.decoder = decoders.ByteLevel()
    specials = sorted(SPECIALS, key=tokenizer.special)
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    for name in specials:
        if fast.token_to_id(name) != tokenizer.special(name):
            raise UserError(f"{name} has id {tokenizer.special(name)} here, which tokenizer.json cannot say")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<|bos|>",
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def export(
    model: GPT, tokenizer: Tokenizer, folder: Path, *, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """
    Write the directory, open it again with transformers, and compare.

    Returns the largest difference of a logit and the size of the file; raises UserError where the model cannot be
    represented, and where fp32 logits differ by more than TOLERANCE (unless rope_bf16 says why).
    """
    try:
        import transformers  # noqa: F401  (the check below needs it; to be found out before anything is written)
        from safetensors.torch import save
    except ImportError as error:
        raise UserError(f"{error.name} is missing; install it with: uv sync --inexact --extra hf") from None
    check_representable(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    model = model.float().cpu().eval()
    weights = {name: tensor.detach().to(dtype).contiguous() for name, tensor in hf_weights(model)}
    write_atomic(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
    config = hf_config(model.config, tokenizer, str(dtype).removeprefix("torch."))
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    ends = [tokenizer.special(END), tokenizer.bos_id]
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": ends[0]}
    write_atomic(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    hf_tokenizer(tokenizer).save_pretrained(folder)
    difference = compare(model, tokenizer, folder)
    if not math.isfinite(difference):  # NaN is not greater than the tolerance either
        raise UserError(f"{folder}: the logits are not finite, its weights have diverged; do not publish it")
    if dtype == torch.float32 and difference > TOLERANCE and not model.config.rope_bf16:
        raise UserError(
            f"{folder}: transformers computes other logits (by {difference:.1e}); do not publish it"
        )
    return {"largest_logit_difference": difference, "megabytes": (folder / WEIGHTS).stat().st_size / 1e6}


@torch.no_grad()
def compare(model: GPT, tokenizer: Tokenizer, folder: Path) -> float:
    """The largest difference between our logits and those of the directory, on a prompt of our own."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (
        "Question: A train travels 60 km in 1.5 hours; what is its speed? A)40 B)45 C)50 D)90 E)30\nAnswer: A\n"
        * 4
    )
    ids = torch.tensor([tokenizer.encode(text, bos=True)[: model.config.sequence_len]])
    dtype, model.compute_dtype = model.compute_dtype, torch.float32
    try:
        ours = model(ids)
    finally:
        model.compute_dtype = dtype
    return float((ours - theirs(ids).logits.float()).abs().max())
