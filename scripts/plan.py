"""
What the main job will do on this machine, and what it will cost, before anything is installed.

    python3 -m scripts.plan            prints the plan
    python3 -m scripts.plan --shell    prints the settings for scripts/pipeline.sh, quoted for a shell
    python3 -m scripts.plan --env      prints the lines of .env.template for all knobs

Settings are the presets' numbers (scripts/presets.py), overridden by environment variables of the same names, fitted to
the GPUs there are. The formulas are the usual ones: 6 FLOPs for each token and each parameter that is not a look-up, plus
12 x layers x width x context for attention, so 1.85 billion tokens through the 92 M parameters of depth 8 are 8e17.
Memory is 16 bytes a parameter (weight, gradient, two moments) and 34 x layers x width bytes a token in bf16 (twice that
in fp32), which is what a block keeps for its backward pass. No torch here: the plan is for a laptop, too.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from nanochat.architecture import GPTConfig
from nanochat.common import UserError
from nanochat.dataset import reachable
from nanochat.run_files import check_run_name
from scripts import presets
from scripts.presets import CHOICES, GPUS, KNOBS, PRESETS, Gpu, Machine, Value, detect
from tasks.aqua import FILE_NAMES, aqua_folders
from tasks.rows import find_file

Settings = dict[str, Value]
AT_LEAST_ONE = (
    "NPROC",
    "DEPTH",
    "VOCAB_SIZE",
    "SEQUENCE_LEN",
    "DEVICE_BATCH_SIZE",
    "NUM_SAMPLES",
    "EXAMPLES_PER_STEP",
)
FOLDERS = ("NANOCHAT_BASE_DIR", "NANOCHAT_DATA_DIR", "AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR")
GIB = 2**30


def resolve(env: Mapping[str, str], machine: Machine) -> Settings:
    """Every knob's value: the preset's, or the environment's, fitted to `machine`. Raises UserError for a wrong one."""
    preset = env.get("PRESET") or ("gpu8" if len(machine.gpus) > 1 else "gpu1" if machine.gpus else "cpu")
    if preset not in PRESETS:
        raise UserError(f"PRESET={preset} is not known; use {', '.join(PRESETS)}")
    check_run_name(env.get("RUN") or "aquarat")
    settings: Settings = {"PRESET": preset}
    for knob in KNOBS:
        text = env.get(knob.name, "")
        settings[knob.name] = _read(knob, text) if text else knob.value(preset)
    if env.get("DEPTH") and settings["DEPTH"] != KNOB["DEPTH"].value(preset):
        for name in ("N_EMBD", "N_HEAD"):  # another depth means depth's own width, as in nanochat
            settings[name] = _read(KNOB[name], env[name]) if env.get(name) else ""
    for name in AT_LEAST_ONE:
        if int(settings[name]) < 1:
            raise UserError(f"{name}={settings[name]}: must be at least 1")
    _fit(settings, env, machine)
    settings["MODEL_TAG"] = settings["MODEL_TAG"] or f"d{settings['DEPTH']}"
    settings["BASE_STEPS"] = base_steps(settings)
    if settings["NUM_SHARDS"] == -1:
        chars = base_tokens(settings) * presets.CHARS_PER_TOKEN
        chars = max(chars, float(settings["TOK_MAX_CHARS"]))
        settings["NUM_SHARDS"] = math.ceil(chars / presets.CHARS_PER_SHARD)
    return settings


KNOB = {knob.name: knob for knob in KNOBS}


def _read(knob: presets.Knob, text: str) -> Value:
    """The value that the environment gives a knob."""
    if knob.name in CHOICES:
        found = [choice for choice in CHOICES[knob.name] if choice.lower() == text.lower()]
        if not found:
            raise UserError(f"{knob.name}={text} is not a choice; use {' or '.join(CHOICES[knob.name])}")
        return found[0]
    if knob.kind is str:
        return text
    try:
        value = knob.kind(text)
    except ValueError:
        kind = "a whole number" if knob.kind is int else "a number"
        example = next(value for value in (*knob.values, 1) if value not in ("", -1))
        raise UserError(
            f"{knob.name}={text} is not {kind} ({knob.help}); write for example {knob.name}={example}"
        ) from None
    if value < 0 and value != -1:
        raise UserError(f"{knob.name}={text}: must not be negative ({knob.help})")
    return value


