"""Tokens to text: characters whole, stop strings unseen, the calculator apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanochat.transcript import Transcript
from tests.rl_fakes import ByteTokenizer

TOKENIZER = ByteTokenizer()


def pieces(text: str | bytes, *, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What each byte of `text` gives out, the end included, and whether a stop string ended it."""
    transcript, found = Transcript(TOKENIZER, stop=stop), []  # type: ignore[arg-type]
    for byte in text.encode() if isinstance(text, str) else text:
        said = transcript.take(byte)
        found.append(said.text)
        if said.stopped:
            return found, True
    said = transcript.close()
    return [*found, said.text], said.stopped


def test_a_character_is_given_out_when_its_last_byte_is_there() -> None:
    assert pieces("é€🙂")[0] == ["", "é", "", "", "€", "", "", "", "🙂", ""]


def test_half_a_character_at_the_end_and_bytes_that_are_none_become_the_replacement() -> None:
    assert "".join(pieces(b"a\xe2\x82")[0]) == "a\ufffd"
    assert "".join(pieces(b"\xffb")[0]) == "\ufffdb"


@given(st.text(), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_text_is_what_stands_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    found, stopped = pieces(text, stop=tuple(stop))
    ends = [text.find(one) + len(one) for one in stop if one in text]
    if not ends:
        assert ("".join(found), stopped) == (text, False)
        return
    first = text[: min(ends)]  # the stop string that is complete first ends the answer
    assert stopped
    assert "".join(found) == first[: min(first.find(one) for one in stop if one in first)]


def test_text_that_cannot_become_a_stop_string_does_not_wait() -> None:
    assert pieces("ab\nc", stop=("\n\n",))[0] == ["a", "b", "", "\nc", ""]


def test_the_calculators_part_is_no_part_of_the_text() -> None:
    transcript, text, tool = Transcript(TOKENIZER), "", ""  # type: ignore[arg-type]
    start, end, out, out_end = (
        TOKENIZER.special(f"<|{name}|>")
        for name in ("python_start", "python_end", "output_start", "output_end")
    )
    ids = [*TOKENIZER.encode("is $"), start, *TOKENIZER.encode("12/60"), end, out, *TOKENIZER.encode("0.2")]
    for token in [*ids, out_end, *TOKENIZER.encode("0.2"), TOKENIZER.special("<|assistant_end|>")]:
        said = transcript.take(token)
        text, tool = text + said.text, tool + said.tool
    assert (text, tool) == ("is $0.2", "12/60=0.2")
