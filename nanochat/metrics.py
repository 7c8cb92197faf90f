"""
Every curve by name: what it is, how it is computed, what a healthy one looks like, what a bad one means.

One table serves the report's captions, the W&B workspace, docs/metrics.md (`python -m scripts.docs` writes it) and
whoever reads metrics.jsonl. A `*` stands for a letter, a layer number, a k or the name of a task; the first name that
fits counts. Sources of the rules of thumb: the RL notes of TRL and verl, the DAPO paper (arXiv 2503.14476).
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Metric:
    """One curve in four sentences."""

    meaning: str
    formula: str
    healthy: str
    """the caption of the report and of the dashboards; it stands alone"""
    bad: str


# fmt: off
SECTIONS: dict[str, dict[str, Metric]] = {
    "Supervised stages and updates": {
        "train/loss": Metric(
            "What one update minimises: in base, mid and SFT the cross entropy of the next token, in nats.",
            "Sum of -log p over all trained tokens of the step and all ranks, divided by their number; in RL the weighted sum of -advantage * log p.",
            "Falls fast, then slowly; a jump that does not come back means that the learning rate is too high.",
            "Flat from the start: data or learning rate are wrong. In RL the value means nothing; read rl/acc."),
        "train/lr": Metric(
            "The multiplier of every group's own learning rate.",
            "schedule(step), between 0 and 1; see nanochat/schedule.py.",
            "The schedule as it was meant: warm-up, plateau, decay.",
            "A decay that ends before the run does: the number of steps was changed after the schedule was made."),
        "train/grad_norm": Metric(
            "Length of the gradient before it is clipped.",
            "Square root of the sum of squares over all weights, after the ranks' gradients are added.",
            "Settles within the first tenth of the run; growth without end precedes divergence.",
            "Spikes: bad rows or too high a rate. Exactly 0 in RL: no group was live."),
        "train/update_norm": Metric(
            "Length of the step that the weights took.",
            "Square root of the sum of squares of (weights after - weights before).",
            "How far the weights move in one step; zero in a step without a live group.",
            "Constant while rl/live_groups falls: the optimizer hides the signal, as Muon does. Growing: lower the rate."),
        "val/bpb": Metric(
            "Bits per byte of unseen pretraining text; comparable between vocabularies.",
            "Sum of -log p over the tokens / (bytes of their text * ln 2); special tokens count in neither.",
            "Bits per byte of unseen text; falls with the training loss and never turns up in a first epoch.",
            "It turns up while train/loss falls: the text repeats, so take more text or fewer steps."),
        "val/loss*": Metric(
            "Loss on conversations that are not trained on, one curve for each task.",
            "Mean of -log p over the assistant's tokens of the held-out split, in nats.",
            "Loss on unseen conversations; when it turns up while the training loss falls, stop earlier.",
            "A minimum early in the run: too many epochs of too few rows."),
        "train/skipped_steps": Metric(
            "Updates that were left out so far.",
            "Count of steps whose loss or gradient was not finite, since the process began.",
            "Updates left out because the gradient was not finite; stays 0.",
            "Any growth: lower the learning rate. Three in a row end the run and leave the batch on disk."),
        "train/skipped": Metric(
            "Whether the update of this RL step was left out.",
            "1 if loss or gradient was not finite, else 0.",
            "1 where the update was left out because the gradient was not finite; stays 0.",
            "Any 1: look at rl/ratio_mean and train/grad_norm of the steps before."),
    },
    "Reward": {
        "rl/acc": Metric(
            "Share of the step's sampled answers that are right.",
            "Right completions / all completions of the step, over all ranks.",
            "Share of sampled answers that are right; noisy, but its mean over 20 steps should rise.",
            "Level: nothing is learnt. It rises and eval/*_dev_acc does not: the training questions are memorised."),
        "rl/mean_reward": Metric(
            "Mean pay of a completion.",
            "Mean of (1 if right) + (0.1 if exactly one well-formed answer line) + (`--wrong_reward` if that is wrong); a cut "
            "completion earns 0.",
            "Follows rl/acc, plus 0.1 for every well-formed answer.",
            "It rises and rl/acc does not: only the form is learnt."),
        "rl/acc_answered": Metric(
            "Share of the answers given that are right.",
            "Right completions / completions with exactly one well-formed answer line; absent in a step without any.",
            "Above rl/acc where the policy may say that it has no answer; with `--wrong_reward=-0.5` above one third, where answers pay.",
            "Falls to 0.2 while rl/format_rate rises: the policy guesses in place of saying nothing."),
        "rl/reward_std": Metric(
            "Spread of the pay.",
            "Population standard deviation of the rewards of all completions of the step.",
            "Spread of rewards; near zero there is nothing left to learn from.",
            "Near 0 at low rl/acc: the questions are too hard. Near 0 at high rl/acc: they are solved."),
        "rl/format_rate": Metric(
            "Share of completions that end in one answer line that can be read.",
            "Completions with exactly one well-formed `Answer: X` / all completions; a cut one has none.",
            "Share of well-formed final answers; should be near 1 after SFT and stay there.",
            "Low from the start: SFT was too short, or it taught to say nothing. Falling: read rl/samples and rl/truncated_rate."),
        "rl/frac_groups_all_right": Metric(
            "Questions that every sample solves.",
            "Groups whose completions are all right / groups of the step.",
            "Questions already solved by every sample; rises as the policy gets better.",
            "Above one half: steps are wasted; take harder questions or --dynamic_sampling."),
        "rl/frac_groups_all_wrong": Metric(
            "Questions that no sample solves.",
            "Groups whose completions are all wrong / groups of the step; by luck alone (1 - p)^G for G samples.",
            "Questions that no sample solves; falls, or the questions are too hard.",
            "Rising: the policy collapses to one letter, or forgets to answer."),
        "rl/live_groups": Metric(
            "Groups that have something to teach.",
            "Count of groups of the step with both right and wrong completions.",
            "Groups with both right and wrong samples: only these carry signal.",
            "Falling towards 0: every update rests on few questions; raise --num_samples or change the questions."),
    },
    "Rollouts": {
        "rl/avg_completion_len": Metric(
            "Length of a completion.",
            "Sampled tokens, the stop token included / completions.",
            "Tokens of a completion; a slow change is style, a collapse or a run to the limit is trouble.",
            "Collapse: the model stops reasoning and guesses. Up to --max_new_tokens: it no longer stops."),
        "rl/completion_len_solved": Metric(
            "Length of the right completions.",
            "Their sampled tokens / their number; left out of a step that has none.",
            "Length of right completions; compare it with that of wrong ones.",
            "Shorter than the wrong ones by far: short guesses are being paid."),
        "rl/completion_len_unsolved": Metric(
            "Length of the wrong completions.",
            "Their sampled tokens / their number; left out of a step that has none.",
            "Length of wrong completions; far above the right ones where the model rambles.",
            "At the limit: they are cut; see rl/truncated_rate."),
        "rl/truncated_rate": Metric(
            "Share of completions that were cut.",
            "Completions without a stop token within --max_new_tokens / all completions.",
            "Completions cut at the limit; above a few percent, raise max_new_tokens.",
            "High: right reasoning is paid nothing, so RL teaches to be short."),
        "rl/token_entropy": Metric(
            "How undecided the policy is, token by token.",
            "Minus the mean log-probability of the sampled tokens, in nats; unbiased for the entropy.",
            "Uncertainty per sampled token in nats; falls slowly, and a fall to zero is collapse.",
            "To 0 within a few dozen steps: all samples of a group are alike; lower the rate or set --entropy_coef. Rising without end: the rate is too high."),
        "rl/sampler_trainer_logp_diff_mean": Metric(
            "How well the trainer reproduces the probabilities that were sampled from.",
            "Mean over trained tokens of |log p of the trainer - log p of the sampler|, first update of the step; left out of a step without a live group.",
            "Sampler against trainer; 1e-5 in float32, else training is not on policy.",
            "Above 1e-3 in float32: --top_k is not 0, or one of the two paths has a bug."),
        "rl/sampler_trainer_logp_diff_max": Metric(
            "The worst token of the same comparison.",
            "Maximum over trained tokens of |log p of the trainer - log p of the sampler|, left out as the mean.",
            "The worst token of sampler against trainer; below 1e-3 in float32, larger in bfloat16.",
            "Single large values: one kind of token is treated differently, often the stop token."),
        "rl/clip_fraction": Metric(
            "Share of tokens whose gradient was clipped away.",
            "Tokens with ratio > 1 + clip_high and advantage > 0, or ratio < 1 - clip_low and advantage < 0 / trained tokens; left out of a step without a live group.",
            "Share of tokens whose ratio is clipped; zero with one update for each rollout.",
            "Above 0.2: too many updates for each rollout, or too high a rate."),
        "rl/ratio_mean": Metric(
            "Policy against sampler, per token.",
            "Mean over trained tokens of exp(log p of the trainer - log p of the sampler), last update of the step.",
            "Policy against sampler, per token; 1 on the first update after a rollout.",
            "Off 1 by more than 1e-3 with one update: sampler and trainer are not the same policy."),
        "rl/temperature": Metric(
            "Temperature of the rollouts.",
            "As --temperature says; the loss uses the same one.",
            "Sampling temperature; constant unless it was scheduled.",
            "Another value than you set: another run's file."),
        "rl/group_size": Metric(
            "Completions of each question.",
            "Completions of the step / groups of the step.",
            "Samples for each question; as --num_samples says.",
            "Not a whole number: groups were lost."),
    },
    "Distance from the reference policy": {
        "rl/kl_letter_mean": Metric(
            "How far RL has moved the opinion on the letters, at the place where the answer is given.",
            "Mean over the questions looked at of KL(policy || start) over the question's letters; exact, in nats.",
            "How far the letters' distribution has moved from SFT, in nats; rises from exactly 0.",
            "Not 0 at the first look: the reference is not the start. Above 1 while rl/letter_pred_entropy falls: one letter takes over."),
        "rl/kl_letter_std": Metric(
            "Its spread over the questions.",
            "Population standard deviation of the same values.",
            "Spread of the letters' KL over the probe questions; grows with its mean.",
            "Far above the mean: a few questions changed sides, the others did not move."),
        "rl/kl_letter_hist": Metric(
            "The same values, one for each question.",
            "Histogram of KL(policy || start) over the letters, by question.",
            "Letters' KL by question; a few large values mean that some questions changed sides.",
            "All mass moves together: the letter prior was shifted, not the answers."),
        "rl/kl_sequence_mean": Metric(
            "How far RL has moved the text.",
            "Mean over completions of the mean over tokens of k3 = exp(-d) - 1 + d, d = log p - log p of the start.",
            "Per-token KL to SFT along the sampled text; rises from 0 and stays well below 1.",
            "A sudden rise: the style breaks; read rl/samples, lower the rate or set --kl_coef."),
        "rl/kl_sequence_std": Metric(
            "Its spread over the completions.",
            "Population standard deviation of the same values.",
            "Spread of the per-token KL over the probe completions; about as large as its mean.",
            "Many times the mean: single completions went astray."),
        "rl/kl_sequence_hist": Metric(
            "The same values, one for each completion.",
            "Histogram of each completion's mean k3.",
            "Per-token KL by completion; one hump that moves slowly to the right.",
            "Two humps: two styles, of which one is new."),
        "rl/kl_k2_mean": Metric(
            "The KL that the penalty of --kl_coef sees.",
            "Mean over trained tokens of (log p - log p of the start)^2 / 2; logged only with --kl_coef.",
            "The KL that the penalty of --kl_coef sees, half the squared log ratio; levels off where penalty and reward balance.",
            "It grows as if there were no penalty: --kl_coef is too small to matter."),
        "rl/kl_sequence_k1_*": Metric(
            "The unbiased estimate k1 of the per-token KL.",
            "d = log p - log p of the start, averaged within each completion; mean, std and hist over completions.",
            "The unbiased estimate k1 of the per-token KL; may dip below 0 by chance.",
            "Far below 0: the completions are not samples of this policy."),
        "rl/kl_sequence_k3_*": Metric(
            "The estimate k3 of the per-token KL; rl/kl_sequence_* is the same.",
            "exp(-d) - 1 + d, averaged as k1.",
            "The estimate k3: never negative, less noisy, close to k1 while both are small.",
            "Far from k1: the KL is large, and neither is to be trusted to the digit."),
    },
    "Confidence": {
        "rl/letter_margin_mean": Metric(
            "How sure the policy is of its letter.",
            "Mean over the questions looked at of (highest - second highest logit of the letters) at the answer position.",
            "Top letter minus runner-up in logits; grows with confidence, right or wrong.",
            "It grows and rl/letter_prob_gold_mean does not: sure and wrong."),
        "rl/letter_margin_std": Metric(
            "Its spread over the questions.",
            "Population standard deviation of the margins.",
            "Spread of the margins over the probe questions; grows with their mean.",
            "Near 0: every question gets the same answer for the same reason, its letter."),
        "rl/letter_margin_hist": Metric(
            "The margins, one for each question.",
            "Histogram of the margins by question.",
            "Margins by question; mass near 0 are the undecided ones.",
            "All mass far from 0 at low accuracy: collapse; the table rl/hardest shows the questions."),
        "rl/letter_prob_gold_mean": Metric(
            "What the policy gives the right letter.",
            "Mean over the questions looked at of the softmax over the letters' logits, at the right one.",
            "Probability of the right letter; must rise with the margin, else confidence is misplaced.",
            "At 0.2 throughout: letters are guessed. Below: a wrong letter is preferred."),
        "rl/answer_appended_rate": Metric(
            "Completions that never said `Answer:`.",
            "Completions to which it was appended in order to read the letters / completions looked at.",
            "Completions without an answer line, where it was appended to read the letters; near 0 after SFT.",
            "High: the letter curves show opinions that the model would not have voiced."),
    },
    "Letters": {
        "rl/letter_pred_counts/*": Metric(
            "How often each letter is the likeliest one.",
            "Count of the questions looked at whose highest letter logit is this letter.",
            "Predicted letters; one bar that swallows the rest is mode collapse.",
            "One letter only: the accuracy is that letter's share, whatever it looks like. Compare rl/gold_counts/*."),
        "rl/gold_counts/*": Metric(
            "Right letters of the same questions.",
            "Count of questions whose right answer stands at this letter.",
            "Right letters of the same questions: what the predictions should look like.",
            "Far from even in spite of --permute_options: too few questions are looked at; raise --kl_batch."),
        "rl/letter_pred_entropy": Metric(
            "How evenly the letters are used.",
            "Entropy in nats of the shares of rl/letter_pred_counts/*.",
            "Evenness of the predicted letters in nats; log 5 = 1.61 is even, 0 is one letter for all.",
            "Falling below 1: collapse has begun; stop, and lower the rate."),
    },
    "Attention": {
        "attn/entropy_mean": Metric(
            "How widely heads look.",
            "Entropy in nats of each row of attention, mean over heads, layers and the rows from the prompt's end to the answer.",
            "Mean entropy of attention in nats; sharpens slowly, and a sudden drop means a dead head.",
            "A sudden drop: heads look at one token whatever is asked. It also grows with the prompts' length."),
        "attn/entropy_normalised_mean": Metric(
            "The same, freed of length.",
            "Entropy of a row / log(number of visible tokens), averaged as attn/entropy_mean.",
            "The entropy of attention as a share of the most that is possible: 1 looks everywhere alike.",
            "Near 1 in every layer: attention has learnt nothing. Near 0: it looks at one token."),
        "attn/entropy_normalised_layer/*": Metric(
            "The same for one layer; the first is 0.",
            "Mean over the layer's heads.",
            "Normalised entropy of each layer; layers differ, and none stays at 1.",
            "One layer at 1: it does nothing yet."),
        "attn/entropy_layer/*": Metric(
            "The entropy of one layer, in nats; the first is 0.",
            "Mean over the layer's heads of the entropy of their rows.",
            "The entropy of each layer; later layers are usually sharper.",
            "One layer falls alone: look at its map in media.jsonl and at the table attn/heads."),
        "attn/bos_mass": Metric(
            "Attention that is parked on the first token.",
            "Mean over heads and rows of the probability at position 0.",
            "Attention parked on the first token; high in heads that have nothing to do.",
            "Towards 1 everywhere: the text is no longer read."),
        "attn/option_mass/*": Metric(
            "How much the answer looks at one option.",
            "Sum of the answer position's attention over the option's tokens, mean over heads, layers and questions.",
            "Attention from the answer position to each option's text; about even between letters.",
            "One letter gets most, whatever its text: position is learnt, not content."),
        "attn/gold_option_mass": Metric(
            "How much the answer looks at the right option.",
            "attn/option_mass of the right letter, mean over questions.",
            "Attention to the right option; above one fifth of the options' sum when the model looks at it.",
            "At one fifth while the accuracy rises: the answer is carried elsewhere, usually in the rationale."),
        "attn/mean_distance": Metric(
            "How far back heads look.",
            "Mean over heads and rows of the number of tokens looked back, weighted by attention.",
            "Mean number of tokens looked back; a steady mix of near and far heads.",
            "Towards 0: only neighbours are read. It follows the prompts' length, too."),
        "attn/logit_lens_gold_prob/*": Metric(
            "Where in the depth the answer forms.",
            "Softmax over the letters of head(norm(residual after the layer)) at the answer position, at the right letter.",
            "Probability of the right letter read after each layer; shows where the answer forms.",
            "At one fifth in every layer but the last: the letter is decided at the very end, often by its prior."),
    },
    "Evaluation": {
        "eval/aqua_dev_acc": Metric(
            "Greedy accuracy on AQuA's validation split.",
            "Right answers / questions, one greedy completion each; a cut or unreadable one is wrong.",
            "Greedy accuracy on validation; compare with 27.2 %, the majority letter.",
            "At 27.2 % with one predicted letter: collapse. At 20 %: guessing."),
        "eval/synthetic_dev_acc": Metric(
            "Greedy accuracy on held-out built-in problems.",
            "As eval/aqua_dev_acc; no (family, numbers) of these problems is trained on.",
            "Greedy accuracy on held-out synthetic problems; compare with the set's majority letter.",
            "It falls while rl/acc on another set rises: what SFT taught is forgotten."),
        "eval/*_low": Metric(
            "Lower end of the 95 % interval of the curve before _low.",
            "Wilson's score interval of the share, n questions; k samples of one question count as one question.",
            "Lower end of the 95 % interval; beat the majority letter with this, not with the mean.",
            "Below eval/majority: no evidence of skill yet."),
        "eval/*_high": Metric(
            "Upper end of the 95 % interval of the curve before _high.",
            "As _low.",
            "Upper end of the 95 % interval; 5 points above the mean with 254 questions.",
            "Below eval/majority: worse than saying one letter, so the answers cannot be read or are biased."),
        "eval/majority": Metric(
            "What always saying the commonest letter scores on these questions.",
            "Highest count of a right letter / questions.",
            "What always saying the commonest letter scores on these questions; a constant line.",
            "An accuracy that rests on this line: look at the histogram of predicted letters."),
        "eval/letter_acc": Metric(
            "Accuracy when only the letters' logits are compared.",
            "Questions whose highest letter logit after the prompt and `Answer:` is the right one / questions.",
            "Accuracy when only the letters' logits are compared, without reasoning.",
            "As high as the greedy accuracy: the rationale adds nothing."),
        "eval/mean_at_k": Metric(
            "Mean accuracy of k samples at temperature 1.",
            "Right samples / samples, over all questions.",
            "Mean accuracy of k samples; a little below the greedy accuracy.",
            "Far below the greedy accuracy: sampling breaks the reasoning, so RL sees mostly noise."),
        "eval/pass_at_*": Metric(
            "A right answer among k samples.",
            "Mean over questions of 1 - C(n - c, k) / C(n, k), n samples of which c are right.",
            "A right answer among k samples; guessing alone reaches 83 % at k = 8 with five options.",
            "It falls while mean_at_k rises: answers become alike, and nothing new is learnt."),
        "eval/guess_at_*": Metric(
            "What guessing reaches with k tries.",
            "1 - (1 - 1/options)^k.",
            "What guessing reaches with k tries; a constant line under eval/pass_at_*.",
            "pass_at_k below it: the samples are alike and wrong."),
        "eval/maj_at_k": Metric(
            "Accuracy of the majority vote over k samples.",
            "Share of questions whose commonest letter is right; a tie counts its share; unreadable samples do not vote.",
            "Accuracy of the majority vote over k samples; above eval/mean_at_k.",
            "Not above mean_at_k: the errors are systematic, so more samples do not help."),
        "eval/rotation_consistency": Metric(
            "Whether the order of the options matters.",
            "Questions with the same option chosen in all five cyclic orders / questions; an unreadable answer breaks it.",
            "Same option chosen in all five orders of the options; 1 when position plays no part.",
            "Near 0 at some accuracy: the letter is chosen, not the option."),
        "eval/rotation_acc": Metric(
            "Accuracy over all orders of the options.",
            "Mean of the greedy accuracies of the five cyclic orders; one letter for all scores 20 %.",
            "Accuracy over all orders of the options; near the greedy accuracy of the given order.",
            "Well below the greedy accuracy: that one owes something to the letter prior."),
        "eval/rotation_all_right": Metric(
            "Questions that are really solved.",
            "Questions right in all five cyclic orders / questions; guessing reaches 0.03 %.",
            "Questions answered rightly in every order; the strictest of the accuracies, and below all others.",
            "Near 0: right answers are mostly luck."),
        "eval/*_dev_acc": Metric(
            "Greedy accuracy on the validation split of any other task.",
            "As eval/aqua_dev_acc.",
            "Greedy accuracy on validation; compare with its interval and with guessing.",
            "As eval/aqua_dev_acc."),
    },
    "Cost": {
        "time/rollout_seconds": Metric(
            "Generation.", "Wall time of sampling the step's completions, on the main rank.",
            "Generation; most of an RL step.",
            "It grows with rl/truncated_rate: every row runs to the limit."),
        "time/reward_seconds": Metric(
            "Marking.", "Wall time of advantages and step metrics; the ranks wait for each other here.",
            "Marking; next to nothing.",
            "Seconds: another rank is still sampling."),
        "time/train_seconds": Metric(
            "Forward, backward and update.", "Wall time of update_policy.",
            "Forward, backward and update; about as long as the rollout on a CPU, shorter on a GPU.",
            "Many times the rollout: raise --device_batch_size."),
        "time/telemetry_seconds": Metric(
            "Looking at KL, letters and attention.", "Wall time of Telemetry.look; other steps than those of --kl_every and --attn_every cost nothing.",
            "KL, margins and attention; under 5 % of the total.",
            "More: raise --kl_every and --attn_every."),
        "time/eval_seconds": Metric(
            "Validation.", "Wall time of validate in steps of --eval_every.",
            "Validation; nothing in most steps, a few rollouts' worth in steps of --eval_every.",
            "More than training: lower --eval_examples or --eval_samples."),
        "time/step_seconds": Metric(
            "A whole step.", "Wall time from the wait for data to the end of the update, validation included in RL.",
            "A whole step; steady after the first ones.",
            "Steps that grow longer: completions do, or another process has come."),
        "time/data_seconds": Metric(
            "Waiting for data.", "Wall time in which training waited for its microbatches.",
            "Waiting for data; next to nothing.",
            "A visible share of time/step_seconds: the disk or the tokenizer is too slow."),
        "time/save_seconds": Metric(
            "Saving a checkpoint, as training feels it.", "Wall time of the call that saves.",
            "How long saving a checkpoint held training up; on a GPU only the copying.",
            "Many seconds: a slow disk; raise --save_every."),
        "time/save_write_seconds": Metric(
            "Writing a checkpoint onto the disk.", "Wall time of the writer that runs beside training.",
            "Writing a checkpoint onto the disk, on a GPU beside training.",
            "Longer than the steps between two checkpoints: the next save waits for it."),
        "perf/rollout_tokens_per_second": Metric(
            "Speed of sampling.", "Sampled tokens of all ranks / time/rollout_seconds.",
            "Sampled tokens a second; falls as completions grow longer.",
            "It falls at equal length: fewer rows are decoded together."),
        "perf/train_tokens_per_second": Metric(
            "Speed of the RL update.", "Sampled tokens of all ranks / time/train_seconds.",
            "Sampled tokens a second of update; constant after the first steps, higher where few groups are live.",
            "A fall at equal rl/live_groups: the machine is shared."),
        "perf/tokens_per_second": Metric(
            "Speed of supervised training.", "Positions of all ranks, padding included / time/step_seconds.",
            "Trained tokens a second; constant after the first steps.",
            "A fall: waiting for data, a warm GPU, or another process."),
        "perf/mfu": Metric(
            "Share of the device's peak arithmetic that is used.", "FLOPs of a token * perf/tokens_per_second / (peak bf16 FLOPs of the GPU * ranks).",
            "Share of the device's peak arithmetic that is used; constant after the first steps.",
            "Under a tenth on a data-centre GPU: microbatches are too small."),
    },
}
# fmt: on

METRICS: dict[str, Metric] = {
    name: metric for section in SECTIONS.values() for name, metric in section.items()
}


def find(name: str) -> Metric | None:
    """The row of the table for the curve `name`; None for one that the table does not know."""
    if name in METRICS:
        return METRICS[name]
    return next(
        (row for pattern, row in METRICS.items() if "*" in pattern and fnmatchcase(name, pattern)), None
    )


def describe(name: str) -> str:
    """What a healthy curve of `name` looks like, in a sentence; '' for one that the table does not know."""
    row = find(name)
    return row.healthy if row else ""
