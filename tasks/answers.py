"""
What counts as an answer, in one place: the reward, the evaluation and the data cleaning all ask here.

The rule is narrow on purpose. A final answer is `Answer: X` (or `Final Answer: X`), X one of the question's letters in
upper case, alone, in parentheses or in bold, and nothing after it on its line but closing punctuation. The word "Answer"
may be in any case, the letter may not: the article "a" answers nothing. The LAST line that says `Answer:` decides; if
what it says is not one well-formed letter, or if it says two, there is no answer. A generous parser pays for noise: one
that takes the first standalone letter finds an answer in 72 % of rationales that were cut before they reached one.

`strip_answer` is the other side: it takes a rationale's own closing statement away ("ANSWER:C", "Correct option is D",
"so the answer is E.") so that a training target ends with exactly one answer line, ours, and so that shuffling the
options leaves no stale letter behind. It may be generous, because no reward hangs on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_MARKER = re.compile(r"(?<!\w)(?:final[ \t]+)?answer\**[ \t]*:", re.IGNORECASE)


@lru_cache(maxsize=64)
def _final_letter(letters: tuple[str, ...]) -> re.Pattern[str]:
    """What may stand between `Answer:` and the end of its line."""
    letter = "|".join(re.escape(one) for one in letters)
    return re.compile(rf"[ \t]*\**[ \t]*(?:\(\**({letter})\**\)|({letter}))[ \t.!)*]*")


def parse_answer(text: str, letters: Sequence[str]) -> str | None:
    """The letter that `text` gives as its final answer, or None."""
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    line_start = text.rfind("\n", 0, markers[-1].start()) + 1
    line_end = text.find("\n", markers[-1].end())
    line_end = len(text) if line_end < 0 else line_end - text[:line_end].endswith("\r")
    on_line = [marker for marker in markers if marker.start() >= line_start]
    ends = [marker.start() for marker in on_line[1:]] + [line_end]
    pattern = _final_letter(tuple(letters))
    found = set()
    for marker, end in zip(on_line, ends, strict=True):
        # "**Final Answer: C" opens its bold before the marker; the stars then belong to the segment before.
        match = pattern.fullmatch(text, marker.end(), max(end, marker.end()))
        if match is None:
            return None
        found.add(match[1] or match[2])
    return found.pop() if len(found) == 1 else None


# ---- taking a rationale's own answer statement away ----------------------------------------------------------------

_WORD = r"(?:final\s+|correct\s+|right\s+|required\s+|best\s+)*(?:answers?|ans|anwer|asnwer|option|choice|choose|ans\w{0,2})"
_LABEL = r"['\"\u2018\u201c]?[(\[{]?\s*['\"]?\s*(?P<letter>[A-Ea-e])\s*['\"]?\s*[)\]}]?['\"\u2019\u201d]?"
_LINK = r"(?:\s|[:=\-\u2013\u2014.,>]|\u21d2|\bis\b|\bwill\b|\bbe\b|\bmust\b|\bshould\b|\bthe\b|\boption\b|\bchoice\b|\bcorrect\b|\banswer\b|\bletter\b)*"
_LEAD = r"(?:(?:hence|so|thus|therefore|thefore|and|i\.e|ie|correct|the|our|my|imo|clearly|which|is|this|it|must|be|that|means|giving|gives)\b|[\s,:;=\-\u2013>.\u2234\u21d2*(])*"
_TAIL = r"[\s.,;:!)\]*'\"\u2019\u201d]*"
_STATEMENT = rf"{_LEAD}{_WORD}{_LINK}{_LABEL}"

# A whole line that states the letter; the option's text may follow it after a bracket, a colon or a dot.
_STATEMENT_LINE = re.compile(
    rf"{_STATEMENT}(?:{_TAIL}|\s*(?:[).:,=\-\u2013]).{{0,60}}|\s+[\d$].{{0,20}})", re.IGNORECASE
)
# The same at the end of a line of reasoning: "... x = 250 m. Answer D", "so the answer is c ) 55".
_STATEMENT_AT_END = re.compile(
    rf"(?P<before>^|[\s.,;:=\u21d2>)]){_STATEMENT}(?:\s*[).:,=]?\s*\(?[\d$][^A-Za-z]{{0,15}})?{_TAIL}$",
    re.IGNORECASE,
)
# "So option C is correct.", "(B) is the answer".
_LETTER_CORRECT = re.compile(
    rf"(?P<before>^|[\s.,;:=\u21d2>)]){_LEAD}(?:{_WORD}\s+)?\(?(?P<letter>[A-E])\)?\s+is\s+(?:the\s+)?(?:correct|right|answer)"
    r"(?:\s+(?:answer|option|choice))?[\s.!]*$",
    re.IGNORECASE,
)
# A bare letter on a line of its own: "C", "(C)", "=> C.".
_BARE_LINE = re.compile(rf"[\s=\-\u2013>.\u2234\u21d2*]*{_LABEL}{_TAIL}")
# Or closing a last line after a full stop, a comma or an arrow: "... = 20 km. C".
_BARE_AT_END = re.compile(
    rf"(?:(?<=[.,;:>\u21d2])\s*|(?<=\d)\s*=\s*|(?:^|\s)(?=(?i:hence|so|thus|therefore|imo)\b))"
    rf"(?:(?i:hence|so|thus|therefore|imo)\b\s*,?)?\s*{_LABEL}{_TAIL}$"
)
# What a statement leaves hanging: "42 is the answer i.e.".
_DANGLING = re.compile(
    r"(?:[\s,;:=>\u21d2(-]|\b(?:i\.e\.?|ie|imo|hence|so|and|thus|therefore))+$", re.IGNORECASE
)
# What is left where a heading stood.
_EMPTY_HEADING = re.compile(
    r"[\s=>*\-.:]*(?:explanation|solution|sol|rationale|answer|ans)?[\s=>*\-.:]*", re.IGNORECASE
)


def strip_answer(rationale: str, gold: str) -> str:
    """
    `rationale` without the statement of its letter and without any `Answer:` that a parser could take for ours.

    An explicit statement goes whatever letter it names; a bare letter goes only where it is the gold one and stands
    where a conclusion stands, because A and B are also people, trains and events.
    """
    lines = [line.strip() for line in rationale.replace("\r", "\n").split("\n")]
    lines = [line for line in lines if line and not _states_letter(line)]
    while lines:
        shorter = _strip_end(lines[-1], gold)
        if shorter == lines[-1]:
            break
        lines[-1:] = [shorter] if shorter else []
    while lines and _EMPTY_HEADING.fullmatch(lines[0]):
        lines.pop(0)
    # "Answer: 30 km" keeps its value and loses the word, which belongs to the last line alone.
    return "\n".join(" ".join(_MARKER.split(line)).strip() for line in lines).strip()


def _states_letter(line: str) -> bool:
    return bool(_STATEMENT_LINE.fullmatch(line))


def _strip_end(line: str, gold: str) -> str:
    """The last line of a rationale without the conclusion that closes it."""
    match = _BARE_LINE.fullmatch(line)
    if match and match["letter"].upper() == gold and (match["letter"].isupper() or len(line) > 1):
        return ""
    far = max(0, len(line) - 120)  # a statement is short; searching all of a long line would be quadratic
    for explicit in (_STATEMENT_AT_END, _LETTER_CORRECT):
        if match := explicit.search(line, far):
            return _DANGLING.sub("", line[: match.start() + len(match["before"])])
    match = _BARE_AT_END.search(line, far)
    if match and match["letter"] == gold:
        return _DANGLING.sub("", line[: match.start()])
    return line


# ---- letters inside a rationale ------------------------------------------------------------------------------------

_REFERENCE = re.compile(
    r"(?P<word>\b(?:options?|choices?|answers?)\b[\s:\-]*(?:is\s+)?['\"(\[]?)(?P<letter>[A-E])(?![\w'\u2019])",
    re.IGNORECASE,
)


def relabel_references(rationale: str, new_letter: dict[str, str]) -> str:
    """Rename the letter in "option B", "choice (C)", "answer D"; other single letters are names of things."""

    def renamed(match: re.Match[str]) -> str:
        letter = match["letter"]
        if letter.islower():  # "a choice a day", "options b": too likely a word to touch unless upper case
            return match[0]
        return match["word"] + new_letter.get(letter, letter)

    return _REFERENCE.sub(renamed, rationale)
