"""
Ask a chat model the questions of a task and say how many it gets right, never as a bare number.

    python -m scripts.chat_eval -i sft -a AQUA
    python -m scripts.chat_eval -i rl -a AQUA --compare sft              # paired: flips and McNemar's p
    python -m scripts.chat_eval -i rl -a AQUA --mode letters             # the letters' logits, without reasoning
    python -m scripts.chat_eval -i rl -a SYNTHETIC -n 8 -t 1.0           # pass@k and maj@k
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft

Beside each accuracy stand its 95 % interval, what always saying the commonest letter would score, the histogram of
predicted letters and the share of answers that could be read. AQUA and SYNTHETIC default to validation, on which one may
look as often as one likes; `--split test` is for a finished model. Without -a all tasks run, and ChatCORE, the mean of
their accuracies with chance taken off, closes the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nanochat.common import UserError
from nanochat.config import StageConfig, cli, flag

if TYPE_CHECKING:
    from nanochat.accuracy import Accuracy
    from nanochat.common import World
    from nanochat.tracking import Tracker

Source = Literal["base", "mid", "sft", "rl"]


@dataclass(frozen=True)
class Config(StageConfig):
    """Evaluate a chat model."""

    source: Source = flag("sft", "-i", help="stage of the checkpoint")
    task_name: str = flag("", "-a", help="tasks, with | between; by default all that can be had")
    model_tag: str = flag("", "-g", help="checkpoint folder, such as d8; by default the largest")
    dtype: str = flag("", "-d", help="float32 or bfloat16")
    temperature: float = flag(0.0, "-t", help="0 is greedy")
    max_new_tokens: int = flag(256, "-m", help="longest answer; cut answers count as none")
    num_samples: int = flag(1, "-n", help="answers to each question; above 1 needs a temperature")
    top_k: int = flag(0, "-k", help="sample among the k likeliest tokens; 0: all")
    batch_size: int = flag(256, "-b", help="answers generated at a time on each rank")
    step: int | None = flag(None, "-s", help="checkpoint step; by default the newest")
    max_problems: int = flag(-1, "-x", help="most questions of each task; -1: all")
    split: Literal["", "validation", "test"] = ""
    """by default validation for AQUA and SYNTHETIC, test for the others"""
    mode: Literal["generative", "letters", "both"] = "generative"
    """letters: compare the letters' logits after the prompt, without reasoning; both: one after the other"""
    rotations: int = 0
    """2 to 5: also ask with the options in so many cyclic orders"""
    compare: str = ""
    """another stage, such as sft, or stage:tag: the same questions, paired"""
    forbid_bare: bool = False
    """control: no answer may begin with the answer line, so how much of a gain is only a choice of style?"""
    allow_code_execution: bool = False
    """HumanEval runs programs that the model wrote; they are confined, but this is not a sandbox"""
    label: str = ""
    """name of this evaluation in the run directory; by default chat_eval_ and the stage"""
    aqua_path: str | None = None
    """file or folder of AQuA"""

    def __post_init__(self) -> None:
        if self.compare and self.num_samples > 1:
            raise UserError(
                f"--compare={self.compare} pairs one answer to each question; leave --num_samples={self.num_samples} out"
            )
        if self.rotations and not 2 <= self.rotations <= 5:
            raise UserError(f"--rotations={self.rotations}: five options have 2 to 5 cyclic orders")


def main(config: Config) -> None:
    """Evaluate each task, print a block for each, keep everything in the run directory."""
    from nanochat.common import compute_cleanup, compute_init, print0
    from nanochat.tracking import open_run
    from tasks.catalog import EVALUATED
    from tasks.rows import DataUnavailable

    world = compute_init(config.device_type, config.dtype, config.seed)
    asked = Asked(config, world)
    names = config.task_name.split("|") if config.task_name else list(EVALUATED)
    with open_run(config.label or f"chat_eval_{config.source}", config, world) as tracker:
        results: dict[str, Any] = {}
        for name in names:
            try:
                task = asked.task(name)
            except DataUnavailable as error:
                tracker.note("skipped", str(error))
                continue
            if task is None:
                tracker.note(
                    "skipped", f"{name}: runs programs of the model; --allow_code_execution evaluates it"
                )
                continue
            tracker.note("data", f"{task.name}: {task.source}")
            results |= asked.evaluate(task, tracker)
        if not results:
            raise UserError(
                f"none of {', '.join(names)} can be evaluated; set NANOCHAT_DATA_DIR or use -a SYNTHETIC"
            )
        if not config.task_name:
            results["ChatCORE"] = chat_core(results)
            print0(f"ChatCORE {results['ChatCORE']:.4f}: the mean of the tasks' accuracies, chance taken off")
        tracker.finish({"step": asked.step, **results})
    compute_cleanup(world)


