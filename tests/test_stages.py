"""Every training stage through its own command: on one rank and on two, cut and gone on with, and with bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STAGES: dict[str, list[str]] = {
    "base": [
        "scripts.base_train", "--depth=2", "--n_embd=32", "--n_head=2", "--smear=2", "--max_seq_len=128",
        "--num_iterations=6", "--total_batch_size=1024", "--synthetic_share=1", "--drill_iterations=2",
        "--save_every=3", "--eval_every=-1",
    ],
    "mid": [
        "scripts.mid_train", "--num_iterations=6", "--total_batch_size=1024", "--synthetic_examples=120",
        "--other_examples=30", "--save_every=3", "--eval_every=-1",
    ],
    "sft": [
        "scripts.chat_sft", "--num_iterations=6", "--total_batch_size=1024", "--synthetic_examples=120",
        "--other_examples=30", "--save_every=3", "--eval_every=6",
    ],
    "rl": [
        "scripts.chat_rl", "--dataset=SYNTHETIC", "--max_steps=4", "--examples_per_step=4", "--num_samples=6",
        "--max_new_tokens=24", "--eval_every=-1", "--kl_every=2", "--attn_every=-1", "--save_every=2",
        "--learning_rate=1e-3",
    ],
}  # fmt: skip


def command(
    home: Path, words: Sequence[str], *, ranks: int = 1, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script in the base dir `home`, without network and without local data."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    gap = ["--"] if ranks > 1 else []
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NANOCHAT_", "AQUA_", "WANDB_"))}
    env |= {"NANOCHAT_BASE_DIR": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launcher, words[0], *gap, *words[1:]], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def stage(home: Path, name: str, *more: str, ranks: int = 1, rows: int = 8) -> list[dict[str, float]]:
    """Run a stage of STAGES as run `r`; its metrics, one row a step."""
    rows_flag = [] if name == "rl" else [f"--device_batch_size={rows // ranks}"]
    command(home, [*STAGES[name], *rows_flag, "--run=dummy", *more], ranks=ranks)
    lines = (home / "runs" / "dummy" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base dir with a tokenizer and one checkpoint of every stage, trained on one rank."""
    from tests.small import tiny_tokenizer

    folder = tmp_path_factory.mktemp("home")
    tiny_tokenizer().save(folder / "tokenizer")
    for name in STAGES:
        stage(folder, name)
    return folder


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """A copy of `home` that a test may change."""
    import shutil

    shutil.copytree(home, tmp_path / "home")
    return tmp_path / "home"


