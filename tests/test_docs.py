"""What the pages say can be typed: every command, flag, variable, path and link in them exists."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.config import parse
from nanochat.metrics import METRICS, describe, find
from scripts import docs, plan
from scripts.presets import KNOBS, Machine
from tests.pages import ROOT, all_pages, blocks, inline_code, shell_text, without_blocks
from tests.test_env import SYSTEM, names_listed
from tests.test_layers import LAYERS

PAGES = all_pages()
OURS = ("scripts", "nanochat", "tasks", "benchmarks", "tests")
KNOB_NAMES = {knob.name for knob in KNOBS}
OTHERS_FLAGS = {"--help", "--standalone", "--nproc_per_node", "--extra"}  # of every command, torchrun and uv
BY_HAND = {  # our commands that read their words themselves: what each must match
    "nanochat.report": r"(reset|generate|summarize)( [\w.-]+)?",
    "scripts.plan": r"(--shell|--env)?",
}
TOY = "LARGEST"  # docs/add_a_dataset.md makes it known
MACHINE = Machine((), 0.0, 2)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def simple_commands(script: str) -> Iterator[list[str]]:
    """The words of each simple command of shell text: joined lines, pipes and lists taken apart, comments left out."""
    lexer = shlex.shlex(
        script.replace("\\\n", " ").replace("\n", " ; "), posix=True, punctuation_chars=";&|<>()"
    )
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    skip = False
    for word in lexer:
        if skip:
            skip = False
        elif set(word) <= set(";&|()"):
            yield words
            words = []
        elif set(word) <= set("<>&"):
            skip = True  # a redirection's file
        elif word not in ("do", "then", "else", "done", "fi"):
            words.append(word)
    yield words


def without_comments(script: str) -> str:
    """Shell text without comments; a # inside a word is none."""
    return re.sub(r"(?m)(^|\s)#.*$", "", script)


def our_command(words: list[str]) -> tuple[str, list[str]] | None:
    """(module or file of ours, its arguments) when the command runs one; None for other programs."""
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    for place, word in enumerate(words):
        program = Path(words[0]).name
        if word == "-m" and words[place + 1 :] and words[place + 1].split(".")[0] in OURS:
            return words[place + 1], words[place + 2 :]
        if word.endswith((".py", ".sh")) and place and program in ("bash", "python", "python3", "source"):
            return word, words[place + 1 :]
    return None


def commands_of(page: Path) -> Iterator[tuple[str, list[str]]]:
    """What the page tells the reader to run of ours, in blocks and in lines of text."""
    text = page.read_text()
    scripts = [shell_text(block) for block in blocks(text)]
    scripts += [
        code for code in inline_code(text) if re.match(r"([A-Z_]+=\S* )*(python3?|torchrun|bash) ", code)
    ]
    for script in scripts:
        for words in simple_commands(without_comments(script)):
            if words and (found := our_command(words)):
                yield found


def typed(word: str) -> str:
    """A word as the shell would hand it over, with 1 in place of a variable, and a known name in place of the toy set's."""
    return re.sub(r"\$\{?\w+\}?", "1", word).replace(TOY, "SYNTHETIC")


def check_command(name: str, words: list[str]) -> None:
    """Raise UserError or AssertionError where the command would be refused."""
    words = [typed(word) for word in words]
    if name in BY_HAND:
        assert re.fullmatch(BY_HAND[name], " ".join(words)), f"{name} does not take {words}"
    elif name.endswith(".sh"):
        assert (ROOT / name).is_file(), f"there is no {name}"
    elif name.endswith(".py"):
        written = [b.lead for p in PAGES for b in blocks(p.read_text()) if b.language == "python"]
        if any(name in lead for lead in written):
            return  # the page itself has the reader write it
        assert (ROOT / name).is_file(), f"there is no {name}"
        check_words(importlib.import_module(name.removesuffix(".py").replace("/", ".")), words)
    else:
        check_words(importlib.import_module(name), words)


