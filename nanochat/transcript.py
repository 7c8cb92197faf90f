"""
Tokens to text while they come: no half characters, no stop string, and the tool's talk kept apart from the answer's.

A character's bytes may come in several tokens, so text waits until it is whole; bytes that are no UTF-8 become U+FFFD.
A stop string may come in several tokens too, so text that could still become one waits as well.
What the model says to the calculator is no part of the answer: training text repeats the result in its own words
("12/60 = $" tool "0.2" ...), so leaving the tool's part out of the text gives back the prose.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Said:
    """What one token added."""

    text: str = ""
    tool: str = ""
    """to the calculator, or from it: "12/60", then "=", then "0.2" """
    stopped: bool = False
    """a stop string is complete; the text before it was given out, and nothing follows"""


class Transcript:
    """The text of one answer, token by token."""

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        """`stop`: strings that end the answer and are no part of it."""
        self.tokenizer, self.stop = tokenizer, tuple(text for text in stop if text)
        self._names = {
            tokenizer.special(f"<|{name}|>"): name
            for name in ("python_start", "python_end", "output_start", "output_end", "assistant_end", "bos")
        }
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tool_decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held, self._in_tool = "", False

    def take(self, token: int) -> Said:
        """The next token's share of the text."""
        name = self._names.get(token)
        if name is not None:
            self._in_tool = name in ("python_start", "output_start")
            return Said(tool="=" if name == "output_start" else "")
        piece = self.tokenizer.token_bytes_of(token)
        if self._in_tool:
            return Said(tool=self._tool_decoder.decode(piece))
        return self._give(self._held + self._decoder.decode(piece))

    def close(self) -> Said:
        """What was still waiting when the answer ended."""
        said = self._give(self._held + self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return said if said.stopped else Said(said.text + rest)

    def _give(self, text: str) -> Said:
        """Give out `text` up to a stop string, or up to where one could have begun."""
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self._held = ""
            return Said(text[: min(found)], stopped=True)
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return Said(text[: len(text) - keep])


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
