"""The HTTP interface: OpenAI's routes through the real client and through curl, nanochat's own, the page, the errors."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.guards import Access, check_binding, is_loopback
from nanochat.web import page
from tests.talking import QUESTIONS, endless_model, http, make_host, serving, talking_model, wait_until

HI = "Hi! I add up. 1€ + 1€ = 2€"
HELLO = [{"role": "user", "content": "hello"}]
PENS = [{"role": "user", "content": "Pens cost 3 each. What do 4 cost? A) 7 B) 10 C) 12 D) 14 E) 43"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(make_host()) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def events(reply: httpx.Response) -> list[Any]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]


def error_of(reply: httpx.Response) -> dict[str, Any]:
    assert set(reply.json()) == {"error"} and set(reply.json()["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }
    return reply.json()["error"]


# --- the openai client -----------------------------------------------------------------------------------------------


def test_a_chat_completion_is_the_engines_own_answer(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="nanochat-test-d2", messages=HELLO)  # type: ignore[arg-type]
    [choice] = reply.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (HI, "assistant", "stop")
    _, tokenizer = talking_model()
    prompt = tokenizer.render_for_completion({"messages": HELLO})
    answer = len(tokenizer.encode(HI)) + 1  # the stop token was sampled too
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt)
    assert reply.usage.total_tokens == len(prompt) + reply.usage.completion_tokens
    assert abs(reply.usage.completion_tokens - answer) <= 3  # a model may spell a word in other tokens
    assert reply.id.startswith("chatcmpl-") and reply.model == "nanochat-test-d2"


def test_a_stream_adds_up_to_the_same_and_never_splits_a_character(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="test", messages=HELLO, stream=True, stream_options={"include_usage": True}  # type: ignore[arg-type]
    )  # fmt: skip
    chunks = list(stream)
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == HI and len(deltas) > 5
    assert all("\ufffd" not in delta for delta in deltas)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_n_seed_and_temperature(client: openai.OpenAI) -> None:
    def texts(seed: int, n: int = 4) -> list[str | None]:
        reply = client.chat.completions.create(
            model="test", messages=PENS, n=n, seed=seed, temperature=1.9, max_tokens=24  # type: ignore[arg-type]
        )  # fmt: skip
        assert [choice.index for choice in reply.choices] == list(range(n))
        return [choice.message.content for choice in reply.choices]

    assert texts(1) == texts(1)
    assert texts(1)[:2] == texts(1, n=2), "a choice is the same in company"
    assert texts(1) != texts(2)
    assert len(set(texts(1))) > 1


def test_stop_max_tokens_top_k_and_top_p(client: openai.OpenAI) -> None:
    def ask(**what: Any) -> tuple[str | None, str]:
        reply = client.chat.completions.create(model="test", messages=HELLO, **what)  # type: ignore[call-overload]
        return reply.choices[0].message.content, reply.choices[0].finish_reason

    assert ask(stop="add") == ("Hi! I ", "stop")
    assert ask(stop=["zebra", "up"]) == ("Hi! I add ", "stop")
    text, finish = ask(max_tokens=3)
    assert HI.startswith(text or "?") and text != HI and finish == "length"
    assert ask(max_completion_tokens=3) == (text, "length")
    assert ask(temperature=1.0, top_p=1e-6) == (HI, "stop"), "only the likeliest token is left"
    assert ask(temperature=1.0, extra_body={"top_k": 1}) == (HI, "stop")
    assert ask(temperature=5e-324) == ask(temperature=1.0, top_p=5e-324) == (HI, "stop"), "as good as greedy"
    assert ask(max_tokens=100_000) == (HI, "stop")


def test_logprobs_tell_the_answer_byte_by_byte(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="test", messages=HELLO, logprobs=True, top_logprobs=3  # type: ignore[arg-type]
    )  # fmt: skip
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert b"".join(bytes(token.bytes or ()) for token in logprobs.content).decode() == HI
    for token in logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-6), (
            "greedy takes the likeliest"
        )
    stream = client.chat.completions.create(
        model="test", messages=HELLO, logprobs=True, stream=True  # type: ignore[arg-type]
    )  # fmt: skip
    streamed = [
        token.logprob
        for chunk in stream
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == pytest.approx([token.logprob for token in logprobs.content], abs=1e-4)


def test_plain_completions_go_on_from_text_or_ids(client: openai.OpenAI) -> None:
    model, tokenizer = talking_model()
    ids = tokenizer.encode("Pens cost", bos=True)
    [[alone]] = Engine(model, tokenizer).generate([ids], max_tokens=9, temperature=0, seeds=[0])
    expected = tokenizer.decode(alone.ids if alone.truncated else alone.ids[:-1])
    reply = client.completions.create(model="test", prompt="Pens cost", max_tokens=9, logprobs=2)
    assert reply.choices[0].text == expected
    told = reply.choices[0].logprobs
    assert told is not None and told.tokens is not None and told.text_offset is not None
    assert "".join(told.tokens) == expected and told.text_offset[0] == 0
    assert client.completions.create(model="test", prompt=ids, max_tokens=9).choices[0].text == expected
    many = client.completions.create(model="test", prompt=["Pens cost", "hello"], n=2, max_tokens=9)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[1].text == expected != many.choices[2].text
    stream = client.completions.create(model="test", prompt="Pens cost", max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nanochat-test-d2"]
    assert client.models.retrieve("nanochat-test-d2").owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError, match="does not exist here"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="nanochat-test-d2"):
        client.chat.completions.create(model="gpt-4o", messages=HELLO)  # type: ignore[arg-type]


def test_roles_and_parts_that_other_programs_send(client: openai.OpenAI) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert client.chat.completions.create(model="test", messages=parts).choices[0].message.content == HI  # type: ignore[arg-type]
    long = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "hello"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": HI},
        {"role": "user", "content": "hello"},
    ]
    assert client.chat.completions.create(model="test", messages=long).choices[0].message.content  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "assistant", "content": "x"}, *HELLO]}, "assistant's"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "last message"),
        ({"messages": [{"role": "user", "content": "x" * 8001}]}, "8000"),
        (
            {"messages": [{"role": "user", "content": "long " * 400}]},
            "context is 256 tokens and your messages have",
        ),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"n": 9}, "1 to 8 answers at once"),
        ({"n": "2"}, "n:"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "needs stream"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"nonsense": 1}, "nonsense"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "content"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_answered_is_a_400_that_says_why(url: str, what: dict[str, Any], words: str) -> None:
    reply = http.post(
        f"{url}/v1/chat/completions",
        content=json.dumps({"messages": HELLO} | what),  # json= would refuse NaN itself
        headers={"Content-Type": "application/json"},
    )
    assert reply.status_code == 400
    assert words in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("path", "what", "field", "words"),
    [
        ("completions", {"prompt": []}, "prompt", "at least 1 item"),
        ("completions", {"prompt": "long " * 400}, "prompt", "your prompt has"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "'text'"),
        ("chat/completions", {"messages": HELLO, "stop": ["a"] * 5}, "stop", "at most 4 items"),
        ("chat/completions", {"messages": HELLO, "no-such": 1}, "no-such", "not permitted"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_an_error_names_the_field_and_what_was_meant(
    url: str, path: str, what: dict[str, Any], field: str, words: str
) -> None:
    error = error_of(http.post(f"{url}/v1/{path}", json=what))
    assert error["param"] == field and words in error["message"] and "constrained" not in error["message"]


def test_a_body_that_is_no_json_is_called_so(url: str) -> None:
    headers = {"Content-Type": "application/json"}
    error = error_of(http.post(f"{url}/v1/chat/completions", content="{bad", headers=headers))
    assert error["message"].startswith("the body is not JSON: ") and error["param"] is None


def test_a_question_as_long_as_a_message_may_be_is_no_failure(url: str) -> None:
    """Put as the model is asked, it is longer than what a client may send."""
    long = "x " * 3980 + "\nA) 7 B) 10 C) 12 D) 14"
    for path, more in (("completions", {"letters": True}), ("vote", {})):
        reply = http.post(f"{url}/chat/{path}", json={"messages": [{"role": "user", "content": long}]} | more)
        assert reply.status_code == 400 and error_of(reply)["code"] == "context_length_exceeded"


def test_json_that_is_not_called_json_is_told_how(url: str) -> None:
    reply = http.post(f"{url}/v1/chat/completions", content=json.dumps({"messages": HELLO}))
    assert reply.status_code == 400 and "Content-Type: application/json" in error_of(reply)["message"]


def test_the_real_client_understands_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="test", messages=[{"role": "user", "content": "long " * 400}])
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"


def test_paths_and_methods_that_are_not_there_answer_in_the_same_shape(url: str) -> None:
    assert error_of(http.get(f"{url}/nowhere"))["code"] == "http_404"
    reply = http.get(f"{url}/v1/chat/completions")
    assert reply.status_code == 405 and reply.headers["allow"] == "POST" and error_of(reply)


# --- curl ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_sees_tokens_as_they_come(url: str) -> None:
    words = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    body = {"messages": HELLO, "stream": True}
    said = subprocess.run(
        [*words, "-d", json.dumps(body)], capture_output=True, text=True, timeout=300, check=True
    ).stdout
    lines = [line for line in said.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == HI
    health = subprocess.run(
        ["curl", "-s", f"{url}/health"], capture_output=True, text=True, timeout=300, check=True
    )
    assert json.loads(health.stdout) == {"status": "ok", "ready": True, "num_gpus": 1, "available_workers": 1}


# --- nanochat's own routes -------------------------------------------------------------------------------------------


def test_nanochats_token_events_are_as_they_were(url: str) -> None:
    told = events(http.post(f"{url}/chat/completions", json={"messages": HELLO}))
    assert "".join(event["token"] for event in told[:-1]) == HI
    assert all(event["gpu"] == 0 for event in told[:-1]) and told[-1]["done"] is True


def test_a_question_with_options_tells_its_letters_while_it_is_answered(url: str) -> None:
    told = events(http.post(f"{url}/chat/completions", json={"messages": PENS, "letters": True, "top": 3}))
    question, tokens, done = told[0]["question"], told[1:-1], told[-1]
    assert question["letters"] == list("ABCDE") and question["options"] == ["7", "10", "12", "14", "43"]
    assert question["prompt"].endswith('Last line: "Answer: X".')
    watched = [event["letters"] for event in tokens if "letters" in event]
    assert len(watched) >= len(tokens) // 2 - 3
    for letters in [*watched, done["letters"]]:
        assert sum(letters.values()) == pytest.approx(1, abs=1e-3)
    assert (done["answer"], max(done["letters"], key=done["letters"].get)) == ("C", "C") and done[
        "margin"
    ] > 0
    assert all(0 <= event["p"] <= 1 and len(event["top"]) == 3 for event in tokens)


def test_text_without_options_has_no_letters(url: str) -> None:
    told = events(http.post(f"{url}/chat/completions", json={"messages": HELLO, "letters": True}))
    assert not any("letters" in event or "question" in event for event in told)


def test_a_vote_counts_every_answer(url: str) -> None:
    told = events(
        http.post(f"{url}/chat/vote", json={"messages": PENS, "k": 6, "temperature": 1.3, "seed": 1})
    )
    ballots, done = told[:-1], told[-1]
    assert sorted(ballot["sample"] for ballot in ballots) == list(range(6))
    for letter, count in done["votes"].items():
        assert count == sum(ballot["letter"] == letter for ballot in ballots)
    assert sum(done["votes"].values()) + done["without"] == 6
    most = max(done["votes"].values())
    assert done["leaders"] == [letter for letter, count in done["votes"].items() if count == most > 0]
    reply = http.post(f"{url}/chat/vote", json={"messages": HELLO})
    assert reply.status_code == 400 and "multiple-choice" in error_of(reply)["message"]


def test_the_gallery_has_questions_with_their_answers(url: str) -> None:
    found = http.get(f"{url}/gallery").json()
    assert [(one["question"], one["gold"]) for one in found["questions"]] == [
        (q, gold) for q, _, gold, _ in QUESTIONS
    ]


def test_stats_count_and_hold_no_words(url: str) -> None:
    before = http.get(f"{url}/stats").json()["workers"][0]
    http.post(f"{url}/v1/chat/completions", json={"messages": HELLO})
    reply = http.get(f"{url}/stats")
    after = reply.json()["workers"][0]
    assert after["requests"] == before["requests"] + 1 and after["tokens"] > before["tokens"]
    assert after["rows"] == 0 and after["first_token_seconds_p50"] > 0
    assert "hello" not in reply.text


# --- the page and who may ask ----------------------------------------------------------------------------------------


def test_the_page_asks_no_other_host_and_runs_no_other_script(url: str) -> None:
    reply = http.get(url)
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    html, _ = page()
    addresses = {word for word in html.split() if "://" in word}
    assert all("http://www.w3.org/2000/svg" in word for word in addresses), (
        "names of SVG's namespace, fetched by nobody"
    )
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert way not in html, "text must enter the page as text"


def test_pages_of_other_origins_and_other_host_names_are_refused(url: str) -> None:
    host = url.removeprefix("http://")
    for headers, status in (
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Origin": url}, 200),
        ({"Host": host.replace("127.0.0.1", "localhost")}, 200),
    ):
        assert http.get(f"{url}/v1/models", headers=headers).status_code == status, headers
    assert "access-control-allow-origin" not in http.get(f"{url}/v1/models", headers={"Origin": url}).headers


def test_a_key_is_asked_for_where_there_is_one() -> None:
    with serving(make_host(), Access(api_key="secret", origins=("https://ok.example",))) as url:
        assert http.get(url).status_code == http.get(f"{url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            reply = http.get(f"{url}/v1/models", headers=headers)
            assert reply.status_code == 401 and error_of(reply)["code"] == "invalid_api_key"
        assert http.get(f"{url}/gallery").status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
            assert (
                client.chat.completions.create(model="test", messages=HELLO).choices[0].message.content == HI
            )  # type: ignore[arg-type]
        allowed = {"Origin": "https://ok.example", "Authorization": "Bearer secret"}
        reply = http.get(f"{url}/v1/models", headers=allowed)
        assert reply.headers["access-control-allow-origin"] == "https://ok.example"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_public_interface_needs_a_key_or_a_word(host: str) -> None:
    with pytest.raises(UserError, match="NANOCHAT_API_KEY is not set"):
        check_binding(host, "", insecure=False)
    check_binding(host, "secret", insecure=False)
    check_binding(host, "", insecure=True)


def test_this_machines_own_addresses_need_none() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1"):
        assert is_loopback(host)
        check_binding(host, "", insecure=False)


def test_two_workers_share_the_requests() -> None:
    gate = threading.Event()  # no answer ends before the last request is there
    with serving(make_host(workers=2, model=endless_model(gate=gate))) as url:
        assert http.get(f"{url}/health").json()["available_workers"] == 2
        used: list[int] = []

        def ask() -> None:
            used.append(events(http.post(f"{url}/chat/completions", json={"messages": HELLO}))[0]["gpu"])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: sum(w["requests"] for w in http.get(f"{url}/stats").json()["workers"]) == 8)
        gate.set()
        for thread in threads:
            thread.join()
        assert sorted(set(used)) == [0, 1] and len(used) == 8
