"""Every curve, table and picture that the documents promise, from a real run of chat_rl, in its files and in W&B's."""

from __future__ import annotations

from pathlib import Path

import pytest
import wandb_file

from nanochat.metrics import describe
from nanochat.run_files import read_lines, read_metrics
from tests.test_stages import STAGES, command, copy, home  # noqa: F401  (fixtures)

pytestmark = pytest.mark.slow

LAYERS, LETTERS = range(2), "ABCDE"
NAMES_OF_EVERY_STEP = """
rl/acc rl/mean_reward rl/reward_std rl/format_rate rl/frac_groups_all_right rl/frac_groups_all_wrong rl/live_groups
rl/avg_completion_len rl/truncated_rate rl/token_entropy rl/temperature rl/group_size
rl/sampler_trainer_logp_diff_mean rl/sampler_trainer_logp_diff_max rl/clip_fraction
train/loss train/grad_norm train/update_norm train/lr
time/rollout_seconds time/reward_seconds time/train_seconds time/telemetry_seconds time/eval_seconds
perf/rollout_tokens_per_second perf/train_tokens_per_second
"""
EVERY_STEP = NAMES_OF_EVERY_STEP.split()
WHERE_THERE_ARE_SUCH = ["rl/completion_len_solved", "rl/completion_len_unsolved"]
LOOKS = [
    *(f"rl/kl_letter_{part}" for part in ("mean", "std", "hist")),
    *(f"rl/kl_sequence{kind}_{part}" for kind in ("", "_k1", "_k3") for part in ("mean", "std", "hist")),
    *(f"rl/letter_margin_{part}" for part in ("mean", "std", "hist")),
    "rl/letter_prob_gold_mean", "rl/letter_pred_entropy", "rl/answer_appended_rate",
    *(f"rl/{kind}_counts/{letter}" for kind in ("letter_pred", "gold") for letter in LETTERS),
    "attn/entropy_mean", "attn/bos_mass", "attn/gold_option_mass", "attn/mean_distance",
    *(f"attn/option_mass/{letter}" for letter in LETTERS),
    *(f"attn/{kind}/{layer}" for kind in ("entropy_layer", "logit_lens_gold_prob") for layer in LAYERS),
]  # fmt: skip
VALIDATION = [
    f"eval/{name}{end}"
    for name in (
        "synthetic_dev_acc", "letter_acc", "mean_at_k", "maj_at_k", "rotation_consistency",
        "rotation_acc", "rotation_all_right",
        *(f"pass_at_{k}" for k in range(1, 4)),
    )
    for end in ("", "_low", "_high")
] + [f"eval/guess_at_{k}" for k in range(1, 4)]  # fmt: skip
TABLES = {
    "rl/samples": {"question", "completion", "predicted", "gold", "reward", "advantage"},
    "rl/hardest": {"question", "options", "model letter", "gold letter", "completion", "margin"},
    "attn/heads": {"layer", "head", "entropy", "bos_mass", "mean_distance"},
}


@pytest.fixture(scope="module")
def record(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The run directory of two steps of RL, everything looked at in each of them."""
    flags = [
        "--run=watched", "--max_steps=2", "--examples_per_step=16", "--kl_every=1", "--attn_every=1", "--eval_every=1", "--eval_examples=8",
        "--eval_samples=3", "--attn_html=1", "--save_tag=watched",
    ]  # fmt: skip
    command(home, [*STAGES["rl"], *flags])
    return home / "runs" / "watched" / "rl"


def test_every_step_has_every_curve(record: Path) -> None:
    before, *steps = read_metrics(record / "metrics.jsonl")
    assert before["step"] == 0 and [row["step"] for row in steps] == [1, 2]
    assert [name for name in VALIDATION if name not in before] == []
    for row in steps:
        assert [name for name in [*EVERY_STEP, *LOOKS, *VALIDATION] if name not in row] == []
        assert any(name in row for name in WHERE_THERE_ARE_SUCH)
        assert ("rl/acc_answered" in row) == (row["rl/format_rate"] > 0)
        assert [name for name in row if not describe(name)] == ["step", "time"]


def test_before_the_first_update_the_policy_is_its_reference_and_after_it_is_not(record: Path) -> None:
    _, first, second = read_metrics(record / "metrics.jsonl")
    assert first["rl/kl_letter_mean"] == 0 and first["rl/kl_sequence_mean"] == 0
    assert second["rl/kl_letter_mean"] > 0 and second["rl/kl_sequence_k3_mean"] > 0
    assert sum(first[f"rl/gold_counts/{letter}"] for letter in LETTERS) == sum(
        first["rl/kl_letter_hist"]["counts"]
    )


def test_tables_pictures_and_pages_are_kept(record: Path) -> None:
    for name, columns in TABLES.items():
        rows = read_lines(record / "tables" / f"{name}.jsonl")
        assert {row["step"] for row in rows} == {1, 2} and columns <= set(rows[0]), name
    kept = {(row["name"], Path(row["file"]).suffix) for row in read_lines(record / "media.jsonl")}
    assert kept == {("attn/map/0", ".png"), ("attn/map/1", ".png"), ("attn/view", ".html")}
    samples = read_lines(record / "tables" / "rl" / "samples.jsonl")
    questions = [row["question"] for row in samples if row["step"] == 1]
    assert questions == sorted(questions, key=questions.index), "the samples of a question stand together"


def test_weights_and_biases_has_them_too(record: Path) -> None:
    (offline,) = (record / "wandb").glob("offline-run-*/run-*.wandb")
    rows = wandb_file.history(offline)
    sent: dict[str, set[int]] = {}
    for row in rows:
        for name in row:
            sent.setdefault(name.split(".")[0], set()).add(row["rl/step"])
    for name in [*EVERY_STEP, *LOOKS, *TABLES, "attn/map/0", "attn/view"]:
        assert sent.get(name) == {1, 2}, name
    assert all(sent.get(name) == {0, 1, 2} for name in VALIDATION)
    logged = {row["step"]: row["rl/mean_reward"] for row in read_metrics(record / "metrics.jsonl")[1:]}
    assert {row["rl/step"]: row["rl/mean_reward"] for row in rows if "rl/mean_reward" in row} == logged
    assert wandb_file.step_metrics(offline).get("*") == "rl/step"
    run = wandb_file.run_record(offline)
    assert (run.run_group, run.job_type) == ("watched", "rl")
