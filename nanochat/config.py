"""
One frozen dataclass becomes one command line.

tyro writes the help text from the dataclass; the words themselves are read here, because we want what nanochat's
users type: dashes or underscores, `--flag=value` or `--flag value`, `--flag`, `--no-flag` or `--flag=0` for switches, a stray
leading `--` from torchrun. What is wrong is refused in one line that names the flag, the value and the cure,
because the ninth of nine ranks is a bad place for a page of usage text.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import sys
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from nanochat.common import UserError

ConfigT = TypeVar("ConfigT")

TRUE, FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def flag(default: Any, *aliases: str, help: str = "") -> Any:
    """A dataclass field with further names: `flag(16, "--group_size")` or `flag("", "-i")`."""
    return dataclasses.field(default=default, metadata={"aliases": aliases, "help": help})


@dataclass(frozen=True)
class StageConfig:
    """The knobs that mean the same in every stage."""

    run: str = "dummy"
    """name of the run: its folder under runs/, and its Weights & Biases group; dummy keeps W&B out"""
    model_tag: str = ""
    """checkpoint folder, such as d8; by default d{depth} or the largest there is"""
    device_type: str = ""
    """cuda, mps or cpu; by default the best there is"""
    dtype: str = ""
    """float32 or bfloat16; by default bfloat16 where the GPU has it"""
    seed: int = 42
    """everything random follows from it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: on a GPU by default; on a CPU it takes minutes that it does not win back"""
    wandb_project: str = ""
    """Weights & Biases project; by default WANDB_PROJECT or nanochat-aquarat"""
    wandb_entity: str = ""
    """Weights & Biases entity; by default WANDB_ENTITY"""
    wandb_mode: Literal["", "online", "offline", "disabled"] = ""
    """by default WANDB_MODE or online; without a key or network the run is offline"""


@dataclass(frozen=True)
class TrainConfig(StageConfig):
    """The knobs of the supervised stages: base, mid and sft."""

    device_batch_size: int = 32
    """rows of one microbatch on one device; lower it when memory runs out, the result stays the same"""
    total_batch_size: int = 524_288
    """tokens of one optimizer step over all ranks; -1: one microbatch on every rank, so more of them with more ranks"""
    num_iterations: int = -1
    """optimizer steps; -1: what the data or the horizon asks for"""
    matrix_lr: float = 0.02
    """Muon's learning rate, for the matrices of the blocks"""
    embedding_lr: float = 0.2
    """AdamW's learning rate for the token embedding"""
    unembedding_lr: float = 0.004
    """AdamW's learning rate for the head"""
    scalar_lr: float = 0.003
    """AdamW's learning rate for the mixing of preceding tokens"""
    weight_decay: float = 0.0
    """decoupled weight decay of the matrices"""
    init_lr_frac: float = 1.0
    """first learning rate as a fraction of the rates above"""
    eval_every: int = 250
    """steps between evaluations; -1: never"""
    save_every: int = -1
    """steps between checkpoints; -1: only the last"""
    keep_last: int = 2
    """checkpoints that stay on disk besides the best"""
    log_every: int = 10
    """steps between progress lines; metrics.jsonl has every step"""
    resume: bool = True
    """go on from the newest complete checkpoint of the same run"""


@dataclass(frozen=True)
class ConversationConfig(TrainConfig):
    """The knobs of the stages that learn from conversations: mid and sft."""

    step: int | None = None
    """step of the checkpoint to start from; by default the newest"""
    aqua_train_examples: int = -1
    """rows of AQuA; -1: all there are"""
    synthetic_examples: int = -1
    """built-in word problems; -1: only where AQuA cannot be had"""
    program_examples: int = 0
    """word problems that one calculator call solves, made from AQuA, MathQA, GSM8K and MAWPS, with numbers of their own"""
    other_examples: int = -1
    """most conversations of each other part of the mixture; -1: as it has them"""
    quality: Literal["mixed", "worked"] = "mixed"
    """rationales of the built-in problems: some bare, as AQuA has them, or all worked"""
    aqua_path: str | None = None
    """file or folder of AQuA"""
    max_seq_len: int = -1
    """tokens of a row; -1: as in base training"""
    num_epochs: int = 1
    """passes over the mixture, where --num_iterations is -1"""
    warmdown_ratio: float = 0.4
    """share of the steps, at the end, in which the learning rate falls"""
    max_grad_norm: float = 1.0
    """gradients longer than this are shortened to it; 0: none are"""


def cli(config: type[ConfigT], argv: list[str] | None = None) -> ConfigT:
    """Parse `argv` (default: the command line) into `config`; print one line and exit with 2 when that cannot be done."""
    from nanochat.interruption import stop_with_parent

    sys.excepthook = _one_line_for_user_errors
    stop_with_parent()  # here, before the seconds in which torch is imported: the launcher may die in them
    try:
        return parse(config, sys.argv[1:] if argv is None else argv)
    except UserError as error:
        _refuse(str(error))