def check_words(module: Any, words: list[str]) -> None:
    """Parse `words` with the module's Config; a command without one takes no words that we could check."""
    if "--help" in words:
        return
    if hasattr(module, "Config"):
        parse(module.Config, module.with_any(words) if hasattr(module, "with_any") else words)
    else:
        assert not words, f"{module.__name__} has no Config, so {words} cannot be checked; give it one"


@each_page
def test_every_command_would_be_understood(page: Path) -> None:
    for name, words in commands_of(page):
        try:
            check_command(name, words)
        except UserError as error:
            pytest.fail(f"{page.name}: {name} {shlex.join(words)}: {error}")


@each_page
def test_every_shell_block_is_read_by_bash(page: Path) -> None:
    whole = "\n".join(
        f"({{ :\n{shell_text(block)}\n}})" for block in blocks(page.read_text()) if shell_text(block)
    )
    done = subprocess.run(["bash", "-n"], input=whole, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each_page
def test_every_variable_is_one_that_is_read(page: Path) -> None:
    text = page.read_text()
    known = {*names_listed(), *SYSTEM, "DEBIAN_FRONTEND", "NAME"}
    for script in [shell_text(block) for block in blocks(text)] + inline_code(text):
        for name, value in re.findall(r"(?:^|[\s`(])([A-Z][A-Z0-9_]+)=([^\s`]*)", without_comments(script)):
            own = re.search(rf"\$\{{?{name}\b", script)  # a helper of the block itself
            assert name in known or own, f"{page.name}: {name} is in no line of .env.template"
            if name in KNOB_NAMES and re.fullmatch(r"[\w|]+", value):
                plan.resolve({name: typed(value)}, MACHINE)


@each_page
def test_every_flag_named_in_text_exists(page: Path) -> None:
    flags = {word for _, kind in docs.commands() for word in spellings(kind)}
    for code in inline_code(page.read_text()):
        if match := re.fullmatch(r"(--[a-z][\w-]*)(?:[= ].*)?", code):
            flag = match[1].replace("-", "_").replace("__", "--", 1)
            known = (
                flag in flags
                or flag in OTHERS_FLAGS
                or code in ("--flag", "--flag=value", "--flag value", "--flag=0")
            )
            assert known or flag.replace("--no_", "--") in (*flags, "--flag"), (
                f"{page.name}: no command has {code}"
            )


def spellings(kind: Any) -> Iterator[str]:
    """Every name of every flag of a Config, with underscores."""
    for field in dataclasses.fields(kind):
        yield f"--{field.name}"
        yield from field.metadata.get("aliases", ())


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", without_blocks(page.read_text())):
        address = "".join(target)
        if re.match(r"[a-z]+:", address):
            continue
        name, _, anchor = address.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{page.name}: {address} leads to no file"
        if anchor:
            assert anchor in anchors(other.read_text()), f"{page.name}: {address} leads to no heading"


def anchors(text: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", without_blocks(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return names | set(re.findall(r"(?:id|name)=\"([^\"]+)\"", text))


@each_page
def test_every_file_of_ours_named_in_text_exists(page: Path) -> None:
    written = " ".join(block.lead for block in blocks(page.read_text()) if block.language == "python")
    for code in inline_code(page.read_text()):
        if re.fullmatch(rf"(?:{'|'.join(OURS)}|docs|rustbpe)/[\w/]+\.\w+", code) and code not in written:
            assert (ROOT / code).exists(), f"{page.name}: there is no {code}"


# ---- pages made from code ------------------------------------------------------------------------------------------


def test_pages_made_from_code_are_what_would_be_written() -> None:
    for path, text in docs.pages().items():
        assert path.read_text() == text, f"{path.name} is stale; write it anew with: python -m scripts.docs"


