"""What comes from outside stays data: no pickles, no eval, no shell; any .env, any flag, any key ends in order."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_config import SCRIPTS

from benchmarks import processes
from nanochat.common import UserError
from nanochat.config import parse

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    p for folder in ("nanochat", "tasks", "scripts", "benchmarks") for p in (ROOT / folder).glob("*.py")
]


# ---- what our own code may not do


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_unpickled_evaluated_or_handed_to_a_shell(path: Path) -> None:
    for name, node in calls(path):
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert name not in (
            "eval",
            "exec",
            "os.system",
            "os.popen",
            "pickle.load",
            "pickle.loads",
            "joblib.load",
        ), name
        assert words.get("shell", "False") == "False", ast.unparse(node)
        assert words.get("allow_pickle", "False") == "False", ast.unparse(node)
        assert words.get("trust_remote_code", "False") == "False", ast.unparse(node)
        unpacks = name.endswith((".extractall", ".extract", "unpack_archive"))
        assert not unpacks, f"{ast.unparse(node)}: may write outside its folder"
        assert name not in ("yaml.load", "yaml.unsafe_load"), ast.unparse(node)
        if name == "torch.load":
            assert words.get("weights_only") == "True", ast.unparse(node)


def test_no_signal_guards_the_calculator() -> None:
    assert "signal" not in (ROOT / "nanochat" / "calculator.py").read_text().replace("No clock or signal", "")


def test_what_a_model_wrote_is_run_with_the_flag_alone_and_in_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanochat import execution
    from scripts.chat_eval import Asked, Config

    row = {"task_id": "t", "prompt": "def f():\n", "canonical_solution": "", "test": "", "entry_point": "f"}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "humaneval.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path))
    ran: list[str] = []

    def run(code: str) -> execution.ExecutionResult:
        ran.append(code)
        return execution.ExecutionResult(True, "", "", False, 0, True, 0.0)

    monkeypatch.setattr(execution, "run_program", run)
    asked = Asked.__new__(Asked)  # without a model
    asked.config = Config()
    assert asked.task("HumanEval") is None
    asked.config = Config(allow_code_execution=True)
    task = asked.task("HumanEval")
    assert task.evaluate(task[0], "    return 1") and len(ran) == 1


# ---- .env


def exports(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The environment, as JSON, after set-up's own functions have read `text` as .env."""
    (folder / ".env").write_text(text, encoding="utf-8", newline="")
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    functions = setup[setup.index("# .env by python-dotenv") : setup.index("command -v git")]
    script = f'set -euo pipefail\ndie() {{ echo "error: $*" >&2; exit 1; }}\n{functions}\nread_dotenv\n'
    script += "python -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-c", script], env={"PATH": path, "LANG": "C.UTF-8"}, cwd=folder, capture_output=True, text=True, timeout=300
    )  # fmt: skip


hostile = st.sampled_from(
    ["$(touch owned)", "`touch owned`", "; touch owned", "'", '"', "\\", "\n", "=", "#", "${PATH}", " "]
)
lines = st.lists(
    st.tuples(
        st.sampled_from(["A1", "B_2", "export C", "1x", "d e", ""]), st.lists(hostile | st.text(max_size=5))
    )
)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(lines=lines)
def test_any_dotenv_is_read_as_data_and_runs_nothing(
    lines: list[tuple[str, list[str]]], tmp_path: Path
) -> None:
    text = (
        "\n".join(f"{name}={''.join(parts)}" for name, parts in lines)
        .replace("\0", "")
        .encode(errors="ignore")
        .decode()
    )
    done = exports(text, tmp_path)
    assert not (tmp_path / "owned").exists(), text
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


# ---- flags of every script


def config_of(script: str) -> type:
    found: type = importlib.import_module(f"scripts.{script}").Config
    return found


values = (
    st.text(max_size=12)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.sampled_from(["", "none", "9" * 5000, "-1", "1_0", "٣"])
)


@pytest.mark.parametrize("script", SCRIPTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_value_of_a_flag_crashes_a_script(script: str, data: st.DataObject) -> None:
    config = config_of(script)
    names = list(config.__dataclass_fields__)  # type: ignore[attr-defined]
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(names), values), max_size=3))
    try:
        parse(config, [f"--{name}={value}" for name, value in pairs])
    except UserError as error:
        assert str(error)


# ---- secrets

SECRETS = {
    name: f"marked-fake-{number:02d}-0123456789abcdef"
    for number, name in enumerate(
        [
            "HF_TOKEN",
            "LAMBDA_API_KEY",
            "HYPERBOLIC_API_KEY",
            "OPENAI_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "NANOCHAT_API_KEY",
        ]
    )
} | {"WANDB_API_KEY": "0123456789abcdef" * 2 + "fa4e4e40"}


def leaks(text: bytes) -> list[str]:
    return [name for name, value in SECRETS.items() if value.encode() in text]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_shows_a_key(script: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT_", "AQUA_", "WANDB_"))}
    env = kept | SECRETS | {
        "NANOCHAT_BASE_DIR": str(base), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "HOME": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-m", f"scripts.{script}"]
    command += ["--run=marked"] if "run" in config_of(script).__dataclass_fields__ else []  # type: ignore[attr-defined]
    command += ["--max_chars=200000", "--vocab_size=512"] if script == "tok_train" else []
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            for pid in [process.pid, *processes.descendants(process.pid)]:
                assert not leaks(" ".join(processes.command_line(pid)).encode()), processes.command_line(pid)
            time.sleep(0.05)
        ended = process.poll() is not None
        processes.kill([*processes.descendants(process.pid), process.pid])
        process.wait()
    assert ended, "whatever it writes, it has written"
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not leaks(path.read_bytes()), path
