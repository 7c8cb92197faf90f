"""
AQuA-RAT: algebra word problems with five options and a rationale (Ling et al. 2017, arXiv 1705.04146).

Read from DeepMind's own JSON lines, from Hugging Face (`deepmind/aqua_rat`, config `raw`) or from prepared conversations,
the format that `scripts.prepare_aqua` and the fork write. Whatever the form, a row becomes a `Problem`: question, options
without their letters, gold letter, rationale. The training target is the rationale without its own closing statement
(AQuA has dozens of wordings for "Answer is A") and then one line, `Answer: X`.

The options of a problem can be put in any order, which takes the letter prior away: train says C most often, dev and test
say A, and a policy that has learnt nothing but that is 9 points worse than one that always says A.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from nanochat.common import UserError, base_dir, data_dir, derive_seed
from nanochat.dataset import fetch_bytes
from tasks.answers import parse_answer
from tasks.common import Conversation, Hub, MultipleChoice, hub_rows, shuffled
from tasks.problem import LETTERS, Problem, deduplicate, parse_problem
from tasks.rows import (
    DataUnavailable,
    Rows,
    find_file,
    keep_rows,
    parse_rows,
    read_lines,
)

__all__ = ["AQUA", "LETTERS", "DataUnavailable", "Problem", "deduplicate", "parse_answer", "parse_problem"]

FILE_NAMES = {"train": ["train"], "validation": ["validation", "dev", "valid", "val"], "test": ["test"]}
REPOSITORY = "https://raw.githubusercontent.com/google-deepmind/AQuA/master/{}.json"


# ---- finding the rows ----------------------------------------------------------------------------------------------


def aqua_folders(path: str | Path | None = None) -> list[Path]:
    """Where AQuA may lie on this machine, in order of search. A folder that was named but is not there is an error."""
    if path is not None:
        return [_existing("--aqua_path", Path(path))]
    for variable in ("AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR"):
        if os.environ.get(variable):
            return [_existing(variable, Path(os.environ[variable]).expanduser()), base_dir() / "aqua"]
    local = data_dir()
    return [*([local / "aqua"] if local else []), base_dir() / "aqua"]


def _existing(flag: str, path: Path) -> Path:
    if not path.exists():
        raise UserError(
            f"{flag}={path} does not exist; name the folder with train, validation and test files"
        )
    return path


@functools.lru_cache(maxsize=8)
def _read(path: Path, stamp: tuple[int, int]) -> Rows[Problem]:
    """The problems of one file, read once per process: validation alone is wanted by train, eval and rl."""
    return parse_rows(read_lines(path), parse_problem, source=str(path))


def read_problems(path: Path) -> Rows[Problem]:
    """The problems of one file of any of the three forms, plain or gzip."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    return _read(path, (stat.st_size, stat.st_mtime_ns))


def load_problems(split: str, path: str | Path | None = None) -> Rows[Problem]:
    """The problems of a split: local folders first, then Hugging Face, then DeepMind's repository."""
    if split not in FILE_NAMES:
        raise UserError(f"AQUA has no split {split!r}; use {', '.join(FILE_NAMES)}")
    folders = aqua_folders(path)
    if path is not None and folders[0].is_file():
        return read_problems(folders[0])
    for folder in folders:
        if found := find_file(folder, FILE_NAMES[split]):
            return read_problems(found)
    tried = [str(folder / f"{split}.jsonl") for folder in folders]
    if path is not None:
        raise DataUnavailable("AQUA", [f"{path} (no {split} file there, only {_listing(folders[0])})"])
    return _download(split, tried)


def _listing(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.iterdir())[:12]) or "nothing"


def _download(split: str, tried: list[str]) -> Rows[Problem]:
    """A split from the network, kept in base_dir()/aqua as DeepMind writes it."""
    hub = Hub("deepmind/aqua_rat", "raw", split)
    try:
        raw, source = hub_rows(hub, "AQUA", tried), str(hub)
    except DataUnavailable as error:
        url = REPOSITORY.format("dev" if split == "validation" else split)
        try:
            text = fetch_bytes(url).decode()
            raw, source = [json.loads(line) for line in text.split("\n") if line.strip()], url
        except ValueError as second:  # UserError of the fetch, or text that is not JSON lines
            raise DataUnavailable("AQUA", [*error.tried, str(second)]) from None
    rows = parse_rows(
        ((f"{split}:{n}", row) for n, row in enumerate(raw, start=1)), parse_problem, source=source
    )
    keep_rows(base_dir() / "aqua" / f"{split}.jsonl.gz", raw)
    return rows


class AQUA(MultipleChoice):
    """
    AQuA-RAT as a task: `AQUA("train", stop=20_000)`.

    Train is shuffled by `seed` (files come sorted by origin), rid of rows that repeat a validation or test question lying
    in the same folder, and, with `permute_seed`, has the options of each row in an order of their own. `include_mathqa`
    adds train_mathqa, a lower-cased re-annotation whose labels are noisy. Validation and test stay in file order.
    """

    name = "AQUA"
    baseline = 0.2

    def __init__(
        self,
        split: str = "train",
        *,
        path: str | Path | None = None,
        include_mathqa: bool = False,
        permute_seed: int | None = None,
        seed: int | None = 42,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        rows = load_problems(split, path)
        self._take(rows)
        self.split, self._permute_seed = split, permute_seed
        problems = list(rows.items)
        if split == "train":
            problems = shuffled(self._train_rows(problems, path, include_mathqa), seed)
        elif include_mathqa:
            raise UserError(f"include_mathqa adds to train, not to {split}; leave it out")
        self.problems = problems
        self.num_ambiguous = sum(problem.ambiguous for problem in problems)
        """rows kept although their gold text stands at two letters"""

    def _train_rows(
        self, problems: list[Problem], path: str | Path | None, include_mathqa: bool
    ) -> list[Problem]:
        folder = Path(self.source).parent if Path(self.source).is_file() else base_dir() / "aqua"
        if include_mathqa:
            extra = find_file(folder, ["train_mathqa"])
            if extra is None:
                raise DataUnavailable("AQUA", [f"{folder} (no train_mathqa file; leave include_mathqa out)"])
            rows = read_problems(extra)
            problems = problems + rows.items
            self.source += f" and {extra.name}"
            self.bad_rows += rows.bad
            for why, count in rows.skipped.items():
                self.skipped[why] = self.skipped.get(why, 0) + count
        held_out: list[Problem] = []
        for split in ("validation", "test"):
            if beside := find_file(folder, FILE_NAMES[split]):
                held_out += read_problems(beside).items
        problems, dropped = deduplicate(problems, held_out)
        self.skipped.update(dropped)
        return problems

    def num_examples(self) -> int:
        return len(self.problems)

    def problem(self, index: int) -> Problem:
        """The Problem at `index` of this slice, in the order of options that the conversation shows."""
        return self._ordered(self.indices()[index])

    def get_example(self, index: int) -> Conversation:
        return self._ordered(index).conversation()

    def gold(self, index: int) -> str:
        return self._ordered(index).gold

    def _ordered(self, index: int) -> Problem:
        problem = self.problems[index]
        if self._permute_seed is None:
            return problem
        return problem.shuffled(derive_seed("options", self._permute_seed, index))
