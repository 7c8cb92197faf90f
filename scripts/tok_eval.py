"""
How well does the tokenizer compress? Bytes per token on texts of several kinds, beside GPT-2's and GPT-4's encodings.

    python -m scripts.tok_eval

More bytes per token is better: the same text in fewer steps of the model. The rivals' vocabularies (50,257 and 100,277
tokens) come over the network once and are cached by tiktoken; where they cannot be had within seconds, ours stands alone
and a notice says so. The samples, at the end of this file, are of our own writing, so nobody has trained on them;
where shards or AQuA rows can be had, some of those are measured too.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.config import StageConfig, cli

RIVALS = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Config(StageConfig):
    """Measure the tokenizer's compression."""

    rivals: bool = True
    """compare with GPT-2's and GPT-4's encodings"""
    patience_seconds: float = 15.0
    """how long to wait for the rivals' vocabularies"""
    max_chars: int = 1_000_000
    """characters of the shards to measure on"""


@dataclass(frozen=True, slots=True)
class Row:
    """One text under all encodings."""

    text: str
    num_bytes: int
    num_tokens: dict[str, int]
    """encoding -> tokens; ours is first"""

    def bytes_per_token(self, encoding: str) -> float:
        return self.num_bytes / max(1, self.num_tokens[encoding])


def main(config: Config) -> None:
    """Measure, print a table, report."""
    from nanochat.common import compute_cleanup, compute_init
    from nanochat.tokenizer import load_tokenizer
    from nanochat.tracking import open_run

    world = compute_init("cpu", seed=config.seed)
    with open_run("tok_eval", config, world) as tracker:
        if world.main:
            tokenizer = load_tokenizer()
            encodings: dict[str, Encode] = {"ours": tokenizer.encode}
            if config.rivals:
                found, missing = rivals(config.patience_seconds)
                encodings |= found
                for why in missing:
                    tracker.note("skipped", f"tok_eval: {why}")
            texts = samples(config.max_chars)
            rows = [measure(name, text, encodings) for name, text in texts.items()]
            for name, text in texts.items():
                if tokenizer.decode(tokenizer.encode(text)) != text:
                    raise UserError(f"the tokenizer does not give back the sample {name!r}; train it anew")
            print(table(rows, list(encodings)))
            tracker.table("compression", 0, [_flat(row) for row in rows])
            tracker.finish({"vocab_size": tokenizer.vocab_size, **results(rows, list(encodings))})
        world.barrier()
    compute_cleanup(world)


def measure(name: str, text: str, encodings: dict[str, Encode]) -> Row:
    """Count the tokens of `text` under every encoding."""
    counts = {encoding: len(encode(text)) for encoding, encode in encodings.items()}
    return Row(name, len(text.encode()), counts)


def rivals(patience_seconds: float) -> tuple[dict[str, Encode], list[str]]:
    """The rivals' encoders that can be had in time, and a line for each that cannot."""
    found: dict[str, Any] = {}

    def fetch(name: str) -> None:
        import tiktoken

        try:
            found[name] = tiktoken.get_encoding(RIVALS[name])
        except (
            Exception
        ) as error:  # no network, a proxy's page, a full disk: all mean that we measure without it
            found[name] = error

    # Daemons, because a download that hangs must hold up neither the table nor the exit.
    threads = {name: threading.Thread(target=fetch, args=(name,), daemon=True) for name in RIVALS}
    for thread in threads.values():
        thread.start()
    encoders: dict[str, Encode] = {}
    missing = []
    for name, thread in threads.items():
        thread.join(patience_seconds)
        outcome = found.get(name, TimeoutError(f"no answer in {patience_seconds:.0f} s"))
        if isinstance(outcome, Exception):
            missing.append(f"{name}'s vocabulary cannot be had ({type(outcome).__name__}); ours stands alone")
        else:
            encoders[name] = outcome.encode_ordinary
    return encoders, missing


def samples(max_chars: int) -> dict[str, str]:
    """Texts by name: ours, then shards and AQuA questions where they can be had."""
    from nanochat.dataset import texts
    from tasks.catalog import open_task
    from tasks.rows import DataUnavailable

    found = dict(SAMPLES)
    for split in ("train", "val"):
        try:
            documents, size = [], 0
            for text in texts(split):
                documents.append(text[: max_chars - size])
                size += len(documents[-1])
                if size >= max_chars:
                    break
            found[f"shards, {split}"] = "\n\n".join(documents)
        except UserError:
            break  # no shards; base_train will say so, a tokenizer can be measured without
    for name in ("AQUA", "SYNTHETIC"):
        try:
            task = open_task(name, "validation")
        except DataUnavailable:
            continue
        rows = itertools.islice(task, 200)
        found[f"{name} questions"] = "\n\n".join(row["messages"][0]["content"] for row in rows)
    return found


def table(rows: Sequence[Row], encodings: Sequence[str]) -> str:
    """Bytes per token; in brackets how many more tokens a rival needs than we do."""
    lines = [f"{'bytes per token':24}{'bytes':>10}" + "".join(f"{name:>18}" for name in encodings)]
    for row in rows:
        cells = [f"{row.bytes_per_token(encodings[0]):18.2f}"]
        for name in encodings[1:]:
            more = row.num_tokens[name] / row.num_tokens[encodings[0]] - 1
            cells.append(f"{row.bytes_per_token(name):9.2f} ({more:+6.1%})")
        lines.append(f"{row.text:24}{row.num_bytes:10,}" + "".join(cells))
    return "\n".join(lines)


