"""The shell drivers: what they would run on which machine, what they skip, how they fail, and once the real thing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb_file
from test_untrusted import SECRETS, leaks

from nanochat.metrics import describe
from nanochat.run_files import read_json, read_metrics
from scripts import plan
from scripts.presets import KNOBS

ROOT = Path(__file__).resolve().parent.parent
STAGES = [
    "tok_train", "tok_eval", "base_train", "base_loss", "base_eval", "mid_train", "chat_eval_mid", "chat_sft",
    "chat_eval_sft", "chat_rl", "chat_eval_rl", "report",
]  # fmt: skip
H100 = "NVIDIA H100 80GB HBM3"
OURS = (
    {knob.name for knob in KNOBS}
    | set(plan.FOLDERS)
    | {"PRESET", "RUN", "FORCE", "DRY_RUN", "SETUP_EXTRAS", "HF_HUB_OFFLINE"}
)


def environment(
    tmp_path: Path, *, gpus: int = 0, gpu: str = H100, memory: int = 81559, **more: str
) -> dict[str, str]:
    """The caller's environment without our variables, offline, and with an nvidia-smi that reports `gpus` GPUs."""
    fake = tmp_path / "bin"
    fake.mkdir(exist_ok=True)
    lines = "\n".join([f"{gpu}, {memory}"] * gpus)
    (fake / "nvidia-smi").write_text(f"#!/bin/sh\n[ {gpus} = 0 ] && exit 9\ncat <<'END'\n{lines}\nEND\n")
    (fake / "nvidia-smi").chmod(0o755)
    kept = {
        k: v for k, v in os.environ.items() if k not in OURS and not k.startswith(("WANDB_", "CUDA_", "OMP_"))
    }
    return {
        **kept,
        "PATH": os.pathsep.join([str(fake), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def bash(
    script: str, env: dict[str, str], cwd: Path = ROOT, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", script], env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout
    )


def dry_run(
    tmp_path: Path, *, driver: str = "run_aquarat_small.sh", gpus: int = 0, **more: str
) -> tuple[str, dict[str, str]]:
    """(everything printed, stage -> its command) of a dry run."""
    done = bash(f"bash {driver}", environment(tmp_path, gpus=gpus, DRY_RUN="1", **more))
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\w+) +((?:python\S*|torchrun) .*)$", done.stdout, re.MULTILINE)
    return done.stdout, dict(found)


def flag(command: str, name: str) -> str:
    (value,) = re.findall(rf"--{name}=(\S*)", command)
    return str(value)


@pytest.mark.parametrize(
    "script",
    [
        "run_aquarat_small.sh",
        "run_aquarat_lite.sh",
        "run_tests.sh",
        "scripts/setup.sh",
        "scripts/pipeline.sh",
        ".ci/run",
    ],
)
def test_bash_reads_every_script(script: str) -> None:
    done = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_eight_gpus_get_torchrun_with_eight_processes_and_all_stages_in_order(tmp_path: Path) -> None:
    text, commands = dry_run(tmp_path, gpus=8)
    assert list(commands) == STAGES
    for name in ("base_train", "mid_train", "chat_sft", "chat_rl", "chat_eval_rl"):
        assert commands[name].startswith("torchrun --standalone --nproc_per_node=8 -m scripts."), name
    assert commands["tok_train"].startswith("python -m scripts.tok_train ")
    assert (
        flag(commands["base_train"], "depth") == "8" and flag(commands["base_train"], "max_seq_len") == "2048"
    )
    assert "--n_embd" not in commands["base_train"]
    assert "92,274,688 parameters" in text and f"8 x {H100}" in text
    assert flag(commands["chat_eval_rl"], "compare") == "sft"


def test_one_gpu_needs_no_torchrun(tmp_path: Path) -> None:
    _, commands = dry_run(tmp_path, gpus=1)
    assert not [name for name, command in commands.items() if "torchrun" in command]
    assert flag(commands["base_train"], "device_type") == "cuda"


def test_a_small_gpu_gets_smaller_microbatches_of_the_same_step(tmp_path: Path) -> None:
    _, large = dry_run(tmp_path, gpus=1, DEPTH="20")
    small = bash(
        "bash run_aquarat_small.sh",
        environment(tmp_path, gpus=1, gpu="NVIDIA A10", memory=23028, DEPTH="20", DRY_RUN="1"),
    )
    command = next(line for line in small.stdout.splitlines() if line.startswith("base_train"))
    assert int(flag(command, "device_batch_size")) < int(flag(large["base_train"], "device_batch_size"))
    assert flag(command, "total_batch_size") == flag(large["base_train"], "total_batch_size")


def test_a_cpu_gets_the_small_model_and_the_synthetic_set(tmp_path: Path) -> None:
    text, commands = dry_run(tmp_path)
    base = commands["base_train"]
    assert (
        flag(base, "device_type") == "cpu"
        and int(flag(base, "n_embd")) < 200
        and int(flag(base, "smear")) > 0
    )
    assert flag(commands["chat_rl"], "dataset") == "SYNTHETIC"
    assert "-a SYNTHETIC " in commands["chat_eval_rl"]
    assert "this machine: about" in text


def test_real_rows_are_used_where_there_are_any(tmp_path: Path) -> None:
    (tmp_path / "data" / "aqua").mkdir(parents=True)
    (tmp_path / "data" / "aqua" / "train.jsonl").write_text("{}\n")
    _, commands = dry_run(tmp_path, NANOCHAT_DATA_DIR=str(tmp_path / "data"))
    assert flag(commands["chat_rl"], "dataset") == "AQUA"
    assert "AQUA\\|SYNTHETIC" in commands["chat_eval_rl"]
    _, commands = dry_run(tmp_path, NANOCHAT_DATA_DIR=str(tmp_path / "data"), RL_DATASET="synthetic")
    assert flag(commands["chat_rl"], "dataset") == "SYNTHETIC"


def test_lite_is_the_same_pipeline_and_smaller(tmp_path: Path) -> None:
    _, small = dry_run(tmp_path)
    _, lite = dry_run(tmp_path, driver="run_aquarat_lite.sh")
    assert list(lite) == list(small)
    for stage, name in (("base_train", "num_iterations"), ("chat_rl", "max_steps"), ("base_train", "depth")):
        assert int(flag(lite[stage], name)) < int(flag(small[stage], name)), name


def test_numbers_come_from_the_environment(tmp_path: Path) -> None:
    text, commands = dry_run(
        tmp_path,
        gpus=8,
        DEPTH="20",
        NPROC="4",
        RUN="mine",
        RL_STEPS="7",
        EXTRA_CHAT_RL="--loss=grpo --kl_coef=0.1",
    )
    assert "560,988,160 parameters" in text
    assert "--nproc_per_node=4" in commands["base_train"]
    assert flag(commands["chat_rl"], "max_steps") == "7" and flag(commands["chat_rl"], "kl_coef") == "0.1"
    assert {flag(command, "run") for name, command in commands.items() if name != "report"} == {"mine"}
    assert flag(commands["base_train"], "model_tag") == "d20"
    _, commands = dry_run(tmp_path, WANDB_RUN="theirs")
    assert flag(commands["base_train"], "run") == "theirs"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DEPTH", "abc", "DEPTH=abc is not a whole number"),
        ("DEPTH", "0", "DEPTH=0: must be at least 1"),
        ("TEMPERATURE", "hot", "TEMPERATURE=hot is not a number"),
        ("RL_STEPS", "-5", "RL_STEPS=-5: must not be negative"),
        ("RL_DATASET", "AQUAA", "use AQUA or GSM8K or SYNTHETIC"),
        ("PRESET", "tpu", "use gpu8, gpu1, cpu, lite"),
        ("NPROC", "7", "NPROC=7 does not divide"),
        ("BASE_BATCH_TOKENS", "1000", "no multiple of SEQUENCE_LEN"),
        ("RUN", "a b", "has only letters"),
        ("NANOCHAT_DATA_DIR", "/no/such/folder", "NANOCHAT_DATA_DIR=/no/such/folder"),
    ],
)
def test_a_wrong_value_costs_one_line(tmp_path: Path, name: str, value: str, words: str) -> None:
    done = bash("bash run_aquarat_small.sh", environment(tmp_path, DRY_RUN="1", **{name: value}))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1


