"""The tokenizer: known answers for conversations, files friendly and hostile, and its two scripts."""

from __future__ import annotations

import base64
import builtins
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.conversation import turns
from nanochat.tokenizer import LETTERS, SPECIALS, Tokenizer, load_tokenizer, split_pattern

TEXT = (
    "Reason first. Answer: A\n- 12 km=A\n- 50 km=B\nThe train needs 3 hours for 150 km, so it's 50 km an hour. "
    * 3
)
TOKENIZER = Tokenizer.train([TEXT], 300)


def marked(tokenizer: Tokenizer, conversation: Any) -> str:
    """What the assistant is trained on, in brackets."""
    ids, mask = tokenizer.render_conversation(conversation)
    assert len(ids) == len(mask)
    text, inside = "", False
    for token, trained in zip(ids, mask, strict=True):
        text += ("[" if trained and not inside else "]" if inside and not trained else "") + tokenizer.decode(
            [token]
        )
        inside = bool(trained)
    return text + ("]" if inside else "")


def say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def part(kind: str, text: str) -> dict[str, Any]:
    return {"type": kind, "text": text}


# ---- training -------------------------------------------------------------------------------------------------------------


def test_the_specials_stand_after_the_merges_in_nanochats_order() -> None:
    assert TOKENIZER.vocab_size == 300
    assert [TOKENIZER.special(name) for name in SPECIALS] == list(range(291, 300))
    assert TOKENIZER.bos_id == 291


def test_letters_are_tokens_even_where_the_text_has_none() -> None:
    for vocab_size in (270, 271, 300):
        tokenizer = Tokenizer.train(["to be or not to be " * 9], vocab_size)
        assert tokenizer.vocab_size <= vocab_size
        found = tokenizer.letter_ids("ABCDE")
        assert [tokenizer.token_bytes_of(token) for token in found] == [piece.encode() for piece in LETTERS]
        assert tokenizer.encode("Answer: C")[-1] == found[2]


def test_letter_ids_are_what_is_really_emitted_on_the_last_line() -> None:
    ids = TOKENIZER.encode("50 km an hour. 50\nAnswer: B")
    assert TOKENIZER.letter_ids(["B"]) == ids[-1:]
    assert TOKENIZER.decode(ids[:-1]).endswith("\nAnswer:")


def test_a_letter_of_two_tokens_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="no single token for 'Q'"):
        TOKENIZER.letter_ids(["A", "Q"])
    without = Tokenizer.train(["xyz"], 300, required=())
    with pytest.raises(UserError, match="no single token for 'A'"):
        without.letter_ids("A")


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(UserError, match="--vocab_size=269 is too small.*need 270"):
        Tokenizer.train(["text"], 269)


def test_too_little_text_gives_a_smaller_vocabulary() -> None:
    tokenizer = Tokenizer.train(["ab ab"], 1000)
    assert tokenizer.vocab_size < 300
    assert tokenizer.special("<|output_end|>") == tokenizer.vocab_size - 1


def test_digits_stay_in_runs_of_the_length_asked_for() -> None:
    for digits in (1, 2, 3):
        tokenizer = Tokenizer.train(["123 123 123456"] * 50, 300, pattern=split_pattern(digits))
        longest = max(len(tokenizer.token_bytes_of(token)) for token in tokenizer.encode("123123123123"))
        assert longest == digits
    with pytest.raises(UserError, match="--digits=0"):
        split_pattern(0)


# ---- text -----------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=200))
def test_text_comes_back_and_holds_no_special_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert max(ids, default=0) < TOKENIZER.bos_id


