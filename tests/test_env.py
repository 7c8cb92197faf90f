"""`.env.template` lists every environment variable that a file reads, and none that no file reads."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from scripts import plan
from scripts.presets import KNOBS, Machine

ROOT = Path(__file__).resolve().parent.parent
SYSTEM = {
    "HOME",
    "PATH",
    "NETRC",
    "CUDA_VISIBLE_DEVICES",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "DRIVER_PID",
} | {
    "TORCHELASTIC_RUN_ID",  # set by torchrun, both
    "TORCHELASTIC_USE_AGENT_STORE",
}
NAME = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
CARRIES_ENVIRONMENT = re.compile(r"\b(environ|getenv|env)\b")


def tracked(*endings: str) -> list[Path]:
    """The files of the repository, tests left out."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.suffix in endings and path.exists() and "tests" not in path.parts]


def names_in_python(source: str) -> Iterator[str]:
    """Names that `environ.get("X")`, `getenv("X")` and `environ["X"]` read, and what functions that touch it list."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and node.args
            and re.search(r"(environ|\benv)\.(get|pop|setdefault)$|getenv$", ast.unparse(node.func))
        ):
            yield from constants(node.args[0])
        elif isinstance(node, ast.Subscript) and re.search(r"environ$|^env$", ast.unparse(node.value)):
            yield from constants(node.slice)
        elif isinstance(node, ast.FunctionDef) and "os.environ[" in ast.unparse(node):
            yield from (name for name in constants(node) if NAME.fullmatch(name))


def constants(node: ast.AST) -> Iterator[str]:
    return (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def names_in_shell(source: str) -> set[str]:
    """Names with a default, as `set -u` asks for, less those that the script itself sets."""
    read = set(re.findall(r"\$\{([A-Z][A-Z0-9_]*):?[-=+]", source))
    own = set(re.findall(r"^\s*([A-Z][A-Z0-9_]*)=", source, re.MULTILINE)) - set(
        re.findall(r"\$\{([A-Z0-9_]+):=", source)
    )
    return read - own


def names_read() -> set[str]:
    shell_files = [*tracked(".sh"), ROOT / ".ci" / "run"]
    found = {knob.name for knob in KNOBS}
    for path in tracked(".py"):
        found |= set(names_in_python(path.read_text()))
    for path in shell_files:
        found |= names_in_shell(path.read_text())
    # What plan.py hands to pipeline.sh is no one's to set, unless it is a knob.
    handed = set(
        re.findall(
            r"^([A-Z_]+)=",
            plan.shell(plan.resolve({}, MACHINE), {"HF_HUB_OFFLINE": "1"}, MACHINE),
            re.MULTILINE,
        )
    )
    return found - SYSTEM - (handed - {knob.name for knob in KNOBS} - {"PRESET"})


MACHINE = Machine((), 0.0, 2)


def names_listed() -> list[str]:
    return re.findall(r"^(?:# )?([A-Z][A-Z0-9_]*)=", (ROOT / ".env.template").read_text(), re.MULTILINE)


def test_the_template_lists_what_is_read_and_nothing_else() -> None:
    listed, read = set(names_listed()), names_read()
    assert read - listed == set(), "read somewhere, missing in .env.template"
    assert listed - read == set(), "in .env.template, read nowhere"


def test_the_knobs_stand_in_the_template_as_the_presets_describe_them() -> None:
    text = (ROOT / ".env.template").read_text()
    assert text.endswith(plan.env_lines() + "\n"), (
        "its end must be what `python3 -m scripts.plan --env` prints"
    )


def test_nothing_is_listed_twice_and_no_secret_has_a_value() -> None:
    names = names_listed()
    assert len(names) == len(set(names))
    for line in (ROOT / ".env.template").read_text().splitlines():
        if re.search(r"(KEY|TOKEN|SECRET|PASSWORD)\w*=", line):
            assert line.endswith("="), line


def test_the_readers_find_names_in_every_form() -> None:
    source = """
import os
def f():
    a = os.environ.get("A_1") or os.getenv("B_1", "x") or os.environ["C_1"]
    for name in ("D_1", "E_1"):
        print(os.environ[name])
def g(env):
    return env.get("ONEWORD")
def h():
    return "NOT_ONE"
"""
    assert set(names_in_python(source)) == {"A_1", "B_1", "C_1", "D_1", "E_1", "ONEWORD"}
    assert names_in_shell(': "${A:=1}"\nOWN=3\necho ${OWN:-} ${B:-} ${C-} ${D:+x} $E') == {"A", "B", "C", "D"}
