"""
The fourteen families of word problem that tasks/synthetic.py draws from, written as data.

A family has three levels, of one, two and three steps, and a level is a little program: the numbers that the question
shows, the wordings that show them, the steps that lead from them to the answer, and the mistakes that a pupil makes on
the way. A step is one operation on two numbers ("d=c-b"), because a model of half a million parameters learns 22-7 and
15/3 long before it learns (22-7)/3, and because steps as data can be run, printed and checked by the same few lines.

The surprising choice is that a level LISTS all the number tuples it admits instead of drawing them: then a split is
a partition of a list, held-out problems share no numbers with training by construction, and row i needs no rows before it.
Constants are written as words ("half", "one percent"), so the digits in a question are its tuple and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

Numbers = tuple[int, ...]
Values = dict[str, int]

NAMES = ("Tom", "Ann", "Sam", "Eva", "Ben", "Mia")
THINGS = ("pen", "cup", "book", "bag", "hat", "ball")
MAX_VALUE = 999
ANSWERS = range(6, MAX_VALUE - 9)
"""Four smaller and four larger options must exist, so that the gold value can have any rank."""

_EXPRESSION = re.compile(r"(\w+)(?:([-+*/])(\w+))?")


@dataclass(frozen=True, slots=True)
class Story:
    """A problem before it has options: what is asked, the steps that answer it, the answer, wrong values."""

    question: str
    steps: str
    answer: int
    mistakes: tuple[int, ...]


def compute(expression: str, values: Values) -> int | None:
    """The value of "c-b", "d" or "n/10"; None where it is no positive whole number of at most three digits."""
    match = _EXPRESSION.fullmatch(expression)
    assert match is not None, expression
    left, operator, right = match.groups()
    a = values[left] if left in values else int(left)
    if operator is None:
        return a
    b = values[right] if right in values else int(right)
    if operator == "/":
        result = a // b if a % b == 0 else 0
    else:
        result = a + b if operator == "+" else a - b if operator == "-" else a * b
    return result if 0 < result <= MAX_VALUE else None


@dataclass(frozen=True, slots=True)
class Level:
    """One difficulty of one family."""

    shown: str
    """Names of the numbers in the question, "a b c"."""
    numbers: Callable[[], Iterator[Numbers]]
    """All tuples for `shown`, before those without a proper answer are dropped."""
    steps: str
    """Steps in order, "d=c-b x=d/a"; the last one is the answer."""
    mistakes: str
    """What comes out when a step is left out or an operation mistaken."""
    wordings: tuple[str, ...]

    def solve(self, numbers: Numbers) -> tuple[Values, list[str]] | None:
        """All values by name and the written steps, or None where a step leaves the whole numbers up to 999."""
        values: Values = dict(zip(self.shown.split(), numbers, strict=True))
        written = []
        for step in self.steps.split():
            target, expression = step.split("=")
            value = compute(expression, values)
            if value is None:
                return None
            values[target] = value
            written.append(f"{_written(expression, values)}={value}")
        return values, written

    def operands(self) -> list[Numbers]:
        """Every tuple of numbers that makes a proper problem, in a fixed order."""
        answer = self.steps.split()[-1].split("=")[0]
        solved = ((numbers, self.solve(numbers)) for numbers in dict.fromkeys(self.numbers()))
        return [numbers for numbers, result in solved if result and result[0][answer] in ANSWERS]

    def tell(self, numbers: Numbers, random: Random) -> Story:
        """Word the problem of `numbers`."""
        solved = self.solve(numbers)
        assert solved is not None, f"{numbers} makes no problem of {self.steps}"
        values, written = solved
        name, other = random.sample(NAMES, 2)
        thing, toy = random.sample(THINGS, 2)
        wording = random.choice(self.wordings)
        question = wording.format(name=name, other=other, thing=thing, toy=toy, **values)
        answer = values[self.steps.split()[-1].split("=")[0]]
        wrong = (compute(mistake, values) for mistake in self.mistakes.split())
        return Story(question, ", ".join(written), answer, tuple(w for w in wrong if w and w != answer))


def _written(expression: str, values: Values) -> str:
    return re.sub(r"[a-z]", lambda match: str(values[match[0]]), expression)


# ---- the families, each of three levels: shown, numbers, steps, mistakes, wordings -----------------------------------
# fmt: off

_LINEAR = (
    Level("b c", lambda: ((b, b + x) for b in range(3, 41) for x in range(6, 50)), "x=c-b", "c+b b",
        ("x + {b} = {c}. Find x.", "What number plus {b} is {c}?")),
    Level("a b c", lambda: ((a, b, a * x + b) for a in range(2, 10) for b in range(2, 21) for x in range(6, 21)),
        "d=c-b x=d/a", "d d-a c/a c-a",
        ("{a}x + {b} = {c}. Find x.", "{a} times a number plus {b} is {c}. What is the number?")),
    Level("a b e c",
        lambda: ((a, b, e, a * (x + b) + e) for a in range(2, 7) for b in (2, 3, 5, 7) for e in range(3, 16) for x in range(6, 17)),
        "d=c-e f=d/a x=f-b", "f f+b d d-b",
        ("{a}(x + {b}) + {e} = {c}. Find x.", "If {a}(x + {b}) + {e} = {c}, what is x?")),
)

_PERCENT = (
    Level("a p", lambda: ((a, p) for a in range(2, 10) for p in range(3, 31)), "x=a*p", "a+p p-a",
        ("One percent of a number is {a}. What is {p}% of it?", "If one percent is {a}, how much is {p}%?")),
    Level("p n", lambda: ((p, 100 // p * x) for p in (10, 20, 25, 50) for x in range(6, 61)),
        "k=100/p x=n/k", "n-p n/p n-k p",
        ("What is {p}% of {n}?", "{name} has {n} {thing}s. {p}% are red. How many are red?")),
    Level("p n", lambda: ((p, 100 // p * d) for p in (10, 20, 25, 50) for d in range(3, 61)),
        "k=100/p d=n/k x=n-d", "d n+d n-p n-k",
        ("A {thing} costs {n} dollars. The price falls {p}%. Find the new price.",
         "{name} has {n} dollars and pays out {p}% of it. How much is left?")),
)

_RATIO = (
    Level("a b", lambda: ((a, b) for a in range(2, 10) for b in range(3, 31)), "x=a*b", "a+b b-a",
        ("There are {a} red {thing}s for each blue one. There are {b} blue. How many are red?",
         "{name} has {a} times as many {thing}s as {other}. {other} has {b}. How many has {name}?")),
    Level("a b c", lambda: ((a, b, a * k) for a in range(2, 10) for b in range(2, 10) if a != b for k in range(3, 13)),
        "k=c/a x=k*b", "c+b k k*a c*b",
        ("The ratio of boys to girls is {a}:{b}. There are {c} boys. How many girls?",
         "{thing}s and {toy}s are as {a}:{b}. There are {c} {thing}s. How many {toy}s?")),
    Level("a b n", lambda: ((a, b, (a + b) * k) for a in range(2, 8) for b in range(2, 8) if a != b for k in range(3, 13)),
        "s=a+b k=n/s x=k*b", "k k*a n-b n/b n-a",
        ("The ratio of boys to girls is {a}:{b}. There are {n} in all. How many girls?",
         "{name} and {other} share {n} dollars as {a}:{b}. How much goes to {other}?")),
)

_AVERAGE = (
    Level("n m", lambda: ((n, m) for n in range(2, 10) for m in range(4, 31)), "x=n*m", "n+m m-n",
        ("The average of {n} numbers is {m}. Find their sum.", "{n} {thing}s weigh {m} kg on average. How many kg in all?")),
    Level("a b", lambda: ((a, b) for a in range(4, 50) for b in range(4, 50) if a != b and (a + b) % 2 == 0),
        "s=a+b x=s/2", "s b-a a-b",
        ("Find the average of {a} and {b}.", "{name} is {a} and {other} is {b} years old. What is the average age?")),
    Level("a b c",
        lambda: ((a, b, c) for a in range(4, 31, 2) for b in range(3, 31, 3) for c in range(4, 31) if (a + b + c) % 3 == 0),
        "s=a+b t=s+c x=t/3", "s t s/2 t/2",
        ("Find the average of {a}, {b} and {c}.", "Three {thing}s cost {a}, {b} and {c} dollars. Find the average cost.")),
)

_SPEED = (
    Level("d t", lambda: ((s * t, t) for s in range(6, 31) for t in range(2, 10)), "x=d/t", "d-t d d+t",
        ("A car goes {d} km in {t} hours. Find its speed.", "{name} runs {d} km in {t} hours. How many km in one hour?")),
    Level("s t e", lambda: ((s, t, e) for s in range(5, 31) for t in range(2, 10) for e in range(3, 25, 2)),
        "d=s*t x=d+e", "d d-e s+t s+e",
        ("A car goes at {s} km an hour for {t} hours and then {e} km more. How far in all?",
         "{name} runs {s} km a day for {t} days and then {e} km. How many km is that?")),
    Level("s t u v",
        lambda: ((s, t, u, v) for s in range(4, 21, 2) for t in range(2, 8) for u in range(5, 21, 3) for v in range(2, 8)),
        "d=s*t e=u*v x=d+e", "d e d-e e-d s+u",
        ("A car goes {s} km an hour for {t} hours, then {u} km an hour for {v} hours. How far in all?",
         "A bus drives {t} hours at {s} km an hour and {v} hours at {u} km an hour. Find the distance.")),
)

_WORK = (
    Level("a b", lambda: ((a, b) for a in range(2, 10) for b in range(3, 31)), "x=a*b", "a+b b-a",
        ("{a} men do a job in {b} days. How many days does one man need?", "{a} men work {b} hours each. How many hours in all?")),
    Level("a b c",
        lambda: ((a, b, c) for a in range(2, 13) for b in range(4, 25) for c in range(2, 10) if c != a and a * b % c == 0),
        "w=a*b x=w/c", "w w-c b b-c b+c",
        ("{a} men do a job in {b} days. How many days do {c} men need?",
         "{a} taps fill a pool in {b} hours. How many hours do {c} taps need?")),
    Level("a b c",
        lambda: ((a, b, c) for a in range(2, 11) for b in range(6, 31) for c in range(1, 9) if a * b % (a + c) == 0),
        "w=a*b m=a+c x=w/m", "w b b-c w/c w-m",
        ("{a} men need {b} days for a job. {c} more men come. How many days now?",
         "{a} taps fill a pool in {b} hours. How many hours with {c} more taps?")),
)

_INTEREST = (
    Level("i t", lambda: ((i, t) for i in range(3, 31) for t in range(2, 10)), "x=i*t", "i+t i-t",
        ("The simple interest is {i} dollars a year. How much is it in {t} years?",
         "{name} gets {i} dollars of interest a year. How much in {t} years?")),
    Level("p i t", lambda: ((p, i, t) for p in range(20, 100, 5) for i in range(2, 16) for t in range(2, 10)),
        "e=i*t x=p+e", "e p-e p+i p+t",
        ("{name} puts {p} dollars in a bank and gets {i} dollars of interest a year. How much is it after {t} years?",
         "A bank adds {i} dollars a year to {p} dollars. How much is there in {t} years?")),
    Level("p r t", lambda: ((100 * k, r, t) for k in range(2, 10) for r in range(2, 16) for t in range(2, 8)),
        "k=p/100 i=k*r x=i*t", "i p-i i+t k*t r*t",
        ("Find the simple interest on {p} dollars at {r}% in {t} years.",
         "{name} puts {p} dollars in a bank at {r}%. How much simple interest comes in {t} years?")),
)

_AGES = (
    Level("a b", lambda: ((a, b) for a in range(4, 50) for b in range(2, 31)), "x=a+b", "a-b b a",
        ("{name} is {a}. {other} is {b} years older. How old is {other}?", "{name} is {a} now. How old is {name} in {b} years?")),
    Level("a b c", lambda: ((a, b, c) for a in range(5, 41, 2) for b in range(2, 20) for c in range(3, 16)),
        "d=a+b x=d+c", "d a+c d-c a-b",
        ("{name} is {a}. {other} is {b} years older. How old is {other} in {c} years?",
         "{name} is {a} and {other} {b} years older. Find the age of {other} in {c} years.")),
    Level("b c a", lambda: ((b, c, a) for b in range(3, 21) for c in range(2, 13) for a in range(2, 7)),
        "d=b+c e=d*a x=e-c", "e d b*a e+c",
        ("{other} is {b}. In {c} years {name} is {a} times as old as {other}. How old is {name} now?",
         "In {c} years {name} is {a} times as old as {other}, who is {b} now. How old is {name}?")),
)

_MIXTURE = (
    Level("a b", lambda: ((a, b) for a in range(4, 50) for b in range(3, 40)), "x=a+b", "a-b b-a a",
        ("{a} litres of milk and {b} litres of water are mixed. How many litres is the mix?",
         "A mix has {a} kg of tea and {b} kg of salt. What is its weight?")),
    Level("n b a", lambda: ((b * k, b, a) for b in range(3, 11) for a in range(2, 10) if a < b for k in range(3, 13)),
        "k=n/b x=k*a", "k n-a n-b n/a",
        ("In {b} litres of a mix {a} are milk. How much milk is in {n} litres?",
         "{a} kg out of {b} kg of a mix are tea. How many kg of tea are in {n} kg?")),
    Level("n b a", lambda: ((b * k, b, a) for b in range(3, 11) for a in range(2, 10) if a < b for k in range(3, 13)),
        "k=n/b m=k*a x=n-m", "m k n-a n-b n+m",
        ("In {b} litres of a mix {a} are milk, the rest is water. How much water is in {n} litres?",
         "{a} kg out of {b} kg of a mix are tea. How many kg in {n} kg are not tea?")),
)

_SEQUENCE = (
    Level("r a", lambda: ((r, a) for r in range(2, 10) for a in range(3, 31)), "x=r*a", "a+r a-r",
        ("In a sequence each number is {r} times the one before. What comes after {a}?",
         "A sequence starts with {a} and grows {r} times with each step. What comes next?")),
    Level("a b c", lambda: ((a, a + d, a + 2 * d) for a in range(2, 60) for d in range(3, 25)),
        "d=b-a x=c+d", "d c+a c-d b+d",
        ("What comes next: {a}, {b}, {c}?", "A sequence goes {a}, {b}, {c}. Find the next number.")),
    Level("a d n", lambda: ((a, d, n) for a in range(2, 30, 2) for d in range(2, 13) for n in range(4, 12)),
        "k=n-1 e=k*d x=a+e", "e n*d a+d e-a",
        ("A sequence starts with {a} and grows by {d}. What is number {n}?",
         "The first number is {a}, each next one is {d} more. Find number {n}.")),
)

_SETS = (
    Level("n a", lambda: ((n, a) for n in range(12, 60) for a in range(4, 40)), "x=n-a", "n+a a n",
        ("Of {n} children {a} like milk. How many do not?", "{n} boys are in a club, {a} play chess. How many do not play chess?")),
    Level("a b c", lambda: ((a, b, c) for a in range(8, 40, 2) for b in range(7, 40, 3) for c in range(2, 16) if c < a and c < b),
        "s=a+b x=s-c", "s s+c a-c b-c",
        ("{a} children like tea, {b} like milk, {c} like both. How many like tea or milk?",
         "{a} play chess, {b} play ball and {c} play both. How many play?")),
    Level("n a b c",
        lambda: ((n, a, b, c) for n in range(40, 100, 5) for a in range(8, 40, 4) for b in range(7, 40, 4) for c in range(2, 14, 2)
                 if c < a and c < b),
        "s=a+b u=s-c x=n-u", "u n-s n-a n-b",
        ("Of {n} children {a} like tea, {b} like milk and {c} like both. How many like none?",
         "In a club of {n}, {a} play chess, {b} play ball, {c} play both. How many play none?")),
)

_COUNTING = (
    Level("a b", lambda: ((a, b) for a in range(2, 10) for b in range(3, 31)), "x=a*b", "a+b b-a",
        ("{name} has {a} hats and {b} bags. In how many ways can {name} take one of each?",
         "In how many ways can we pick one of {a} boys and one of {b} girls?")),
    Level("a b c", lambda: ((a, b, c) for a in range(2, 13) for b in range(2, 11) for c in range(2, 10)),
        "d=a*b x=d*c", "d a+b d+c b*c",
        ("{name} has {a} hats, {b} bags and {c} cups. In how many ways can {name} take one of each?",
         "In how many ways can we pick one of {a} boys, one of {b} girls and one of {c} men?")),
    Level("a b c e", lambda: ((a, b, c, e) for a in range(2, 9) for b in range(2, 9) for c in range(2, 7) for e in range(2, 7)),
        "s=a+b t=c+e x=s*t", "s+t a*b c*e s*c t*a",
        ("There are {a} red and {b} blue pens, {c} old and {e} new books. In how many ways can we take a pen and a book?",
         "{a} boys and {b} girls sing, {c} boys and {e} girls play. In how many ways can we pick one to sing and one to play?")),
)

_COST = (
    Level("p n", lambda: ((p, n) for p in range(3, 31) for n in range(2, 10)), "x=p*n", "p+n p-n",
        ("A {thing} costs {p} dollars. How much do {n} {thing}s cost?", "{name} buys {n} {thing}s at {p} dollars each. How much is that?")),
    Level("n c m", lambda: ((n, n * p, m) for n in range(2, 10) for p in range(3, 16) for m in range(2, 10) if m != n),
        "p=c/n x=p*m", "p c+m c-n n*m",
        ("{n} {thing}s cost {c} dollars. How much do {m} {thing}s cost?", "{name} pays {c} dollars for {n} {thing}s. How much are {m}?")),
    Level("n p q c", lambda: ((n, p, q, c) for n in range(2, 8) for p in range(3, 16) for q in range(2, 20, 3) for c in (50, 80, 100)),
        "d=n*p e=d+q x=c-e", "e c-d d c-q",
        ("{name} buys {n} {thing}s at {p} dollars each and a {toy} for {q} dollars. How much is left of {c} dollars?",
         "{n} {thing}s cost {p} dollars each, a {toy} costs {q}. {name} pays with {c} dollars. How much comes back?")),
)

_PROFIT = (
    Level("a b", lambda: ((a, a + x) for a in range(4, 50) for x in range(6, 41)), "x=b-a", "a+b a b",
        ("{name} buys a {thing} for {a} dollars and sells it for {b}. Find the profit.",
         "A {thing} costs {a} dollars and is sold for {b} dollars. What is the profit?")),
    Level("n c p", lambda: ((n, c, p) for n in range(2, 10) for c in range(8, 90, 3) for p in range(5, 20)),
        "r=n*p x=r-c", "r r+c c-p c",
        ("{name} buys {n} {thing}s for {c} dollars in all and sells each for {p}. Find the profit.",
         "{n} {thing}s cost {c} dollars in all and are sold at {p} dollars each. What is the profit?")),
    Level("n p q", lambda: ((n, p, q) for n in range(2, 10) for p in range(3, 20) for q in range(4, 26) if p < q),
        "c=n*p r=n*q x=r-c", "c r q-p r+c",
        ("{name} buys {n} {thing}s at {p} dollars each and sells them at {q} each. Find the profit.",
         "{n} {thing}s are bought at {p} dollars and sold at {q} dollars each. What is the profit?")),
)
# fmt: on

FAMILIES: dict[str, tuple[Level, ...]] = {
    "linear": _LINEAR,
    "percent": _PERCENT,
    "ratio": _RATIO,
    "average": _AVERAGE,
    "speed": _SPEED,
    "work": _WORK,
    "interest": _INTEREST,
    "ages": _AGES,
    "mixture": _MIXTURE,
    "sequence": _SEQUENCE,
    "sets": _SETS,
    "counting": _COUNTING,
    "cost": _COST,
    "profit": _PROFIT,
}
