"""
The report of a run, written from its run directory. Stages know nothing of it.

    python -m nanochat.report generate [RUN]     report.md and its figures, in <base dir>/report and here
    python -m nanochat.report summarize [RUN]    the summary table alone, for a terminal
    python -m nanochat.report reset              remove <base dir>/report

Without RUN the newest run is meant. nanochat kept reports in its stages, which put half of report.py into ten scripts and was
deleted there for it; here a stage that is missing, still running or failed costs a line that says so. As in nanochat,
<base dir>/report/ also holds each section as a file of its own, under nanochat's names.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat import report_text as text
from nanochat.common import UserError, base_dir, write_atomic
from nanochat.figures import learning_curves, panels_of
from nanochat.metrics import describe
from nanochat.rl_gain import gain_table, load_gain, tasks_asked
from nanochat.run_files import read_lines, run_dir
from nanochat.run_record import CONTROLS, TITLES, RunRecord, StageRecord, load_run, run_names

FIGURES = "report_figures"  # beside report.md, so that the same text works in both places
COLUMNS = ("base", "mid", "sft", "rl")


def generate(run: RunRecord, folder: Path) -> str:
    """Write sections and figures of `run` into `folder`; returns the whole report."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sections = {"header": header(run), "summary": "## Summary\n\n" + summary(run)}
    sections["gain"] = gain_section(run)
    sections["data"] = data_section(run)
    for stage in run.stages.values():
        figure = folder / FIGURES / f"{stage.name}.png"
        drawn = learning_curves(stage.name, stage.metrics, figure, levels=levels(run, stage))
        slug = re.sub(r"\W+", "-", stage.title.lower())
        sections[slug] = stage_section(stage, f"{FIGURES}/{stage.name}.png" if drawn else None)
    sections["samples"] = samples_section(run)
    sections["time"] = time_section(run)
    for name, section in sections.items():
        if section:
            write_atomic(folder / f"{name}.md", section + "\n")
    whole = "\n\n".join(section for section in sections.values() if section) + "\n"
    write_atomic(folder / "report.md", whole)
    return whole


