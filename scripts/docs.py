"""
Write the pages that are made from code: docs/metrics.md from nanochat/metrics.py, docs/flags.md from every Config.

    python -m scripts.docs              write them
    python -m scripts.docs --check=1    compare, name the page that is stale, exit with 1

A module counts as a command when it has a dataclass `Config` of its own and hands it to cli(). A flag's text is the
string below its field, as `--help` shows it. Flags that several stages share are listed once, and a command that only
changes the default of one lists it again.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from nanochat import config as shared
from nanochat.common import UserError, write_atomic
from nanochat.config import cli
from nanochat.launch_flags import LaunchConfig
from nanochat.metrics import SECTIONS
from scripts.presets import KNOBS, PRESETS

ROOT = Path(__file__).resolve().parent.parent
SHARED = (shared.StageConfig, shared.TrainConfig, shared.ConversationConfig, LaunchConfig)
MARK = "<!-- written by `python -m scripts.docs`; change the code instead -->\n"
# A flag or a curve inside a sentence; as code, so that Markdown leaves `*` and `_` alone.
_NAME = re.compile(r"(?<![`\w/])(--\w+|(?:train|val|rl|attn|eval|time|perf)/[\w*]+(?:/[\w*]+)*)")


@dataclass(frozen=True)
class Config:
    """Write the pages that are made from code."""

    check: bool = False
    """write nothing; fail where a page is not what would be written"""


def main(config: Config) -> None:
    """Write or compare every page."""
    for path, text in pages().items():
        if config.check and (not path.exists() or path.read_text() != text):
            raise UserError(f"docs/{path.name} is stale; write it anew with: python -m scripts.docs")
        if not config.check:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, text)
        print(f"docs/{path.name}: {'as it should be' if config.check else 'written'}")


def pages() -> dict[Path, str]:
    """Path and text of every page that is made from code."""
    return {ROOT / "docs" / "metrics.md": metrics_page(), ROOT / "docs" / "flags.md": flags_page()}


# ---- metrics -------------------------------------------------------------------------------------------------------


def metrics_page() -> str:
    """docs/metrics.md."""
    head = f"""\
{MARK}
# Every curve

Each stage writes its curves to `runs/RUN/STAGE/metrics.jsonl`, one line for each step, and to Weights & Biases under the
same names. `nanochat/metrics.py` is where the sentences below stand; the report and the dashboards take theirs from there.

Words. A `*` in a name stands for a letter, a layer number, a k or the name of a task. A *group* is all completions of one
question. The *start* is the checkpoint that RL began from. *Looked at*: at the first step, then every `--kl_every` steps, the
same `--kl_batch` validation questions, answered anew, and one completion each of as many questions of the step; attention
is looked at on the validation questions alone, every `--attn_every` steps. The *answer position* is the token after the last
`Answer:`. log is the natural logarithm, so entropies and KLs are in nats.

In Weights & Biases, `python -m scripts.wandb_workspace` lays the curves out as dashboards.
"""
    parts = [head]
    for title, section in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name, row in section.items():
            parts.append(
                f"### `{name}`\n\n{as_code(row.meaning)}\n\n"
                f"- Formula: {as_code(row.formula)}\n"
                f"- Healthy: {as_code(row.healthy)}\n"
                f"- Bad: {as_code(row.bad)}\n"
            )
    return "\n".join(parts)


def as_code(text: str) -> str:
    """`text` with the names of flags and curves as code."""
    return _NAME.sub(r"`\1`", text)


# ---- flags ---------------------------------------------------------------------------------------------------------


def flags_page() -> str:
    """docs/flags.md."""
    head = f"""\
{MARK}
# Every flag

Write `--flag=value` or `--flag value`, with dashes or underscores; switches are `--flag`, `--flag=0` or `--no-flag`. `--help`
after any command prints its flags. A wrong flag or value is refused in one line that says what to write.

