"""
The numbers of the main job, as data: one row for each knob, one column for each kind of machine.

A knob is also an environment variable: `DEPTH=20 bash run_aquarat_small.sh`. `scripts/plan.py` reads this table, fits it to
the machine and prints the plan; `scripts/pipeline.sh` turns it into the flags of the stages. An empty text leaves a flag out,
so that the stage's own default holds; -1 lets the stage work the number out.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

PRESETS = ("gpu8", "gpu1", "cpu", "lite")  # gpu8 serves any number of GPUs above one

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Knob:
    """One number of the pipeline and its value in each preset."""

    name: str
    help: str
    values: tuple[Value, Value, Value, Value]  # in the order of PRESETS

    def value(self, preset: str) -> Value:
        """The value in `preset`."""
        return self.values[PRESETS.index(preset)]

    @property
    def kind(self) -> type:
        """int, float or str: what an override must be."""
        kinds = {type(value) for value in self.values if value != ""}
        return float if kinds == {int, float} else kinds.pop() if len(kinds) == 1 else str


def same(value: Value) -> tuple[Value, Value, Value, Value]:
    """One value for all presets."""
    return (value, value, value, value)


# fmt: off
KNOBS: tuple[Knob, ...] = (
    #    name                    what it is                                                    gpu8       gpu1      cpu      lite
    Knob("NPROC",                "processes: GPUs, or gloo ranks on a CPU; fewer where there are fewer", (8, 1, 2, 1)),
    Knob("DEVICE_TYPE",          "cuda, mps or cpu; empty: the best there is",                ("cuda", "cuda", "cpu", "")),
    Knob("DTYPE",                "float32 or bfloat16; empty: what the device has",            same("")),
    Knob("SEED",                 "everything random follows from it",                          same(42)),
    Knob("MODEL_TAG",            "checkpoint folder; empty: d and the depth",                  same("")),
    # model and tokenizer
    Knob("DEPTH",                "layers; also sets the width to 64 times this",              (8, 8, 3, 2)),
    Knob("N_EMBD",               "width, where it is not 64 times the depth",                 ("", "", 96, 64)),
    Knob("N_HEAD",               "heads, where they are not of size 128",                     ("", "", 3, 2)),
    Knob("SMEAR",                "preceding tokens mixed into each position",                 (0, 0, 5, 5)),
    Knob("VOCAB_SIZE",           "tokens of the vocabulary",                                  (65_536, 65_536, 512, 512)),
    Knob("SEQUENCE_LEN",         "tokens of a row in training",                               (2048, 2048, 512, 256)),
    Knob("TOK_MAX_CHARS",        "characters that the tokenizer is trained on",     (2_000_000_000, 2_000_000_000, 20_000_000, 1_000_000)),
    Knob("DEVICE_BATCH_SIZE",    "most rows of a microbatch on one device",                   (32, 32, 32, 8)),
    Knob("EVAL_EVERY",           "steps between validations in base, mid and sft; -1: never",  (250, 250, 250, 4)),
    Knob("SAVE_EVERY",           "steps between checkpoints in base, mid and sft; -1: only the last", (250, 250, 100, 4)),
    Knob("EVAL_TOKENS",          "tokens of a validation in base and mid",                    (10_485_760, 10_485_760, 32_768, 2_048)),
    Knob("MATRIX_LR",            "of muon, in base, mid and sft",                             same(0.02)),
    Knob("EMBEDDING_LR",         "of adamw, for the embedding; small batches want less",      (0.2, 0.2, 0.02, 0.02)),
    Knob("SCALAR_LR",            "of adamw, for the mixing of preceding tokens",              (0.003, 0.003, 0.02, 0.02)),
    Knob("UNEMBEDDING_LR",       "of adamw, for the head",                                    same(0.004)),
    # base
    Knob("BASE_BATCH_TOKENS",    "tokens of an optimizer step",                               (524_288, 524_288, 4_096, 2_048)),
    Knob("BASE_ITERATIONS",      "steps; -1: from the ratio",                                 (-1, -1, 1_000, 8)),
    Knob("PARAM_DATA_RATIO",     "tokens for each parameter, where steps are -1",             same(20.0)),
    Knob("NUM_SHARDS",           "pretraining shards to download; -1: as many as the tokens need", (-1, -1, 1, 0)),
    Knob("SYNTHETIC_SHARE",      "share of the text that is of our own writing",              (0.0, 0.0, 0.6, 0.5)),
    Knob("ISOLATE",              "1: documents that share a row do not see each other",       (0, 0, 1, 1)),
    Knob("DRILL_ITERATIONS",     "first steps, which train on the look-up drill",             (0, 0, 200, 2)),
    Knob("CORE_EXAMPLES",        "CORE questions of each task; -1: all",                      (500, 500, 20, 4)),
    # mid and sft
    Knob("MID_BATCH_TOKENS",     "tokens of an optimizer step",                               (524_288, 524_288, 8_192, 2_048)),
    Knob("MID_ITERATIONS",       "steps; -1: one pass over the mixture",                      (-1, -1, 250, 6)),
    Knob("SFT_BATCH_TOKENS",     "tokens of an optimizer step",                               (65_536, 65_536, 8_192, 2_048)),
    Knob("SFT_ITERATIONS",       "steps; -1: one pass over the mixture",                      (-1, -1, 650, 6)),
    Knob("AQUA_TRAIN_EXAMPLES",  "AQuA rows in sft",                                          (20_000, 20_000, 20_000, 64)),
    Knob("AQUA_VAL_EXAMPLES",    "AQuA rows that sft is validated on; -1: all",               (254, 254, 254, 16)),
    Knob("SYNTHETIC_EXAMPLES",   "built-in word problems in mid and sft; -1: only where AQuA cannot be had", (-1, -1, 20_000, 256)),
    Knob("PROGRAM_EXAMPLES",     "word problems solved by one calculator call, in mid and sft", same(0)),
    Knob("OTHER_EXAMPLES",       "most conversations of each other part of mid and sft; -1: as it has them", (-1, -1, 1_000, 64)),
    # rl
    Knob("RL_DATASET",           "AQUA, GSM8K or SYNTHETIC; empty: AQUA where its rows can be had", same("")),
    Knob("RL_STEPS",             "steps; -1: one pass over the questions",                    (1_500, 1_500, 100, 3)),
    Knob("EXAMPLES_PER_STEP",    "questions of a step",                                       (16, 16, 16, 4)),
    Knob("NUM_SAMPLES",          "samples of a question",                                     (16, 16, 8, 4)),
    Knob("MAX_NEW_TOKENS",       "longest completion, in rl and in evaluation",               (256, 256, 128, 48)),
    Knob("TEMPERATURE",          "of the rollouts",                                           same(1.0)),
    Knob("RL_LEARNING_RATE",     "of adamw",                                                  (3e-5, 3e-5, 5e-4, 5e-4)),
    Knob("RL_DEVICE_BATCH_SIZE", "completions of a microbatch",                               (8, 8, 32, 8)),
    Knob("RL_EVAL_EVERY",        "steps between validations; -1: never",                      (60, 60, 50, 3)),
    Knob("RL_EVAL_EXAMPLES",     "questions of a validation",                                 (254, 254, 128, 8)),
    Knob("RL_SAVE_EVERY",        "steps between checkpoints; -1: only the last",              (60, 60, 50, -1)),
    Knob("KL_EVERY",             "steps between looks at letters and KL; -1: never",          (200, 200, 20, 2)),
    Knob("ATTN_EVERY",           "steps between looks at attention; -1: never",               (200, 200, 20, 2)),
    Knob("CONTROLS",             "1: beside rl, the bare style forbidden and rewards drawn by lot; 2: and rl from an sft on worked rationales alone", same(0)),
    # evaluation
    Knob("EVAL_TASKS",           "tasks of chat_eval, with | between; empty: all that can be had", ("", "", "AQUA|SYNTHETIC", "AQUA|SYNTHETIC")),
    Knob("EVAL_EXAMPLES",        "most questions of a task; -1: all",                         (-1, -1, 1_024, 16)),
    Knob("EVAL_MODE",            "generative, letters or both",                               same("both")),
    # anything else: more flags for one stage, split at blanks
    Knob("EXTRA_TOK_TRAIN",      "more flags for tok_train",                                  same("")),
    Knob("EXTRA_BASE_TRAIN",     "more flags for base_train",                                 same("")),
    Knob("EXTRA_MID_TRAIN",      "more flags for mid_train",                                  same("")),
    Knob("EXTRA_CHAT_SFT",       "more flags for chat_sft",                                   same("")),
    Knob("EXTRA_CHAT_RL",        "more flags for chat_rl",                                    same("")),
    Knob("EXTRA_CHAT_EVAL",      "more flags for every chat_eval",                            same("")),
)
# fmt: on

CHOICES: dict[str, tuple[str, ...]] = {
    "DEVICE_TYPE": ("cuda", "mps", "cpu"),
    "DTYPE": ("float32", "bfloat16"),
    "RL_DATASET": ("AQUA", "GSM8K", "SYNTHETIC"),
    "EVAL_MODE": ("generative", "letters", "both"),
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the plan needs to know of a GPU. Arithmetic is dense bf16 with fp32 sums."""

    name: str
    pattern: str
    """How nvidia-smi names it (regular expression, first match counts)."""
    memory_gib: float
    peak_tflops: float
    bandwidth_gb_per_second: float
    dollars_per_hour: float
    """For one GPU. A list price of the rental market, autumn 2025, to plan by; a launcher reads today's."""