def recorded(home: Path, name: str) -> list[dict[str, float]]:
    lines = (home / "runs" / "dummy" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", list(STAGES))
def test_two_ranks_give_the_losses_of_one(home: Path, copy: Path, name: str) -> None:
    alone = [row["train/loss"] for row in recorded(home, name) if "train/loss" in row]
    together = [row["train/loss"] for row in stage(copy, name, "--resume=0", ranks=2) if "train/loss" in row]
    assert len(alone) == len(together) >= 4
    assert together == pytest.approx(alone, abs=1e-4)


def lose_the_last(home: Path, name: str) -> Path:
    """Remove the newest checkpoint of a stage; where its model lay, relative to `home`."""
    folder = Path({"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}[name] + "_checkpoints/d2")
    last = max((home / folder).glob("model_*.pt"))
    for path in (home / folder).glob(f"*{last.stem.removeprefix('model_')}*"):
        path.unlink()
    return folder / last.name


def losses(rows: Sequence[dict[str, float]]) -> dict[float, float]:
    """Step -> loss, of the steps that have one."""
    found = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert len(dict(found)) == len(found), "every step stands once"
    return dict(found)


@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_that_lost_its_last_checkpoint_ends_bit_identical(home: Path, copy: Path, name: str) -> None:
    import torch

    last = lose_the_last(copy, name)
    rows = stage(copy, name)
    before, after = (torch.load(folder / last, weights_only=True) for folder in (home, copy))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert losses(rows) == losses(recorded(home, name))


@pytest.mark.parametrize("name", list(STAGES))
def test_a_stage_goes_on_with_two_ranks_where_one_was(home: Path, copy: Path, name: str) -> None:
    lose_the_last(copy, name)
    together, alone = losses(stage(copy, name, ranks=2)), losses(recorded(home, name))
    assert list(together) == list(alone)
    assert list(together.values()) == pytest.approx(list(alone.values()), abs=1e-4)


def test_the_best_base_checkpoint_is_one_that_was_validated(tmp_path: Path) -> None:
    from tests.shard_files import write_shards
    from tests.small import tiny_tokenizer

    tiny_tokenizer().save(tmp_path / "tokenizer")
    write_shards(tmp_path / "base_data", 2)
    words = [
        word for word in STAGES["base"] if word.partition("=")[0] not in ("--num_iterations", "--eval_every")
    ]
    command(
        tmp_path,
        [*words, "--num_iterations=5", "--eval_every=2", "--eval_tokens=1024", "--device_batch_size=8"],
    )
    folder = tmp_path / "base_checkpoints" / "d2"
    metas = {step: json.loads((folder / f"meta_{step:06d}.json").read_text()) for step in (3, 5)}
    assert metas[3]["val_bpb"] is not None and metas[3]["best_value"] is None  # that of step 2
    assert metas[5]["best_value"] == -metas[5]["val_bpb"] and (folder / "best").read_text() == "5\n"


def test_a_finished_stage_does_nothing_and_other_settings_move_the_old_aside(copy: Path) -> None:
    assert (
        "going on from base_checkpoints/d2 step 6"
        in command(copy, [*STAGES["base"], "--device_batch_size=8"]).stdout
    )
    done = command(copy, [*STAGES["base"], "--device_batch_size=8", "--matrix_lr=0.01"])
    assert "they were made with other settings" in done.stdout
    assert len(list((copy / "base_checkpoints").glob("d2.before-*/model_*.pt"))) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["scripts.chat_sft", "--model_tag=d9"], "there is no mid checkpoint of d9"),
        (["scripts.chat_rl", "--step=99"], "at step 99"),
        (["scripts.chat_rl", "--dataset=AQUA"], "AQUA: not found in"),
        (["scripts.base_train", "--depth=2", "--n_embd=33", "--num_iterations=1"], "n_embd=33"),
        (["scripts.base_train", "--total_batch_size=1000"], "--total_batch_size=1000 is no multiple"),
        (["scripts.base_train", "--device_type=cuda"], "--device_type=cuda: this machine has cpu"),
        (["scripts.chat_eval", "-i", "sft", "-a", "AQAU"], "task AQAU is not known"),
        (["scripts.chat_eval", "-i", "sft", "-a", "AQUA"], "none of AQUA can be evaluated"),
        (
            ["scripts.chat_eval", "-i", "rl", "--compare=sft", "-n", "4", "-t", "1"],
            "--compare=sft pairs one answer",
        ),
        (["scripts.chat_eval", "-i", "rl", "--rotations=7"], "--rotations=7"),
        (["scripts.chat_rl", "--num_samples=1"], "--num_samples=1"),
        (["scripts.chat_rl", "--temperature=0"], "--temperature=0"),
    ],
)
def test_bad_input_is_one_line_that_says_what_and_how(home: Path, words: list[str], expected: str) -> None:
    if "--device_type=cuda" in words:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    done = command(home, words, check=False)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_evaluation_compares_two_stages_and_keeps_the_results(copy: Path) -> None:
    words = ["scripts.chat_eval", "-i", "rl", "-a", "SYNTHETIC", "-x", "24", "-m", "24", "--compare=sft"]
    done = command(copy, [*words, "--mode=both", "--run=dummy", "--rotations=2", "--forbid_bare"])
    assert "McNemar p" in done.stdout and "cyclic orders" in done.stdout
    results = json.loads((copy / "runs/dummy/chat_eval_rl/summary.json").read_text())["results"]
    assert {"SYNTHETIC", "SYNTHETIC letters", "SYNTHETIC rotations"} <= set(results)
    assert results["SYNTHETIC"]["n"] == 24 and 0 < results["SYNTHETIC"]["mcnemar_p"] <= 1


def test_chat_cli_prints_only_the_answer(home: Path) -> None:
    done = command(home, ["scripts.chat_cli", "-i", "rl", "-p", "What is 2+2?", "-m", "8"])
    assert len(done.stdout.splitlines()) >= 1
    assert "device" in done.stderr and "device" not in done.stdout
