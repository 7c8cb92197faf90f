"""
The names of all curves, one sentence each on what a healthy one looks like, and the dashboards that show them.

One table serves the report's captions, the W&B workspace and whoever reads metrics.jsonl. A `*` stands for a letter, a
layer number or a k. Sources of the rules of thumb: the RL notes of TRL and verl, the DAPO paper (arXiv 2503.14476).
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

METRICS: dict[str, str] = {
    # supervised stages
    "train/loss": "Falls fast, then slowly; a jump that does not come back means that the learning rate is too high.",
    "train/lr": "The schedule as it was meant: warm-up, plateau, decay.",
    "train/grad_norm": "Settles within the first tenth of the run; growth without end precedes divergence.",
    "train/update_norm": "How far the weights move in one step; zero in a step without a live group.",
    "val/bpb": "Bits per byte of unseen text; falls with the training loss and never turns up in a first epoch.",
    "val/loss*": "Loss on unseen conversations; when it turns up while the training loss falls, stop earlier.",
    "train/skipped_steps": "Updates left out because the gradient was not finite; stays 0.",
    "train/skipped": "1 where the update was left out: no live group, or a gradient that is not finite.",
    # reward
    "rl/acc": "Share of sampled answers that are right; noisy, but its mean over 20 steps should rise.",
    "rl/mean_reward": "Follows rl/acc, plus 0.1 for every well-formed answer.",
    "rl/reward_std": "Spread of rewards; near zero there is nothing left to learn from.",
    "rl/format_rate": "Share of well-formed final answers; should be near 1 after SFT and stay there.",
    "rl/frac_groups_all_right": "Questions already solved by every sample; rises as the policy gets better.",
    "rl/frac_groups_all_wrong": "Questions that no sample solves; falls, or the questions are too hard.",
    "rl/live_groups": "Groups with both right and wrong samples: only these carry signal.",
    # rollouts
    "rl/avg_completion_len": "Tokens of a completion; a slow change is style, a collapse or a run to the limit is trouble.",
    "rl/completion_len_solved": "Length of right completions; compare it with that of wrong ones.",
    "rl/completion_len_unsolved": "Length of wrong completions; far above the right ones where the model rambles.",
    "rl/truncated_rate": "Completions cut at the limit; above a few percent, raise max_new_tokens.",
    "rl/token_entropy": "Uncertainty per sampled token in nats; falls slowly, and a fall to zero is collapse.",
    "rl/sampler_trainer_logp_diff_mean": "Sampler against trainer; 1e-5 in float32, else training is not on policy.",
    "rl/sampler_trainer_logp_diff_max": "The worst token of the same comparison.",
    "rl/clip_fraction": "Share of tokens whose ratio is clipped; zero with one update for each rollout.",
    "rl/ratio_mean": "Policy against sampler, per token; 1 on the first update after a rollout.",
    "rl/temperature": "Sampling temperature; constant unless it was scheduled.",
    "rl/group_size": "Samples for each question.",
    # distance from the reference policy
    "rl/kl_letter_mean": "How far the letters' distribution has moved from SFT, in nats; rises from exactly 0.",
    "rl/kl_letter_std": "Its spread over the probe questions.",
    "rl/kl_letter_hist": "The same by question; a few large values mean that some questions changed sides.",
    "rl/kl_sequence_mean": "Per-token KL to SFT along the sampled text; rises from 0 and stays well below 1.",
    "rl/kl_sequence_std": "Its spread over the probe completions.",
    "rl/kl_sequence_hist": "The same by completion.",
    "rl/kl_k2_mean": "The KL that the penalty of --kl_coef sees, half the squared log ratio.",
    "rl/kl_sequence_k1_*": "The unbiased estimate k1; may dip below 0 by chance.",
    "rl/kl_sequence_k3_*": "The estimate k3: never negative, less noisy, close to k1 while both are small.",
    # confidence
    "rl/letter_margin_mean": "Top letter minus runner-up in logits; grows with confidence, right or wrong.",
    "rl/letter_margin_std": "Its spread over the probe questions.",
    "rl/letter_margin_hist": "The same by question; mass near 0 are the undecided ones.",
    "rl/letter_prob_gold_mean": "Probability of the right letter; must rise with the margin, else confidence is misplaced.",
    "rl/answer_appended_rate": "Completions without an answer line, where it was appended to read the letters.",
    # letters
    "rl/letter_pred_counts/*": "Predicted letters; one bar that swallows the rest is mode collapse.",
    "rl/gold_counts/*": "Right letters of the same questions: what the predictions should look like.",
    "rl/letter_pred_entropy": "Evenness of the predicted letters in nats; log 5 = 1.61 is even, 0 is one letter for all.",
    # attention
    "attn/entropy_mean": "Mean entropy of attention in nats; sharpens slowly, and a sudden drop means a dead head.",
    "attn/entropy_normalised_mean": "The same as a share of the most that is possible: 1 looks everywhere alike.",
    "attn/entropy_normalised_layer/*": "The same for each layer.",
    "attn/entropy_layer/*": "The entropy of each layer; later layers are usually sharper.",
    "attn/bos_mass": "Attention parked on the first token; high in heads that have nothing to do.",
    "attn/option_mass/*": "Attention from the answer position to each option's text.",
    "attn/gold_option_mass": "The same for the right option; above one fifth of the sum when the model looks at it.",
    "attn/mean_distance": "Mean number of tokens looked back.",
    "attn/logit_lens_gold_prob/*": "Probability of the right letter read after each layer; shows where the answer forms.",
    # evaluation
    "eval/aqua_dev_acc": "Greedy accuracy on validation; compare with 27.2 %, the majority letter.",
    "eval/synthetic_dev_acc": "Greedy accuracy on held-out synthetic problems; compare with the set's majority letter.",
    "eval/*_low": "Lower end of the 95 % interval; beat the majority letter with this, not with the mean.",
    "eval/*_high": "Upper end of the 95 % interval.",
    "eval/majority": "What always saying the commonest letter scores on these questions.",
    "eval/letter_acc": "Accuracy when only the letters' logits are compared, without reasoning.",
    "eval/mean_at_k": "Mean accuracy of k samples.",
    "eval/pass_at_*": "A right answer among k samples; guessing alone reaches 83 % at k = 8 with five options.",
    "eval/guess_at_*": "What guessing reaches with k tries.",
    "eval/maj_at_k": "Accuracy of the majority vote over k samples.",
    "eval/rotation_consistency": "Same option chosen in all five orders of the options; 1 when position plays no part.",
    "eval/rotation_acc": "Accuracy over all orders of the options.",
    "eval/rotation_all_right": "Questions answered rightly in every order.",
    "eval/*_dev_acc": "Greedy accuracy on validation.",
    # cost
    "time/rollout_seconds": "Generation; most of an RL step.",
    "time/reward_seconds": "Marking; next to nothing.",
    "time/train_seconds": "Forward, backward and update.",
    "time/telemetry_seconds": "KL, margins and attention; under 5 % of the total.",
    "time/eval_seconds": "Validation.",
    "time/step_seconds": "A whole step.",
    "time/data_seconds": "Waiting for data; next to nothing.",
    "time/save_seconds": "How long saving a checkpoint held training up; on a GPU only the copying.",
    "time/save_write_seconds": "Writing a checkpoint onto the disk, on a GPU beside training.",
    "perf/rollout_tokens_per_second": "Sampled tokens a second; falls as completions grow longer.",
    "perf/train_tokens_per_second": "Trained tokens a second; constant after the first steps.",
    "perf/tokens_per_second": "Trained tokens a second; constant after the first steps.",
    "perf/mfu": "Share of the device's peak arithmetic that is used; constant after the first steps.",
}


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
        Panel("Entropy by layer", ("attn/entropy_layer/*",)),
        Panel("Mass on the first token", ("attn/bos_mass",)),
        Panel("Mass on the options", ("attn/option_mass/*", "attn/gold_option_mass")),
        Panel("Distance", ("attn/mean_distance",)),
        Panel("Right letter after each layer", ("attn/logit_lens_gold_prob/*",)),
        Panel("Maps", tuple(f"attn/map/{layer}" for layer in range(24)), "media"),
    ),
    "Rollouts": (
        Panel("Accuracy and reward", ("rl/acc", "rl/mean_reward", "rl/format_rate")),
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


def describe(name: str) -> str:
    """The sentence for the metric `name`, '' for one that the table does not know."""
    if name in METRICS:
        return METRICS[name]
    return next(
        (text for pattern, text in METRICS.items() if "*" in pattern and fnmatchcase(name, pattern)), ""
    )
