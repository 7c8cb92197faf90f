"""What a stage logs can be read back, from our files and from W&B's, and no secret and no failure gets in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb_file

from nanochat import tracking
from nanochat.common import UserError
from nanochat.provenance import REDACTED, is_secret, redacted
from nanochat.run_files import Files, Histogram, read_json, read_lines, read_metrics

KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Config:
    run: str = "dummy"
    wandb_project: str = ""
    wandb_entity: str = ""
    wandb_mode: str = ""
    max_new_tokens: int = 64
    api_key: str = ""


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return tmp_path


def world(rank: int = 0) -> Any:
    """A World without torch: tracking only reads these."""
    return SimpleNamespace(main=rank == 0, rank=rank, size=1 + rank, device="cpu", dtype="torch.float32")


def log_lines(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(path / "metrics.jsonl")]


def test_a_run_directory_holds_all_that_was_logged(base: Path) -> None:
    import torch

    with tracking.open_run("rl", Config(), world()) as tracker:
        tracker.log(0, {"rl/acc": 0.5, "rl/live_groups": 3})
        tracker.log(
            1, {"train/loss": torch.tensor(2.5), "bad": float("nan"), "rl/h": Histogram((1, 2), (0, 1, 2))}
        )
        tracker.table("rl/samples", 1, [{"question": "é?", "letter": None}])
        tracker.image("attn/map", 1, b"png")
        (base / "page.html").write_text("<p>")
        tracker.html("attn/view", 1, base / "page.html")
        tracker.note("data", "5 rows")
        tracker.finish({"best": 1})
        assert tracker.directory == base / "runs" / "dummy" / "rl"
    folder = base / "runs" / "dummy" / "rl"
    first, second = log_lines(folder)
    assert first == {"step": 0, "rl/acc": 0.5, "rl/live_groups": 3}
    assert second["train/loss"] == 2.5 and second["bad"] != second["bad"]
    assert second["rl/h"] == {"counts": [1, 2], "edges": [0, 1, 2]}
    assert read_lines(folder / "tables" / "rl" / "samples.jsonl") == [
        {"step": 1, "question": "é?", "letter": None}
    ]
    assert (folder / "media" / "attn" / "map_000001.png").read_bytes() == b"png"
    assert [row["file"] for row in read_lines(folder / "media.jsonl")] == [
        "media/attn/map_000001.png",
        "media/attn/view_000001.html",
    ]
    assert read_lines(folder / "notes.jsonl") == [{"kind": "data", "text": "5 rows"}]
    summary = read_json(folder / "summary.json")
    assert summary["results"] == {"best": 1} and summary["finished"] and summary["seconds"] > 0
    config = read_json(folder / "config.json")
    assert (
        config["config"]["max_new_tokens"] == 64
        and config["device"] == "cpu"
        and config["dtype"] == "float32"
    )
    assert config["versions"]["torch"] and config["system"]["num_cores"] and config["world_size"] == 1
    assert not (folder / "wandb").exists()
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_calls_of_one_step_become_one_line_and_steps_never_go_back(tmp_path: Path) -> None:
    files = Files(tmp_path / "s")
    for step in (0, 1):
        files.log(step, {"a": step})
        files.log(step, {"b": step, "long": "x" * 50})
        files.log(step, {"a": step + 10})
    assert log_lines(tmp_path / "s") == [{"step": s, "a": s + 10, "b": s, "long": "x" * 50} for s in (0, 1)]
    with pytest.raises(AssertionError, match="steps must not go back"):
        files.log(0, {"a": 1})


def test_after_a_resume_every_step_stands_once(base: Path) -> None:
    folder, ids = base / "runs" / "dummy" / "base", []
    for start, resume in ((0, None), (3, 3)):
        with tracking.open_run("base", Config(), world(), resume_step=resume) as tracker:
            ids.append(read_json(folder / "config.json")["wandb_id"])
            for step in range(start, start + 5):
                tracker.log(step, {"v": start})
                tracker.table("t", step, [{"v": start}])
    assert ids[0] == ids[1], "the W&B run goes on as well"
    assert [(row["step"], row["v"]) for row in log_lines(folder)] == [(s, 0) for s in range(3)] + [
        (s, 3) for s in range(3, 8)
    ]
    assert [row["step"] for row in read_lines(folder / "tables" / "t.jsonl")] == list(range(8))
    times = [row["time"] for row in read_metrics(folder / "metrics.jsonl")]
    assert times == sorted(times)
    assert read_json(folder / "config.json")["resumed_at"] == [3]


def test_a_resume_after_a_crash_drops_the_torn_line(tmp_path: Path) -> None:
    files = Files(tmp_path / "s")
    for step in range(3):
        files.log(step, {"a": step})
    with (tmp_path / "s" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "a"')
    Files(tmp_path / "s", resume_step=3).log(3, {"a": 3})
    assert [row["a"] for row in log_lines(tmp_path / "s")] == [0, 1, 2, 3]


def test_a_line_ends_at_a_newline_alone(tmp_path: Path) -> None:
    """Models write U+2028 and U+0085 too, and str.splitlines would end the line of JSON there."""
    rows = [{"completion": "one\u2028two\x85three\r\nfour\x1cfive"}, {"completion": "plain"}]
    Files(tmp_path / "run").table("rl/samples", 3, rows)
    kept = read_lines(tmp_path / "run" / "tables" / "rl" / "samples.jsonl")
    assert [row["completion"] for row in kept] == [row["completion"] for row in rows]


def test_starting_anew_sets_the_old_record_aside(base: Path) -> None:
    for value in (1, 2):
        with tracking.open_run("sft", Config(), world()) as tracker:
            tracker.log(0, {"v": value})
    runs = base / "runs" / "dummy"
    assert log_lines(runs / "sft") == [{"step": 0, "v": 2}]
    assert log_lines(runs / ".previous" / "sft") == [{"step": 0, "v": 1}]


def test_a_failed_stage_says_so(base: Path) -> None:
    with pytest.raises(UserError), tracking.open_run("mid", Config(), world()) as tracker:
        tracker.log(0, {"v": 1})
        raise UserError("no rows")
    summary = read_json(base / "runs" / "dummy" / "mid" / "summary.json")
    assert summary["failed"] == "UserError: no rows" and summary["finished"] is None


def test_ranks_after_the_first_write_nothing(base: Path) -> None:
    with tracking.open_run("rl", Config(), world(rank=1)) as tracker:
        tracker.log(0, {"v": 1})
        tracker.table("t", 0, [{"v": 1}])
        tracker.image("i", 0, b"")
        tracker.note("data", "x")
        tracker.finish({})
        assert tracker.directory is None
    assert not (base / "runs").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x\n"])
def test_a_run_needs_a_plain_name(name: str) -> None:
    with pytest.raises(UserError, match="only letters"), tracking.open_run("rl", Config(run=name), world()):
        pass


def test_secrets_are_words_not_parts_of_words() -> None:
    secret = ["WANDB_API_KEY", "api-key", "hfToken", "HF_TOKEN", "password", "client_secret", "--api_key"]
    harmless = [
        "max_new_tokens",
        "tokenizer",
        "eval_tokens",
        "monkey",
        "keyboard",
        "num_kv_heads",
        "tok_max_chars",
    ]
    assert [name for name in secret if not is_secret(name)] == []
    assert [name for name in harmless if is_secret(name)] == []


def test_secrets_are_cut_out_of_settings_commands_and_text() -> None:
    environment = {"HF_TOKEN": "hf_abcdefgh123", "WANDB_API_KEY": "short", "PATH": "/usr/bin/long/enough"}
    given = {
        "api_key": "x",
        "empty_key": "",
        "max_new_tokens": 64,
        "nested": {"password": "p"},
        "command": ["python", "--api-key", "x", "--secret=y", "--depth=3", "https://u:hf_abcdefgh123@host"],
    }
    assert redacted(given, environment=environment) == {
        "api_key": REDACTED,
        "empty_key": "",
        "max_new_tokens": 64,
        "nested": {"password": REDACTED},
        "command": [
            "python",
            "--api-key",
            REDACTED,
            f"--secret={REDACTED}",
            "--depth=3",
            f"https://u:{REDACTED}@host",
        ],
    }


def test_the_key_reaches_no_file(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(sys, "orig_argv", ["python", "x.py", f"--note={KEY}"])
    with tracking.open_run("rl", Config(api_key=KEY), world()) as tracker:
        tracker.log(0, {"v": 1})
    for path in base.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text(), path


SCRIPT = """
import sys
from test_tracking import Config, world
from nanochat import tracking
from nanochat.run_files import Histogram

