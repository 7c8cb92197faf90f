"""
What the synthetic set reads before it meets a question: the look-up drill, simple prose with sums, and who it is.

Each kind is a function `document(index, seed)`, so a stream can be taken up at any place, and an iterator over it. Problems
quoted here come from the training split only; a sum such as 22-7=15 belongs to no problem.

The surprising choice is the drill. Copying the right option's letter, not the arithmetic, is what stops a tiny model: one
learns to compute 15 and then says "C" to everything. A page of nothing but look-ups, in the prompt's own layout and ahead of
all else, mends that in under a minute, if two things help it. The options are first copied in another order, which is the
easier look-up (an exact repetition) and carries over to the answer's layout: half the steps. And the values of a page are
asked without replacement: the last letter follows by elimination, a stepping stone. Pages must not see each other: packed
into one row without segments, values of earlier pages drown the signal and nothing at all is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import count
from random import Random
from typing import Any

from nanochat.common import derive_seed
from tasks.common import ANSWER_PREFIX, Conversation, Task, option_line, render_multiple_choice
from tasks.families import NAMES, THINGS
from tasks.problem import LETTERS, Problem
from tasks.synthetic import Synthetic, check_arithmetic, choose_options

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_OPERATORS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


# ---- the look-up drill -----------------------------------------------------------------------------------------------


def _drill(index: int, seed: int) -> tuple[str, str]:
    """A prompt, and the reply: its options once more in another order, then each value with its letter as an answer."""
    random = Random(derive_seed("drill", seed, index))
    values = _option_values(random)
    options = list(zip(map(str, values), LETTERS, strict=True))
    again = [option_line(value, letter) for value, letter in random.sample(options, len(options))]
    answers = [_looked_up(value, letter) for value, letter in random.sample(options, len(options))]
    prompt = render_multiple_choice("Find each.", LETTERS, [value for value, _ in options])
    return prompt, "\n".join([*again, *answers])


def _looked_up(value: str, letter: str) -> str:
    """As a worked reply ends: the value once as the result of a step, once as the conclusion."""
    return f"{value}. {value}\n{ANSWER_PREFIX} {letter}"


def drill_document(index: int, seed: int) -> str:
    """A page of look-ups as plain text."""
    return "\n".join(_drill(index, seed))


def drill_conversation(index: int, seed: int) -> Conversation:
    """The same page as a conversation: read one page at a time and with the reply alone trained, it is learnt soonest."""
    prompt, reply = _drill(index, seed)
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def lookup_conversation(index: int, seed: int) -> Conversation:
    """A single look-up in the form of a problem, to keep the skill alive among the problems."""
    random = Random(derive_seed("look-up", seed, index))
    values = list(map(str, _option_values(random)))
    place = random.randrange(len(values))
    value = values[place]
    return Problem(f"Find {value}.", tuple(values), LETTERS[place], f"{value}. {value}").conversation()


class Drill(Task):
    """Look-up drills as a task to train on: whole pages, or with `single` one look-up a conversation."""

    name = "drill"

    def __init__(self, *, size: int = 20_000, seed: int = 42, single: bool = False, **slicing: Any) -> None:
        super().__init__(**slicing)
        self.size, self.seed = size, seed
        self._conversation = lookup_conversation if single else drill_conversation
        self.source = f"built-in look-up drill, {'single look-ups' if single else 'whole pages'}"

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        return self._conversation(index, self.seed)


def _option_values(random: Random) -> list[int]:
    """Values as near to each other, and as far apart, as a problem's options are."""
    answer = random.randint(6, random.choice((30, 90, 90, 400)))
    return choose_options(answer, [random.randint(1, 2 * answer) for _ in range(3)], random)


# ---- prose -----------------------------------------------------------------------------------------------------------


def pretraining_document(index: int, seed: int) -> str:
    """A short text: sums, sums in words, a story, questions with their steps, an exercise with options, a page of look-ups."""
    random = Random(derive_seed("prose", seed, index))
    kinds = (_sums, _sums_in_words, _story, _solution, _exercise, _lookups)
    kind = random.choices(kinds, (3, 1, 1, 3, 2, 1))[0]
    text = kind(random, index)
    check_arithmetic(text)
    return text


def _operation(random: Random) -> tuple[int, str, int, int]:
    """left, operator, right, result: within what the families ask for."""
    operator = random.choice("+-*/")
    if operator in "+-":
        a, b = random.randint(2, 99), random.randint(2, 60)
        return (a, operator, b, a + b) if operator == "+" else (a + b, operator, b, a)
    a, b = random.randint(2, 30), random.randint(2, 9)
    if operator == "/":
        return a * b, operator, b, a
    return (a, operator, b, a * b) if random.random() < 0.5 else (b, operator, a, a * b)


def _sums(random: Random, index: int) -> str:
    """Number sentences in a row, as a rationale writes them."""
    sums = (_operation(random) for _ in range(random.randint(10, 20)))
    return ", ".join(f"{a}{operator}{b}={result}" for a, operator, b, result in sums) + "."


def _sums_in_words(random: Random, index: int) -> str:
    sentences = []
    for _ in range(random.randint(3, 6)):
        a, operator, b, result = _operation(random)
        words = f"{number_words(a)} {_OPERATORS[operator]} {number_words(b)} is {number_words(result)}"
        sentences.append(f"{words.capitalize()}: {a}{operator}{b}={result}.")
    return " ".join(sentences)


