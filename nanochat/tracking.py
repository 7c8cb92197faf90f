"""
What a stage reports while it runs: to files always, to Weights & Biases when asked.

The run directory is the record and W&B is a view of it. So the report and the tests read files, a machine without account or
network loses nothing, and a W&B process that dies takes no training with it. W&B gets our own step as a metric (`rl/step`)
and never its `step=` argument: an offline run that resumes starts W&B's own counter again at 0, ours goes on.

`--run=dummy` keeps W&B out, as in nanochat. Otherwise: one W&B run for each stage, grouped under the name of the pipeline's
run. Project, entity and mode come from the flags and WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE. The key is found by wandb
itself, in the environment or ~/.netrc. Without key or network the run is offline: decided in seconds, said once.
"""

from __future__ import annotations

import importlib
import netrc
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nanochat.dataset import reachable
from nanochat.locks import exclusive
from nanochat.provenance import provenance, redacted
from nanochat.run_files import Files, Histogram, Row, now, read_json, run_dir, write_json

if TYPE_CHECKING:
    from nanochat.common import World

__all__ = ["Histogram", "Tracker", "open_run", "run_dir"]

NO_WANDB = "dummy"
DEFAULT_PROJECT = "nanochat-aquarat"
WANDB_SERVER = "https://api.wandb.ai"


@contextmanager
def open_run(stage: str, config: Any, world: World, *, resume_step: int | None = None) -> Iterator[Tracker]:
    """
    The tracker of one stage of the run `config.run`; closed on every way out, an exception included.

    `config` is the stage's dataclass. `resume_step` is the first step that will be run again: what was recorded from it
    on is dropped. Without it the stage starts anew, and its earlier record stands in `runs/<run>/.previous/<stage>`.
    """
    if not world.main:
        yield Tracker(None, None)
        return
    directory = run_dir(config.run, stage)
    with exclusive(f"run-{config.run}-{stage}", f"run {config.run}, stage {stage},"):
        yield from _recorded(directory, stage, config, world, resume_step)


def _recorded(
    directory: Path, stage: str, config: Any, world: World, resume_step: int | None
) -> Iterator[Tracker]:
    old = read_json(directory / "config.json") if resume_step is not None else {}
    files = Files(directory, resume_step=resume_step)
    record = {
        "stage": stage,
        "run": config.run,
        "config": redacted(asdict(config)),
        **provenance(),
        "world_size": world.size,
        "device": str(world.device),
        "dtype": str(world.dtype).removeprefix("torch."),
        "started": old.get("started") or now(),
        "resumed_at": old.get("resumed_at", []) + ([] if resume_step is None else [resume_step]),
        "wandb_id": old.get("wandb_id") or secrets.token_hex(4),
    }
    write_json(directory / "config.json", record)
    view = open_view(stage, record, directory)
    if view:
        write_json(directory / "config.json", {**record, "wandb_id": view.run.id})
    tracker = Tracker(files, view)
    try:
        yield tracker
    except BaseException as error:
        tracker.close(error)
        raise
    tracker.close()


class Tracker:
    """What a stage sees. On every rank but the first it has no files and does nothing."""

    def __init__(self, files: Files | None, view: View | None = None) -> None:
        self.files = files
        self.view = view

    @property
    def directory(self) -> Path | None:
        """The stage's run directory; None on a rank that writes nothing."""
        return self.files.directory if self.files else None

    def log(self, step: int, metrics: Row) -> None:
        """Record numbers (a tensor of one element is one) and Histograms; calls of one step become one line."""
        if self.files:
            self.files.log(step, metrics)
        if self.view:
            self.view.log(step, metrics)

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        """Record rows, such as sample completions, in tables/<name>.jsonl."""
        if self.files:
            self.files.table(name, step, rows)
        if self.view:
            self.view.table(name, step, rows)

    def image(self, name: str, step: int, png: Path | bytes) -> None:
        """Record a PNG picture, given as a file or as its bytes."""
        self._media("png", name, step, png)

    def html(self, name: str, step: int, page: Path | bytes) -> None:
        """Record a standalone HTML page, given as a file or as its bytes."""
        self._media("html", name, step, page)

    def note(self, kind: str, text: str) -> None:
        """Print a line and keep it for the report: `note("data", "AQUA train: 4,473 rows of ...")`, `note("skipped", ...)`."""
        if self.files:
            print(f"{kind}: {text}", flush=True)
            self.files.note(kind, text)

    def sync(self) -> None:
        """Put what was logged onto the disk."""
        if self.files:
            self.files.sync()

    def finish(self, results: Row) -> None:
        """Record the stage's results: numbers, text, or for a task a mapping with `accuracy` and what belongs to it."""
        if self.files:
            self.files.finish(results)
        if self.view:
            self.view.finish(results)

    def close(self, error: BaseException | None = None) -> None:
        """Close files and view; `error` is what ended the stage, if anything did."""
        if self.files:
            self.files.close(error)
        if self.view:
            self.view.close(error)

    def _media(self, kind: str, name: str, step: int, content: Path | bytes) -> None:
        if self.files:
            data = content if isinstance(content, bytes) else content.read_bytes()
            path = self.files.media(kind, name, step, data)
            if self.view:
                self.view.media(kind, name, step, path)


