"""
What goes to the Hugging Face Hub: gathered in a release folder that can be looked at before anything is sent.

The README and every file of the repository that it links; with a checkpoint its weights, config, tokenizer and report, and a
model card whose accuracies were measured by this run and carry their interval and the score of the commonest letter.

Only what was staged here before is ever deleted (`.staged.json` lists it), and no link leads outside the repository, whatever
it looks like.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from nanochat.checkpoints import file_sha256
from nanochat.common import UserError, write_atomic
from nanochat.run_files import read_json

STAGED = ".staged.json"
LINK = re.compile(
    r"""!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*(?:<([^>\n]*)>|([^\s()]+(?:\([^\s()]*\)[^\s()]*)*))(?:\s+["'(][^)]*)?\s*\)"""  # inline
    r"""|^ {0,3}\[[^\]]+\]:\s*(?:<([^>\n]*)>|(\S+))"""  # reference
    r"""|<(?:a|img|source|video)\b[^>]*?\b(?:href|src)\s*=\s*["']([^"'>]+)["']""",  # HTML
    re.MULTILINE | re.IGNORECASE,
)
DATASETS = {"AQUA": ("deepmind/aqua_rat", "AQuA-RAT", "raw"), "GSM8K": ("openai/gsm8k", "GSM8K", "main")}


@dataclass(frozen=True, slots=True)
class Staged:
    """A file of the release: its name there, and its content or where it comes from."""

    name: str
    source: Path | bytes


def link_targets(markdown: str) -> list[str]:
    """Every link target of a Markdown text outside code, in order, each once."""
    plain = re.sub(r"^(```|~~~).*?^\1[^\n]*$|`[^`\n]*`", "", markdown, flags=re.MULTILINE | re.DOTALL)
    found = (next(group for group in match.groups() if group is not None) for match in LINK.finditer(plain))
    return list(dict.fromkeys(found))


def linked_files(readme: Path, root: Path) -> tuple[list[Staged], list[str]]:
    """The files of the repository that the README links, and a sentence on each link that is left out."""
    files, left_out = [], []
    for target in link_targets(readme.read_text(encoding="utf-8")):
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|#", target):
            continue
        name = unquote(re.split(r"[?#]", target)[0])
        path = Path(str(root) + name) if name.startswith("/") else readme.parent / name
        resolved = path.resolve()
        if not resolved.is_relative_to(root.resolve()):
            left_out.append(f"{target} leads outside the repository")
        elif is_private(resolved, root):
            left_out.append(f"{target} is private")
        elif resolved.is_dir():
            left_out.append(f"{target} is a folder")
        elif not resolved.is_file():
            left_out.append(f"{target} does not exist")
        elif resolved != readme.resolve():
            files.append(Staged(resolved.relative_to(root.resolve()).as_posix(), resolved))
    return files, left_out


def is_private(path: Path, root: Path) -> bool:
    """Whether a file of the repository is git's or holds keys: never part of a release."""
    parts = path.resolve().relative_to(root.resolve()).parts
    return any(p.startswith(".git") or (p.startswith(".env") and p != ".env.template") for p in parts)


def matching_files(patterns: tuple[str, ...], root: Path) -> list[Staged]:
    """The files of --extra but private ones. Raises UserError for a pattern that matches nothing or leads outside."""
    files = []
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise UserError(f"--extra={pattern}: give a pattern inside the repository")
        found = [
            path
            for path in sorted(root.glob(pattern))
            if path.is_file() and path.resolve().is_relative_to(root.resolve()) and not is_private(path, root)
        ]
        if not found:
            raise UserError(f"--extra={pattern} matches no file of the repository that may be published")
        files += [Staged(path.relative_to(root).as_posix(), path) for path in found]
    return files


def measured(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(task, results) of the evaluations that have an accuracy and its interval."""
    for task, values in results.items():
        if isinstance(values, Mapping) and {"accuracy", "n", "low", "high"} <= set(values):
            yield task, values


def front_matter(*, model_name: str, results: Mapping[str, Any], exported: bool) -> str:
    """The YAML that the Hub reads: licence, tags, and accuracies that were measured."""
    import yaml

    head: dict[str, Any] = {"language": ["en"], "license": "mit", "datasets": ["deepmind/aqua_rat"]}
    head |= {"metrics": ["accuracy"], "pipeline_tag": "text-generation"}
    head["tags"] = ["nanochat", "aqua-rat", "reinforcement-learning", "grpo"]
    if exported:
        head["library_name"] = "transformers"
    entries = []
    for task, values in measured(results):
        dataset, name, config = DATASETS.get(task.split(" ")[0], (None, task, None))
        if dataset is None:
            continue  # the Hub wants a dataset that it has; the table below has all of them
        entries.append(
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": dataset, "name": name, "config": config, "split": values.get("split", "validation")},
                "metrics": [{"type": "accuracy", "value": round(100 * values["accuracy"], 2), "name": f"accuracy, {task}, n = {values['n']}"}],
            }
        )  # fmt: skip
    if entries:
        head["model-index"] = [{"name": model_name, "results": entries}]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def results_table(results: Mapping[str, Any]) -> str:
    """Accuracies with interval and null, as Markdown."""
    rows = [
        "| task | questions | accuracy | 95 % interval | always the commonest letter |",
        "|---|---|---|---|---|",
    ]
    for task, values in measured(results):
        null = values.get("majority")
        rows.append(
            f"| {task} | {values['n']:,} | {100 * values['accuracy']:.1f} % | "
            f"{100 * values['low']:.1f} to {100 * values['high']:.1f} | {f'{100 * null:.1f} %' if null is not None else ''} |"
        )
    return "\n".join(rows) + "\n"


def card(*, readme: str, model_name: str, source: str, meta: Mapping[str, Any] | None, results: Mapping[str, Any], exported: bool) -> str:  # fmt: skip
    """README.md of the release: front matter, the checkpoint's facts, the repository's README."""
    readme = re.sub(r"\A---\n.*?\n---\n", "", readme, flags=re.DOTALL)
    head = front_matter(model_name=model_name, results=results, exported=exported)
    if meta is None:
        return head + readme
    lines = [f"# {model_name}, {source} checkpoint at step {meta['step']}\n"]
    if any(measured(results)):
        lines.append("Measured by this run, greedy unless said otherwise:\n\n" + results_table(results))
    else:
        lines.append("No evaluation of this checkpoint was found, so none is claimed.\n")
    if exported:
        lines.append(
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{model_name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{model_name}")\n```\n'
        )
    else:
        lines.append(
            "`model.safetensors` has nanochat's own names; this model is not one that transformers can compute.\n"
        )
    return head + "\n".join(lines) + "\n" + readme


def run_results(base: Path, run: str, source: str, step: int) -> dict[str, Any]:
    """What chat_eval measured of a stage in a run; {} where it did not, or measured another step than this one."""
    results = read_json(base / "runs" / run / f"chat_eval_{source}" / "summary.json").get("results") or {}
    if results.get("step", step) != step:
        print(
            f"left out: the accuracies of {run}, which are of step {results['step']} and not of step {step}"
        )
        return {}
    return dict(results)


def report_files(base: Path, run: str) -> list[Staged]:
    """report.md of this run and the figures that it shows; [] where the report there is another run's, or none is."""
    report = base / "report" / "report.md"
    if not report.is_file():
        print(f"left out: {report} does not exist")
        return []
    title = report.read_text(encoding="utf-8").partition("\n")[0]
    if title != f"# Report of the run {run}":
        print(
            f"left out: {report} is not of the run {run}; write it with: python -m nanochat.report generate {run}"
        )
        return []
    figures = sorted((report.parent / "report_figures").glob("*.png"))
    return [Staged("report.md", report), *(Staged(f"report_figures/{path.name}", path) for path in figures)]


def stage(files: list[Staged], folder: Path) -> None:
    """Write the release folder; of what is there only files staged earlier, and as they were staged, make room.

    Raises UserError, before anything is written, for a file of somebody else's in the way.
    """
    before = read_json(folder / STAGED).get("files", {})
    for file in files:
        target = folder / file.name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{file.name} would lie outside {folder}")
        if target.exists() and file.name not in before and not _same(file, target):
            raise UserError(f"{target} is there and was not staged by this command; move it away")
    names = {file.name for file in files}
    unwanted = [
        folder / name
        for name in sorted(before.keys() - names)
        if (folder / name).parent.resolve().is_relative_to(folder.resolve()) and (folder / name).is_file()
    ]
    for target in (*unwanted, *(folder / file.name for file in files if not _same(file, folder / file.name))):
        name = target.relative_to(folder).as_posix()
        if name in before and target.is_file() and file_sha256(target) != before[name]:
            raise UserError(f"{target} was changed since it was staged; move it away, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        target = folder / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file.source, bytes):
            write_atomic(target, file.source)
        elif file.source.resolve() != target.resolve():
            shutil.copyfile(file.source, target)
    for target in unwanted:
        target.unlink()
    hashes = {name: file_sha256(folder / name) for name in sorted(names)}
    write_atomic(folder / STAGED, json.dumps({"files": hashes}, indent=1) + "\n")


def _same(file: Staged, target: Path) -> bool:
    content = file.source if isinstance(file.source, bytes) else file.source.read_bytes()
    return target.is_file() and target.read_bytes() == content


def size_of(file: Staged) -> int:
    """Bytes of a file that will be staged."""
    return len(file.source) if isinstance(file.source, bytes) else file.source.stat().st_size
