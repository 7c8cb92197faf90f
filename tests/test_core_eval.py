"""CORE on a bundle of a few lines: what each kind of task scores, how it is laid out, and what is missing when it is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.common import UserError, World
from nanochat.core_eval import (
    BundleMissing,
    CoreResult,
    TaskScore,
    _rows,
    evaluate_core,
    evaluate_task,
    load_bundle,
)
from tests.gloo import run_ranks, single
from tests.rl_fakes import ByteTokenizer, small_model

ALONE = single()
CHOICES = [
    {"query": f"Q{i}: what?", "choices": [f"no {i}", f"yes it is {i}", "maybe"], "gold": i % 3}
    for i in range(9)
]
SCHEMA = [
    {
        "context_options": [f"Tom {i} fell because Tom", f"Tom {i} fell because Ann"],
        "continuation": "slipped.",
        "gold": i % 2,
    }
    for i in range(6)
]
LANGUAGE = [{"context": f"one two {i} ", "continuation": "three four"} for i in range(5)]
KINDS = {"multiple_choice": CHOICES, "schema": SCHEMA, "language_modeling": LANGUAGE}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path)


def write_bundle(folder: Path) -> Path:
    lines = ["icl_tasks:"]
    for kind, items in KINDS.items():
        path = folder / "eval_data" / "sub" / f"{kind}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        lines += [
            f"- label: my_{kind}",
            f"  dataset_uri: sub/{kind}.jsonl",
            "  num_fewshot: [2]",
            f"  icl_task_type: {kind}",
        ]
        lines += ['  continuation_delimiter: "\\nAnswer: "'] if kind == "multiple_choice" else []
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    rows = ["Eval Task,Random baseline", "my_multiple_choice,33.3", "my_schema,50", "my_language_modeling,0"]
    (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n")
    return folder


class Oracle:
    """A stand-in for the model whose hidden state is the ids themselves; favours what `likes(previous, next)` likes."""

    def __init__(self, vocab_size: int, likes: Any) -> None:
        self.config = small_model().config
        self.device = torch.device("cpu")
        table = [[1.0 if likes(a, b) else 0.0 for b in range(vocab_size)] for a in range(vocab_size)]
        self.table = torch.tensor(table)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.unsqueeze(-1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.table[hidden.squeeze(-1)]

    def token_logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.logits(hidden), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def test_the_bundle_is_read_as_it_stands(bundle: Path) -> None:
    tasks = {task.kind: task for task in load_bundle(bundle)}
    assert tasks["multiple_choice"].delimiter == "\nAnswer: " and tasks["schema"].delimiter == " "
    assert tasks["multiple_choice"].chance == pytest.approx(0.333) and tasks["schema"].num_fewshot == 2


def test_a_multiple_choice_row_scores_the_continuation_alone_after_its_examples(bundle: Path) -> None:
    tokenizer = ByteTokenizer()
    task = load_bundle(bundle)[0]
    rows = _rows(tokenizer, task, CHOICES, 4, 512)
    drawn = random.Random(1234 + 4).sample([i for i in range(9) if i != 4], 2)
    shots = "".join(f"Q{i}: what?\nAnswer: {CHOICES[i]['choices'][CHOICES[i]['gold']]}\n\n" for i in drawn)
    for row, choice in zip(rows, CHOICES[4]["choices"], strict=True):
        assert row.ids[0] == tokenizer.bos_id
        assert tokenizer.decode(row.ids[1:]) == f"{shots}Q4: what?\nAnswer: {choice}"
        assert tokenizer.decode(row.ids[row.start : row.end]) == choice


def test_schema_rows_score_what_the_contexts_share_at_the_end(bundle: Path) -> None:
    tokenizer = ByteTokenizer()
    for row in _rows(tokenizer, load_bundle(bundle)[1], SCHEMA, 1, 512):
        assert tokenizer.decode(row.ids[row.start : row.end]) == " slipped."


def test_a_language_row_scores_the_continuation_and_its_space(bundle: Path) -> None:
    tokenizer = ByteTokenizer()
    (row,) = _rows(tokenizer, load_bundle(bundle)[2], LANGUAGE, 0, 512)
    assert tokenizer.decode(row.ids[row.start : row.end]) == " three four"


def test_rows_too_long_lose_their_beginning_and_keep_the_scored_span(bundle: Path) -> None:
    tokenizer = ByteTokenizer()
    for row in _rows(tokenizer, load_bundle(bundle)[0], CHOICES, 4, 20):
        assert len(row.ids) == 20 and row.end == 20 and 0 < row.start < 20
        assert tokenizer.decode(row.ids[row.start : row.end]) in CHOICES[4]["choices"]


def test_models_that_know_and_that_do_not_score_as_they_should(bundle: Path) -> None:
    tokenizer = ByteTokenizer()
    tasks = {task.kind: task for task in load_bundle(bundle)}

    def accuracy(kind: str, likes: Any) -> float:
        model: Any = Oracle(tokenizer.vocab_size, likes)
        return evaluate_task(model, tokenizer, ALONE, tasks[kind]).accuracy

    likes_maybe = {tuple(tokenizer.encode(pair)) for pair in ("ma", "ay", "yb", "be")}
    assert accuracy("multiple_choice", lambda a, b: (a, b) in likes_maybe) == pytest.approx(1 / 3)
    (space,) = tokenizer.encode(" ")
    for name in ("Tom", "Ann"):
        golds = [item["context_options"][item["gold"]].endswith(name) for item in SCHEMA]
        after_name = (tokenizer.encode(name)[-1], space)
        found = accuracy("schema", lambda a, b, liked=after_name: (a, b) == liked)
        assert found == sum(golds) / len(golds), name


def test_language_modeling_needs_every_token_to_be_the_likeliest(bundle: Path) -> None:
    tokenizer = ByteTokenizer(words=[" three", " four"])
    three, four = tokenizer.encode(" three four")
    task = load_bundle(bundle)[2]

    def accuracy(likes: Any) -> float:
        model: Any = Oracle(tokenizer.vocab_size, likes)
        return evaluate_task(model, tokenizer, ALONE, task).accuracy

    digits = tokenizer.encode("01234")
    assert accuracy(lambda a, b: (a in digits and b == three) or (a == three and b == four)) == 1.0
    assert accuracy(lambda a, b: a in digits and b == three) == 0.0
    assert accuracy(
        lambda a, b: (a == digits[0] and b == three) or (a == three and b == four)
    ) == pytest.approx(0.2)


def test_batches_of_any_size_and_ranks_of_any_number_give_one_result(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    alone = core_scores(ALONE, str(tmp_path), 10_000)
    assert core_scores(ALONE, str(tmp_path), 100) == alone
    assert run_ranks(core_scores, 2, str(tmp_path), 10_000) == [alone, alone]


def core_scores(world: World, folder: str, token_budget: int) -> list[float]:
    tokenizer = ByteTokenizer()
    model = small_model(vocab_size=tokenizer.vocab_size, noise=0.2)
    result = evaluate_core(model, tokenizer, world, bundle=Path(folder), token_budget=token_budget)
    assert [score.n for score in result.scores] == [9, 6, 5]
    return [score.accuracy for score in result.scores]


def test_core_is_the_mean_of_the_centred_accuracies_and_written_as_nanochat_writes_it() -> None:
    result = CoreResult((TaskScore("a", 10, 0.4, 0.25), TaskScore("b", 10, 0.5, 0.5)))
    assert result.core == pytest.approx(0.1)
    lines = result.csv().splitlines()
    assert [cell.strip() for cell in lines[0].split(",")] == ["Task", "Accuracy", "Centered"]
    assert [cell.strip() for cell in lines[-1].split(",")] == ["CORE", "", "0.100000"]
    assert "CORE" in result.table()


def test_a_missing_bundle_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing, match=r"eval_bundle\.zip"):
        load_bundle(tmp_path)


def test_broken_bundles_are_named(bundle: Path) -> None:
    (bundle / "eval_data" / "sub" / "schema.jsonl").unlink()
    with pytest.raises(UserError, match=r"my_schema: .*schema\.jsonl is missing"):
        load_bundle(bundle)
    config = bundle / "core.yaml"
    config.write_text(config.read_text().replace("icl_task_type: schema", "icl_task_type: cloze"))
    with pytest.raises(UserError, match="my_schema is of type cloze"):
        load_bundle(bundle)
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n")
    with pytest.raises(UserError, match="no random baseline for my_multiple_choice"):
        load_bundle(bundle)


@pytest.mark.parametrize("text", ["", "icl_tasks: 3", "icl_tasks: [{label: a}]", "a: [", "icl_tasks:\n- 7"])
@pytest.mark.parametrize("file", ["core.yaml", "eval_meta_data.csv"])
def test_a_damaged_index_is_one_line(bundle: Path, file: str, text: str) -> None:
    (bundle / file).write_text(text)
    with pytest.raises(UserError) as caught:
        load_bundle(bundle)
    assert "\n" not in str(caught.value)
    assert file in str(caught.value)


def test_too_few_items_for_the_examples_are_refused(bundle: Path) -> None:
    tokenizer = ByteTokenizer()
    model = small_model(vocab_size=tokenizer.vocab_size)
    with pytest.raises(UserError, match="too few to show 2"):
        evaluate_task(model, tokenizer, ALONE, load_bundle(bundle)[0], max_items=2)


def test_a_line_break_of_unicode_inside_an_item_ends_no_line(bundle: Path) -> None:
    path = bundle / "eval_data" / "sub" / "language_modeling.jsonl"
    items = [{**item, "context": f"one\u2028two\u0085{item['context']}"} for item in LANGUAGE]
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    task = next(task for task in load_bundle(bundle) if task.kind == "language_modeling")
    tokenizer: Any = ByteTokenizer()
    model = small_model(vocab_size=tokenizer.vocab_size)
    assert evaluate_task(model, tokenizer, ALONE, task).n == len(LANGUAGE)