class View:
    """A run on Weights & Biases. When anything of it fails it is left alone, with one warning."""

    def __init__(self, wandb: Any, run: Any, stage: str) -> None:
        self.wandb = wandb
        self.run = run
        self.step_name = f"{stage}/step"
        self._guarded(lambda: run.define_metric(self.step_name, hidden=True))
        self._guarded(lambda: run.define_metric("*", step_metric=self.step_name))

    def log(self, step: int, metrics: Row) -> None:
        """Send numbers and histograms."""
        self._send(step, lambda: {name: self._value(value) for name, value in metrics.items()})

    def table(self, name: str, step: int, rows: Sequence[Row]) -> None:
        """Send rows as a table with the columns of all of them."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = [[row.get(column) for column in columns] for row in rows]
        self._send(step, lambda: {name: self.wandb.Table(columns=columns, data=data, allow_mixed_types=True)})

    def media(self, kind: str, name: str, step: int, path: Path) -> None:
        """Send a picture or page that the files already hold."""
        if kind == "png":
            self._send(step, lambda: {name: self.wandb.Image(str(path))})
        else:
            self._send(step, lambda: {name: self.wandb.Html(path.read_text(encoding="utf-8"), inject=False)})

    def finish(self, results: Row) -> None:
        """Put the results into the run's summary."""
        self._guarded(lambda: self.run.summary.update(dict(results)))

    def close(self, error: BaseException | None) -> None:
        """End the run, as failed when there was an error."""
        self._guarded(lambda: self.run.finish(exit_code=1) if error else self.run.finish())

    def _value(self, value: Any) -> Any:
        if isinstance(value, Histogram):
            return self.wandb.Histogram(np_histogram=(list(value.counts), list(value.edges)))
        return value.item() if hasattr(value, "item") else value

    def _send(self, step: int, payload: Callable[[], dict[str, Any]]) -> None:
        self._guarded(lambda: self.run.log({self.step_name: step, **payload()}))

    def _guarded(self, action: Callable[[], object]) -> None:
        if self.run is None:
            return
        try:
            action()
        except Exception as error:  # whatever ails the view, the run goes on
            self.run = None
            _warn(
                f"failed and is left alone ({type(error).__name__}: {error}); the run directory has everything"
            )


def open_view(stage: str, record: Row, directory: Path) -> View | None:
    """A W&B run, online or offline, or None when it is not wanted or not installed."""
    mode = record["config"].get("wandb_mode") or os.environ.get("WANDB_MODE") or "online"
    if record["run"] == NO_WANDB or mode == "disabled":
        return None
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        _warn(f"cannot be imported ({error}); recording to {directory} alone")
        return None
    if "pandas" not in sys.modules and hasattr(wandb.util, "pd_available"):
        # W&B asks of every table whether it is a data frame, and would import pandas to find out: seconds of the
        # first look of an RL run. Without the import it goes by the type's name.
        wandb.util.pd_available = False
    why, run_id = "" if mode == "offline" else why_offline(), record["wandb_id"]
    if mode != "offline" and not why:
        run, why = _start(wandb, stage, record, directory, mode="online", id=run_id)
        if run is not None:
            print(f"Weights & Biases: {run.url}", flush=True)
            return View(wandb, run, stage)
        run_id = secrets.token_hex(4)  # wandb holds the id of a failed attempt until the process ends
    run, trouble = _start(wandb, stage, record, directory, mode="offline", id=run_id)
    if run is None:
        _warn(f"does not start ({trouble}); recording to {directory} alone")
        return None
    if why:
        _warn(f"is offline: {why}; `wandb sync {Path(run.dir).parent}` sends it later")
    return View(wandb, run, stage)


def why_offline() -> str:
    """'' when there is a W&B key and its server answers within seconds, otherwise what is missing."""
    server = os.environ.get("WANDB_BASE_URL") or WANDB_SERVER
    if not has_key(server):
        return "no key (set WANDB_API_KEY, or run `wandb login`)"
    return "" if reachable(server) else f"{server} does not answer"


def has_key(server: str) -> bool:
    """True when wandb will find a key for `server`: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(urlsplit(server).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start(
    wandb: Any, stage: str, record: Row, directory: Path, *, mode: str, id: str
) -> tuple[Any | None, str]:
    """(run, '') or (None, what went wrong)."""
    flags = record["config"]
    settings = wandb.Settings(console="off", silent=True, init_timeout=20, login_timeout=10)
    try:
        wandb.setup(settings)
        run = wandb.init(
            project=flags.get("wandb_project") or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            entity=flags.get("wandb_entity") or os.environ.get("WANDB_ENTITY") or None,
            group=record["run"],
            name=f"{record['run']}-{stage}",
            job_type=stage,
            id=id,
            resume="allow",
            mode=mode,
            dir=str(directory),
            config={name: value for name, value in record.items() if name != "wandb_id"},
            settings=settings,
        )
    except (
        Exception
    ) as error:  # a refused key, a full disk, a server of another version: the stage starts all the same
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return run, ""


def _warn(text: str) -> None:
    print(f"warning: Weights & Biases {text}", file=sys.stderr, flush=True)