def test_too_many_processes_for_the_gpus_are_refused(tmp_path: Path) -> None:
    done = bash("bash run_aquarat_small.sh", environment(tmp_path, gpus=2, NPROC="4", DRY_RUN="1"))
    assert done.returncode == 2 and "this machine has 2 GPUs" in done.stderr


def test_hidden_gpus_are_not_counted(tmp_path: Path) -> None:
    _, commands = dry_run(tmp_path, gpus=8, CUDA_VISIBLE_DEVICES="2,3")
    assert "--nproc_per_node=2" in commands["base_train"]
    _, commands = dry_run(tmp_path, gpus=8, CUDA_VISIBLE_DEVICES="")
    assert flag(commands["base_train"], "device_type") == "cpu"


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path) -> None:
    dry_run(tmp_path)
    assert [path.name for path in (tmp_path / "base").rglob("*")] == []


# ---- stages: markers and failures, with stages that are one-line scripts


def write_driver(tmp_path: Path, body: str) -> Path:
    """A driver with the functions of pipeline.sh and `body`; module X is a script that appends X to `ran`."""
    package = tmp_path / "fake"
    package.mkdir(exist_ok=True)
    for name in ("one", "two", "three"):
        (package / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')\n")
    (package / "bad.py").write_text("print('before'); raise SystemExit('it broke')\n")
    (package / "endless.py").write_text("import time\nprint('started')\ntime.sleep(60)\n")
    functions = (ROOT / "scripts" / "pipeline.sh").read_text().split("# Flags that every stage")[0]
    driver = tmp_path / "driver.sh"
    driver.write_text(
        f"set -euo pipefail\ncd {ROOT}\nRUN=r1\nsay() {{ printf '%s\\n' \"$*\" >&2; }}\nPYTHON=python\n"
        f"{functions}\nexport PYTHONPATH={package}\n{body}\n"
    )
    return driver


def stage_script(tmp_path: Path, body: str, **more: str) -> subprocess.CompletedProcess[str]:
    return bash(f"bash {write_driver(tmp_path, body)}", environment(tmp_path, **more))


def ran(tmp_path: Path) -> list[str]:
    path = tmp_path / "ran"
    words = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return words


PIPE = """
need one after= single one --a="${A:-1}" --device_batch_size="${D:-4}"
need two after=one single two
need three after= single three
"""


def test_a_finished_stage_is_skipped_until_its_settings_change(tmp_path: Path) -> None:
    first = stage_script(tmp_path, PIPE)
    assert first.returncode == 0, first.stderr
    assert ran(tmp_path) == ["one", "two", "three"]
    again = stage_script(tmp_path, PIPE)
    assert ran(tmp_path) == [] and again.stdout.count("finished earlier") == 3
    stage_script(tmp_path, PIPE, D="2")
    assert ran(tmp_path) == [], "a microbatch changes no result"
    stage_script(tmp_path, PIPE, A="2")
    assert ran(tmp_path) == ["one", "two"], "what stands after a changed stage runs again, the rest does not"
    stage_script(tmp_path, PIPE, A="2", NANOCHAT_DATA_DIR=str(tmp_path))
    assert ran(tmp_path) == ["one", "two", "three"], "other data"
    stage_script(tmp_path, PIPE, A="2", NANOCHAT_DATA_DIR=str(tmp_path), FORCE="1")
    assert ran(tmp_path) == ["one", "two", "three"]


def test_what_is_forced_starts_anew_instead_of_going_on_from_its_own_end(tmp_path: Path) -> None:
    names = ("tok_train", "base_train", "base_loss", "mid_train", "chat_sft", "chat_rl")
    body = "PYTHON=echo\n" + "".join(f"need {name} after= single scripts.{name} --seed=1\n" for name in names)

    def said(**more: str) -> list[str]:
        lines = stage_script(tmp_path, body, **more).stdout.splitlines()
        return [line.removeprefix("-m scripts.") for line in lines if line.startswith("-m")]

    assert said() == [f"{name} --seed=1" for name in names] and said() == []
    anew = [f"{name} --seed=1" + " --resume=0" * (name not in ("tok_train", "base_loss")) for name in names]
    assert said(FORCE="1") == anew
    assert said() == [], "the settings are the same, so what was forced counts as finished"


def test_a_failed_stage_stops_the_run_and_says_how_to_go_on(tmp_path: Path) -> None:
    done = stage_script(
        tmp_path,
        "need one after= single one\nneed bad after=one single bad\nneed two after=bad single two",
        DEPTH="4",
    )
    assert done.returncode == 1
    assert ran(tmp_path) == ["one"]
    assert "error: stage bad failed with exit code 1" in done.stderr
    assert "    before\n    it broke\n" in done.stderr
    log = tmp_path / "base" / "runs" / "r1" / "logs" / "bad.log"
    assert str(log) in done.stderr and "it broke" in log.read_text()
    command = done.stderr.split("to go on:")[1].strip()
    assert command.endswith(f"bash {tmp_path}/driver.sh") and "DEPTH=4" in command and "RUN=r1" in command
    stage_script(tmp_path, "need one after= single one\nneed two after=one single two", DEPTH="4")
    assert ran(tmp_path) == ["two"]


def test_an_interrupted_stage_is_not_taken_for_finished(tmp_path: Path) -> None:
    stage_script(tmp_path, PIPE)
    ran(tmp_path)
    stage_script(tmp_path, "need one after= single bad --a=1")
    stage_script(tmp_path, PIPE)
    assert ran(tmp_path) == ["one"], "the failed attempt may have spoiled what one left behind"


def test_a_stage_that_was_asked_to_stop_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "stopped.py").write_text("raise SystemExit(75)\n")
    done = stage_script(tmp_path, "need stopped after= single stopped\nneed one after= single one")
    assert done.returncode == 75 and "stopped; to go on:" in done.stderr and "error" not in done.stderr
    assert ran(tmp_path) == []


