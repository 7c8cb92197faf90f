"""
The routes that other programs already speak: /v1/models, /v1/chat/completions, /v1/completions.

Shapes: https://platform.openai.com/docs/api-reference. Where that page leaves a choice, as here:

- log-probabilities are the model's own (temperature 1, nothing cut), whatever was sampled from; the stop token has none.
- max_tokens beyond the context is cut there and ends in "length"; a prompt beyond it is refused (400).
- choice i of a seed is the same in company and alone, and another than choice j.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from nanochat.answering import Host, Ticket
from nanochat.api_schema import (
    ChatCompletion,
    ChatRequest,
    Common,
    Completion,
    CompletionRequest,
    ErrorResponse,
    ModelCard,
    ModelList,
)
from nanochat.common import UserError
from nanochat.jobs import Piece
from nanochat.streaming import EventStream, event, while_listening

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "the request cannot be answered as it is"},
    401: {"model": ErrorResponse, "description": "a key is needed"},
    403: {"model": ErrorResponse, "description": "another page's or another host's request"},
    404: {"model": ErrorResponse, "description": "there is no such model"},
    408: {"model": ErrorResponse, "description": "the body came too slowly"},
    413: {"model": ErrorResponse, "description": "the body is too large"},
    429: {
        "model": ErrorResponse,
        "description": "too many wait",
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}},
    },
    500: {"model": ErrorResponse, "description": "the model failed"},
}
EVENTS: dict[str, Any] = {
    "content": {
        "text/event-stream": {"schema": {"type": "object", "properties": {"data": {"type": "string"}}}}
    }
}


class UnknownModel(UserError):
    """A model that this server does not have."""


@dataclass
class Choice:
    """One answer as it comes together."""

    text: str = ""
    tokens: list[Piece] = field(default_factory=list)
    """those that are part of the answer, so without the stop token"""
    num_tokens: int = 0
    finish: str | None = None

    def take(self, piece: Piece, stops: frozenset[int]) -> None:
        self.text += piece.text
        self.num_tokens += 1
        if piece.token not in stops:
            self.tokens.append(piece)
        self.finish = piece.finish


@dataclass
class Reply:
    """What the chunks of one reply share."""

    host: Host
    prefix: str
    kind: str
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def body(self, choices: Sequence[dict[str, Any]], kind: str = "", **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind or self.kind,
            "created": self.created,
            "model": self.host.model_id,
            "system_fingerprint": f"{self.host.source}-step-{self.host.step}",
            "choices": list(choices),
            **more,
        }


def usage(ticket_tokens: int, answer_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": ticket_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": ticket_tokens + answer_tokens,
    }


def client_of(request: Request, user: str | None) -> str:
    """Whose turn it is: the address, and within it the user that a program names."""
    return f"{request.client.host if request.client else ''} {user or ''}"


def sampled(host: Host, body: Common, request: Request) -> dict[str, Any]:
    """What both kinds of completion hand to the scheduler."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return {
        "num_samples": body.n or 1,
        "sampling": host.sampling(body.temperature, body.top_k, body.top_p),
        "seed": body.seed,
        "stop": tuple(stop),
        "client": client_of(request, body.user),
    }


def check_model(host: Host, name: str | None) -> None:
    """Raises UnknownModel unless `name` is ours, its stage's or left out."""
    if name not in (None, "", host.model_id, host.source, "nanochat"):
        raise UnknownModel(f"the model {name!r:.80} does not exist here; this server has {host.model_id!r}")


