"""The terminal: streaming, history, commands, Ctrl-C, pipes, and bars for a question with options."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.engine import Engine
from scripts import chat_cli
from scripts.chat_cli import Config, Talk, ask_once, bar, converse
from tests.talking import talking_model

PENS = "Pens cost 3 each. What do 4 cost? A) 7 B) 10 C) 12 D) 14 E) 43"


def make_talk(**config: Any) -> Talk:
    model, tokenizer = talking_model()
    return Talk(Engine(model, tokenizer), Config(**{"temperature": 0.0} | config))


def type_in(monkeypatch: pytest.MonkeyPatch, *typed: str | type[BaseException]) -> None:
    """Let input() give these lines, or raise, and then end."""
    left = list(typed)

    def typed_next(_: str = "") -> str:
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed_next)


def test_one_question_gives_the_answer_on_stdout_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    ask_once(make_talk(), "hello")
    said = capsys.readouterr()
    assert said.out == "Hi! I add up. 1€ + 1€ = 2€\n"
    assert said.err == ""


def test_a_question_with_options_gives_bars_beside_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    ask_once(make_talk(), PENS)
    said = capsys.readouterr()
    assert said.out == "One costs 3.\n4 * 3 = 12.\nAnswer: C\n"
    assert "answer C" in said.err
    rows = re.findall(r"^([> ]) ([A-E])  (\S+)\s+([█▏▎▍▌▋▊▉]*)\s+([\d.]+)%$", said.err, re.MULTILINE)
    assert [(letter, option) for _, letter, option, _, _ in rows] == list(
        zip("ABCDE", ("7", "10", "12", "14", "43"), strict=True)
    )
    assert [letter for mark, letter, *_ in rows if mark == ">"] == ["C"]
    assert sum(float(share) for *_, share in rows) == pytest.approx(100, abs=0.3)
    assert max(rows, key=lambda row: len(row[3]))[1] == "C"


def test_bars_are_as_long_as_their_share() -> None:
    assert [bar(share) for share in (0.0, 1 / 240, 0.5, 1.0)] == ["", "▏", "█" * 15, "█" * 30]


def test_what_a_model_writes_commands_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\tb\n\x1b]0;title\x07\x9b2J\r€"
    assert chat_cli.harmless(text) == text, "a pipe gets every character"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert chat_cli.harmless(text) == "a\tb\n\ufffd]0;title\ufffd\ufffd2J\ufffd€"


def test_aqua_insists_on_options() -> None:
    with pytest.raises(UserError, match="has no options"):
        ask_once(make_talk(aqua=True), "hello")


def test_a_conversation_keeps_its_history_until_it_is_cleared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = make_talk()
    type_in(monkeypatch, "hello", PENS, "/undo", "/again", "/clear", "/undo", "/nonsense", "/help")
    converse(talk)
    out = capsys.readouterr().out
    assert talk.history == []
    assert out.count("Hi! I add up.") == 2, "/undo took the question, /again asked the greeting again"
    assert "(a new conversation)" in out and "(nothing has been asked)" in out
    assert "/nonsense is not a command" in out and "/system TEXT" in out


def test_the_history_is_what_the_model_is_asked_with(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = make_talk(max_tokens=4)
    type_in(monkeypatch, "/system Be kind.", "hello", "hello")
    converse(talk)
    assert [m["role"] for m in talk.history] == ["user", "assistant"] * 2
    before = Talk(talk.engine, talk.config, talk.history[:3], talk.system).prompt()
    text = talk.engine.tokenizer.decode(before)
    assert "Be kind.\n\nhello" in text and text.count("<|user_start|>") == 2


def test_ctrl_c_stops_the_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = make_talk()
    stream = talk.engine.stream

    def interrupted(*args: Any, **settings: Any) -> Iterator[tuple[int, float]]:
        for number, pair in enumerate(stream(*args, **settings)):
            if number == 3 and not talk.history[1:]:
                raise KeyboardInterrupt
            yield pair

    talk.engine.stream = interrupted  # type: ignore[method-assign]
    type_in(monkeypatch, "hello", KeyboardInterrupt, "hello")
    converse(talk)
    out = capsys.readouterr().out
    assert "(stopped)" in out
    assert len(talk.history) == 4 and talk.history[0]["content"] == "hello"
    assert len(talk.history[1]["content"]) < len("Hi! I add up.")


def test_settings_change_in_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = make_talk()
    type_in(
        monkeypatch,
        "/set max_tokens 2",
        "/set temperature -1",
        "/set top_k many",
        "/set seed 1",
        "/set",
        "hello",
    )
    converse(talk)
    out = capsys.readouterr().out
    assert "max_tokens 2" in out and "temperature 0.0" in out
    assert "is below 0" in out and "'many' is not a number" in out and "seed cannot be set" in out
    assert len(talk.engine.tokenizer.encode(talk.history[-1]["content"])) <= 2


def test_an_overlong_conversation_is_one_line_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = make_talk()
    type_in(monkeypatch, "long " * 300, "hello")
    converse(talk)
    out = capsys.readouterr().out
    assert "error: prompt 0 has" in out and "Hi! I add up." in out
    assert len(talk.history) == 2


def test_several_lines_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, '"""', "one", "", "two", '"""', "/quit", "never")
    assert list(chat_cli.lines()) == ["one\n\ntwo"]


def test_a_dash_reads_the_question_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("  \n"))
    with pytest.raises(UserError, match="standard input is empty"):
        chat_cli.main(Config(prompt="-"))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"max_tokens": 0}, {"top_k": -1}])
def test_wrong_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}="):
        Config(**wrong)