GPUS: tuple[Gpu, ...] = (
    Gpu("B200", r"B200", 180, 2250, 8000, 4.99),
    Gpu("H200", r"\bH200", 141, 989, 4800, 3.79),
    Gpu("GH200", r"GH200", 96, 989, 4000, 1.49),
    Gpu("H100", r"H100", 80, 989, 3350, 2.99),
    Gpu("A100 80 GB", r"A100.*80", 80, 312, 2039, 1.79),
    Gpu("A100 40 GB", r"A100", 40, 312, 1555, 1.29),
    Gpu("L40S", r"L40S", 48, 362, 864, 1.55),
    Gpu("A6000", r"A6000", 48, 155, 768, 0.80),
    Gpu("A10", r"A10\b|A10G", 24, 125, 600, 0.75),
    Gpu("RTX 4090", r"4090", 24, 165, 1008, 0.69),
)

# What the plan assumes beside the formulas of scripts/plan.py.
TRAIN_EFFICIENCY = 0.40  # share of peak arithmetic that training reaches on a GPU
CPU_GFLOPS_PER_CORE = 120.0  # peak fp32 of one core with AVX-512
CPU_EFFICIENCY = 0.25  # small matrices
DECODE_EFFICIENCY = 0.30  # share of memory bandwidth that generation reaches
DECODE_OVERHEAD_SECONDS = 0.003  # of one decoded position, however small the model
CHARS_PER_TOKEN = 4.8  # at a vocabulary of 65,536
CHARS_PER_SHARD = 250_000_000
MID_TOKENS = 400_000_000  # one pass over the whole mid-training mixture, roughly
SFT_TOKENS = 20_000_000  # and over the SFT mixture
PROMPT_TOKENS = 120  # of an AQuA question with its options
RL_QUESTIONS = {"AQUA": 90_000, "GSM8K": 7_005, "SYNTHETIC": 100_000}  # of one pass, where RL_STEPS is -1


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to compute on."""

    gpus: tuple[str, ...]
    gpu_memory_gib: float
    num_cores: int

    @property
    def gpu(self) -> Gpu | None:
        """The known GPU that the first of ours is."""
        return next((g for g in GPUS if self.gpus and re.search(g.pattern, self.gpus[0])), None)

    def __str__(self) -> str:
        if self.gpus:
            return f"{len(self.gpus)} x {self.gpus[0]} ({self.gpu_memory_gib:.0f} GiB each)"
        return f"{self.num_cores} CPU core{'s' * (self.num_cores > 1)}"


def detect(env: Mapping[str, str]) -> Machine:
    """Ask nvidia-smi for the GPUs that CUDA_VISIBLE_DEVICES leaves visible, and the system for its cores."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        lines = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    except (OSError, subprocess.SubprocessError):
        lines = []
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        lines = lines[: len([part for part in visible.split(",") if part.strip() not in ("", "-1")])]
    memory = min((float(size) / 1024 for _, size in lines), default=0.0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(tuple(name.strip() for name, _ in lines), memory, cores)