def _fit(settings: Settings, env: Mapping[str, str], machine: Machine) -> None:
    """Choose the number of processes, and the microbatches so that they divide the step and fit into memory."""
    rows = {
        s: int(settings[f"{s}_BATCH_TOKENS"]) // int(settings["SEQUENCE_LEN"]) for s in ("BASE", "MID", "SFT")
    }
    for stage, count in rows.items():
        tokens, length = settings[f"{stage}_BATCH_TOKENS"], settings["SEQUENCE_LEN"]
        if count < 1 or int(tokens) % int(length):
            raise UserError(
                f"{stage}_BATCH_TOKENS={tokens} is no multiple of SEQUENCE_LEN={length}; make it one"
            )
    nodes = _num_nodes(env)
    if math.gcd(*rows.values()) % nodes:
        raise UserError(
            f"NNODES={nodes} does not divide the {math.gcd(*rows.values())} rows of a step; use a divisor"
        )
    shared = math.gcd(*rows.values()) // nodes  # rows of one node
    wanted = int(settings["NPROC"])
    if env.get("NPROC"):
        if shared % wanted:
            raise UserError(
                f"NPROC={wanted} does not divide the {shared} rows of a step; use a divisor, or change *_BATCH_TOKENS"
            )
        if settings["DEVICE_TYPE"] == "cuda" and wanted > len(machine.gpus):
            raise UserError(
                f"NPROC={wanted}: this machine has {len(machine.gpus)} GPUs; use at most that many"
            )
    else:
        there = len(machine.gpus) if uses_gpus(settings, machine) else machine.num_cores
        settings["NPROC"] = max(n for n in range(1, max(1, min(wanted, there)) + 1) if shared % n == 0)
    for stage, count in rows.items():
        share = count // nodes // int(settings["NPROC"])
        limit = min(share, int(settings["DEVICE_BATCH_SIZE"]))
        fitting = [n for n in range(1, limit + 1) if share % n == 0 and _fits(settings, n, machine)]
        settings[f"{stage}_DEVICE_BATCH_SIZE"] = max(fitting, default=1)


def _num_nodes(env: Mapping[str, str]) -> int:
    text = env.get("NNODES") or "1"
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"NNODES={text} is not a number of machines; write for example NNODES=2")
    return int(text)


def uses_gpus(settings: Settings, machine: Machine) -> bool:
    """True when the stages will run on the machine's GPUs."""
    return bool(machine.gpus) and settings["DEVICE_TYPE"] != "cpu"


def _fits(settings: Settings, rows: int, machine: Machine) -> bool:
    return not uses_gpus(settings, machine) or memory_gib(settings, rows) < 0.85 * machine.gpu_memory_gib


def model(settings: Settings) -> GPTConfig:
    """The model that the settings describe."""
    width, heads = (int(settings[name]) if settings[name] != "" else None for name in ("N_EMBD", "N_HEAD"))
    return GPTConfig.for_depth(
        int(settings["DEPTH"]),
        vocab_size=int(settings["VOCAB_SIZE"]),
        sequence_len=int(settings["SEQUENCE_LEN"]),
        n_embd=width,
        n_head=heads,
        smear=int(settings["SMEAR"]),
    )


def num_params(config: GPTConfig) -> int:
    """Embedding and head, attention and MLP of each layer, and the mixing of preceding tokens."""
    width, kv_width = config.n_embd, config.n_kv_head * config.head_dim
    layer = 2 * width * width + 2 * width * kv_width + 8 * width * width
    return 2 * config.vocab_size * width + config.n_layer * layer + config.smear * width


def flops_per_token(config: GPTConfig, context: int) -> float:
    """Forward and backward; the embedding is a look-up and costs nothing."""
    computed = num_params(config) - config.vocab_size * config.n_embd
    return 6.0 * computed + 12.0 * config.n_layer * config.n_embd * context