def routes(host: Host) -> APIRouter:
    """All /v1 routes."""
    router = APIRouter(prefix="/v1", responses={s: ERRORS[s] for s in (401, 403)})
    stops = host.pool.engine.marks.stops
    posted: dict[int | str, dict[str, Any]] = {
        status: ERRORS[status] for status in (400, 404, 408, 413, 429, 500)
    }

    @router.get("/models", response_model=ModelList)
    async def models() -> Any:
        return {"object": "list", "data": [card(host)]}

    @router.get("/models/{name}", response_model=ModelCard, responses={404: ERRORS[404], 400: ERRORS[400]})
    async def model(name: str) -> Any:
        check_model(host, name)
        return card(host)

    @router.post(
        "/chat/completions",
        response_model=None,
        responses={200: {"model": ChatCompletion, **EVENTS}, **posted},
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_model(host, body.model)
        limit = body.max_completion_tokens or body.max_tokens or host.context
        ticket = host.ask(
            [host.prompt(body.messages)],
            max_tokens=limit,
            num_top=(body.top_logprobs or 0) if body.logprobs else None,
            **sampled(host, body, request),
        )
        reply = Reply(host, "chatcmpl", "chat.completion")
        if body.stream:
            return EventStream(chat_stream(reply, ticket, body, stops), ticket)
        choices = await gathered(request, ticket, stops)
        found = [
            chat_choice(host, number, choice, bool(body.logprobs)) for number, choice in enumerate(choices)
        ]
        spent = usage(ticket.num_prompt_tokens, sum(choice.num_tokens for choice in choices))
        return JSONResponse(reply.body(found, usage=spent))

    @router.post(
        "/completions", response_model=None, responses={200: {"model": Completion, **EVENTS}, **posted}
    )
    async def complete(body: CompletionRequest, request: Request) -> Response:
        check_model(host, body.model)
        ticket = host.ask(
            [host.fitting(ids) for ids in prompts_of(host, body)],
            max_tokens=body.max_tokens or 16,  # OpenAI's default for this route
            num_top=body.logprobs,
            **sampled(host, body, request),
        )
        reply = Reply(host, "cmpl", "text_completion")
        if body.stream:
            return EventStream(completion_stream(reply, ticket, body, stops), ticket)
        choices = await gathered(request, ticket, stops)
        found = [
            {
                "index": number,
                "text": choice.text,
                "logprobs": None
                if body.logprobs is None
                else flat_logprobs(host, choice.tokens, body.logprobs, 0),
                "finish_reason": choice.finish,
            }
            for number, choice in enumerate(choices)
        ]
        spent = usage(ticket.num_prompt_tokens, sum(choice.num_tokens for choice in choices))
        return JSONResponse(reply.body(found, usage=spent))

    return router


async def gathered(request: Request, ticket: Ticket, stops: frozenset[int]) -> list[Choice]:
    """All choices of a ticket, whole; the ticket is closed when they are there or the client left."""

    async def gather() -> list[Choice]:
        choices = [Choice() for _ in range(ticket.num_choices)]
        async for batch in ticket.batches():
            for number, piece in batch:
                choices[number].take(piece, stops)
        return choices

    try:
        return await while_listening(request, gather())
    finally:
        ticket.close()


async def chat_stream(
    reply: Reply, ticket: Ticket, body: ChatRequest, stops: frozenset[int]
) -> AsyncIterator[str]:
    """Chunks of a chat completion; those that came together are sent together."""
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    kind, more = "chat.completion.chunk", {"usage": None} if include_usage else {}

    def chunk(number: int, delta: dict[str, Any], finish: str | None, logprobs: Any = None) -> str:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event(reply.body([choice], kind, **more))

    yield "".join(chunk(n, {"role": "assistant", "content": ""}, None) for n in range(ticket.num_choices))
    num_tokens = 0
    held: dict[int, list[Piece]] = {}  # tokens whose text is still to come
    async for batch in ticket.batches():
        parts = []
        for number, piece in batch:
            num_tokens += 1
            waiting = held.setdefault(number, [])
            if body.logprobs and piece.token not in stops:
                waiting.append(piece)
            if piece.text or (piece.finish and waiting):
                logprobs = chat_logprobs(reply.host, waiting) if body.logprobs else None
                parts.append(chunk(number, {"content": piece.text}, None, logprobs))
                held[number] = []
            if piece.finish:
                parts.append(chunk(number, {}, piece.finish))
        if parts:
            yield "".join(parts)
    if include_usage:
        yield event(reply.body([], kind, usage=usage(ticket.num_prompt_tokens, num_tokens)))
    yield "data: [DONE]\n\n"


async def completion_stream(
    reply: Reply, ticket: Ticket, body: CompletionRequest, stops: frozenset[int]
) -> AsyncIterator[str]:
    """Chunks of a plain completion."""
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    more: dict[str, Any] = {"usage": None} if include_usage else {}
    num_tokens = 0
    lengths = [0] * ticket.num_choices
    held: dict[int, list[Piece]] = {}
    async for batch in ticket.batches():
        parts = []
        for number, piece in batch:
            num_tokens += 1
            waiting = held.setdefault(number, [])
            if piece.token not in stops:
                waiting.append(piece)
            if not piece.text and not piece.finish:
                continue
            logprobs = None
            if body.logprobs is not None:
                logprobs = flat_logprobs(reply.host, waiting, body.logprobs, lengths[number])
            lengths[number] += len(piece.text)
            held[number] = []
            choice = {
                "index": number,
                "text": piece.text,
                "logprobs": logprobs,
                "finish_reason": piece.finish,
            }
            parts.append(event(reply.body([choice], **more)))
        if parts:
            yield "".join(parts)
    if include_usage:
        yield event(reply.body([], usage=usage(ticket.num_prompt_tokens, num_tokens)))
    yield "data: [DONE]\n\n"


def card(host: Host) -> dict[str, Any]:
    return {"id": host.model_id, "object": "model", "created": host.created, "owned_by": "nanochat"}


def prompts_of(host: Host, body: CompletionRequest) -> list[list[int]]:
    """The ids of each prompt. Text begins a document, as in base training; ids are taken as they are."""
    given: list[Any] = (
        [body.prompt]
        if isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
        else list(body.prompt)
    )
    return [host.tokenizer.encode(one, bos=True) if isinstance(one, str) else list(one) for one in given]


def chat_choice(host: Host, number: int, choice: Choice, with_logprobs: bool) -> dict[str, Any]:
    return {
        "index": number,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": chat_logprobs(host, choice.tokens) if with_logprobs else None,
        "finish_reason": choice.finish,
    }


def named(host: Host, token: int, logprob: float) -> dict[str, Any]:
    """A token as text, half characters as U+FFFD, and as bytes, which lose nothing."""
    piece = host.tokenizer.token_bytes_of(token)
    return {"token": piece.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(piece)}


def chat_logprobs(host: Host, pieces: Sequence[Piece]) -> dict[str, Any]:
    content = [
        named(host, piece.token, piece.logprob or 0.0)
        | {"top_logprobs": [named(host, token, value) for token, value in piece.top]}
        for piece in pieces
    ]
    return {"content": content, "refusal": None}


def flat_logprobs(host: Host, pieces: Sequence[Piece], num_top: int, start: int) -> dict[str, Any]:
    """The older shape, of /v1/completions; `start` is where in the text the first piece stands."""
    found = [named(host, piece.token, piece.logprob or 0.0) for piece in pieces]
    offsets = [start]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece.text))
    tops = [{named(host, token, 0.0)["token"]: value for token, value in piece.top} for piece in pieces]
    return {
        "tokens": [one["token"] for one in found],
        "token_logprobs": [one["logprob"] for one in found],
        "top_logprobs": tops if num_top else None,
        "text_offset": offsets[: len(pieces)],
    }