Defaults are those of a command that is called by itself. The drivers, `run_aquarat_small.sh` and `run_aquarat_lite.sh`, set
many of them from [their own numbers](#numbers-of-the-drivers).
"""
    parts = [head]
    for kind in SHARED:
        title, base = SHARED_TITLES[kind], _shared_base(kind)
        parts.append(f"## {title}\n\n{_first_line(kind)}{_beside(base)}\n\n{flag_table(kind)}\n")
    for module, kind in commands():
        table = flag_table(kind) or "No flags of its own.\n"
        parts.append(
            f"## python -m {module}\n\n{_first_line(kind)}{_beside(_shared_base(kind))}\n\n{table}\n"
        )
    parts.append(f"## Numbers of the drivers\n\n{KNOBS_TEXT}\n\n{knob_table()}")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


SHARED_TITLES = {
    shared.StageConfig: "Flags of every stage",
    shared.TrainConfig: "Flags of supervised training",
    shared.ConversationConfig: "Flags of training on conversations",
    LaunchConfig: "Flags of the launchers",
}
KNOBS_TEXT = """\
`NAME=value bash run_aquarat_small.sh` sets one; `.env` can hold them, too. The machine chooses the column, `PRESET=` overrules
it. An empty value leaves a flag to the stage. `.env.template` has the variables that are not numbers: folders, keys, names."""


def commands() -> Iterator[tuple[str, Any]]:
    """(module, its Config) of every command, in order of the alphabet."""
    for path in sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("nanochat/*.py")]):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.ClassDef) and node.name == "Config" for node in tree.body):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            # By name: scripts do not import each other, and here they are read as data.
            yield module, importlib.import_module(module).Config


def flag_table(kind: Any) -> str:
    """The flags that `kind` itself declares, as a Markdown table; '' where it has none."""
    texts, hints = field_texts(kind), typing.get_type_hints(kind)
    own = vars(kind).get("__annotations__", {})
    rows = [
        "| {} | {} | {} | {} |".format(
            ", ".join(f"`{name}`" for name in (f"--{field.name}", *field.metadata.get("aliases", ()))),
            type_name(hints[field.name]),
            default_text(field.default),
            cell(field.metadata.get("help") or texts.get(field.name, "")),
        )
        for field in dataclasses.fields(kind)
        if field.name in own
    ]
    return (
        "\n".join(["| flag | value | default | what it is |", "|---|---|---|---|", *rows, ""]) if rows else ""
    )


def field_texts(kind: Any) -> dict[str, str]:
    """Field name -> the string below it, of the class itself."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    pairs = zip(body.body, body.body[1:], strict=False)
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


def type_name(hint: Any) -> str:
    """What to write after `=`."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" if choice != "" else "nothing" for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"{type_name(get_args(hint)[0])}, may be repeated"
    return {int: "whole number", float: "number", str: "text", bool: "switch"}[hint]


def default_text(value: Any) -> str:
    """A default as one types it."""
    if value is None or value in ("", ()):
        return ""
    return f"`{int(value)}`" if isinstance(value, bool) else f"`{value}`"


def cell(text: str) -> str:
    """`text` for a table."""
    return as_code(text).replace("|", "\\|")


def knob_table() -> str:
    """The presets as a Markdown table."""
    lines = [f"| number | {' | '.join(PRESETS)} | what it is |", "|---|" + "---|" * (len(PRESETS) + 1)]
    for knob in KNOBS:
        values = " | ".join("" if value == "" else f"`{cell(str(value))}`" for value in knob.values)
        lines.append(f"| `{knob.name}` | {values} | {cell(knob.help)} |")
    return "\n".join(lines) + "\n"


def _shared_base(kind: Any) -> Any:
    return next((base for base in kind.__mro__[1:] if base in SHARED), None)


def _first_line(kind: Any) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _beside(base: Any) -> str:
    """Where the flags stand that are not listed again."""
    if base is None:
        return ""
    title = SHARED_TITLES[base]
    return f" Beside these, the [{title[0].lower()}{title[1:]}](#{title.lower().replace(' ', '-')})."


if __name__ == "__main__":
    main(cli(Config))