def memory_gib(settings: Settings, rows: int) -> float:
    """Peak memory of one device in base training with `rows` in a microbatch."""
    config = model(settings)
    bytes_per_value = 68 if settings["DEVICE_TYPE"] == "cpu" or settings["DTYPE"] == "float32" else 34
    activations = rows * config.sequence_len * config.n_layer * config.n_embd * bytes_per_value
    return (
        16.0 * num_params(config) + activations
    ) / GIB + 1.0  # and a gibibyte of kernels and chunked logits


def base_steps(settings: Settings) -> int:
    """Optimizer steps of base training."""
    if int(settings["BASE_ITERATIONS"]) != -1:
        return int(settings["BASE_ITERATIONS"])
    tokens = float(settings["PARAM_DATA_RATIO"]) * num_params(model(settings))
    return max(1, int(tokens) // int(settings["BASE_BATCH_TOKENS"]))


def base_tokens(settings: Settings) -> int:
    """Tokens of base training."""
    return base_steps(settings) * int(settings["BASE_BATCH_TOKENS"])


@dataclass(frozen=True, slots=True)
class Work:
    """What one stage asks of the machine."""

    stage: str
    num_steps: int
    num_tokens: int
    flops: float
    num_decoded: int = 0
    """Positions that are decoded one after the other: generation waits for memory, not for arithmetic."""


def work(settings: Settings) -> list[Work]:
    """The work of the four training stages; evaluation and downloads come on top."""
    config = model(settings)
    per_token = flops_per_token(config, config.sequence_len)
    stages = [Work("base", base_steps(settings), base_tokens(settings), per_token * base_tokens(settings))]
    for stage, whole in (("MID", presets.MID_TOKENS), ("SFT", presets.SFT_TOKENS)):
        batch, steps = int(settings[f"{stage}_BATCH_TOKENS"]), int(settings[f"{stage}_ITERATIONS"])
        steps = steps if steps != -1 else max(1, whole // batch)
        stages.append(Work(stage.lower(), steps, steps * batch, per_token * steps * batch))
    steps = int(settings["RL_STEPS"])
    if steps == -1:
        questions = presets.RL_QUESTIONS[str(settings["RL_DATASET"] or "AQUA")]
        steps = max(1, questions // int(settings["EXAMPLES_PER_STEP"]))
    length = presets.PROMPT_TOKENS + int(settings["MAX_NEW_TOKENS"])
    tokens = steps * int(settings["EXAMPLES_PER_STEP"]) * int(settings["NUM_SAMPLES"]) * length
    flops = tokens * flops_per_token(config, length) * 4 / 3  # sampled with a forward pass, then trained
    return [*stages, Work("rl", steps, tokens, flops, steps * int(settings["MAX_NEW_TOKENS"]))]


def seconds(settings: Settings, stages: list[Work], gpu: Gpu | None, count: int) -> float:
    """Time on `count` GPUs, or on `count` CPU cores."""
    if gpu is None:
        return sum(w.flops for w in stages) / (
            count * presets.CPU_GFLOPS_PER_CORE * 1e9 * presets.CPU_EFFICIENCY
        )
    arithmetic = sum(w.flops for w in stages) / (count * gpu.peak_tflops * 1e12 * presets.TRAIN_EFFICIENCY)
    weights = (
        2.0 * num_params(model(settings)) / (gpu.bandwidth_gb_per_second * 1e9 * presets.DECODE_EFFICIENCY)
    )
    return arithmetic + sum(w.num_decoded for w in stages) * max(weights, presets.DECODE_OVERHEAD_SECONDS)


def describe(settings: Settings, machine: Machine) -> str:
    """The plan as a page of text."""
    config, stages = model(settings), work(settings)
    rows, nproc = int(settings["BASE_DEVICE_BATCH_SIZE"]), int(settings["NPROC"])
    accumulated = int(settings["BASE_BATCH_TOKENS"]) // (rows * nproc * config.sequence_len)
    lines = [
        f"preset    {settings['PRESET']} on {machine}, {nproc} process{'es' * (nproc > 1)}",
        f"model     {config.n_layer} layers, {config.n_embd} wide, {config.n_head} heads, vocabulary "
        f"{config.vocab_size:,}: {num_params(config):,} parameters",
        f"memory    about {memory_gib(settings, rows):.1f} GiB a process in base training: {rows} rows of "
        f"{config.sequence_len:,} tokens, {accumulated} microbatch{'es' * (accumulated > 1)} a step",
        "",
        f"{'stage':10}{'steps':>8}{'tokens':>18}{'FLOPs':>10}",
        *(f"{w.stage:10}{w.num_steps:>8,}{w.num_tokens:>18,}{w.flops:>10.1e}" for w in stages),
        f"{'total':10}{'':8}{sum(w.num_tokens for w in stages):>18,}{sum(w.flops for w in stages):>10.1e}",
        "",
        f"{'on':14}{'one: time':>12}{'dollars':>9}{'eight: time':>14}{'dollars':>9}",
        *(_price(settings, stages, gpu) for gpu in GPUS if memory_gib(settings, 1) < 0.85 * gpu.memory_gib),
    ]
    on_gpus = uses_gpus(settings, machine)
    gpu = machine.gpu if on_gpus else None
    if gpu or not (on_gpus or settings["DEVICE_TYPE"] == "cuda"):
        # on a CPU the processes share all cores out (THREADS)
        time = seconds(settings, stages, gpu, nproc if gpu else machine.num_cores)
        price = f", {time / 3600 * nproc * gpu.dollars_per_hour:.2f} dollars" if gpu else ""
        lines.append(f"this machine: about {_time(time)}{price}")
    share = presets.TRAIN_EFFICIENCY if gpu else presets.CPU_EFFICIENCY
    lines.append(
        f"Training only, at {share:.0%} of peak arithmetic here; evaluation and downloads come on top. "
        "What is assumed, prices included, stands in scripts/presets.py."
    )
    return "\n".join(lines)


def _price(settings: Settings, stages: list[Work], gpu: Gpu) -> str:
    cells = [f"{gpu.name:14}"]
    for count, width in ((1, 12), (8, 14)):
        time = seconds(settings, stages, gpu, count)
        cells.append(f"{_time(time):>{width}}{time / 3600 * count * gpu.dollars_per_hour:>9.2f}")
    return "".join(cells)


def _time(duration: float) -> str:
    if duration < 90:
        return f"{duration:.0f} s"
    return f"{duration / 60:.0f} min" if duration < 5400 else f"{duration / 3600:.1f} h"


def find_aqua() -> str:
    """The file that AQuA's train split will be read from, '' where this machine has none."""
    files = (find_file(folder, FILE_NAMES["train"]) for folder in aqua_folders())
    return str(next((file for file in files if file), ""))


def has_network(env: Mapping[str, str]) -> bool:
    """True when the data sets' host answers within seconds."""
    if env.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    return reachable(env.get("HF_ENDPOINT") or "https://huggingface.co")


def shell(settings: Settings, env: Mapping[str, str], machine: Machine) -> str:
    """Assignments for scripts/pipeline.sh."""
    overrides = {n: env[n] for n in ("PRESET", "RUN", *KNOB, *FOLDERS) if env.get(n)}
    values = {
        **settings,
        "AQUA_ROWS": find_aqua(),
        "NETWORK": int(has_network(env)),
        "THREADS": max(1, machine.num_cores // int(settings["NPROC"])),
        "OVERRIDES": shlex.join(f"{n}={v}" for n, v in overrides.items()),
    }
    return "\n".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items())


def env_lines() -> str:
    """What each knob is, as comments of .env.template."""
    return "\n".join(f"# {knob.help}\n# {knob.name}=" for knob in KNOBS)


def main(argv: list[str]) -> int:
    """Print the plan, the settings or the knobs; one line and exit code 2 for a wrong value."""
    if "--env" in argv or {"-h", "--help"} & set(argv):
        print(env_lines() if "--env" in argv else (__doc__ or "").strip())
        return 0
    try:
        machine = detect(os.environ)
        settings = resolve(os.environ, machine)
        print(shell(settings, os.environ, machine) if "--shell" in argv else describe(settings, machine))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
