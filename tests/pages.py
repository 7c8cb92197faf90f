"""Reading the project's pages as a reader does: code blocks, commands, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    section: str
    """the heading above it"""
    lead: str
    """the last paragraph before it"""


def all_pages() -> list[Path]:
    """The pages that a user reads."""
    return [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "rustbpe" / "README.md"]


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    for match in _FENCE.finditer(page):
        before = without_blocks(page[: match.start()])
        headings = re.findall(r"^#+ (.*)$", before, re.MULTILINE)
        paragraphs = [part.strip() for part in before.split("\n\n") if part.strip()]
        indent = re.compile(rf"^{match['indent']}", re.MULTILINE)
        yield Block(
            match["language"],
            indent.sub("", match["text"]),
            headings[-1] if headings else "",
            paragraphs[-1] if paragraphs else "",
        )


def without_blocks(page: str) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page)


def inline_code(page: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_blocks(page))


def shell_text(block: Block) -> str:
    """What a reader would type of a shell block; of a transcript, the lines after the prompt."""
    if block.language == "console":
        return "\n".join(re.findall(r"^\$ (.*)$", block.text, re.MULTILINE)) + "\n"
    return block.text if block.language in ("bash", "sh", "shell") else ""
