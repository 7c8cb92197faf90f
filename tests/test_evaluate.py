"""Accuracies with everything they must carry, rotations, paired comparison, bits per byte, on scripted engines."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanochat.accuracy import Accuracy, Outcome, Rotations, compare, with_interval
from nanochat.common import UserError, World
from nanochat.engine import Engine
from nanochat.evaluate import bits_per_byte, evaluate_generative, evaluate_letters, evaluate_rotations
from nanochat.statistics import wilson_interval
from nanochat.tracking import Tracker
from scripts import chat_eval
from tests.gloo import run_ranks, single
from tests.rl_fakes import ByteTokenizer, Choices, ScriptedEngine, small_model

ALONE = single()


def right_letter(prompt: str) -> str:
    """What a perfect model says: reads the question of Choices and finds the option."""
    wanted = re.search(r"which is (.)\?", prompt)
    assert wanted
    found = re.search(rf"- {wanted[1]}=([A-E])", prompt)
    assert found
    return found[1]


def scripted(say: Callable[[str, int], str], **settings: bool) -> ScriptedEngine:
    return ScriptedEngine(ByteTokenizer(), say, **settings)


def asked(engine: ScriptedEngine, task: Choices, **settings: object) -> Accuracy:
    return evaluate_generative(engine, engine.tokenizer, task, ALONE, **settings)  # type: ignore[arg-type]


def outcomes(rows: list[tuple[str, str]]) -> tuple[Outcome, ...]:
    """(gold, letters of the samples) per item; "-" is an answer that could not be read."""
    return tuple(
        Outcome(
            index=index,
            gold=gold,
            letters=tuple(None if x == "-" else x for x in letters),
            options=tuple(None if x == "-" else x.lower() for x in letters),
            correct=tuple(x == gold for x in letters),
            truncated=tuple(x == "-" for x in letters),
            num_options=5,
        )
        for index, (gold, letters) in enumerate(rows)
    )


def test_a_perfect_and_a_constant_model_score_what_they_should() -> None:
    task = Choices(50)
    perfect = asked(scripted(lambda prompt, sample: f"x\nAnswer: {right_letter(prompt)}"), task)
    assert perfect.value == 1.0 and perfect.n == 50 and perfect.parse_rate == 1.0
    constant = asked(scripted(lambda prompt, sample: "Answer: B"), task)
    golds = [task[i]["answer_letter"] for i in range(50)]
    assert constant.value == golds.count("B") / 50
    assert constant.predicted_counts == {"B": 50}
    letter, share = constant.majority or ("", 0)
    assert share == max(golds.count(x) for x in "ABCDE") / 50 == golds.count(letter) / 50
    assert constant.interval == wilson_interval(constant.correct, 50)


def test_unreadable_and_cut_answers_are_wrong_and_counted() -> None:
    task = Choices(10)
    mumbled = asked(scripted(lambda prompt, sample: right_letter(prompt)), task)
    assert mumbled.value == 0 and mumbled.parse_rate == 0 and mumbled.predicted_counts == {"none": 10}
    cut = asked(scripted(lambda prompt, sample: f"Answer: {right_letter(prompt)}", truncated=True), task)
    assert cut.value == 0 and cut.truncated_rate == 1.0


def test_the_description_never_leaves_an_accuracy_alone() -> None:
    text = asked(scripted(lambda prompt, sample: "Answer: B"), Choices(50)).describe()
    assert "of 50" in text and "95 %:" in text and "always" in text and "guessing 20.0 %" in text
    assert "predicted  B 50" in text and "gold       A" in text and "100.0 % could be read" in text


def test_samples_give_mean_pass_and_majority_with_their_guessing_baseline() -> None:
    accuracy = Accuracy("T", "generative", outcomes([("A", "AABB"), ("B", "BBB-"), ("C", "----")]), 0.2, 1.0)
    assert accuracy.value == pytest.approx((0.5 + 0.75 + 0) / 3)
    assert accuracy.pass_at(1) == pytest.approx(accuracy.value)
    assert accuracy.pass_at(2) == pytest.approx((5 / 6 + 1 + 0) / 3)
    assert accuracy.pass_at(4) == pytest.approx(2 / 3)
    assert accuracy.guess_at(4) == pytest.approx(1 - 0.8**4)
    assert accuracy.maj == pytest.approx((0.5 + 1 + 0) / 3) and accuracy.num_tied == 1
    metrics = accuracy.metrics()
    expected = {"eval/mean_at_k", "eval/maj_at_k", *(f"eval/pass_at_{k}" for k in range(1, 5))}
    bands = {f"{name}_{side}" for name in expected for side in ("low", "high")}
    assert set(metrics) == expected | bands | {f"eval/guess_at_{k}" for k in range(1, 5)}
    assert (
        "pass@4" in accuracy.describe() and "maj@4" in accuracy.describe() and "1 tied" in accuracy.describe()
    )
    results = accuracy.results()
    assert results["maj"] == accuracy.maj and results["pass_at"]["2"] == accuracy.pass_at(2)


def test_a_task_without_letters_has_no_majority_and_no_histogram() -> None:
    items = tuple(Outcome(i, None, (None,), (None,), (i == 0,), (False,), 0) for i in range(4))
    accuracy = Accuracy("GSM8K", "generative", items, 0.0)
    assert accuracy.majority is None and accuracy.parse_rate is None and accuracy.maj is None
    assert accuracy.value == 0.25 and "predicted" not in accuracy.describe()
    assert "majority" not in accuracy.results()


def test_a_task_asked_in_both_modes_counts_once_and_one_without_letters_is_asked_in_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Written:
        """A task of written answers, such as GSM8K."""

        name, eval_type, split = "GSM8K", "generative", "test"

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"messages": []}

    answered = {
        ("C", "generative"): Accuracy("C", "generative", outcomes([("A", "A"), ("B", "A")]), 0.2),
        ("C", "letters"): Accuracy("C", "letters", outcomes([("A", "A"), ("B", "B")]), 0.2),
        ("GSM8K", "generative"): Accuracy("GSM8K", "generative", outcomes([("A", "A")]), 0.0),
    }
    monkeypatch.setattr(chat_eval.Asked, "__init__", lambda self: None)
    monkeypatch.setattr(chat_eval.Asked, "ask", lambda self, engine, task, mode: answered[task.name, mode])
    asked = chat_eval.Asked()  # type: ignore[call-arg]
    asked.config, asked.engine, asked.other = chat_eval.Config(mode="both"), None, None  # type: ignore[assignment]
    task = Choices(2)
    task.name, task.eval_type = "C", "generative"  # type: ignore[attr-defined]
    results = asked.evaluate(task, Tracker(None)) | asked.evaluate(Written(), Tracker(None))
    assert list(results) == ["C", "C letters", "GSM8K"] and results["GSM8K"]["split"] == "test"
    assert chat_eval.chat_core(results) == pytest.approx(((0.5 - 0.2) / 0.8 + 1.0) / 2)


def test_with_interval_names_the_band_of_a_curve() -> None:
    low, high = wilson_interval(30, 100)
    assert with_interval("eval/x", 0.3, 100) == {"eval/x": 0.3, "eval/x_low": low, "eval/x_high": high}


def test_greedy_answers_to_one_question_several_times_are_refused() -> None:
    with pytest.raises(UserError, match="--temperature=1.0"):
        asked(scripted(lambda prompt, sample: ""), Choices(1), num_samples=4)


def test_an_empty_evaluation_is_refused() -> None:
    with pytest.raises(UserError, match="nothing to evaluate"):
        asked(scripted(lambda prompt, sample: ""), Choices(0))
    with pytest.raises(UserError, match="nothing to evaluate"):
        asked(scripted(lambda prompt, sample: ""), Choices(3), limit=0)


def test_a_limit_takes_the_first_items_and_some_are_shown() -> None:
    accuracy = asked(
        scripted(lambda prompt, sample: "Answer: A"), Choices(9), limit=5, batch_size=2, num_shown=3
    )
    assert [o.index for o in accuracy.outcomes] == [0, 1, 2, 3, 4]
    assert len(accuracy.shown) == 3
    assert set(accuracy.shown[0]) == {"question", "completion", "predicted", "gold", "correct"}


def test_the_result_does_not_depend_on_the_batch_size_or_the_number_of_ranks() -> None:
    alone = ranks_results(ALONE)
    assert alone["small"] == alone["large"]
    for rank in run_ranks(ranks_results, 2):
        assert rank == alone


def ranks_results(world: World) -> dict:
    tokenizer, task = ByteTokenizer(), Choices(7)
    model = small_model(vocab_size=tokenizer.vocab_size, noise=0.2)
    engine = Engine(model, tokenizer)
    small, large = (
        evaluate_generative(
            engine, tokenizer, task, world, num_samples=2, temperature=1.0, max_tokens=6, batch_size=size
        )
        for size in (3, 64)
    )
    letters = evaluate_letters(model, tokenizer, task, world)
    plain = {
        name: [list(dataclasses.astuple(outcome)) for outcome in accuracy.outcomes]
        for name, accuracy in (("small", small), ("large", large), ("letters", letters))
    }
    return {name: repr(rows) for name, rows in plain.items()}


def test_letters_are_read_after_the_prompt_and_the_cue() -> None:
    tokenizer, task = ByteTokenizer(), Choices(12)
    model = small_model(vocab_size=tokenizer.vocab_size, noise=0.2)
    accuracy = evaluate_letters(model, tokenizer, task, ALONE, token_budget=300)
    assert accuracy.mode == "letters" and accuracy.parse_rate == 1.0
    for index, outcome in enumerate(accuracy.outcomes):
        ids = [*tokenizer.render_for_completion(task[index]), *tokenizer.encode("Answer:")]
        logits = model(torch.tensor([ids]))[0, -1, tokenizer.letter_ids("ABCDE")]
        assert outcome.letters == ("ABCDE"[int(logits.argmax())],)
        assert outcome.correct == (outcome.letters[0] == task[index]["answer_letter"],)
    assert "no reasoning" in accuracy.describe()


def test_a_model_that_reads_is_consistent_under_rotation_and_one_that_likes_a_letter_is_not() -> None:
    task = Choices(20)
    reader, fan, mute = (
        evaluate_rotations(engine, engine.tokenizer, task, ALONE)  # type: ignore[arg-type]
        for engine in (
            scripted(lambda prompt, sample: f"Answer: {right_letter(prompt)}"),
            scripted(lambda prompt, sample: "Answer: C"),
            scripted(lambda prompt, sample: "..."),
        )
    )
    assert reader.consistency == reader.all_right == reader.value == 1.0
    assert fan.consistency == fan.all_right == 0.0
    assert fan.value == pytest.approx(0.2), "in five cyclic orders every letter is right exactly once"
    assert mute.consistency == 0.0, "no answer is not the same answer"
    assert set(reader.metrics()) > {"eval/rotation_consistency", "eval/rotation_consistency_low"}
    assert "5 cyclic orders" in reader.describe()


def test_rotations_need_a_task_with_options() -> None:
    class NoOptions(Choices):
        problem = property()  # type: ignore[assignment]

    engine = scripted(lambda prompt, sample: "")
    with pytest.raises(UserError, match="no options to rotate"):
        evaluate_rotations(engine, engine.tokenizer, NoOptions(2), ALONE)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--rotations=7"):
        evaluate_rotations(engine, engine.tokenizer, Choices(2), ALONE, num_rotations=7)  # type: ignore[arg-type]


def test_a_comparison_counts_flips_and_tests_them() -> None:
    before = Accuracy("T", "generative", outcomes([("A", "A")] * 5 + [("A", "B")] * 35), 0.2)
    after = Accuracy(
        "T", "generative", outcomes([("A", "B")] * 2 + [("A", "A")] * 18 + [("A", "B")] * 20), 0.2
    )
    result = compare(before, after)
    assert (result.gained, result.lost, result.n) == (15, 2, 40)
    assert result.difference == pytest.approx(after.value - before.value)
    assert result.p == pytest.approx(0.00235, abs=1e-4) and result.mid_p < result.p
    assert "+32.5 points" in result.describe() and "15 gained, 2 lost of 40" in result.describe()


def test_only_the_same_items_are_paired() -> None:
    one = Accuracy("T", "generative", outcomes([("A", "A")] * 4), 0.2)
    with pytest.raises(UserError, match="different items"):
        compare(one, dataclasses.replace(one, outcomes=one.outcomes[:3]))
    with pytest.raises(UserError, match="one task"):
        compare(one, dataclasses.replace(one, mode="letters"))
    with pytest.raises(UserError, match="--num_samples=1"):
        compare(one, dataclasses.replace(one, outcomes=outcomes([("A", "AB")] * 4)))


def test_rotations_of_different_letters_for_one_option_agree() -> None:
    turns = tuple(
        Accuracy("T", "generative", (Outcome(0, "A", (letter,), ("seven",), (True,), (False,), 5),), 0.2)
        for letter in "AEDCB"
    )
    assert Rotations("T", turns).consistency == 1.0


@dataclasses.dataclass
class TextBatch:
    inputs: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def to(self, device: torch.device) -> TextBatch:
        return self


def test_bits_per_byte_is_nats_over_bytes_without_special_tokens() -> None:
    model = small_model(noise=0.2)
    sizes = torch.tensor([0, *[1 + i % 4 for i in range(30)]])
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 3] = 0
    targets = torch.where(torch.rand(2, 8) < 0.2, -1, ids[:, 1:])
    batches = [TextBatch(ids[:, :-1], targets)] * 2
    logp = torch.log_softmax(model(ids[:, :-1]), -1)
    nats, num_bytes = 0.0, 0
    for row in range(2):
        for t in range(8):
            target = int(targets[row, t])
            if target > 0:  # neither untrained nor the special token 0
                nats -= logp[row, t, target].item()
                num_bytes += int(sizes[target])
    assert bits_per_byte(model, batches, sizes, ALONE) == pytest.approx(
        nats / num_bytes / math.log(2), rel=1e-5
    )


def test_bits_per_byte_of_no_text_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="validation text is empty"):
        bits_per_byte(small_model(), [], torch.ones(31), ALONE)