def results(rows: Sequence[Row], encodings: Sequence[str]) -> dict[str, float]:
    """Bytes per token of every text, and over all of them together, for each encoding."""
    found: dict[str, float] = {}
    for name in encodings:
        total = sum(row.num_bytes for row in rows), sum(row.num_tokens[name] for row in rows)
        found[f"{name}/bytes_per_token"] = round(total[0] / total[1], 4)
        found |= {f"{name}/bytes_per_token/{row.text}": round(row.bytes_per_token(name), 4) for row in rows}
    return found


def _flat(row: Row) -> dict[str, Any]:
    return {"text": row.text, "bytes": row.num_bytes, **row.num_tokens}


# ---- texts, to be counted rather than admired -------------------------------------------------------------------

PROSE = """\
The ferry to the island leaves twice a day, at seven in the morning and again at four, unless the wind comes from the
north. Nobody in the village needs to look at the timetable for that; they look at the flag on the harbour master's roof.
When it points towards the church, the schoolteacher packs an extra jumper, the baker puts aside six loaves, and the
postman sits down to finish his crossword.

"We've had worse," says Mrs. Okafor, who runs the shop and has seen forty winters here. "In '87 they brought the flour by
helicopter. It didn't rise any better for it." She weighs two pounds of apples, rounds the price down, and writes the sum
into a book with a cracked green spine. Visitors find the book quaint. It is, in fact, the island's bank: half of what is
owed between one spring and the next stands in it, in pencil, and no one has ever asked for a receipt.

Last year a company from the mainland offered to build a bridge. There was a meeting, there was tea, and there were charts
in three colours. The vote was 61 to 58 against, with one ballot on which somebody had drawn a boat.
"""

CODE = '''\
from __future__ import annotations

import heapq
from collections import defaultdict


class Graph:
    """A weighted, directed graph; edges are kept per node."""

    def __init__(self) -> None:
        self._edges: dict[str, list[tuple[str, float]]] = defaultdict(list)

    def connect(self, source: str, target: str, cost: float = 1.0) -> None:
        if cost < 0:
            raise ValueError(f"cost={cost!r}: Dijkstra's algorithm needs costs >= 0")
        self._edges[source].append((target, cost))

    def distance(self, start: str, goal: str) -> float | None:
        queue, seen = [(0.0, start)], set()
        while queue:
            total, node = heapq.heappop(queue)
            if node == goal:
                return total
            if node in seen:
                continue
            seen.add(node)
            for neighbour, cost in self._edges[node]:
                heapq.heappush(queue, (total + cost, neighbour))
        return None


if __name__ == "__main__":
    graph = Graph()
    for a, b, km in [("Ulm", "Bonn", 410.5), ("Bonn", "Kiel", 505), ("Ulm", "Kiel", 980)]:
        graph.connect(a, b, cost=km)
    print(f"{graph.distance('Ulm', 'Kiel'):.1f} km")  # 915.5 km
'''

MATH = r"""
Problem: A tank holds 240 litres. Pipe A fills it in 6 hours, pipe B in 4 hours, and a leak empties it in 12 hours. How
long does it take to fill the tank with both pipes open and the leak unnoticed?
Solution: In one hour the pipes bring 240/6 + 240/4 = 40 + 60 = 100 litres, and the leak takes 240/12 = 20 litres. What
remains is 100 - 20 = 80 litres an hour, so that t = 240/80 = 3 hours.

Theorem. For every integer $n \geq 1$ we have $1^2 + 2^2 + \dots + n^2 = \frac{n(n+1)(2n+1)}{6}$.
Proof. For $n = 1$ both sides are 1. Suppose that it holds for $n$; adding $(n+1)^2$ gives
\[ \frac{n(n+1)(2n+1) + 6(n+1)^2}{6} = \frac{(n+1)\left(2n^2 + 7n + 6\right)}{6} = \frac{(n+1)(n+2)(2n+3)}{6}, \]
which is the claim for $n+1$. $\blacksquare$

If 35% of x is 84, then x = 84 / 0.35 = 240. The ratio 18:24 equals 3:4. At 6.5% simple interest, $1,200 earns
1200 * 0.065 * 3 = $234 in 3 years. sqrt(2) = 1.41421356..., pi = 3.14159265..., 2^10 = 1024, 7! = 5040.
"""

NON_ENGLISH = """\
Die Fähre zur Insel fährt zweimal am Tag, um sieben Uhr morgens und um vier Uhr nachmittags, es sei denn, der Wind kommt
aus Norden. Im Dorf schaut dafür niemand auf den Fahrplan.
Le bac pour l'île part deux fois par jour, à sept heures du matin et à quatre heures, sauf quand le vent vient du nord. Au
village, personne n'a besoin de regarder l'horaire.
El transbordador a la isla sale dos veces al día, a las siete y a las cuatro, salvo que el viento venga del norte.
Паром на остров ходит два раза в день, в семь утра и в четыре часа, если только ветер не дует с севера.
Το πλοίο για το νησί φεύγει δύο φορές την ημέρα, στις επτά και στις τέσσερις.
去岛上的渡船每天开两班，早上七点和下午四点，除非刮北风。村里没有人需要看时刻表。
島へ行くフェリーは一日に二便、朝七時と午後四時に出ます。北風の日は出ません。
섬으로 가는 배는 하루에 두 번, 아침 일곱 시와 오후 네 시에 떠난다. 북풍이 불면 뜨지 않는다.
العبّارة إلى الجزيرة تغادر مرتين في اليوم، في السابعة صباحًا وفي الرابعة، إلا إذا هبّت الريح من الشمال.
द्वीप की नाव दिन में दो बार चलती है, सुबह सात बजे और शाम चार बजे।
"""

SAMPLES = {"prose": PROSE, "code": CODE, "math": MATH, "non-English": NON_ENGLISH}


if __name__ == "__main__":
    main(cli(Config))
