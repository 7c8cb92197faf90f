"""The engine: cached is uncached, company changes nothing, and the stop token counts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.kv_cache import Extent
from nanochat.rows import Request
from nanochat.sampling import Sampling
from tests.characters import (
    ANSWER,
    BOS,
    CHAT,
    SHAPES,
    STOP,
    USER,
    USER_END,
    VOCAB,
    Characters,
    ask,
    call,
    ids_of,
    make_engine,
    make_model,
    make_prompts,
    script_model,
    teacher_forced,
)

# --- the same numbers as the plain forward -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("settings", [{}, {"check_every": 7}, {"cache_bytes": 120_000}], ids=str)
def test_the_samplers_logprobs_are_the_trainers(shape: dict[str, Any], settings: dict[str, Any]) -> None:
    model, prompts = make_model(**shape), make_prompts(6)
    groups = make_engine(model, **settings).generate(
        prompts, num_samples=5, max_tokens=40, temperature=0.7, seeds=range(6)
    )
    stopped = 0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = teacher_forced(model, prompt, completion, 0.7)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)
            stopped += not completion.truncated
    assert 0 < stopped < 30, "the test must see rows that stop and rows that do not"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_cached_states_are_those_of_a_plain_forward(shape: dict[str, Any]) -> None:
    model, prompts = make_model(**shape), make_prompts(5)
    engine = make_engine(model)
    with engine.decoder(Extent(5, 40, 15, 32, chunk=4), check_every=1) as decoder:
        decoder.admit([Request(prompt, 1, range(3), 30, Sampling()) for prompt in prompts])
        for _ in range(20):
            decoder.step()
            decoder._settle()
            for number, row in enumerate(decoder.rows):
                row_ids = torch.tensor([[*row.request.prompt, *row.ids]])
                expected = model.logits(model.hidden(row_ids)[0, -1])
                cached = model.logits(decoder.state["hidden"][number])
                torch.testing.assert_close(cached, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_greedy_is_the_argmax_of_plain_forwards(shape: dict[str, Any]) -> None:
    model, [prompt] = make_model(**shape), make_prompts(1)
    [[completion]] = make_engine(model).generate([prompt], max_tokens=25, temperature=0.0, seeds=[0])
    ids = list(prompt)
    while ids[len(prompt) :] != completion.ids:
        best = model.logits(model.hidden(torch.tensor([ids]))[0, -1]).argmax().item()
        ids.append(int(best))
        assert ids[len(prompt) :] == completion.ids[: len(ids) - len(prompt)]
    expected = teacher_forced(model, prompt, completion, 1.0)
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


def test_top_k_logprobs_are_renormalised_over_what_was_kept() -> None:
    model, [prompt] = make_model(), make_prompts(1)
    [[completion]] = make_engine(model).generate([prompt], max_tokens=20, temperature=0.8, top_k=4, seeds=[3])
    row = torch.tensor([[*prompt, *completion.ids]])
    logits = model.logits(model.hidden(row)[0, len(prompt) - 1 : -1]) / 0.8
    kept, index = logits.topk(4)
    for position, token in enumerate(completion.ids):
        slot = index[position].tolist().index(token)
        expected = kept[position].log_softmax(-1)[slot].item()
        assert completion.logprobs[position] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_bf16_agrees_with_the_plain_forward_to_bf16() -> None:
    model, prompts = make_model(dtype=torch.bfloat16), make_prompts(4)
    groups = make_engine(model).generate(prompts, num_samples=4, max_tokens=20, seeds=range(4))
    gaps = torch.cat(
        [
            (teacher_forced(model, prompt, completion, 1.0) - torch.tensor(completion.logprobs)).abs()
            for prompt, group in zip(prompts, groups, strict=True)
            for completion in group
        ]
    )
    assert gaps.mean() < 0.02 and gaps.max() < 0.2


# --- company changes nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_is_the_same_alone_and_among_64_mixed_rows(shape: dict[str, Any], temperature: float) -> None:
    engine, prompts = make_engine(make_model(**shape)), make_prompts(16)
    how = {"max_tokens": 24, "temperature": temperature}
    together = engine.generate(prompts, num_samples=4, seeds=range(16), **how)  # type: ignore[arg-type]
    for number in range(0, 16, 3):
        alone = engine.generate([prompts[number]], num_samples=2, seeds=[number], **how)  # type: ignore[arg-type]
        assert ids_of(alone)[0] == ids_of(together)[number][:2]


@pytest.mark.parametrize("settings", [{"check_every": 1}, {"check_every": 5}], ids=str)
@pytest.mark.parametrize("cache_bytes", [200_000, 1])
def test_neither_pieces_nor_looking_seldom_change_a_sample(
    settings: dict[str, Any], cache_bytes: int
) -> None:
    model, prompts = make_model(**SHAPES["everything"]), make_prompts(7)
    how: dict[str, Any] = {"num_samples": 6, "max_tokens": 30, "seeds": range(7)}
    expected = make_engine(model).generate(prompts, **how)
    assert ids_of(make_engine(model, cache_bytes=cache_bytes, **settings).generate(prompts, **how)) == ids_of(
        expected
    )


def test_order_of_prompts_does_not_matter() -> None:
    engine, prompts = make_engine(), make_prompts(8)
    forwards = engine.generate(prompts, num_samples=3, max_tokens=20, seeds=range(8))
    backwards = engine.generate(prompts[::-1], num_samples=3, max_tokens=20, seeds=range(8)[::-1])
    assert ids_of(forwards) == ids_of(backwards)[::-1]


def test_samples_of_a_group_differ_from_the_first_token_on() -> None:
    [group] = make_engine().generate(make_prompts(1), num_samples=64, max_tokens=1, seeds=[0])
    assert len({completion.ids[0] for completion in group}) > 8


def test_the_seed_decides() -> None:
    engine, prompts = make_engine(), make_prompts(1)
    one, same, other = (
        ids_of(engine.generate(prompts, num_samples=4, max_tokens=20, seeds=[seed])) for seed in (1, 1, 2)
    )
    assert one == same != other


def test_rows_admitted_and_dropped_midway_leave_the_others_alone() -> None:
    engine, prompts = make_engine(make_model(**SHAPES["everything"])), make_prompts(6)
    expected = engine.generate(prompts, num_samples=3, max_tokens=30, seeds=[9] * 6)
    requests = [
        Request(tuple(prompt), 9, range(3), 30, Sampling(), index=i) for i, prompt in enumerate(prompts)
    ]
    finished = []
    with engine.decoder(Extent(6, 40, 18, 31, chunk=8), check_every=1) as decoder:
        decoder.admit(requests[:2])
        for step in range(45):
            if step == 4:
                decoder.admit(requests[2:5])
            if step == 7:
                decoder.drop([row for row in decoder.rows if row.request.index == 1 or row.sample == 2])
            if step == 9:
                decoder.admit(requests[5:])
            if decoder.rows:
                finished += decoder.step()
    assert len(finished) >= 4
    for row in finished:
        assert row.ids == expected[row.request.index][row.sample].ids


def test_rows_may_sample_in_different_ways() -> None:
    engine, [prompt] = make_engine(), make_prompts(1)
    ways = [Sampling(), Sampling(0.0), Sampling(0.8, top_k=5), Sampling(1.2, top_p=0.9)]
    with engine.decoder(Extent(4, 40, 8, 21, chunk=21), check_every=1) as decoder:
        rows = decoder.admit([Request(prompt, 4, range(2), 20, way, index=i) for i, way in enumerate(ways)])
        while decoder.rows:
            decoder.step()
    for row in rows:
        way = ways[row.request.index]
        [alone] = engine.generate(
            [prompt],
            num_samples=2,
            max_tokens=20,
            seeds=[4],
            **{k: getattr(way, k) for k in ("temperature", "top_k", "top_p")},
        )
        assert row.ids == alone[row.sample].ids


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    samples=st.integers(1, 4),
    max_tokens=st.integers(1, 50),
    cache_bytes=st.integers(1, 300_000),
    check_every=st.integers(1, 9),
)
def test_any_mixture_gives_what_each_gives_alone(
    lengths: list[int], samples: int, max_tokens: int, cache_bytes: int, check_every: int
) -> None:
    model = make_model(**SHAPES["everything"])
    prompts = [make_prompts(1, seed, length, length)[0] for seed, length in enumerate(lengths)]
    mixed = make_engine(model, cache_bytes=cache_bytes, check_every=check_every).generate(
        prompts, num_samples=samples, max_tokens=max_tokens, seeds=range(len(prompts))
    )
    for seed, (prompt, group) in enumerate(zip(prompts, mixed, strict=True)):
        [alone] = make_engine(model).generate(
            [prompt], num_samples=samples, max_tokens=max_tokens, seeds=[seed]
        )
        assert [completion.ids for completion in group] == [completion.ids for completion in alone]


# --- where a completion ends -------------------------------------------------------------------------------------


def test_the_stop_token_is_returned_and_counts_as_sampled() -> None:
    groups = make_engine().generate(make_prompts(8), num_samples=8, max_tokens=40, seeds=range(8))
    for completion in (completion for group in groups for completion in group):
        assert len(completion.ids) == len(completion.logprobs) == len(completion.mask) <= 40
        assert completion.truncated == (completion.ids[-1] not in (STOP, BOS))
        assert not {STOP, BOS}.intersection(completion.ids[:-1])
        assert all(completion.mask)
        assert completion.truncated <= (len(completion.ids) == 40)


def test_generation_is_cut_where_the_models_rows_end() -> None:
    engine = make_engine(script_model("5" * 200))
    prompts = [[BOS] * 90, [BOS] * 95]
    [[long], [short]] = engine.generate(prompts, max_tokens=40, temperature=0.0, seeds=[0, 0])
    assert (len(long.ids), len(short.ids)) == (6, 1)
    assert long.truncated and short.truncated


@pytest.mark.parametrize("check_every", [1, 5])
def test_forbid_first_holds_for_the_first_token_only(check_every: int) -> None:
    engine, prompts = make_engine(check_every=check_every), make_prompts(4)
    allowed = [STOP, *range(20, 24)]
    forbidden = [token for token in range(VOCAB) if token not in allowed]
    groups = engine.generate(prompts, num_samples=16, max_tokens=8, seeds=range(4), forbid_first=forbidden)
    completions = [completion for group in groups for completion in group]
    assert {completion.ids[0] for completion in completions} <= set(allowed)
    assert any(token in forbidden for completion in completions for token in completion.ids[1:])
    assert ids_of(groups) == ids_of(
        make_engine().generate(prompts, num_samples=16, max_tokens=8, seeds=range(4), forbid_first=forbidden)
    )
    prompt, completion = prompts[0], groups[0][0]
    logits = engine.model.logits(engine.model.hidden(torch.tensor([prompt]))[0, -1])
    expected = logits[allowed].log_softmax(-1)[allowed.index(completion.ids[0])].item()
    assert completion.logprobs[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1, 2], []], "seeds": [0, 0]}, "prompt 1 is empty"),
        ({"prompts": [[1] * 96]}, "sequence_len is 96"),
        ({"prompts": [[VOCAB]]}, "prompt 0 holds ids"),
        ({"prompts": [[-1]]}, "prompt 0 holds ids"),
        ({"forbid_first": [VOCAB]}, "forbid_first"),
        ({"forbid_first": list(range(VOCAB))}, "forbid_first"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_a_line(wrong: dict[str, Any], word: str) -> None:
    values: dict[str, Any] = {"prompts": [[1, 2]], "max_tokens": 4, "seeds": [0]} | wrong
    prompts = values.pop("prompts")
    with pytest.raises(UserError, match=word) as caught:
        make_engine().generate(prompts, **values)
    assert "\n" not in str(caught.value)


# --- streams and storage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_first_sample_of_generate(temperature: float) -> None:
    engine, prompts = make_engine(make_model(**SHAPES["everything"])), make_prompts(5)
    for seed, prompt in enumerate(prompts):
        how: dict[str, Any] = {"max_tokens": 30, "temperature": temperature}
        [[whole]] = engine.generate([prompt], seeds=[seed], **how)
        pieces = list(engine.stream(prompt, seed=seed, **how))
        assert [token for token, _ in pieces] == whole.ids
        assert [logprob for _, logprob in pieces] == pytest.approx(whole.logprobs, abs=1e-5)


def test_a_stream_shows_forced_tokens_too() -> None:
    engine = make_engine(script_model(call("6*7", after=4), len(CHAT)))
    ids = [token for token, _ in engine.stream(CHAT, max_tokens=60, temperature=0.0)]
    assert ids == ask(call("6*7", after=4)).ids


def test_two_streams_and_a_batch_at_once_do_not_disturb_each_other() -> None:
    engine, (one, two, three) = make_engine(), make_prompts(3)
    expected = [[token for token, _ in engine.stream(prompt, max_tokens=30, seed=1)] for prompt in (one, two)]
    streams = [engine.stream(prompt, max_tokens=30, seed=1) for prompt in (one, two)]
    shown: list[list[int]] = [[], []]
    for _ in range(30):
        for ids, stream in zip(shown, streams, strict=True):
            ids += [token for token, _ in [next(stream, (-1, 0.0))] if token >= 0]
        engine.generate([three], num_samples=2, max_tokens=3, seeds=[0])
    assert shown == expected


def test_a_stream_checks_its_arguments_before_the_first_token() -> None:
    with pytest.raises(UserError, match="max_tokens=0"):
        make_engine().stream([1], max_tokens=0)


def test_a_closed_stream_leaves_the_engine_usable() -> None:
    engine, [prompt] = make_engine(), make_prompts(1)
    expected = ids_of(engine.generate([prompt], max_tokens=20, seeds=[5]))
    stream = engine.stream(prompt, max_tokens=20, seed=5)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert ids_of(engine.generate([prompt], max_tokens=20, seeds=[5])) == expected


def test_storage_is_kept_between_calls() -> None:
    engine, prompts = make_engine(), make_prompts(4)
    engine.generate(prompts, num_samples=4, max_tokens=20, seeds=range(4))
    first = engine.spare[0].data_ptr()
    for _ in range(3):
        engine.generate(prompts[:2], num_samples=4, max_tokens=12, seeds=range(2))
    assert [storage.data_ptr() for storage in engine.spare] == [first]


def test_weights_are_read_anew_at_every_call() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, prompts = make_model(dtype=dtype), make_prompts(3)
        engine = make_engine(model)
        engine.generate(prompts, max_tokens=10, seeds=range(3))
        other = make_model(dtype=dtype, seed=1)
        model.load_state_dict(other.state_dict())
        expected = make_engine(other).generate(prompts, max_tokens=10, seeds=range(3))
        assert engine.generate(prompts, max_tokens=10, seeds=range(3)) == expected


def test_the_copy_in_the_compute_dtype_leaves_the_model_as_it_was() -> None:
    model = make_model(dtype=torch.bfloat16, smear=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    make_engine(model).generate([[1, 2]], max_tokens=4, seeds=[0])
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in model.parameters())
    assert all(before[name].equal(weight) for name, weight in model.state_dict().items())


def test_weights_that_are_not_finite_are_reported_and_do_no_lasting_harm() -> None:
    model, prompts = make_model(), make_prompts(3)
    engine = make_engine(model)
    expected = engine.generate(prompts, max_tokens=10, seeds=range(3))
    good = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
        model.blocks[0].attn.c_v.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate(prompts, max_tokens=10, seeds=range(3))
    model.load_state_dict(good)
    assert engine.generate(prompts, max_tokens=10, seeds=range(3)) == expected


def test_a_scale_that_would_overflow_is_refused() -> None:
    with pytest.raises(UserError, match="qk_scale"):
        make_engine(make_model(qk_scale=6.0)).generate([[1]], max_tokens=2, seeds=[0])


def test_gradients_are_not_recorded_and_training_may_follow() -> None:
    model, prompts = make_model(), make_prompts(2)
    [[completion], _] = make_engine(model).generate(prompts, max_tokens=10, seeds=range(2))
    teacher_forced(model, prompts[0], completion, 1.0).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_completion_is_plain_data() -> None:
    [[completion]] = make_engine().generate([[1, 2]], max_tokens=3, seeds=[0])
    assert dataclasses.asdict(completion).keys() == {"ids", "logprobs", "mask", "truncated"}
    assert all(type(token) is int for token in completion.ids)
    assert all(type(value) is float for value in completion.logprobs)


def test_the_benchmark_runs_and_finds_the_same_greedy_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import rollout

    monkeypatch.setattr(
        rollout,
        "read_questions",
        lambda count: ([f"What is {n} + 1?" * (n + 1) for n in range(count)], "here"),
    )
    config = rollout.Config(
        depths="1,2",
        questions=3,
        samples=4,
        max_tokens=6,
        rows_per_call=3,
        repeats=1,
        vocab_size=300,
        device_type="cpu",
    )
    rollout.main(config)
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(result["depth"], result["rows"]) for result in results] == [
        (depth, rows) for depth in (1, 2) for rows in ("fixed", "ending")
    ]
    assert all(result["same_greedy"] == 1.0 and result["ratio"] > 0 for result in results)


# --- looking without touching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_looking_ahead_gives_the_plain_forwards_logits_and_leaves_no_trace(shape: dict[str, Any]) -> None:
    model, prompts = make_model(**shape), make_prompts(4)
    engine, ahead = make_engine(model), [[20, 21, 22], [23], [24, 25], [26, 27, 28, 29]]
    looks = 0

    def run(*, look: bool) -> list[tuple[int, int, list[int], list[float]]]:
        nonlocal looks
        requests = [Request(prompt, i, range(2), 20, Sampling(), index=i) for i, prompt in enumerate(prompts)]
        finished = []
        with engine.decoder(Extent(4, 40, 8, 21, chunk=4), check_every=1) as decoder:
            decoder.admit(requests)
            while decoder.rows:
                rows = [row for row in decoder.rows if row.sample][:4]
                if look and rows and len(rows[0].ids) % 3 == 0:
                    tokens = ahead[: len(rows)]
                    for row, more, peeked, own in zip(
                        rows, tokens, decoder.peek(rows, tokens), decoder.logits(rows), strict=True
                    ):
                        whole = torch.tensor([[*row.request.prompt, *row.ids, *more]])
                        with torch.no_grad():
                            plain = model.logits(model.hidden(whole)[0])
                        torch.testing.assert_close(peeked, plain[-1], rtol=0, atol=1e-5)
                        torch.testing.assert_close(own, plain[-1 - len(more)], rtol=0, atol=1e-5)
                    looks += 1
                finished += decoder.step()
        return [(row.request.index, row.sample, row.ids, row.logprobs) for row in finished]

    assert run(look=True) == run(look=False), "to the last bit"
    assert looks >= 3


def test_a_released_engine_takes_its_memory_anew() -> None:
    engine = Engine(make_model(), Characters())  # type: ignore[arg-type]
    first = engine.generate([[BOS, USER, USER_END, ANSWER]], max_tokens=5, seeds=[1])
    assert len(engine.spare) == 1
    engine.release()
    assert engine.spare == []
    assert engine.generate([[BOS, USER, USER_END, ANSWER]], max_tokens=5, seeds=[1]) == first