def test_a_stale_page_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    monkeypatch.setattr(docs, "commands", lambda: iter(()))
    with pytest.raises(UserError, match=r"metrics\.md is stale"):
        docs.main(docs.Config(check=True))
    docs.main(docs.Config())
    docs.main(docs.Config(check=True))
    (tmp_path / "docs" / "flags.md").write_text("old")
    with pytest.raises(UserError, match=r"flags\.md is stale"):
        docs.main(docs.Config(check=True))


def test_every_curve_has_four_sentences() -> None:
    for name, row in METRICS.items():
        for sentence in dataclasses.astuple(row):
            assert sentence.endswith(".") and len(sentence) > 6, f"{name}: {sentence!r}"
    page = docs.metrics_page()
    assert all(f"### `{name}`\n" in page for name in METRICS)
    row = find("rl/kl_sequence_k3_std")
    assert row is METRICS["rl/kl_sequence_k3_*"] and describe("rl/kl_sequence_k3_std") == row.healthy
    assert find("nothing/such") is None


def test_the_page_of_flags_has_every_flag_with_its_text() -> None:
    page = docs.flags_page()
    for module, kind in docs.commands():
        assert f"## python -m {module}\n" in page
        for line in docs.flag_table(kind).splitlines()[2:]:
            assert line in page and line.count(" | ") == 3 and not line.endswith("|  |"), line
    everything = {word for _, kind in docs.commands() for word in spellings(kind)}
    assert sorted(flag for flag in everything if f"`{flag}`" not in page) == []


def test_the_drawing_of_the_layers_has_every_module_in_its_layer() -> None:
    (drawing,) = (
        block.text
        for block in blocks((ROOT / "docs" / "architecture.md").read_text())
        if block.section.startswith("The layers")
    )
    rows = [set(re.findall(r"\w+", line)) for line in drawing.splitlines() if line.startswith("  ")]
    rows = [row for row in rows if row]
    wanted = [set(names.split()) for names in LAYERS]
    exist = {path.stem for path in (ROOT / "nanochat").glob("*.py")}
    assert [row & exist for row in reversed(rows)] == [row & exist for row in wanted]
    assert set().union(*rows) <= set().union(*wanted)


def test_the_line_that_luck_rarely_reaches_is_counted_right() -> None:
    def luck(right: int, n: int = 254, majority: int = 69) -> float:
        share = majority / n
        return math.fsum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(right, n + 1))

    text = (ROOT / "docs" / "results.md").read_text()
    (percent, right) = re.findall(r"([\d.]+) % \((\d+) of 254\) is the least", text)[0]
    assert luck(int(right)) < 0.05 <= luck(int(right) - 1)
    assert float(percent) == round(100 * int(right) / 254, 1)


# ---- the tests' own reading ----------------------------------------------------------------------------------------


def test_commands_are_found_in_every_form() -> None:
    script = (
        "A=1 torchrun --standalone -m scripts.chat_rl -- --dataset=AQUA  # note\n"
        'cd x && python -m scripts.chat_eval \\\n  -i rl -a "AQUA|SYNTHETIC" | tee log\nls > out\nbash run.sh &\n'
    )
    found = [our_command(words) for words in simple_commands(without_comments(script)) if words]
    assert found == [
        ("scripts.chat_rl", ["--", "--dataset=AQUA"]),
        None,
        ("scripts.chat_eval", ["-i", "rl", "-a", "AQUA|SYNTHETIC"]),
        None,
        None,
        ("run.sh", []),
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scripts.chat_rl", ["--", "--datset=AQUA"]),
        ("scripts.chat_eval", ["-i", "sftt"]),
        ("nanochat.report", ["make"]),
        ("run_aquarat_large.sh", []),
        ("scripts.plan", ["--shel"]),
    ],
)
def test_a_wrong_command_is_refused(name: str, words: list[str]) -> None:
    with pytest.raises((UserError, AssertionError)):
        check_command(name, words)


def test_anchors_are_github_s() -> None:
    text = "# Two `rl/acc` words\n## A\n## A\n```\n# no\n```\n"
    assert anchors(text) == {"two-rlacc-words", "a", "a-1"}
