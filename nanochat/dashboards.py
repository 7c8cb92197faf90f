"""
Which curves stand together: the dashboards that `python -m scripts.wandb_workspace` builds.

The names are those of nanochat/metrics.py, which says of each what it means. A `*` stands for every letter or layer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: its title and the curves in it."""

    title: str
    metrics: tuple[str, ...]
    kind: str = "line"  # line, bar, histogram, media or table


DASHBOARDS: dict[str, tuple[Panel, ...]] = {
    "KL Telemetry": (
        Panel("KL of the letters", ("rl/kl_letter_mean", "rl/kl_letter_std")),
        Panel("KL per token", ("rl/kl_sequence_mean", "rl/kl_sequence_k1_mean")),
        Panel("KL of the letters by question", ("rl/kl_letter_hist",), "histogram"),
        Panel("KL by completion", ("rl/kl_sequence_hist",), "histogram"),
        Panel("Accuracy against validation", ("rl/acc", "eval/aqua_dev_acc", "eval/synthetic_dev_acc")),
        Panel("Entropy of the policy", ("rl/token_entropy",)),
    ),
    "Answer Confidence": (
        Panel("Margin between the two best letters", ("rl/letter_margin_mean", "rl/letter_margin_std")),
        Panel("Probability of the right letter", ("rl/letter_prob_gold_mean",)),
        Panel("Margin by question", ("rl/letter_margin_hist",), "histogram"),
        Panel("Completions without an answer line", ("rl/answer_appended_rate",)),
        Panel("Hardest questions", ("rl/hardest",), "table"),
    ),
    "Letters": (
        Panel("Predicted letters", tuple(f"rl/letter_pred_counts/{letter}" for letter in "ABCDE")),
        Panel("Right letters", tuple(f"rl/gold_counts/{letter}" for letter in "ABCDE")),
        Panel("Evenness of the predicted letters", ("rl/letter_pred_entropy",)),
        Panel("Same option in all orders", ("eval/rotation_consistency",)),
    ),
    "Attention": (
        Panel("Entropy", ("attn/entropy_mean",)),
        Panel("Entropy as a share of the most possible", ("attn/entropy_normalised_mean",)),
        Panel("Entropy by layer", ("attn/entropy_layer/*",)),
        Panel("Mass on the first token", ("attn/bos_mass",)),
        Panel("Mass on the options", ("attn/option_mass/*", "attn/gold_option_mass")),
        Panel("Distance", ("attn/mean_distance",)),
        Panel("Right letter after each layer", ("attn/logit_lens_gold_prob/*",)),
        Panel("Maps", tuple(f"attn/map/{layer}" for layer in range(24)), "media"),
        Panel("Maps to open, with --attn_html", ("attn/view",), "media"),
        Panel("Heads", ("attn/heads",), "table"),
    ),
    "Rollouts": (
        Panel("Accuracy and reward", ("rl/acc", "rl/acc_answered", "rl/mean_reward", "rl/format_rate")),
        Panel(
            "Validation without reasoning, sampled, by vote",
            ("eval/letter_acc", "eval/mean_at_k", "eval/maj_at_k"),
        ),
        Panel("Groups", ("rl/frac_groups_all_right", "rl/frac_groups_all_wrong")),
        Panel(
            "Length",
            ("rl/avg_completion_len", "rl/completion_len_solved", "rl/completion_len_unsolved"),
        ),
        Panel("Cut at the limit", ("rl/truncated_rate",)),
        Panel(
            "Sampler against trainer",
            ("rl/sampler_trainer_logp_diff_mean", "rl/sampler_trainer_logp_diff_max"),
        ),
        Panel("Gradient and update", ("train/grad_norm", "train/update_norm")),
        Panel("Seconds of a step", ("time/rollout_seconds", "time/train_seconds", "time/telemetry_seconds")),
        Panel("Samples", ("rl/samples",), "table"),
    ),
}