def parse(config: type[ConfigT], argv: list[str]) -> ConfigT:
    """As `cli`, but raises UserError instead of exiting (`--help` still prints and exits)."""
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, config))}
    hints = typing.get_type_hints(config)
    if any(word in ("-h", "--help") for word in argv):
        _print_help(config, fields, hints)
    values: dict[str, Any] = {}
    for name, value in _values(argv, fields, hints):
        # A field that is a tuple collects: the flag may be given again and again.
        values[name] = values.get(name, ()) + value if get_origin(hints[name]) is tuple else value
    return config(**values)


def _values(
    argv: list[str], fields: dict[str, dataclasses.Field[Any]], hints: dict[str, Any]
) -> typing.Iterator[tuple[str, Any]]:
    """(field name, value of the field's type) for every flag in `argv`."""
    names = {alias: name for name, field in fields.items() for alias in _spellings(name, field)}
    words = argv[1:] if argv[:1] == ["--"] else list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            raise UserError(f"{word}: a value without a flag; write --flag={word}")
        spelled, equals, value = word.partition("=")
        key = spelled.replace("_", "-")
        negated = key not in names and key.startswith("--no-") and f"--{key[5:]}" in names
        name = names.get(f"--{key[5:]}" if negated else key)
        if name is None:
            raise UserError(f"{spelled} is not a flag{_suggest(key, names)}; --help lists them all")
        switch = hints[name] is bool
        if not equals:
            if switch and (negated or not words or words[0].lower() not in TRUE | FALSE):
                value = "false" if negated else "true"
            elif not words or (words[0].startswith("-") and words[0] != "-" and not _is_number(words[0])):
                raise UserError(f"{spelled} needs a value; write {spelled}=VALUE")
            else:
                value = words.pop(0)
        yield name, _convert(spelled, value, hints[name])


def _spellings(name: str, field: dataclasses.Field[Any]) -> list[str]:
    aliases: tuple[str, ...] = field.metadata.get("aliases", ())
    return [f"--{name}".replace("_", "-"), *(alias.replace("_", "-") for alias in aliases)]


def _suggest(key: str, names: dict[str, str]) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f", did you mean {near[0].replace('-', '_').replace('__', '--', 1)}?" if near else ""


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _convert(spelled: str, value: str, hint: Any) -> Any:
    """`value` as an object of type `hint`, or a UserError that names flag, value and cure."""
    if get_origin(hint) is tuple:
        return (_convert(spelled, value, get_args(hint)[0]),)
    optional = get_origin(hint) in (Union, types.UnionType)
    kind = next(t for t in get_args(hint) if t is not type(None)) if optional else hint
    if optional and value.lower() in ("none", ""):
        return None
    if get_origin(kind) is Literal:
        same = [choice for choice in get_args(kind) if str(choice).lower() == value.lower()]
        if not same:
            raise UserError(f"{spelled}={value} is not a choice; use {' or '.join(map(str, get_args(kind)))}")
        return same[0]
    if kind is bool:
        if value.lower() not in TRUE | FALSE:
            raise UserError(f"{spelled}={value} is not a switch; use {spelled} or {spelled}=0")
        return value.lower() in TRUE
    wanted = {int: "a whole number; write for example {}=4", float: "a number; write for example {}=0.5"}
    try:
        number = kind(value)
        if number != number:  # nan is a float that passes every check that a limit makes
            raise ValueError
        return number
    except ValueError:
        raise UserError(f"{spelled}={value} is not {wanted[kind].format(spelled)}") from None


def _print_help(
    config: type[ConfigT], fields: dict[str, dataclasses.Field[Any]], hints: dict[str, Any]
) -> NoReturn:
    """Let tyro lay out the help text; it is imported here alone, so that a run does not wait for it."""
    import tyro

    for name, field in fields.items():
        if aliases := field.metadata.get("aliases", ()):
            described = tyro.conf.arg(aliases=list(aliases), help=field.metadata["help"] or None)
            config.__annotations__[name] = typing.Annotated[hints[name], described]
    spec = sys.modules["__main__"].__spec__
    program = f"python -m {spec.name}" if spec else sys.argv[0]
    tyro.cli(config, prog=program, args=["--help"], config=(tyro.conf.FlagConversionOff,))
    raise SystemExit(0)


def _one_line_for_user_errors(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(
            f"error: the disk is full: {error.filename or error}; free some space and run the same command again",
            file=sys.stderr,
        )
    elif lost := _lost_rank(error):
        print(f"error: {lost}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _lost_rank(error: BaseException) -> str:
    """A line where another rank is gone, and this one's traceback says nothing about why; '' for any other error."""
    gone = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "remote process exited")
    rank, text = os.environ.get("RANK"), str(error)
    if rank is None or not isinstance(error, RuntimeError) or not any(words in text for words in gone):
        return ""
    return f"rank {rank} has lost another rank: why that one ended, torchrun says as root cause; run the same command again"


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