def header(run: RunRecord) -> str:
    """Title and system."""
    first = next(iter(run.stages.values()))
    last = list(run.stages.values())[-1]
    system, versions = first.config.get("system", {}), first.config.get("versions", {})
    commit = str(first.config.get("commit") or "unknown")[:12]
    dirty = " with uncommitted changes" if first.config.get("dirty") else ""
    gpus = system.get("gpus") or []
    rows = {
        "started": f"{first.config.get('started', '?')} UTC",
        "time": f"{text.duration(run.seconds)} in all stages",
        "commit": commit + dirty,
        "GPUs": f"{len(gpus)} x {gpus[0]}" if gpus else "none",
        "CPU": f"{system.get('cpu', '?')}, {system.get('num_cores', '?')} cores",
        "memory": f"{system.get('memory_gib', '?')} GiB",
        "processes": max((s.config.get("world_size") or 1 for s in run.stages.values()), default=1),
        "device, dtype": f"{last.config.get('device', '?')}, {last.config.get('dtype', '?')}",
        "platform": system.get("platform", "?"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return f"# Report of the run {run.name}\n\n## System\n\n{text.bullets(rows)}"


def summary(run: RunRecord) -> str:
    """The table of all scores by stage, the comparisons, and what did not finish."""
    return "\n\n".join(
        part for part in (text.table(*summary_table(run)), *comparisons(run), *troubles(run)) if part
    )


def summary_table(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row for each measure, one column for each trained stage."""
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for column in COLUMNS:
        for label, result in measures(run, column):
            if isinstance(result, Mapping):
                key = (label, text.null_level(result), str(result.get("n", "")))
                cells.setdefault(key, {})[column] = text.accuracy(result)
            else:
                cells.setdefault((label, "", ""), {})[column] = text.value(result)
    rows = [[label, *(by.get(c, "") for c in COLUMNS), null, n] for (label, null, n), by in cells.items()]
    return ["", *COLUMNS, "guessing", "questions"], rows


def measures(run: RunRecord, column: str) -> Iterator[tuple[str, Any]]:
    """(label, number or accuracy) of the stage `column` and of its evaluations, most telling last."""
    sources = {"base": ("base", "base_loss", "base_eval")}.get(column, (column, f"chat_eval_{column}"))
    for name in sources:
        stage = run.stages.get(name)
        for key, result in (stage.results if stage else {}).items():
            if is_accuracy(result):
                yield text.accuracy_name(key, result), result
            elif key in text.MEASURES and isinstance(result, int | float):
                yield text.MEASURES[key], result


def is_accuracy(result: Any) -> bool:
    """True for what Accuracy.results() gives."""
    return isinstance(result, Mapping) and "accuracy" in result


def comparisons(run: RunRecord) -> Iterator[str]:
    """A sentence for each paired comparison that an evaluation recorded."""
    for stage in run.stages.values():
        for key, result in stage.results.items():
            if is_accuracy(result) and result.get("compared_with"):
                yield text.comparison(key, result)


def troubles(run: RunRecord) -> Iterator[str]:
    """What is missing or did not end well."""
    absent = [title for name, title in TITLES.items() if name not in run.stages]
    if absent:
        yield f"Not run: {', '.join(absent)}."
    for stage in run.stages.values():
        if stage.state:
            yield f"**{stage.title}** {stage.state}"


def gain_section(run: RunRecord) -> str:
    """Whether RL helped, question by question, with the controls beside it."""
    folder = run_dir(run.name)
    tables = [f"### {task}\n\n{gain_table(load_gain(folder, task))}" for task in tasks_asked(folder)]
    return "\n\n".join(["## Does RL help?", *tables]) if tables else ""


def data_section(run: RunRecord) -> str:
    """What was trained and evaluated on, and what was left out."""
    parts = ["## Data"]
    for opening, kind in (("", "data"), ("Left out:\n\n", "skipped")):
        told: dict[str, list[str]] = {}  # what -> the stages that said it
        for stage in run.stages.values():
            for line in stage.told(kind):
                told.setdefault(line.removeprefix(f"{stage.name}: "), []).append(stage.title)
        if told:
            parts.append(
                opening + "\n".join(f"- {text.clipped(k)} ({', '.join(v)})" for k, v in told.items())
            )
    return "\n\n".join(parts) if len(parts) > 1 else ""


def stage_section(stage: StageRecord, figure: str | None) -> str:
    """nanochat's section: title, timestamp, `- key: value`; then the curves, and the settings folded away."""
    parts = [
        f"## {stage.title}\ntimestamp: {stage.summary.get('finished') or stage.config.get('started', '?')}"
    ]
    if stage.state:
        parts.append(f"**{stage.state}**")
    plain = {key: value for key, value in stage.results.items() if not is_accuracy(value)}
    if plain:
        parts.append(text.bullets(text.flat(plain)))
    scores = {key: value for key, value in stage.results.items() if is_accuracy(value)}
    if scores:
        parts.append(text.accuracy_table(scores))
        parts += filter(None, (text.many_samples(key, result) for key, result in scores.items()))
    if figure:
        parts.append(f"![{stage.title}: learning curves]({figure})")
        drawn = dict.fromkeys(
            n
            for panel in panels_of(stage.name)
            for n in panel.curves
            if any(n in row for row in stage.metrics)
        )
        parts.append(
            text.folded("how to read the curves", text.bullets({f"`{n}`": describe(n) for n in drawn}))
        )
    if settings := stage.config.get("config"):
        parts.append(
            text.folded("settings", text.bullets({**settings, "resumed at": stage.config.get("resumed_at")}))
        )
    return "\n\n".join(parts)


def samples_section(run: RunRecord) -> str:
    """A few answers of the last stage that recorded any, of a control only where no other did; right and wrong ones."""
    for stage in sorted(reversed([*run.stages.values()]), key=lambda stage: stage.name in CONTROLS):
        tables = stage.directory / "tables"
        for path in [*sorted(tables.glob("samples/*.jsonl")), tables / "rl" / "samples.jsonl"]:
            rows = read_lines(path)
            if chosen := text.choose_samples(
                [row for row in rows if row.get("step") == rows[-1].get("step")]
            ):
                shown = "\n\n".join(text.sample(row) for row in chosen)
                return f"## Sample answers\n\n{stage.title}, {path.stem}.\n\n{shown}"
    return ""


def time_section(run: RunRecord) -> str:
    """Wall time by stage."""
    rows = [
        [
            stage.title,
            text.duration(stage.seconds),
            f"{stage.seconds / run.seconds:.0%}" if run.seconds else "",
        ]
        for stage in run.stages.values()
    ]
    rows.append(["total", text.duration(run.seconds), ""])
    return "## Time\n\n" + text.table(["stage", "time", "share"], rows)


def levels(run: RunRecord, stage: StageRecord) -> dict[str, float]:
    """What always saying the commonest letter scores, by task: the lines that the accuracies of `stage` must beat.

    The stage's own, of the very questions that its curve is of; only where it logged none, that of another evaluation.
    """
    if own := [row["eval/majority"] for row in stage.metrics if "eval/majority" in row]:
        return {"always the commonest letter": own[-1]}
    drawn = {name for row in stage.metrics for name in row if name.endswith("_dev_acc")}
    found: dict[str, float] = {}
    for other in run.stages.values():
        for result in other.results.values():
            task = str(result.get("task", "")) if is_accuracy(result) else ""
            if f"eval/{task.lower()}_dev_acc" in drawn and result.get("majority"):
                found[f"{task}, always {result.get('majority_letter', 'one letter')}"] = result["majority"]
    return found


def main(argv: Sequence[str]) -> int:
    """Carry out `reset`, `generate` or `summarize`."""
    parser = argparse.ArgumentParser(prog="python -m nanochat.report", description="The report of a run.")
    parser.add_argument("action", choices=["reset", "generate", "summarize"])
    parser.add_argument("run", nargs="?", default="", help="name of the run; by default the newest")
    chosen = parser.parse_args(argv)
    folder = base_dir() / "report"
    if chosen.action == "reset":
        shutil.rmtree(folder, ignore_errors=True)
        print(f"removed {folder}")
        return 0
    try:
        names = run_names()
        if not chosen.run and not names:
            raise UserError(f"there are no runs under {base_dir() / 'runs'}; run a stage first")
        run = load_run(chosen.run or names[-1])
        if chosen.action == "summarize":
            print(text.plain(summary(run)))
            return 0
        whole = generate(run, folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_atomic(Path("report.md"), whole)
    if (folder / FIGURES).exists():
        shutil.copytree(folder / FIGURES, FIGURES, dirs_exist_ok=True)
    print(f"report: {folder / 'report.md'}, copied to {Path('report.md').resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