class Asked:
    """The model that is asked, and the one it is compared with; both loaded once."""

    def __init__(self, config: Config, world: World) -> None:
        from nanochat.checkpoint_manager import load_model
        from nanochat.engine import Engine

        self.config, self.world = config, world
        model, self.tokenizer, meta = load_model(
            config.source, world=world, model_tag=config.model_tag, step=config.step
        )
        self.step: int = meta["step"]
        self.engine = Engine(model, self.tokenizer)
        self.other: Engine | None = None
        if config.compare:
            source, _, tag = config.compare.partition(":")
            other, _, _ = load_model(source, world=world, model_tag=tag or config.model_tag)
            self.other = Engine(other, self.tokenizer)

    def task(self, name: str) -> Any:
        """The task, or None for one that may not run."""
        from tasks.catalog import open_task

        if name.lower() == "humaneval":
            if not self.config.allow_code_execution:
                return None
            from nanochat.execution import run_program

            return open_task(name, execute=lambda code: run_program(code).success)
        return open_task(name, self.config.split, aqua_path=self.config.aqua_path, seed=self.config.seed)

    def evaluate(self, task: Any, tracker: Tracker) -> dict[str, Any]:
        """Every mode that was asked for, printed and as results by name."""
        from nanochat.accuracy import compare
        from nanochat.common import print0
        from nanochat.evaluate import evaluate_rotations

        results: dict[str, Any] = {}
        modes = ["generative", "letters"] if self.config.mode == "both" else [self.config.mode]
        if task.eval_type == "categorical":
            modes = ["letters"]
        elif "letters" in modes and not task[0].get("letters"):
            tracker.note("skipped", f"{task.name}: it has no letters to compare, so no --mode=letters")
            modes.remove("letters")
        for mode in modes:
            accuracy = self.ask(self.engine, task, mode)
            name = task.name if mode == modes[0] else f"{task.name} {mode}"
            print0(accuracy.describe())
            results[name] = accuracy.results()
            if split := getattr(task, "split", ""):
                results[name]["split"] = split
            if accuracy.shown:
                tracker.table(f"samples/{task.name}", 0, list(accuracy.shown))
            tracker.table(f"outcomes/{name}", 0, [outcome.row() for outcome in accuracy.outcomes])
            if self.other is not None:
                before = self.ask(self.other, task, mode)
                paired = compare(before, accuracy)
                print0(f"{self.config.compare}: {before.describe()}\n{paired.describe()}")
                results[name] |= {"compared_with": self.config.compare, "before": before.results()}
                results[name] |= {"gained": paired.gained, "lost": paired.lost, "mcnemar_p": paired.p}
        if self.config.rotations and not hasattr(task, "problem"):
            tracker.note("skipped", f"{task.name}: it has no options to turn, so no --rotations")
        elif self.config.rotations:
            turned = evaluate_rotations(
                self.engine,
                self.tokenizer,
                task,
                self.world,
                num_rotations=self.config.rotations,
                **self.settings(),
            )
            print0(turned.describe())
            results[f"{task.name} rotations"] = turned.metrics()
        return results

    def ask(self, engine: Any, task: Any, mode: str) -> Accuracy:
        """One model on one task."""
        from nanochat.evaluate import evaluate_generative, evaluate_letters

        limit = None if self.config.max_problems < 0 else self.config.max_problems
        if mode == "letters":
            return evaluate_letters(engine.model, self.tokenizer, task, self.world, limit=limit)
        forbidden = self.bare_opening() if self.config.forbid_bare else ()
        return evaluate_generative(
            engine,
            self.tokenizer,
            task,
            self.world,
            num_samples=self.config.num_samples,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            forbid_first=forbidden,
            **self.settings(),
        )

    def settings(self) -> dict[str, Any]:
        """What all generative evaluations share."""
        limit = None if self.config.max_problems < 0 else self.config.max_problems
        return {
            "limit": limit,
            "max_tokens": self.config.max_new_tokens,
            "batch_size": self.config.batch_size,
            "seed": self.config.seed,
        }

    def bare_opening(self) -> list[int]:
        """Tokens that open an answer which gives the letter at once."""
        from tasks.synthetic import opens_bare

        ordinary = range(self.tokenizer.vocab_size)
        return [token for token in ordinary if opens_bare(self.tokenizer.token_bytes_of(token))]


def chat_core(results: dict[str, Any]) -> float:
    """The mean over tasks of (accuracy - chance) / (1 - chance); a task asked in two modes counts once, by its first."""
    firsts = [r for name, r in results.items() if "accuracy" in r and name == r["task"]]
    centred = [(r["accuracy"] - r["chance"]) / (1 - r["chance"]) for r in firsts]
    return sum(centred) / len(centred)


if __name__ == "__main__":
    main(cli(Config))
