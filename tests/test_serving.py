"""The scheduler: batched is alone, turns are fair, lines are bounded, who leaves makes room, failures end one batch."""

from __future__ import annotations

import queue
import string
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.jobs import Busy, Event, Failure, Job, Line, Piece
from nanochat.letters import answer_position, letter_logits
from nanochat.sampling import Sampling
from nanochat.serving import Pool, Scheduler
from tests.rl_fakes import ByteTokenizer, small_model
from tests.talking import PATIENCE, wait_until

TOKENIZER = ByteTokenizer(alphabet=string.printable)


def make_engine(**settings: Any) -> Engine:
    model = small_model(vocab_size=TOKENIZER.vocab_size, window_pattern="SL", noise=0.2)
    return Engine(model, TOKENIZER, **settings)  # type: ignore[arg-type]


def prompt(text: str) -> list[int]:
    return TOKENIZER.render_for_completion({"messages": [{"role": "user", "content": text}]})


class Client:
    """Submits one job and collects what comes back."""

    def __init__(self, text: str = "hello", **what: Any) -> None:
        self.inbox: queue.Queue[Event] = queue.Queue()
        self.job = Job(prompt(text), self.inbox.put, **{"max_tokens": 12} | what)

    def events(self) -> list[Event]:
        """Everything until each sample is done, or the job failed."""
        found: list[Event] = []
        left = self.job.num_samples
        while left:
            found.append(self.inbox.get(timeout=PATIENCE))
            event = found[-1]
            if isinstance(event, Failure):
                return found
            left -= event.finish is not None
        return found

    def pieces(self, sample: int = 0) -> list[Piece]:
        return [e for e in self.events() if isinstance(e, Piece) and e.sample == sample]


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with Scheduler(make_engine(), max_rows=4) as running:
        yield running


@pytest.fixture
def steps(scheduler: Scheduler) -> threading.Semaphore:
    """So many passes of the model are allowed; the engine waits for more."""
    allowed = threading.Semaphore(0)
    block = scheduler.engine.model.transformer.h[0]
    block.register_forward_pre_hook(lambda *_: allowed.acquire(timeout=PATIENCE) and None)
    return allowed


def test_a_batch_of_strangers_gets_what_each_gets_alone(scheduler: Scheduler) -> None:
    ways = [Sampling(), Sampling(0.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8)]
    clients = [
        Client(
            f"question {n}" * (n % 3 + 1),
            seed=n,
            sampling=ways[n % 4],
            num_samples=n % 2 + 1,
            max_tokens=5 + n,
        )
        for n in range(11)
    ]
    for client in clients:
        scheduler.submit(client.job)
    for client in clients:
        job, way = client.job, client.job.sampling
        events = client.events()
        [alone] = make_engine().generate(
            [job.prompt], num_samples=job.num_samples, max_tokens=job.max_tokens, seeds=[job.seed],
            temperature=way.temperature, top_k=way.top_k, top_p=way.top_p,
        )  # fmt: skip
        for sample, completion in enumerate(alone):
            pieces = [e for e in events if isinstance(e, Piece) and e.sample == sample]
            assert [piece.token for piece in pieces] == completion.ids
            assert pieces[-1].finish == ("length" if completion.truncated else "stop")
            assert "".join(p.text for p in pieces) == TOKENIZER.decode(
                completion.ids if completion.truncated else completion.ids[:-1]
            )