@given(st.lists(st.sampled_from([*SPECIALS, "<|", "|>", "bos", " "]), max_size=8).map("".join))
def test_special_tokens_in_text_stay_text(text: str) -> None:
    assert max(TOKENIZER.encode(text), default=0) < TOKENIZER.bos_id
    assert TOKENIZER.encode(text, bos=True) == [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    ids, _ = TOKENIZER.render_conversation({"messages": [say("user", text), say("assistant", text)]})
    assert [token for token in ids if token >= TOKENIZER.bos_id] == [
        TOKENIZER.special(name) for name in (*SPECIALS[:3], *SPECIALS[3:5])
    ]


@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_ids_decode(ids: list[int]) -> None:
    assert TOKENIZER.decode(ids) == b"".join(map(TOKENIZER.token_bytes_of, ids)).decode(errors="replace")


def test_an_id_that_no_token_has_is_named() -> None:
    for token in (300, -1):
        with pytest.raises(UserError, match=f"{token} is not a token"):
            TOKENIZER.decode([token])
    with pytest.raises(UserError, match="nope is not a special token"):
        TOKENIZER.special("nope")


def test_a_batch_is_its_texts_one_by_one() -> None:
    texts = [TEXT[:n] for n in range(0, len(TEXT), 7)]
    for threads in (None, 1, 2):
        batch = TOKENIZER.encode_batch(texts, bos=True, num_threads=threads)
        assert batch == [TOKENIZER.encode(text, bos=True) for text in texts]


def test_bytes_are_counted_as_bytes_and_specials_as_none() -> None:
    sizes = TOKENIZER.num_bytes()
    assert len(sizes) == 300 and sizes[:256] == [1] * 256 and sizes[291:] == [0] * 9
    assert sum(sizes[token] for token in TOKENIZER.encode("é 50 km")) == 8


def test_tiktoken_gives_the_same_ids() -> None:
    theirs = TOKENIZER.to_tiktoken()
    assert theirs.encode_ordinary(TEXT) == TOKENIZER.encode(TEXT)
    assert theirs.n_vocab == 300


def test_without_rustbpe_it_encodes_with_tiktoken_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    TOKENIZER.save(tmp_path)
    real = builtins.__import__

    def no_rustbpe(name: str, *rest: Any) -> Any:
        if name == "rustbpe":
            raise ImportError("No module named 'rustbpe'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_rustbpe)
    tokenizer = Tokenizer.load(tmp_path)
    assert "rustbpe is not built here" in capsys.readouterr().out
    assert tokenizer.encode(TEXT) == TOKENIZER.encode(TEXT)
    assert tokenizer.encode_batch([TEXT, ""]) == TOKENIZER.encode_batch([TEXT, ""])
    with pytest.raises(UserError, match="maturin develop"):
        Tokenizer.train([TEXT], 300)


# ---- conversations --------------------------------------------------------------------------------------------------------


def test_a_conversation_is_laid_out_as_nanochat_does_and_the_assistant_alone_is_trained() -> None:
    chat = {
        "messages": [
            say("user", "Hi."),
            say("assistant", "Yes?"),
            say("user", "No."),
            say("assistant", "Oh."),
        ]
    }
    assert marked(TOKENIZER, chat) == (
        "<|bos|><|user_start|>Hi.<|user_end|><|assistant_start|>[Yes?<|assistant_end|>]"
        "<|user_start|>No.<|user_end|><|assistant_start|>[Oh.<|assistant_end|>]"
    )


def test_what_the_assistant_shall_not_learn_to_say_is_not_trained() -> None:
    parts = [
        part("python", "1/0") | {"trained": False},
        part("text", "No"),
        part("text", "way") | {"trained": False},
    ]
    chat = {"messages": [say("user", "How?"), say("assistant", parts)]}
    assert marked(TOKENIZER, chat).endswith(
        "<|assistant_start|><|python_start|>1/0<|python_end|>[No]\nway[<|assistant_end|>]"
    )


def test_a_tool_call_is_trained_and_its_output_is_not() -> None:
    parts = [part("text", "So "), part("python", "150/3"), part("python_output", "50"), part("text", "50 km")]
    chat = {"messages": [say("user", "How far?"), say("assistant", parts)]}
    assert marked(TOKENIZER, chat) == (
        "<|bos|><|user_start|>How far?<|user_end|><|assistant_start|>[So <|python_start|>150/3<|python_end|>]"
        "<|output_start|>50<|output_end|>[50 km<|assistant_end|>]"
    )


def test_text_parts_do_not_glue() -> None:
    def rendered(*texts: str) -> str:
        chat = {"messages": [say("user", "?"), say("assistant", [part("text", text) for text in texts])]}
        return marked(TOKENIZER, chat).split("<|assistant_start|>")[1]

    assert rendered("50 km", "Answer: E") == "[50 km\nAnswer: E<|assistant_end|>]"
    assert rendered("50 km\n", "Answer: E") == "[50 km\nAnswer: E<|assistant_end|>]"
    assert rendered("", "Answer: E") == "[Answer: E<|assistant_end|>]"
    assert rendered("a", "b", "c") == "[a\nb\nc<|assistant_end|>]"


def test_parts_and_the_same_text_in_one_string_are_the_same_ids() -> None:
    parts = {
        "messages": [say("user", "?"), say("assistant", [part("text", "50 km"), part("text", "Answer: E")])]
    }
    string = {"messages": [say("user", "?"), say("assistant", "50 km\nAnswer: E")]}
    assert TOKENIZER.render_conversation(parts) == TOKENIZER.render_conversation(string)


def test_a_system_message_opens_the_first_users_message() -> None:
    chat = {"messages": [say("system", "Be brief."), say("user", "Hi."), say("assistant", "Yes?")]}
    before = json.dumps(chat)
    assert marked(TOKENIZER, chat) == (
        "<|bos|><|user_start|>Be brief.\n\nHi.<|user_end|><|assistant_start|>[Yes?<|assistant_end|>]"
    )
    assert json.dumps(chat) == before, "the caller's conversation is left alone"


def test_max_tokens_crops_ids_and_mask() -> None:
    chat = {"messages": [say("user", "Hi."), say("assistant", TEXT)]}
    ids, mask = TOKENIZER.render_conversation(chat)
    assert TOKENIZER.render_conversation(chat, max_tokens=9) == (ids[:9], mask[:9])


def test_a_prompt_ends_where_the_assistant_begins() -> None:
    chat = {
        "messages": [
            say("user", "Hi."),
            say("assistant", "Yes?"),
            say("user", "No."),
            say("assistant", "Oh."),
        ]
    }
    expected = (
        "<|bos|><|user_start|>Hi.<|user_end|><|assistant_start|>Yes?<|assistant_end|>"
        "<|user_start|>No.<|user_end|><|assistant_start|>"
    )
    assert TOKENIZER.decode(TOKENIZER.render_for_completion(chat)) == expected
    assert TOKENIZER.decode(TOKENIZER.render_for_completion({"messages": chat["messages"][:3]})) == expected
    ids, _ = TOKENIZER.render_conversation(chat)
    prompt = TOKENIZER.render_for_completion(chat)
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ({}, "at least one message"),
        ([], "at least one message"),
        (None, "at least one message"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hello"}, "at least one message"),
        ({"messages": ["hello"]}, "a message has a role"),
        ({"messages": [{"content": "hello"}]}, "a message has a role"),
        ({"messages": [say("robot", "hello")]}, "a message has a role"),
        ({"messages": [say("assistant", "hello")]}, "message 1 is the assistant's but it is the user's turn"),
        ({"messages": [say("user", "a"), say("user", "b")]}, "message 2 is the user's"),
        ({"messages": [say("user", "a"), say("system", "b")]}, "message 2 is the system's"),
        ({"messages": [say("system", "a")]}, "a system message alone"),
        ({"messages": [say("user", None)]}, "text or a list of parts, not NoneType"),
        ({"messages": [say("user", 7)]}, "text or a list of parts, not int"),
        ({"messages": [say("user", ["a"])]}, "a part of the user"),
        ({"messages": [say("user", [part("python", "1+1")])]}, "a part of the user"),
        ({"messages": [say("user", "a"), say("assistant", [part("image", "x")])]}, "a part of the assistant"),
        ({"messages": [say("user", "a"), say("assistant", [{"type": "text"}])]}, "a part of the assistant"),
        (
            {"messages": [say("user", "a"), say("assistant", [{"type": [], "text": ""}])]},
            "a part of the assistant",
        ),
        (
            {"messages": [say("user", "a"), say("assistant", [part("text", "b") | {"trained": "no"}])]},
            "is true or false, not 'no'",
        ),
    ],
)
def test_a_malformed_conversation_is_refused_with_the_reason(conversation: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        TOKENIZER.render_conversation(conversation)


def test_nothing_to_complete_is_refused() -> None:
    for messages in ([say("assistant", "a")], [say("system", "a")]):
        with pytest.raises(UserError, match="needs a user's message"):
            TOKENIZER.render_for_completion({"messages": messages})


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "type", "text"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(json_values)
def test_any_json_is_a_conversation_or_a_clear_error(value: Any) -> None:
    for candidate in (
        value,
        {"messages": [value]},
        {"messages": [say("user", value), say("assistant", value)]},
    ):
        try:
            ids, mask = TOKENIZER.render_conversation(candidate)
        except UserError:
            continue
        assert len(ids) == len(mask) and ids[0] == TOKENIZER.bos_id
        assert list(turns(candidate))


# ---- files ----------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train([TEXT], 400, pattern=split_pattern(1))
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.pattern == split_pattern(1)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert loaded.fingerprint == tokenizer.fingerprint
    others = Tokenizer.train([TEXT[::-1]], 400, pattern=split_pattern(1)), Tokenizer.train([TEXT], 400)
    assert tokenizer.fingerprint not in [other.fingerprint for other in others]
    sizes = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
    assert sizes.dtype == torch.int32 and sizes.tolist() == loaded.num_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["token_bytes.pt", "tokenizer.json"]


def test_a_tokenizer_can_be_sent_to_another_process() -> None:
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.encode(TEXT) == TOKENIZER.encode(TEXT) and copy.vocab_size == TOKENIZER.vocab_size


def test_the_default_place_is_the_base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(
        UserError, match="no tokenizer in .*tokenizer; make one with: python -m scripts.tok_train"
    ):
        load_tokenizer()
    TOKENIZER.save(tmp_path / "tokenizer")
    assert load_tokenizer().vocab_size == 300


def test_nanochats_pickle_is_read_and_its_bytes_are_counted_anew(tmp_path: Path) -> None:
    with open(tmp_path / "tokenizer.pkl", "wb") as file:
        pickle.dump(TOKENIZER.to_tiktoken(), file)
    # Half of a Cyrillic letter is one byte; October 2025's nanochat wrote 3, the length of U+FFFD.
    torch.save(torch.full((300,), 3, dtype=torch.int32), tmp_path / "token_bytes.pt")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(TEXT) == TOKENIZER.encode(TEXT)
    assert loaded.num_bytes() == TOKENIZER.num_bytes()
    assert [loaded.special(name) for name in SPECIALS] == [TOKENIZER.special(name) for name in SPECIALS]


def test_of_two_files_ours_is_used_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(b"whatever")
    assert Tokenizer.load(tmp_path).vocab_size == 300
    assert "using tokenizer.json" in capsys.readouterr().out


class Calls:
    """Pickles into a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def as_encoding(state: Any) -> bytes:
    """A pickle that gives tiktoken's Encoding the state, as a real one does."""
    buffer = io.BytesIO()
    pickler = pickle._Pickler(buffer, 4)  # type: ignore[attr-defined]  # the one in Python takes opcodes one by one
    pickler.write(b"\x80\x04")
    pickler.save("tiktoken.core")
    pickler.save("Encoding")
    pickler.write(b"\x93)\x81")  # STACK_GLOBAL, EMPTY_TUPLE, NEWOBJ
    pickler.save(state)
    pickler.write(b"b.")  # BUILD, STOP
    return buffer.getvalue()


HOSTILE = {
    "os.system": pickle.dumps(Calls(os.system, "touch hacked")),
    "eval": pickle.dumps(Calls(eval, "open('hacked', 'w')")),
    "subprocess": pickle.dumps(Calls(subprocess.run, ["touch", "hacked"])),
    "nested in a list": pickle.dumps([1, {"a": Calls(os.system, "touch hacked")}]),
    "a call that makes a call": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system")),
    "old protocol": b"cposix\nsystem\n(S'touch hacked'\ntR.",
    "INST opcode": b"(S'touch hacked'\niposix\nsystem\n.",
    "inside the right class": as_encoding({"mergeable_ranks": Calls(os.system, "touch hacked")}),
    "as its state": as_encoding(Calls(eval, "open('hacked', 'w')")),
    "a call of the right class": b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93\x8c\x01x\x85R.",
    "tiktoken's loader": b"\x80\x04\x8c\x0dtiktoken.core\x8c\x0cget_encoding\x93\x8c\x01x\x85R.",
    "a registered name for a state": as_encoding("cl100k_base"),
    "no ranks": as_encoding({"pat_str": "a", "special_tokens": {}}),
    "ranks of text": as_encoding({"pat_str": "a", "special_tokens": {}, "mergeable_ranks": {"a": 1}}),
    "ranks without specials": as_encoding(
        {"pat_str": "a", "special_tokens": {}, "mergeable_ranks": {b"a": 1}}
    ),
    "not a pickle": b"hello",
    "empty": b"",
    "cut": pickle.dumps({"a": 1})[:-3],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_does_nothing_and_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(HOSTILE[name])
    with pytest.raises(UserError):
        Tokenizer.load(tmp_path)
    assert not (tmp_path / "hacked").exists()


@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda data: as_encoding({})[:-2] + data))
def test_any_bytes_as_a_pickle_are_refused(data: bytes) -> None:
    from nanochat.tokenizer_files import unpickled

    with pytest.raises(UserError):
        unpickled(data, "tokenizer.pkl")


def saved(change: Any) -> str:
    tokens: list[str | None] = [base64.b64encode(bytes([byte])).decode() for byte in range(256)]
    record = {
        "format": "nanochat-tokenizer-1",
        "pattern": split_pattern(),
        "specials": {name: 256 + index for index, name in enumerate(SPECIALS)},
        "tokens": tokens,
    }
    change(record)
    return json.dumps(record)


DAMAGED: dict[str, str] = {
    "not json": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "another format": saved(lambda r: r.update(format="nanochat-tokenizer-9")),
    "no tokens": saved(lambda r: r.pop("tokens")),
    "a byte is missing": saved(lambda r: r["tokens"].pop()),
    "not base64": saved(lambda r: r["tokens"].append("!!!")),
    "an empty token": saved(lambda r: r["tokens"].append("")),
    "a special is missing": saved(lambda r: r["specials"].pop("<|bos|>")),
    "a special over a byte": saved(lambda r: r["specials"].update({"<|bos|>": 7})),
    "a special beyond measure": saved(lambda r: r["specials"].update({"<|bos|>": 1 << 60})),
    "a negative special": saved(lambda r: r["specials"].update({"<|bos|>": -1})),
    "specials in a list": saved(lambda r: r.update(specials=[1])),
    "no pattern": saved(lambda r: r.update(pattern="(")),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(DAMAGED[name])
    with pytest.raises(UserError) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_undamaged_form_of_those_files_is_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(saved(lambda r: None))
    assert Tokenizer.load(tmp_path).encode("hi") == [104, 105]


# ---- the scripts ----------------------------------------------------------------------------------------------------------


def test_tok_train_and_tok_eval_run_without_any_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts import tok_eval, tok_train

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    tok_train.main(tok_train.Config(vocab_size=512, max_chars=60_000, mixture="synthetic"))
    tokenizer = load_tokenizer()
    assert tokenizer.vocab_size == 512
    assert max(map(len, [tokenizer.token_bytes_of(t) for t in tokenizer.encode("123456")])) == 1
    tok_eval.main(tok_eval.Config(rivals=False))
    results = json.loads((tmp_path / "runs/dummy/tok_eval/summary.json").read_text())["results"]
    assert results["ours/bytes_per_token/prose"] > 1.2


def test_tok_train_reads_shards_and_files_up_to_the_caps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from scripts import tok_train

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "shards").mkdir()
    for number, word in enumerate(("train", "held out")):
        table = pa.table({"text": [f"{word} " * 2000] * 10})
        pq.write_table(table, tmp_path / "shards" / f"shard_{number:05d}.parquet")
    (tmp_path / "extra.txt").write_text("quixotic " * 2000)
    tok_train.main(
        tok_train.Config(
            vocab_size=300,
            max_chars=5000,
            doc_cap=1000,
            mixture="",
            shards=str(tmp_path / "shards"),
            texts=str(tmp_path / "extra.txt"),
        )  # fmt: skip
    )
    record = json.loads((tmp_path / "base/runs/dummy/tok_train/summary.json").read_text())["results"]
    assert (record["num_chars"], record["num_documents"]) == (5000, 5)
    tokenizer = load_tokenizer()
    learnt = {tokenizer.token_bytes_of(token) for token in range(256, tokenizer.vocab_size)}
    assert {b" train", b" quixotic"} <= learnt and not any(b"held" in token for token in learnt)


def test_a_wrong_setting_of_tok_train_is_one_line() -> None:
    from scripts.tok_train import Config

    for wrong in ({"max_chars": 0}, {"doc_cap": 0}, {"digits": 4}, {"mixture_share": 1.0}):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))}="):
            Config(**wrong)  # type: ignore[arg-type]


def test_rivals_that_cannot_be_had_are_left_out_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    from scripts.tok_eval import rivals

    over = threading.Event()

    def slow_or_absent(name: str) -> Any:
        if name == "gpt2":
            raise OSError("no network")
        over.wait(60)

    monkeypatch.setattr(tiktoken, "get_encoding", slow_or_absent)
    found, missing = rivals(patience_seconds=0.2)
    assert not over.is_set(), "the slow one was not waited for"
    over.set()
    assert found == {} and [line.split("'")[0] for line in missing] == ["GPT-2", "GPT-4"]


@pytest.mark.parametrize("script", ["tok_train", "tok_eval"])
def test_help_does_not_wait_for_torch(script: str) -> None:
    code = f"import sys, scripts.{script}; sys.exit(any(m in sys.modules for m in ('torch', 'tiktoken', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