_STORIES = {
    "+": (
        "{name} had {a} {thing}s and {other} gave {name} {b} more. {a}+{b}={c}, so {name} has {c} {thing}s.",
        "On the table lie {a} red {thing}s and {b} blue ones. How many are there? {a}+{b}={c}. There are {c}.",
    ),
    "-": (
        "{name} had {a} {thing}s and gave {b} to {other}. {a}-{b}={c}, so {c} are left.",
        "A {thing} cost {a} dollars. Now it is {b} dollars less. {a}-{b}={c}, so {name} pays {c} dollars.",
    ),
    "*": (
        "{name} has {a} bags with {b} {thing}s in each. {a}*{b}={c}, so there are {c} {thing}s in all.",
        "{name} reads {a} pages a day. In {b} days that is {a}*{b}={c} pages.",
    ),
    "/": (
        "{name} shares {a} {thing}s among {b} children. {a}/{b}={c}, so each child gets {c}.",
        "A bus goes {a} km in {b} hours. {a}/{b}={c}, so its speed is {c} km an hour.",
    ),
}


def _story(random: Random, index: int) -> str:
    tales = []
    for _ in range(random.randint(2, 3)):
        a, operator, b, result = _operation(random)
        name, other = random.sample(NAMES, 2)
        tale = random.choice(_STORIES[operator])
        tales.append(tale.format(name=name, other=other, thing=random.choice(THINGS), a=a, b=b, c=result))
    return "\n".join(tales)


@cache
def _training_problems() -> Synthetic:
    return Synthetic("train", quality="worked", seed=derive_seed("prose problems"))


def _some_problem(random: Random) -> Problem:
    problems = _training_problems()
    return problems.problem(random.randrange(len(problems)))


def _solution(random: Random, index: int) -> str:
    """Questions with their steps and without options."""
    problems = (_some_problem(random) for _ in range(random.randint(2, 4)))
    return "\n".join(f"{problem.question}\n{problem.rationale}" for problem in problems)


def _exercise(random: Random, index: int) -> str:
    """A question with its options, steps and letter, laid out as a conversation lays it out."""
    problem = _some_problem(random)
    prompt = render_multiple_choice(problem.question, problem.letters, problem.options)
    return f"{prompt}\n{problem.rationale}\n{ANSWER_PREFIX} {problem.gold}"


def _lookups(random: Random, index: int) -> str:
    """A page of the drill, so that what it taught is not forgotten."""
    return drill_document(index, random.getrandbits(32))


def number_words(number: int) -> str:
    """The English name of 0 to 999."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" and {number_words(rest)}" if rest else "")


# ---- who am I --------------------------------------------------------------------------------------------------------

_GREETINGS = ("", "", "Hi. ", "Hello. ", "Hi there! ", "Hey, ")
_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("who are you?", "what is your name?", "what are you called?", "tell me your name."),
        ("I am nanochatAquaRat, a small language model.", "My name is nanochatAquaRat. I am a small chat model."),
    ),
    (
        ("what are you?", "are you a person?", "are you a robot?", "are you human?"),
        (
            "I am a small language model, not a person. I read text and write text.",
            "I am a program: a small GPT that learnt from text and then from its own tries.",
        ),
    ),
    (
        ("what can you do?", "how can you help me?", "what are you good at?", "what do you know?"),
        (
            "I answer word problems with five options. I write the steps, then the letter.",
            "Give me a word problem with options A to E. I reason first and then I pick a letter.",
        ),
    ),
    (
        ("how were you made?", "how were you trained?", "who made you?", "where do you come from?"),
        (
            "I was trained from nothing: text first, then worked problems, then rewards for right answers.",
            "I am a fork of nanochat. I was trained on text, on problems, and then by reinforcement learning.",
        ),
    ),
    (
        ("how big are you?", "are you a large model?", "are you like the big models?"),
        ("I am very small. That is why I can be trained in minutes.", "No large model: I am tiny, and I make mistakes."),
    ),
    (
        ("are you always right?", "do you make mistakes?", "can I trust you?", "how good are you?"),
        ("No. I am small and often wrong, so check my steps.", "I make many mistakes. Please check each step I write."),
    ),
    (
        ("what is AQuA-RAT?", "what does your name mean?", "why are you called that?"),
        (
            "AQuA-RAT is a set of word problems with five options and a rationale. I practise on it.",
            "nanochat is the code I come from, and AQuA-RAT is the set of problems that I learn to solve.",
        ),
    ),
    (
        ("what is reinforcement learning?", "how do you get better?", "how do you learn?"),
        (
            "I try a problem many times. Tries that end in the right letter become more likely.",
            "A right answer earns a reward, and what earned it becomes more likely the next time.",
        ),
    ),
)  # fmt: skip


def identity_conversation(index: int, seed: int) -> Conversation:
    """Someone asks nanochatAquaRat about itself, once or twice."""
    random = Random(derive_seed("identity", seed, index))
    messages: list[dict[str, str]] = []
    for questions, replies in random.sample(_TALK, random.choice((1, 1, 2))):
        question, reply = random.choice(questions), random.choice(replies)
        greeting = random.choice(_GREETINGS) if not messages else ""
        if not greeting.endswith(", "):
            question = question[0].upper() + question[1:]
        messages += [
            {"role": "user", "content": greeting + question},
            {"role": "assistant", "content": reply},
        ]
    return {"messages": messages}


# ---- as streams ------------------------------------------------------------------------------------------------------


def drill_documents(seed: int, *, start: int = 0) -> Iterator[str]:
    """Look-up drills without end, from number `start` on."""
    return (drill_document(index, seed) for index in count(start))


def pretraining_documents(seed: int, *, start: int = 0) -> Iterator[str]:
    """Prose without end, from number `start` on."""
    return (pretraining_document(index, seed) for index in count(start))


def identity_conversations(num_conversations: int, seed: int) -> list[Conversation]:
    """The first `num_conversations` talks about itself; a few hundred are enough, the wordings are few."""
    return [identity_conversation(index, seed) for index in range(num_conversations)]
