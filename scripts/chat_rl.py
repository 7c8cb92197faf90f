"""
Reinforcement learning on questions whose answers can be checked.

    python -m scripts.chat_rl --dataset=SYNTHETIC
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --run=aquarat

It is called GRPO and is, with everything taken out that does nothing here, REINFORCE with a group baseline. A step draws
questions, samples a group of completions for each, pays 1 for the right letter and 0.1 for a well-formed answer line, and
pushes up what was paid above its group's mean. No value network; no reference model in the loss; no clipping, because
each rollout is used once and the policy that is trained is the one that sampled, temperature and stop token included.

What to look at: rl/acc and eval/*_dev_acc should rise, rl/letter_pred_entropy should not collapse, rl/kl_* grow slowly, and
rl/sampler_trainer_logp_diff_max stay near zero. The loss itself means nothing. DeepSeekMath (arXiv 2402.03300) has the
group baseline, DAPO (arXiv 2503.14476) the mean over tokens and the skipping of groups that are all right or all wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nanochat.common import UserError
from nanochat.config import StageConfig, cli, flag

if TYPE_CHECKING:
    from nanochat.common import World
    from nanochat.engine import Engine
    from nanochat.gpt import GPT
    from nanochat.optim import MuonAdamW
    from nanochat.policy_gradient import Objective
    from nanochat.rl import Group


@dataclass(frozen=True)
class Config(StageConfig):
    """Reinforcement learning on AQuA, GSM8K or the built-in problems."""

    source: Literal["sft", "mid", "rl"] = "sft"
    """stage of the checkpoint to start from"""
    source_step: int | None = flag(None, "--step", help="step of that checkpoint; by default the newest")
    dataset: Literal["AQUA", "GSM8K", "SYNTHETIC"] = "AQUA"
    """what to ask"""
    aqua_path: str | None = None
    """file or folder of AQuA"""
    difficulty: str = ""
    """levels of the built-in problems, such as 2 or 1-2; by default all"""
    # rollouts
    examples_per_step: int = 16
    """questions of a step, over all ranks"""
    num_samples: int = flag(16, "--group_size", help="completions of each question")
    max_new_tokens: int = 256
    """longest completion; one that is cut earns nothing"""
    temperature: float = 1.0
    """of the sampling, and inside the loss"""
    top_k: int = 0
    """sample among the k likeliest tokens; 0 keeps sampler and trainer the same policy"""
    permute_options: bool = True
    """shuffle each question's options, so that no letter is worth more than another"""
    dynamic_sampling: bool = False
    """draw further questions in place of groups that are all right or all wrong; each rank for its own share"""
    # reward and objective
    format_reward: float = 0.1
    """for exactly one well-formed answer line"""
    wrong_reward: float = 0.0
    """for an answer that is wrong; at -0.25 a guess among five is worth no more than silence, below that it costs"""
    reward_control: Literal["none", "random"] = "none"
    """random: the control in which rewards are drawn by lot; nothing should be learnt"""
    save_tag: str = ""
    """folder of the checkpoints that are written; by default that of the start, or with -random for the control"""
    label: str = ""
    """name of this stage in the run directory; by default rl, or rl_random for the control"""
    advantage: Literal["center", "zscore", "rloo"] = "center"
    """a reward against its group's mean; over its standard deviation; against the mean of the others"""
    loss: Literal["dapo", "dr_grpo", "grpo"] = "dapo"
    """mean over the tokens of the step; over its completions at full length; over completions' own means"""
    updates_per_rollout: int = 1
    """above 1 the ratio to the sampling policy is clipped"""
    clip_low: float = 0.2
    """how far the ratio may fall below 1"""
    clip_high: float = 0.28
    """how far it may rise above 1"""
    kl_coef: float = 0.0
    """weight of the KL to the starting policy"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    mask_truncated: bool = False
    """leave cut completions out of the loss, instead of training them as wrong"""
    # optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon's update is as long for a weak signal as for a strong one"""
    learning_rate: float = 3e-5
    """of adamw, for all weights"""
    matrix_lr: float = 0.02
    """of muon, for the matrices of the blocks"""
    embedding_lr: float = 0.2
    """beside muon, for the token embedding"""
    unembedding_lr: float = 0.004
    """beside muon, for the head"""
    scalar_lr: float = 0.003
    """beside muon, for the mixing of preceding tokens"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    init_lr_frac: float = 0.05
    """first learning rate of muon as a fraction of the rates above"""
    max_grad_norm: float = 1.0
    """gradients longer than this are shortened to it; 0: none are"""
    num_epochs: int = 1
    """passes over the questions"""
    max_steps: int = -1
    """steps, where not a whole number of passes"""
    device_batch_size: int = 8
    """a microbatch takes as many tokens as so many of the step's longest rows; lower it when memory runs out"""
    # watching
    eval_every: int = 60
    """steps between validations; -1: never"""
    eval_examples: int = 400
    """questions of a validation"""
    eval_samples: int = 4
    """sampled answers to each question of a validation, for pass@k and maj@k; 0: greedy only"""
    kl_every: int = 200
    """steps between looks at letters and KL; -1: never"""
    kl_batch: int = 8
    """fixed questions that are looked at, beside as many of the step's own"""
    kl_mode: Literal["letter", "sequence", "both"] = "both"
    """KL over the letters at the answer, over whole completions, or both"""
    attn_every: int = 200
    """steps between looks at attention; -1: never"""
    attn_html: bool = False
    """also write attention maps as a page (extra interp)"""
    save_every: int = 60
    """steps between checkpoints, besides each that validates best so far; -1: only the last"""
    keep_last: int = 2
    """checkpoints that stay on disk besides the best"""
    log_every: int = 1
    """steps between progress lines; metrics.jsonl has every step"""
    resume: bool = True
    """go on from the newest complete checkpoint of the same run"""

    def __post_init__(self) -> None:
        for name in ("examples_per_step", "max_new_tokens", "device_batch_size", "num_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.num_samples < 2:
            raise UserError(
                f"--num_samples={self.num_samples}: a group needs at least 2 completions to compare"
            )
        if self.wrong_reward > 0:
            raise UserError(f"--wrong_reward={self.wrong_reward} would pay for wrong answers; use 0 or less")
        if self.top_k < 0:
            raise UserError(f"--top_k={self.top_k} is below 0; use 0 for all tokens")

    @property
    def objective(self) -> Objective:
        """What the gradient is of; refuses numbers that make no sense."""
        from nanochat.policy_gradient import Objective

        return Objective(
            loss=self.loss,
            temperature=self.temperature,
            updates_per_rollout=self.updates_per_rollout,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            mask_truncated=self.mask_truncated,
            max_completion_tokens=self.max_new_tokens,
        )


def main(config: Config) -> None:
    """Sample, mark, compare, push; watch what it does."""
    from nanochat.checkpoint_manager import load_model
    from nanochat.checkpoints import best_step
    from nanochat.common import compute_cleanup, compute_init, print0
    from nanochat.engine import Engine
    from nanochat.policy_gradient import update_policy
    from nanochat.rl import randomize_rewards, step_metrics, with_advantages
    from nanochat.schedule import linear_to_zero
    from nanochat.shared_prefix import tokens_of_rows
    from nanochat.stage import open_stage, tell
    from nanochat.telemetry import Clock, Telemetry, due, frozen_copy, step_line
    from nanochat.train import compiles

    world = compute_init(config.device_type, config.dtype, config.seed)
    objective = config.objective
    tag, record = names(config)
    policy, tokenizer, parent = load_model(
        config.source, phase="train", world=world, model_tag=config.model_tag, step=config.source_step
    )
    reference = frozen_copy(policy) if config.kl_every > 0 or config.kl_coef else None
    questions, held_out, notes = open_tasks(config)
    num_steps = count_steps(config, len(questions))
    engine = Engine(policy, tokenizer, compiled=compiles(config.compile, world))
    optimizer = make_rl_optimizer(policy, config, world)
    with open_stage(
        "rl", config, world, tag=tag, parent=parent, tokenizer=tokenizer.fingerprint, record=record
    ) as stage:
        tell(stage.tracker, notes)
        stage.restore(policy, optimizer)
        telemetry = Telemetry.of(
            config, engine=engine, reference=reference, task=held_out, tracker=stage.tracker
        )
        if stage.start == 0 and config.eval_every > 0:
            found = validate(engine, held_out, config, world)
            stage.tracker.log(0, found)
            print0(step_line(0, num_steps, found))
        for step in range(stage.start + 1, num_steps + 1):
            clock = Clock()
            groups = sample(engine, questions, config, world, step)
            clock.lap("rollout")
            if config.reward_control == "random":
                groups = randomize_rewards(groups, seed=config.seed, step=step, world=world)
            groups = with_advantages(groups, config.advantage)
            metrics: dict[str, Any] = step_metrics(groups, temperature=config.temperature, world=world)
            clock.lap("reward")
            if world.main:  # before the update: the completions are samples of the policy that is looked at
                metrics |= telemetry.look(step, groups, num_steps)
            clock.lap("telemetry")
            engine.release()
            lr_scale = linear_to_zero(step - 1, num_steps=num_steps)
            metrics |= update_policy(
                policy,
                optimizer,
                groups,
                objective=objective,
                reference=reference,
                world=world,
                lr_scale=lr_scale,
                token_budget=tokens_of_rows(groups, config.device_batch_size),
                max_grad_norm=config.max_grad_norm,
                want_update_norm=True,
                guard=stage.guard,
                step=step,
            )
            metrics["train/lr"] = lr_scale
            clock.lap("train")
            accuracy = None
            if due(step, config.eval_every, num_steps):
                found = validate(engine, held_out, config, world)
                accuracy = found[f"eval/{held_out.name.lower()}_dev_acc"]
                metrics |= found
            clock.lap("eval")
            metrics |= clock.metrics(groups, world)
            stage.tracker.log(step, metrics)
            if due(step, config.log_every, num_steps):
                print0(step_line(step, num_steps, metrics))
            if stage.saves_at(step, last=step == num_steps, best_value=accuracy):
                stage.save(step, policy, optimizer, best_value=accuracy)
        best = {"best_dev_acc": stage.best, "best_step": best_step("rl", tag)}
        stage.tracker.finish({"steps": num_steps, **best})
    compute_cleanup(world)


def names(config: Config) -> tuple[str, str]:
    """The folder of the checkpoints that are written, and that of the run directory."""
    from nanochat.checkpoints import find_tag

    control = "random" if config.reward_control == "random" else ""
    start = config.model_tag or find_tag(config.source)
    tag = config.save_tag or "-".join(filter(None, [start, control]))
    if config.source == "rl" and tag == start:
        raise UserError(
            f"--source=rl starts from the folder {start} that it would write to; name another with --save_tag"
        )
    return tag, config.label or "_".join(filter(None, ["rl", control]))


def count_steps(config: Config, num_questions: int) -> int:
    """Steps that were asked for, or as many as --num_epochs passes over the questions take."""
    if config.max_steps >= 0:
        return config.max_steps
    return max(1, config.num_epochs * num_questions // config.examples_per_step)


def open_tasks(config: Config) -> tuple[Any, Any, list[tuple[str, str]]]:
    """The questions to train on, the held-out ones, and what they are."""
    from tasks.catalog import open_rl_tasks

    train, held_out = open_rl_tasks(
        config.dataset, aqua_path=config.aqua_path, difficulty=config.difficulty, seed=config.seed
    )
    notes = [("data", f"rl: {len(train):,} questions from {train.source}")]
    notes += [("data", f"rl validation: {len(held_out):,} questions from {held_out.source}")]
    return train, held_out, notes


def sample(engine: Engine, questions: Any, config: Config, world: World, step: int) -> list[Group]:
    """This rank's groups of the step: questions drawn by seed, options shuffled by seed, completions sampled by seed."""
    from nanochat.rl import questions_for_step, refill, refill_questions, rollout, rollout_seeds

    def draw(attempt: int) -> list[Group]:
        if attempt == 0:
            numbers = questions_for_step(config.seed, step - 1, len(questions), config.examples_per_step)
        else:
            numbers = refill_questions(config.seed, step, attempt, len(questions), config.examples_per_step)
        seeds = rollout_seeds(config.seed, step, numbers, attempt=attempt)
        asked = [
            (number, pose(questions, number, config, step)) for number in numbers[world.rank :: world.size]
        ]
        if not asked:
            return []
        return rollout(
            engine,
            engine.tokenizer,
            questions,
            asked,
            num_samples=config.num_samples,
            seeds=seeds[world.rank :: world.size],
            max_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            format_reward=config.format_reward,
            wrong_reward=config.wrong_reward,
            description=f"rollouts of step {step}",
        )

    if not config.dynamic_sampling:
        return draw(0)
    mine = len(range(world.rank, config.examples_per_step, world.size))
    return refill(draw, num_live=mine, max_attempts=4)[0]


def pose(questions: Any, number: int, config: Config, step: int) -> Any:
    """The question as it is asked in this step."""
    from nanochat.rl import option_order

    if not config.permute_options or not hasattr(questions, "problem"):
        return questions[number]
    problem = questions.problem(number)
    return problem.permuted(option_order(config.seed, step, number, len(problem.options))).conversation()


def validate(engine: Engine, task: Any, config: Config, world: World) -> dict[str, Any]:
    """Greedy and letter-logit accuracy, pass@k and maj@k, and consistency over the orders of the options."""
    from nanochat.telemetry import validation_metrics

    return validation_metrics(
        engine,
        task,
        world,
        limit=config.eval_examples,
        num_samples=config.eval_samples,
        max_tokens=config.max_new_tokens,
        seed=config.seed,
    )


def make_rl_optimizer(policy: GPT, config: Config, world: World) -> MuonAdamW:
    """AdamW on everything, or Muon as in the other stages."""
    from nanochat.optim import make_adamw
    from nanochat.supervised import optimizer_for

    if config.optimizer == "adamw":
        return make_adamw(policy, lr=config.learning_rate, world=world, weight_decay=config.weight_decay)
    return optimizer_for(policy, config, world)


if __name__ == "__main__":
    main(cli(Config))
