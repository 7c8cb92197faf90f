"""
How the report words things: numbers, tables, accuracies with their intervals, sample answers. Markdown out, no files in.

Accuracies arrive as `Accuracy.results()` (nanochat/accuracy.py) gives them. None is printed without its interval, and the
level beside it is the score of always saying the commonest letter where there are letters, else that of a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MEASURES = {  # results that belong into the summary -> their name there
    "train_bpb": "training text, bits per byte",
    "val_bpb": "validation text, bits per byte",
    "val_loss": "validation loss",
    "core": "CORE",
    "core_metric": "CORE",
    "CORE": "CORE",
    "ChatCORE": "ChatCORE",
}
Result = Mapping[str, Any]


def value(item: Any) -> str:
    """nanochat's way: floats with 4 decimals, whole numbers from 10,000 on with commas."""
    if isinstance(item, bool) or item is None:
        return {True: "yes", False: "no", None: ""}[item]
    if isinstance(item, float):
        return f"{item:.4f}" if item == 0 or 1e-3 <= abs(item) < 1e6 else f"{item:.3g}"
    if isinstance(item, int):
        return f"{item:,}" if item >= 10_000 else str(item)
    if isinstance(item, list | tuple):
        return ", ".join(value(one) for one in item)
    return str(item).replace("\n", " ")


def clipped(line: str, limit: int = 220) -> str:
    """A line of at most `limit` characters."""
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def percent(share: float) -> str:
    """27.2 %"""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 5 min"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def flat(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings within mappings as one, with names such as `AQUA rotations, eval/rotation_acc`."""
    result: dict[str, Any] = {}
    for name, item in rows.items():
        if isinstance(item, Mapping):
            result |= {f"{name}, {inner}": leaf for inner, leaf in flat(item).items()}
        else:
            result[name] = item
    return result


def bullets(rows: Mapping[str, Any]) -> str:
    """`- key: value` lines, without those that have nothing to say."""
    return "\n".join(f"- {name}: {value(item)}" for name, item in rows.items() if item not in (None, "", []))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without the columns that are empty; '' when there are no rows."""
    if not rows:
        return ""
    used = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    lines = [[header[i] for i in used], ["---", *("---:" for _ in used[1:])]]
    lines += [[row[i].replace("|", "\\|") for i in used] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def folded(title: str, body: str) -> str:
    """Text behind a fold."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def accuracy_name(key: str, result: Result) -> str:
    """`AQUA validation, generative`: what was asked and how, the same in every stage."""
    name = " ".join(str(result[part]) for part in ("task", "split") if result.get(part)) or key
    parts = [name, str(result.get("mode") or "")]
    if result.get("temperature"):  # the mean of samples is another measure than a greedy answer
        count = result.get("num_samples", 1)
        parts.append(f"mean of {count} samples" if count > 1 else f"temperature {result['temperature']:g}")
    return ", ".join(filter(None, parts))


def accuracy(result: Result) -> str:
    """`27.2 % (22.1 to 33.0)`"""
    shown = percent(result["accuracy"])
    if "low" in result and "high" in result:
        shown += f" ({100 * result['low']:.1f} to {100 * result['high']:.1f})"
    return shown


def null_level(result: Result) -> str:
    """What an accuracy has to beat."""
    if result.get("majority") is not None:
        return f"{percent(result['majority'])} (always {result.get('majority_letter', 'one letter')})"
    return percent(result["chance"]) if result.get("chance") else ""


def accuracy_table(results: Mapping[str, Result]) -> str:
    """All accuracies of a stage with what belongs to them."""
    rows = []
    for key, result in results.items():
        letters = result.get("predicted") or {}
        rows.append(
            [
                accuracy_name(key, result),
                accuracy(result),
                null_level(result),
                value(result.get("n", "")),
                percent(result["parse_rate"]) if result.get("parse_rate") is not None else "",
                " ".join(f"{letter} {count}" for letter, count in letters.items()),
            ]
        )
    return table(
        ["task", "accuracy (95 %)", "guessing", "questions", "answers read", "predicted letters"], rows
    )


def many_samples(key: str, result: Result) -> str:
    """What several answers to each question reach: pass@k beside guessing, and the majority vote; '' for one answer."""
    passed, guessed = result.get("pass_at") or {}, result.get("guess_at") or {}
    if not passed:
        return ""
    k = max(passed, key=int)
    beside = f" (guessing {percent(guessed[k])})" if k in guessed else ""
    told = f"**{accuracy_name(key, result)}** at temperature {result['temperature']:g}: pass@{k} {percent(passed[k])}{beside}"
    if result.get("maj") is not None:
        told += f", maj@{k} {percent(result['maj'])}, {result['num_tied']} tied and counted by their share"
    return told + "."


def comparison(key: str, result: Result) -> str:
    """What a paired comparison found, in a sentence."""
    before, n = result["before"], result["n"]
    return (
        f"**{accuracy_name(key, result)}**, against {result['compared_with']} on the same {n:,} questions: "
        f"{percent(before['accuracy'])} to {percent(result['accuracy'])}, "
        f"{100 * (result['gained'] - result['lost']) / n:+.1f} points; "
        f"{result['gained']} gained, {result['lost']} lost, McNemar p = {result['mcnemar_p']:.2g}."
    )


def choose_samples(rows: Sequence[Result]) -> list[Result]:
    """At most two right and two wrong answers, each of another question."""
    chosen: list[Result] = []
    for right in (True, False):
        seen: set[str] = set()
        for row in rows:
            question = str(row.get("question", ""))
            if is_right(row) is right and question and question not in seen and len(seen) < 2:
                seen.add(question)
                chosen.append(row)
    return chosen


def is_right(row: Result) -> bool:
    """Whether a sample got the gold answer."""
    if "correct" in row:
        return bool(row["correct"])
    return row.get("predicted") is not None and row.get("predicted") == row.get("gold")


def sample(row: Result) -> str:
    """A question and its answer, both in fences that nothing in them can close."""
    asked, completion = str(row["question"]).strip(), str(row.get("completion", ""))
    verdict = "right" if is_right(row) else "wrong"
    facts = {
        "predicted": row.get("predicted") or "none",
        "gold": row.get("gold"),
        "reward": f"{row['reward']:g}" if isinstance(row.get("reward"), int | float) else None,
    }
    told = ", ".join(f"{name} {fact}" for name, fact in facts.items() if fact is not None)
    return f"{fenced(asked)}\n\n{fenced(completion)}\n\n{verdict}: {told}"


def fenced(content: str) -> str:
    """Text as it is, with a fence longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall(r"`+", content)), default=0))
    return f"{fence}text\n{content}\n{fence}"


def plain(markdown: str) -> str:
    """Markdown for a terminal: tables with straight columns, no stars."""
    lines: list[str] = []
    rows: list[list[str]] = []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("| "):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
            continue
        if rows:
            lines += _aligned([row for row in rows if not row[0].startswith("---")])
            rows = []
        lines.append(line.replace("**", ""))
    return "\n".join(lines).rstrip()


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
