from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.architecture import OCT2025, GPTConfig
from nanochat.common import UserError
from nanochat.gpt import (
    GPT,
    Attend,
    causal_attend,
    causal_mask,
    preceding,
    rope_tables,
    rotate,
    segment_positions,
)

OLD_SHAPE = {
    "sequence_len": 2048,
    "vocab_size": 65536,
    "n_layer": 8,
    "n_head": 4,
    "n_kv_head": 4,
    "n_embd": 512,
}


def tiny(*, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> GPT:
    """A model whose every weight is random, so that every path shows in the logits."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"vocab_size": 50, "sequence_len": 16, "n_embd": 32, "n_head": 4} | overrides
    model = GPT(GPTConfig.for_depth(settings.pop("depth", 3), **settings), dtype=dtype)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


def some_ids(rows: int, length: int, *, seed: int = 1) -> Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


def naive_october_2025(weights: dict[str, Tensor], config: GPTConfig, ids: list[int]) -> Tensor:
    """Logits (T,V) by the definition, one position, one head, one key at a time, in float64."""
    weights = {name: weight.double() for name, weight in weights.items()}
    size = config.n_embd // config.n_head
    half = size // 2

    def unit(x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + torch.finfo(torch.float32).eps)

    def turned(x: Tensor, position: int) -> Tensor:
        result = x.clone()
        for i in range(half):
            angle = torch.tensor(position / 10_000.0 ** (2 * i / size))
            cos, sin = angle.cos().bfloat16().double(), angle.sin().bfloat16().double()
            result[i] = x[i] * cos + x[i + half] * sin
            result[i + half] = -x[i] * sin + x[i + half] * cos
        return result

    states = [unit(weights["transformer.wte.weight"][token]) for token in ids]
    for layer in range(config.n_layer):
        matrix = {name: weights[f"transformer.h.{layer}.{name}.weight"] for name in MATRICES}
        normed = [unit(x) for x in states]
        mixed = []
        for t in range(len(ids)):
            heads = []
            for head in range(config.n_head):
                own = slice(head * size, (head + 1) * size)
                shared = head * config.n_kv_head // config.n_head
                theirs = slice(shared * size, (shared + 1) * size)
                q = unit(turned((matrix["attn.c_q"] @ normed[t])[own], t))
                keys = [unit(turned((matrix["attn.c_k"] @ normed[s])[theirs], s)) for s in range(t + 1)]
                values = [(matrix["attn.c_v"] @ normed[s])[theirs] for s in range(t + 1)]
                share = torch.stack([q @ key / math.sqrt(size) for key in keys]).softmax(0)
                heads.append(sum(p * value for p, value in zip(share, values, strict=True)))
            mixed.append(matrix["attn.c_proj"] @ torch.cat(heads))
        states = [x + y for x, y in zip(states, mixed, strict=True)]
        for t, x in enumerate(states):
            inner = (matrix["mlp.c_fc"] @ unit(x)).clamp(min=0) ** 2
            states[t] = x + matrix["mlp.c_proj"] @ inner
    raw = torch.stack([weights["lm_head.weight"] @ unit(x) for x in states])
    return 15 * torch.tanh(raw / 15)


MATRICES = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_october_2025_preset_gives_the_logits_of_its_definition(n_kv_head: int) -> None:
    shape = {
        "sequence_len": 16,
        "vocab_size": 50,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "n_kv_head": n_kv_head,
    }
    model = tiny(depth=2, n_kv_head=n_kv_head, **OCT2025)
    assert model.config == GPTConfig.from_dict(shape)
    ids = some_ids(1, 9)
    expected = naive_october_2025(model.state_dict(), model.config, ids[0].tolist())
    torch.testing.assert_close(model(ids)[0].double(), expected, atol=2e-5, rtol=0)


def test_depth_8_has_the_published_layout() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.from_dict(OLD_SHAPE))
    tensors = model.state_dict()
    expected = [("transformer.wte.weight", (65536, 512))]
    for layer in range(8):
        expected += [(f"transformer.h.{layer}.{name}.weight", (512, 512)) for name in MATRICES[:4]]
        expected += [(f"transformer.h.{layer}.mlp.c_fc.weight", (2048, 512))]
        expected += [(f"transformer.h.{layer}.mlp.c_proj.weight", (512, 2048))]
    expected += [("lm_head.weight", (65536, 512))]
    assert [(name, tuple(tensor.shape)) for name, tensor in tensors.items()] == expected
    assert len(tensors) == 50
    assert model.num_params() == 92_274_688


def test_depth_8_has_octobers_shape() -> None:
    config = GPTConfig.for_depth(8, vocab_size=65536, sequence_len=2048, **OCT2025)
    assert config == GPTConfig.from_dict(OLD_SHAPE)


@pytest.mark.parametrize(("depth", "heads"), [(2, 4), (4, 4), (5, 5), (8, 4), (12, 6), (20, 10), (7, 7)])
def test_heads_are_128_wide_or_smaller_at_small_depth(depth: int, heads: int) -> None:
    assert GPTConfig.for_depth(depth, vocab_size=8, sequence_len=8).n_head == heads


def test_config_survives_json_and_older_ones_take_october_values() -> None:
    config = GPTConfig.for_depth(2, vocab_size=8, sequence_len=64, smear=3, window_pattern="SL")
    assert GPTConfig.from_dict(dataclasses.asdict(config)) == config
    old = dataclasses.asdict(GPTConfig.from_dict(OLD_SHAPE))
    assert old == OLD_SHAPE | OCT2025


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 3}, "n_embd=512 must give 3 heads"),
        ({"n_kv_head": 3}, "no multiple of n_kv_head=3"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"n_layer": "8"}, "n_layer must be int, got '8'"),
        ({"n_layer": True}, "n_layer must be int, got True"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"rope_base": float("nan")}, "rope_base must be above 0"),
        ({"window_pattern": "SX"}, "made of L and S"),
        ({"window_pattern": "SL"}, "needs window_len"),
        ({"smear": -1}, "smear must be 0"),
        ({"value_embeds": True}, "unknown fields value_embeds"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_words(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPTConfig.from_dict(OLD_SHAPE | change)


def test_a_config_that_lacks_a_field_names_it() -> None:
    with pytest.raises(UserError, match="missing fields n_head, n_embd"):
        GPTConfig.from_dict({k: v for k, v in OLD_SHAPE.items() if k not in ("n_head", "n_embd")})


def test_rotation_known_answer() -> None:
    config = GPTConfig.from_dict(OLD_SHAPE | {"n_embd": 16, "n_head": 4, "rope_bf16": False})
    cos, sin = rope_tables(
        config, torch.tensor([[0, 1, 100]]), torch.float32
    )  # heads of 4: angles t and t / 100
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 3, 1, 4)
    y = rotate(x, cos, sin)[0, :, 0]
    torch.testing.assert_close(y[0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    c, s, d, e = math.cos(1), math.sin(1), math.cos(0.01), math.sin(0.01)
    torch.testing.assert_close(y[1], torch.tensor([c + 3 * s, 2 * d + 4 * e, 3 * c - s, 4 * d - 2 * e]))
    c, s, d, e = math.cos(100), math.sin(100), math.cos(1), math.sin(1)
    torch.testing.assert_close(y[2], torch.tensor([c + 3 * s, 2 * d + 4 * e, 3 * c - s, 4 * d - 2 * e]))


def test_logits_depend_on_distance_not_on_position() -> None:
    model, ids = tiny(), some_ids(1, 8)
    late = model(ids, positions=torch.arange(1000, 1008).unsqueeze(0))
    torch.testing.assert_close(late, model(ids), atol=1e-3, rtol=0)


def test_bf16_rotary_tables_are_rounded_ones() -> None:
    config = GPTConfig.from_dict(OLD_SHAPE)
    exact = rope_tables(dataclasses.replace(config, rope_bf16=False), torch.arange(64)[None], torch.float32)
    for rounded, value in zip(rope_tables(config, torch.arange(64)[None], torch.float32), exact, strict=True):
        assert rounded.dtype == torch.float32
        assert rounded.eq(value.bfloat16().float()).all()


def test_no_position_sees_what_follows() -> None:
    model, ids = tiny(smear=2, window_pattern="SL"), some_ids(2, 12)
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 50
    torch.testing.assert_close(model(other)[:, :7], model(ids)[:, :7], atol=1e-5, rtol=0)


def test_mask_known_answer() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1]])
    mask = causal_mask(6, 2, segments, torch.device("cpu"))[0, 0].int()
    expected = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]
    expected += [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert mask.tolist() == expected


def test_windows_repeat_over_layers_and_the_last_layer_sees_all() -> None:
    config = GPTConfig.for_depth(4, vocab_size=8, sequence_len=8, window_pattern="SSL", window_len=3)
    assert [config.window(layer) for layer in range(4)] == [3, 3, None, None]
    config = GPTConfig.for_depth(4, vocab_size=8, sequence_len=8, window_pattern="S", window_len=3)
    assert [config.window(layer) for layer in range(4)] == [3, 3, 3, None]


def test_a_window_hides_exactly_what_is_too_far_back() -> None:
    # The last layer sees all, so look at what the first one writes: the input of the second.
    model, ids = tiny(depth=2, window_pattern="S", window_len=3), some_ids(1, 8)

    def after_first_layer(ids: Tensor) -> Tensor:
        inputs: list[Tensor] = []
        hook = model.blocks[1].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        model(ids)
        hook.remove()
        return inputs[0]

    other = ids.clone()
    other[0, 2] = (other[0, 2] + 1) % 50
    changed = (after_first_layer(other) - after_first_layer(ids)).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False, False, True, True, True, False, False, False]


@pytest.mark.parametrize("window_pattern", ["L", "SL"])
@pytest.mark.parametrize("smear", [0, 2])
def test_token_by_token_with_a_cache_equals_the_whole_row(window_pattern: str, smear: int) -> None:
    model, ids = tiny(window_pattern=window_pattern, smear=smear, n_kv_head=2), some_ids(2, 10)
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def cached(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in cache:
            k, v = torch.cat([cache[layer][0], k], 1), torch.cat([cache[layer][1], v], 1)
        cache[layer] = k, v
        first = max(0, k.size(1) - (model.config.window(layer) or k.size(1)))
        q, k, v = q.transpose(1, 2), k[:, first:].transpose(1, 2), v[:, first:].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    columns = []
    for t in range(10):
        context = preceding(ids, smear)[:, t : t + 1] if smear else None
        hidden = model.hidden(
            ids[:, t : t + 1], positions=torch.full((2, 1), t), context=context, attend=cached
        )
        columns.append(model.logits(hidden))
    torch.testing.assert_close(torch.cat(columns, 1), model(ids), atol=1e-5, rtol=0)


def test_attend_sees_normalised_scaled_queries_and_keys_of_every_layer() -> None:
    model = tiny(n_kv_head=2, qk_scale=1.5)
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    plain: Attend = causal_attend(model.config)

    def probe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((layer, tuple(q.shape), tuple(k.shape)))
        for tensor in (q, k):
            root_mean_square = tensor.square().mean(-1).sqrt()
            torch.testing.assert_close(
                root_mean_square, torch.full_like(root_mean_square, 1.5), atol=1e-4, rtol=0
            )
        return plain(layer, q, k, v)

    ids = some_ids(2, 6)
    assert model.hidden(ids, attend=probe).equal(model.hidden(ids))
    assert seen == [(layer, (2, 6, 4, 8), (2, 6, 2, 8)) for layer in range(3)]


def test_segments_restart_positions_and_cut_off_what_precedes() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [4, 5, 5, 5, 5, 5]])
    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    ids = torch.arange(12).view(2, 6)
    nearest = preceding(ids, 2, segments)
    assert nearest[0].tolist() == [[-1, -1], [0, -1], [1, 0], [-1, -1], [3, -1], [-1, -1]]
    assert nearest[1].tolist() == [[-1, -1], [-1, -1], [7, -1], [8, 7], [9, 8], [10, 9]]
    assert preceding(ids, 1)[0].tolist() == [[-1], [0], [1], [2], [3], [4]]


@pytest.mark.parametrize(
    "settings", [{}, {"smear": 3}, {"smear": 1, "window_pattern": "SL", "n_kv_head": 2}, OCT2025]
)
def test_a_packed_conversation_gets_the_logits_it_gets_alone(settings: dict[str, Any]) -> None:
    model = tiny(**settings)
    lengths = [5, 1, 7]
    conversations = [some_ids(1, length, seed=length) for length in lengths]
    packed = torch.cat([*conversations, torch.zeros(1, 3, dtype=torch.long)], 1)
    segments = torch.repeat_interleave(torch.tensor([0, 1, 2, -1]), torch.tensor([*lengths, 3])).unsqueeze(0)
    logits = model(packed, segments=segments)
    assert logits.isfinite().all()
    start = 0
    for ids, length in zip(conversations, lengths, strict=True):
        torch.testing.assert_close(logits[:, start : start + length], model(ids), atol=1e-5, rtol=0)
        start += length


def test_smear_adds_the_weighted_embeddings_before() -> None:
    model, ids = tiny(smear=2), some_ids(1, 4)
    e, w = model.embeddings[ids[0]], model.smear.weight
    expected = torch.stack(
        [e[0], e[1] + w[0] * e[0], *(e[t] + w[0] * e[t - 1] + w[1] * e[t - 2] for t in (2, 3))]
    )
    torch.testing.assert_close(model.embed(ids)[0], expected)
    assert GPT(model.config).smear.weight.eq(torch.tensor(0.3)).all()


def test_a_new_model_predicts_nothing_yet_can_learn() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig.for_depth(2, vocab_size=50, sequence_len=16))
    ids = some_ids(4, 16)
    loss = model(ids, ids) / ids.numel()
    assert loss.item() == pytest.approx(math.log(50), abs=0.02)
    loss.backward()
    assert model.lm_head.weight.grad is not None and model.lm_head.weight.grad.norm() > 0.01


def dense_logprobs(model: GPT, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = model.logits(hidden) / temperature
    return torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 1, 5, 100])
@pytest.mark.parametrize("path", ["token_logprobs", "weighted_loss"])
def test_the_head_in_chunks_equals_the_dense_one_forward_and_backward(
    path: str, chunk: int | None, temperature: float
) -> None:
    model = tiny()
    torch.manual_seed(3)
    targets, scale = torch.randint(-1, 50, (13,)), torch.randn(13)
    targets[:2] = -1
    results = []
    for dense in (True, False):
        hidden = torch.randn(13, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)
        live = targets >= 0
        if dense or path == "token_logprobs":
            if dense:
                logprobs = dense_logprobs(model, hidden, targets, temperature)
            else:
                safe = targets.clamp(min=0)
                logprobs = model.token_logprobs(hidden, safe, temperature=temperature, chunk=chunk)
            loss = -(scale * logprobs)[live].sum()
            logprobs = torch.where(live, logprobs, 0.0)
        else:
            loss, logprobs = model.weighted_loss(hidden, targets, scale, temperature=temperature, chunk=chunk)
            assert not logprobs.requires_grad
        model.zero_grad()
        (loss / 7).backward()
        assert hidden.grad is not None and model.lm_head.weight.grad is not None
        results.append([loss.detach(), logprobs.detach(), hidden.grad, model.lm_head.weight.grad.clone()])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_forward_with_targets_is_the_summed_cross_entropy_of_the_live_ones() -> None:
    model, ids = tiny(), some_ids(2, 8)
    targets = ids.roll(-1, 1)
    targets[0, :5] = -1
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(model(ids, targets), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, targets), expected)
    assert model(ids, torch.full_like(ids, -1)).item() == 0.0


def test_head_memory_does_not_grow_with_positions_times_vocabulary() -> None:
    model = tiny(vocab_size=4096)
    hidden, targets = torch.randn(2048, 32), torch.randint(4096, (2048,))
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.untyped_storage().nbytes() // 4)
            return result

    with Largest():
        loss, _ = model.weighted_loss(hidden.requires_grad_(), targets)
        (loss + model.token_logprobs(hidden, targets).sum()).backward()
    assert 0 < largest <= 2**20 < 2048 * 4096


def test_bf16_computes_in_bf16_keeps_fp32_weights_and_stays_near_fp32() -> None:
    model, ids = tiny(), some_ids(2, 8)
    low = tiny(dtype=torch.bfloat16)
    assert low.lm_head.weight.dtype == torch.float32
    assert low.hidden(ids).dtype == torch.bfloat16
    assert low(ids).dtype == torch.float32
    assert (low(ids) - model(ids)).abs().mean() < 0.2
    low(ids, ids).backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in low.parameters())
    cast = tiny(dtype=torch.bfloat16).bfloat16()  # as an engine would, to read half the bytes
    torch.testing.assert_close(cast(ids), low(ids), atol=0.2, rtol=0)


def test_flops_known_answer() -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.from_dict(OLD_SHAPE))
    matrices = 92_274_688 - 65536 * 512
    assert model.flops_per_token(2048) == 6 * matrices + 12 * 8 * 512 * 2048
    short = GPTConfig.from_dict(OLD_SHAPE | {"window_pattern": "SL", "window_len": 512})
    with torch.device("meta"):
        model = GPT(short)
    assert model.flops_per_token(2048) == 6 * matrices + 12 * 512 * (4 * 2048 + 4 * 512)