with tracking.open_run("rl", Config(run="watched", wandb_project="quality"), world(), resume_step=None) as tracker:
    for step in range(3):
        tracker.log(step, {"rl/acc": step / 4, "train/loss": float("nan") if step == 1 else 1.0})
        tracker.log(step, {"rl/kl_letter_hist": Histogram((1.0, 2.0), (0.0, 0.5, 1.0))})
    tracker.table("rl/samples", 2, [{"question": "q", "predicted": None}, {"question": "r", "gold": "B"}])
    tracker.html("attn/view", 2, b"<p>hello</p>")
    tracker.finish({"best_step": 2, "AQUA": {"accuracy": 0.3}})
"""


def run_script(script: str, base: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "NANOCHAT_BASE_DIR": str(base), **environment},
        cwd=base, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def offline_file(base: Path) -> Path:
    (path,) = (base / "runs" / "watched" / "rl" / "wandb").glob("offline-run-*/run-*.wandb")
    return path


def test_an_offline_wandb_run_can_be_read_back(base: Path) -> None:
    pytest.importorskip("wandb")
    done = run_script(SCRIPT, base, WANDB_MODE="offline", WANDB_PROJECT="ignored", WANDB_ENTITY="me")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    path = offline_file(base)
    rows = wandb_file.history(path)
    assert [row["rl/step"] for row in rows if "rl/acc" in row] == [0, 1, 2]
    assert [row["rl/acc"] for row in rows if "rl/acc" in row] == [0, 0.25, 0.5]
    assert [row["rl/kl_letter_hist.values"] for row in rows if "rl/kl_letter_hist.values" in row] == [
        [1, 2]
    ] * 3
    assert any(row.get("rl/samples._type") == "table-file" for row in rows)
    assert any(row.get("attn/view._type") == "html-file" for row in rows)
    assert wandb_file.summary(path)["best_step"] == 2
    axes = wandb_file.step_metrics(path)
    assert axes.get("rl/acc", axes.get("*")) == "rl/step"
    record = wandb_file.run_record(path)
    assert (record.project, record.entity, record.run_group, record.job_type) == (
        "quality",
        "me",
        "watched",
        "rl",
    )
    assert record.run_id == read_json(base / "runs" / "watched" / "rl" / "config.json")["wandb_id"]


def test_the_flag_for_the_mode_goes_before_the_environment(base: Path) -> None:
    pytest.importorskip("wandb")
    flagged = SCRIPT.replace('"quality"', '"quality", wandb_mode="offline"')
    done = run_script(flagged, base, WANDB_MODE="disabled")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert wandb_file.history(offline_file(base))


def test_without_a_key_the_run_is_offline_with_one_warning(base: Path) -> None:
    pytest.importorskip("wandb")
    done = run_script(SCRIPT, base)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning") == 1 and "no key" in done.stderr and "wandb sync" in done.stderr
    assert wandb_file.history(offline_file(base))


def test_without_a_network_the_run_is_offline_within_seconds(base: Path) -> None:
    pytest.importorskip("wandb")
    began = time.monotonic()
    done = run_script(SCRIPT, base, WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning") == 1 and "does not answer" in done.stderr
    assert time.monotonic() - began < 80, "W&B's own patience is 90 s"
    assert wandb_file.history(offline_file(base))


REFUSING = """
import http.server, threading
class Refuse(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(401); self.end_headers()
    do_POST = do_HEAD = do_GET
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
"""


def test_a_refused_key_ends_in_an_offline_run(base: Path) -> None:
    pytest.importorskip("wandb")
    done = run_script(REFUSING + SCRIPT, base, WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert "warning: Weights & Biases is offline" in done.stderr and KEY not in done.stderr + done.stdout
    assert wandb_file.history(offline_file(base))


def test_without_the_package_the_files_are_written_all_the_same(base: Path) -> None:
    done = run_script('import sys; sys.modules["wandb"] = None\n' + SCRIPT, base)
    assert done.returncode == 0 and "cannot be imported" in done.stderr, done.stderr
    assert len(read_lines(base / "runs" / "watched" / "rl" / "metrics.jsonl")) == 3


class BrokenRun:
    """A W&B run whose process has died."""

    def __init__(self) -> None:
        self.calls = 0

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, _: Any) -> None:
        self.calls += 1
        raise BrokenPipeError("gone")


def test_a_dying_view_leaves_the_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = BrokenRun()
    tracker = tracking.Tracker(Files(tmp_path / "s"), tracking.View(None, run, "rl"))
    for step in range(3):
        tracker.log(step, {"v": step})
    tracker.finish({})
    tracker.close()
    assert run.calls == 1
    assert capsys.readouterr().err.count("warning") == 1
    assert len(read_lines(tmp_path / "s" / "metrics.jsonl")) == 3


def test_a_key_is_found_where_wandb_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tracking.has_key("https://api.wandb.ai")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert tracking.has_key("https://api.wandb.ai")
    assert not tracking.has_key("https://other.host")


def test_a_histogram_counts_finite_values() -> None:
    histogram = Histogram.of([0.0, 0.25, 1.0, float("inf")], num_bins=2)
    assert histogram == Histogram((2, 1), (0.0, 0.5, 1.0))
    with pytest.raises(AssertionError):
        Histogram((1,), (0.0,))