POLITE = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
print("started", flush=True)
while not asked:
    time.sleep(0.01)
time.sleep(0.3)
print(f"saved after {len(asked)} signal", flush=True)
sys.exit(75)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("to_all", [True, False], ids=["to the group", "to the driver alone"])
def test_a_signal_reaches_the_stage_once_and_its_last_words_are_logged(
    number: signal.Signals, code: int, to_all: bool, tmp_path: Path
) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "polite.py").write_text(POLITE)
    driver = write_driver(tmp_path, "need polite after= single polite")
    running = subprocess.Popen(
        ["bash", driver], env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert running.stdout is not None
    for line in running.stdout:
        if line == "started\n":
            break
    (os.killpg if to_all else os.kill)(running.pid, number)
    printed, error = running.communicate(timeout=300)
    assert running.returncode == code and "interrupted; to go on:" in error
    assert "saved after 1 signal" in printed
    logs = tmp_path / "base" / "runs" / "r1" / "logs"
    assert "saved after 1 signal" in (logs / "polite.log").read_text()
    assert [path.name for path in logs.iterdir()] == ["polite.log"], "no pipe is left"


def test_an_interrupt_says_how_to_go_on_and_leaves_no_marker(tmp_path: Path) -> None:
    driver = write_driver(tmp_path, "need one after= single endless")
    running = subprocess.Popen(
        ["bash", driver], env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A test run in the background inherits an ignored SIGINT, which no shell can trap.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert running.stdout is not None
    for line in running.stdout:
        if line == "started\n":
            break
    os.killpg(running.pid, signal.SIGINT)  # as Ctrl-C does
    _, error = running.communicate(timeout=300)
    assert running.returncode == 130 and "interrupted; to go on:" in error
    assert not (tmp_path / "base" / "finished" / "d3" / "one").exists()


# ---- .env


HOSTILE = r"""
PLAIN=value
SPACES=two words
QUOTED="double 'single' inside"
SINGLE='$(touch owned)'
COMMAND=$(touch owned)
BACKTICKS=`touch owned`
SEMICOLON=a; touch owned
export EXPORTED=yes
DEPTH=5
bad name=1
EMPTY=
# COMMENT=1
NO_NEWLINE=last; touch owned"""


def test_dotenv_is_data_and_never_code(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / ".env").write_text(HOSTILE)
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    functions = setup[setup.index("# .env by python-dotenv") : setup.index("command -v git")]
    script = f"set -euo pipefail\ndie() {{ echo \"$*\"; exit 1; }}\n{functions}\nread_dotenv\npython -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    done = bash(script, environment(tmp_path, DEPTH="7"), cwd=work)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["PLAIN"] == "value" and seen["SPACES"] == "two words" and seen["EXPORTED"] == "yes"
    assert seen["QUOTED"] == "double 'single' inside"
    assert seen["SINGLE"] == "$(touch owned)" and seen["COMMAND"] == "$(touch owned)"
    assert seen["BACKTICKS"] == "`touch owned`" and seen["SEMICOLON"] == "a; touch owned"
    assert seen["NO_NEWLINE"] == "last; touch owned"
    assert seen["DEPTH"] == "7", "what the environment has wins"
    assert "COMMENT" not in seen and "EMPTY" not in seen
    assert not (work / "owned").exists()


def test_relative_folders_mean_where_the_user_stands(tmp_path: Path) -> None:
    (tmp_path / "here" / "d" / "aqua").mkdir(parents=True)
    (tmp_path / "here" / "d" / "aqua" / "train.jsonl").write_text("{}\n")
    env = environment(tmp_path, DRY_RUN="1", NANOCHAT_DATA_DIR="d")
    done = bash(f"bash {ROOT}/run_aquarat_small.sh", env, cwd=tmp_path / "here")
    assert done.returncode == 0 and "--dataset=AQUA" in done.stdout, done.stderr


# ---- the real thing


@pytest.fixture
def kept_report() -> Iterator[None]:
    """The driver copies its report into the repository; what lay there comes back."""
    path = ROOT / "report.md"
    before = path.read_bytes() if path.exists() else None
    yield
    path.unlink(missing_ok=True)
    if before is not None:
        path.write_bytes(before)


@pytest.mark.slow
@pytest.mark.usefixtures("kept_report")
def test_every_stage_runs_through_the_real_driver_and_a_second_run_skips_them_all(tmp_path: Path) -> None:
    env = environment(tmp_path, RUN="e2e", WANDB_MODE="offline", NO_INSTALL="1", NPROC="2", **SECRETS)
    first = bash("bash run_aquarat_lite.sh", env, timeout=1500)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    base = tmp_path / "base"
    run = base / "runs" / "e2e"
    for stage in ("tok_train", "base", "mid", "sft", "rl", "chat_eval_mid", "chat_eval_sft", "chat_eval_rl"):
        assert read_json(run / stage / "summary.json")["finished"], stage
    for folder in ("base", "mid", "chatsft", "chatrl"):
        assert list((base / f"{folder}_checkpoints" / "d2").glob("model_*.pt")), folder
    report = (base / "report" / "report.md").read_text()
    for title in ("Base model training", "Midtraining", "Chat SFT", "Chat RL", "Sample answers", "Summary"):
        assert f"## {title}" in report, title
    assert "Not run" not in report
    logged = {
        path.parent.name: {name for row in read_metrics(path) for name in row}
        for path in run.glob("*/metrics.jsonl")
    }
    names = set().union(*logged.values()) - {"step", "time"}
    assert sorted(name for name in names if not describe(name)) == [], (
        "curves without a line in nanochat/metrics.py"
    )
    (offline,) = (run / "rl" / "wandb").glob("offline-run-*/run-*.wandb")
    sent = {name.split(".")[0] for row in wandb_file.history(offline) for name in row}
    assert logged["rl"] - {"step", "time"} <= sent, "every metric is in W&B's file, too"
    second = bash("bash run_aquarat_lite.sh", env, timeout=600)
    assert second.returncode == 0 and second.stdout.count("finished earlier") == len(STAGES) - 1
    assert leaks((first.stdout + first.stderr).encode()) == []
    assert [
        (path, leaks(path.read_bytes()))
        for path in base.rglob("*")
        if path.is_file() and leaks(path.read_bytes())
    ] == []