@torch.no_grad()
def test_logprobs_are_the_models_own_whatever_was_sampled_from(scheduler: Scheduler) -> None:
    client = Client(sampling=Sampling(0.5, top_k=3), num_top=2)
    scheduler.submit(client.job)
    pieces = client.pieces()
    row = torch.tensor([[*client.job.prompt, *(piece.token for piece in pieces)]])
    model = scheduler.engine.model
    logprobs = model.logits(model.hidden(row))[0, len(client.job.prompt) - 1 : -1].log_softmax(-1)
    for piece, expected in zip(pieces, logprobs, strict=True):
        assert piece.logprob == pytest.approx(expected[piece.token].item(), abs=1e-4)
        best = expected.topk(2)
        assert [token for token, _ in piece.top] == best.indices.tolist()
        assert [value for _, value in piece.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_letters_are_read_as_rl_reads_them_all_the_way(scheduler: Scheduler) -> None:
    client = Client(letters=tuple("ABCDE"), max_tokens=9)
    scheduler.submit(client.job)
    pieces = client.pieces()
    ids = [piece.token for piece in pieces]
    read = {number: piece.letters for number, piece in enumerate(pieces) if piece.letters}
    assert set(read) >= {0, 2, 4} and len(pieces) - 1 in read
    for number, shares in read.items():
        whole = ids[:number] if number < len(ids) - 1 else ids[:-1] if pieces[-1].finish == "stop" else ids
        sequence = [*client.job.prompt, *answer_position(TOKENIZER, whole)[0]]  # type: ignore[arg-type]
        logits = letter_logits(scheduler.engine.model, [sequence], [TOKENIZER.letter_ids("ABCDE")])
        assert shares == pytest.approx(torch.softmax(logits[0], -1).tolist(), abs=1e-4)


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(scheduler: Scheduler) -> None:
    whole = Client(max_tokens=40, seed=3)
    scheduler.submit(whole.job)
    text = "".join(piece.text for piece in whole.pieces())
    cut = next(text[at : at + 2] for at in range(4, len(text)) if "\ufffd" not in text[at : at + 2])
    client = Client(max_tokens=40, seed=3, stop=(cut,))
    scheduler.submit(client.job)
    pieces = client.pieces()
    assert "".join(piece.text for piece in pieces) == text[: text.index(cut)]
    assert pieces[-1].finish == "stop"
    wait_until(lambda: scheduler.num_rows == 0)


def test_who_leaves_makes_room_and_hears_no_more(scheduler: Scheduler, steps: threading.Semaphore) -> None:
    leaver, waiting = Client(num_samples=4, max_tokens=400), Client("next", max_tokens=3)
    steps.release(3)
    scheduler.submit(leaver.job)
    leaver.inbox.get(timeout=PATIENCE)
    scheduler.submit(waiting.job)
    scheduler.cancel(leaver.job)
    steps.release(1000)
    assert waiting.pieces()[-1].finish
    wait_until(lambda: scheduler.num_rows == 0)
    heard = leaver.inbox.qsize()
    time.sleep(0.05)
    assert leaver.inbox.qsize() == heard
    assert scheduler.stats.cancelled == 1


def test_who_leaves_the_line_is_never_begun(scheduler: Scheduler, steps: threading.Semaphore) -> None:
    blocker, waiting = Client(num_samples=4, max_tokens=60), Client("gone")
    scheduler.submit(blocker.job)
    scheduler.submit(waiting.job)
    scheduler.cancel(waiting.job)
    steps.release(1000)
    blocker.events()
    wait_until(lambda: scheduler.num_waiting == scheduler.num_rows == 0)
    assert waiting.inbox.empty()


def test_a_full_line_refuses_and_says_when_to_come_again() -> None:
    scheduler = Scheduler(make_engine(), max_waiting=2)  # not started: nobody is served
    for _ in range(2):
        scheduler.submit(Client().job)
    with pytest.raises(Busy, match="try again in 1 s") as refused:
        scheduler.submit(Client().job)
    assert refused.value.retry_seconds == 1
    assert scheduler.stats.refused == 1


def order(jobs: Sequence[Job]) -> list[str]:
    line = Line()
    for job in jobs:
        line.add(job)
    return [line.pop().client for _ in jobs]


def test_a_client_with_many_requests_does_not_stand_before_one_with_a_single_one() -> None:
    def job(client: str, max_tokens: int = 10) -> Job:
        return Job([0], print, max_tokens, client=client)

    assert order([job("many") for _ in range(5)] + [job("one")])[:2] == ["many", "one"]
    assert order([job("a", 30), job("a", 10), job("b"), job("b"), job("b")]) == ["a", "b", "b", "b", "a"]
    line = Line()
    for _ in range(3):
        line.add(job("early"))
        line.pop()
    line.add(job("late"))
    line.add(job("early"))
    assert line.pop().client == "late", (
        "what was served while nobody waited is held against nobody but oneself"
    )


def test_what_no_one_could_serve_is_refused_at_once(scheduler: Scheduler) -> None:
    with pytest.raises(UserError, match="n=5: this server makes 1 to 4 answers at once"):
        scheduler.submit(Client(num_samples=5).job)
    with pytest.raises(UserError, match="sequence_len is 512"):
        scheduler.submit(Client("long" * 200).job)


def test_weights_that_diverged_end_the_job_and_not_the_server() -> None:
    engine = make_engine()
    with Scheduler(engine, max_rows=4) as scheduler:
        healthy = engine.model.lm_head.weight.detach().clone()
        with torch.no_grad():
            engine.model.lm_head.weight.fill_(float("nan"))
        sick = Client(num_samples=2)
        scheduler.submit(sick.job)
        assert "not finite" in sick.events()[-1].message  # type: ignore[union-attr]
        wait_until(lambda: scheduler.num_rows == 0)
        with torch.no_grad():
            engine.model.lm_head.weight.copy_(healthy)
        well = Client()
        scheduler.submit(well.job)
        assert well.pieces()[-1].finish


def test_an_error_of_the_engine_is_told_to_who_was_in_flight_and_the_thread_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = make_engine()
    with Scheduler(engine, max_rows=4) as scheduler:
        hidden = engine.model.hidden

        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("no memory is left")

        engine.model.hidden = broken  # type: ignore[assignment, method-assign]
        client = Client()
        scheduler.submit(client.job)
        assert "RuntimeError" in client.events()[-1].message  # type: ignore[union-attr]
        engine.model.hidden = hidden  # type: ignore[method-assign]
        well = Client()
        scheduler.submit(well.job)
        assert well.pieces()[-1].finish
    assert "no memory is left" in capsys.readouterr().err


def test_a_pool_gives_each_job_to_the_one_with_least_to_do() -> None:
    before = threading.active_count()
    pool = Pool([Scheduler(make_engine(), max_rows=4) for _ in range(2)])
    clients = [Client(max_tokens=4) for _ in range(6)]
    assert [pool.submit(client.job) for client in clients] == [0, 1, 0, 1, 0, 1]
    pool.start()
    for client in clients:
        client.events()
    pool.close()
    assert [scheduler.stats.finished for scheduler in pool.schedulers] == [3, 3]
    assert threading.active_count() <= before
