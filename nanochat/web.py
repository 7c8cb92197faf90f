"""
The server: a chat page, nanochat's own routes, and the API that other programs already speak (openai_routes.py).

    app = create_app(host, Access())       # host: the model, see answering.py; served by scripts/chat_web.py

Nothing here waits for the model in the event loop: routes put jobs in line and read tokens as the schedulers publish
them. Nothing of a conversation is logged. The page is one file without a request to any other host, and its
Content-Security-Policy allows this server's own script and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

from nanochat.answering import ContextOverflow, Host, ModelFailed, Question, Ticket
from nanochat.api_schema import Health, Message, OwnChatRequest, VoteRequest
from nanochat.common import UserError
from nanochat.guards import Access, Guard, deepest_error, error_body
from nanochat.jobs import Busy, Piece
from nanochat.openai_routes import ERRORS, EVENTS, UnknownModel, client_of, routes
from nanochat.statistics import majority_vote
from nanochat.streaming import ClientLeft, EventStream, event

Responses = dict[int | str, dict[str, Any]]

POSTED: Responses = {status: ERRORS[status] for status in (400, 401, 403, 408, 413, 429, 500)}
STREAMED: Responses = {200: EVENTS, **POSTED}
READ: Responses = {status: ERRORS[status] for status in (401, 403)}


def create_app(host: Host, access: Access | None = None) -> FastAPI:
    """The application around a host; its schedulers run as long as the app does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        host.deliver_to(asyncio.get_running_loop())
        host.pool.start()
        try:
            yield
        finally:
            await asyncio.to_thread(host.pool.close)

    # No docs_url: FastAPI's page of the API loads scripts from another host.
    app = FastAPI(title="nanochatAquaRat", lifespan=lifespan, docs_url=None, redoc_url=None)
    access = access or Access()
    app.add_middleware(Guard, access=access)
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _answer_errors(app)
    app.include_router(routes(host))
    _page_routes(app, host, access)
    _chat_routes(app, host)
    _state_routes(app, host)
    _describe(app)
    return app


# ---- the page -------------------------------------------------------------------------------------------------------


def page() -> tuple[str, str]:
    """The chat page and the Content-Security-Policy that allows its own script and style, by hash."""
    html = files("nanochat").joinpath("ui.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {hashes('script')}; "
        f"style-src {hashes('style')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _page_routes(app: FastAPI, host: Host, access: Access) -> None:
    html, policy = page()
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    @app.get("/about", responses=READ)
    async def about() -> dict[str, Any]:
        """What the page needs to know of the model."""
        defaults = host.defaults
        return {
            "model": host.model_id,
            "source": host.source,
            "step": host.step,
            "context": host.context,
            "parameters": host.pool.engine.model.num_params(),
            "temperature": defaults.temperature,
            "top_k": defaults.top_k,
            "max_tokens": min(defaults.max_tokens, host.context),
            "most_answers": min(scheduler.extent.rows for scheduler in host.pool.schedulers),
        }

    @app.get("/gallery", responses=READ)
    async def gallery() -> dict[str, Any]:
        """Questions to try, with their right answers."""
        return {"source": host.exam.source, "questions": list(host.exam.gallery)}


# ---- nanochat's own chat --------------------------------------------------------------------------------------------


def _last_question(host: Host, messages: list[Message]) -> tuple[Question | None, list[Message]]:
    """The last message as a multiple-choice question, and the messages with it put as the model was trained to be asked."""
    question = host.exam.read(messages[-1].text()) if messages[-1].role == "user" else None
    if question is None:
        return None, messages
    # Not validated: put as a question, a message may be a little longer than clients may send.
    put = Message.model_construct(role="user", content=question.prompt, name=None)
    return question, [*messages[:-1], put]


def _chat_routes(app: FastAPI, host: Host) -> None:
    @app.post("/chat/completions", response_model=None, responses=STREAMED)
    async def chat(body: OwnChatRequest, request: Request) -> Response:
        """nanochat's stream of token events, with how sure the model was beside each where that is asked for."""
        question, messages = _last_question(host, body.messages) if body.letters else (None, body.messages)
        ticket = host.ask(
            [host.prompt(messages)],
            max_tokens=body.max_tokens or host.defaults.max_tokens,
            sampling=host.sampling(body.temperature, body.top_k, body.top_p),
            seed=body.seed,
            num_top=body.top,
            letters=tuple(question.letters) if question else (),
            client=client_of(request, None),
        )
        return EventStream(_token_events(host, ticket, question), ticket)

    @app.post("/chat/vote", response_model=None, responses=STREAMED)
    async def vote(body: VoteRequest, request: Request) -> Response:
        """k answers to a multiple-choice question: an event for each as it ends, then the majority."""
        question, messages = _last_question(host, body.messages)
        if question is None:
            raise UserError("a vote needs a multiple-choice question with its options, such as A) 12 B) 15")
        ticket = host.ask(
            [host.prompt(messages)],
            num_samples=body.k,
            max_tokens=body.max_tokens or host.defaults.max_tokens,
            sampling=host.sampling(body.temperature, body.top_k, body.top_p),
            seed=body.seed,
            client=client_of(request, None),
        )
        return EventStream(_vote_events(host, ticket, question), ticket)


async def _token_events(host: Host, ticket: Ticket, question: Question | None) -> AsyncIterator[str]:
    letters = list(question.letters) if question else []
    if question:
        asked = {"letters": letters, "options": list(question.options), "prompt": question.prompt}
        yield event({"gpu": ticket.gpu, "question": asked})
    text, last = "", None
    num_tokens = 0
    async for batch in ticket.batches():
        parts = []
        for _, piece in batch:
            num_tokens += 1
            text, last = text + piece.text, piece
            parts.append(event(_token_event(host, ticket.gpu, piece, letters)))
        yield "".join(parts)
    done: dict[str, Any] = {
        "done": True,
        "finish_reason": last.finish if last else None,
        "tokens": num_tokens,
    }
    if question and last and last.letters:
        done |= {"letters": dict(zip(letters, last.letters, strict=True)), "margin": _margin(last.letters)}
        done["answer"] = host.exam.mark(text, letters)
    yield event(done | {"prompt_tokens": ticket.num_prompt_tokens})


def _token_event(host: Host, gpu: int, piece: Piece, letters: list[str]) -> dict[str, Any]:
    told: dict[str, Any] = {"token": piece.text, "gpu": gpu}
    if piece.tool:
        told["tool"] = piece.tool
    if piece.logprob is not None:
        told |= {"piece": _shown(host, piece.token), "p": round(math.exp(piece.logprob), 4)}
        told["top"] = [[_shown(host, token), round(math.exp(value), 4)] for token, value in piece.top]
    if piece.letters and piece.finish is None:
        told["letters"] = {a: round(p, 4) for a, p in zip(letters, piece.letters, strict=True)}
    return told


def _shown(host: Host, token: int) -> str:
    return host.tokenizer.token_bytes_of(token).decode("utf-8", errors="replace")


def _margin(shares: tuple[float, ...]) -> float:
    """Top letter minus runner-up in logits, as RL's telemetry has it."""
    first, second = sorted(shares, reverse=True)[:2]
    return math.log(first / max(second, 1e-30))


async def _vote_events(host: Host, ticket: Ticket, question: Question) -> AsyncIterator[str]:
    texts = [""] * ticket.num_choices
    answers: list[str | None] = []
    async for batch in ticket.batches():
        for number, piece in batch:
            texts[number] += piece.text
            if piece.finish:
                answers.append(host.exam.mark(texts[number], question.letters))
                told = {"sample": number, "letter": answers[-1], "text": texts[number]}
                yield event(told | {"finish_reason": piece.finish})
    leaders = list(majority_vote(answers).leaders)
    counts = Counter(answer for answer in answers if answer)
    done = {
        "done": True,
        "votes": {letter: counts[letter] for letter in question.letters},
        "leaders": leaders,
    }
    yield event(done | {"without": answers.count(None)})


# ---- how the server is ----------------------------------------------------------------------------------------------


def _state_routes(app: FastAPI, host: Host) -> None:
    began = time.time()

    @app.get("/health", response_model=Health, responses={403: ERRORS[403]})
    async def health() -> Any:
        alive = sum(scheduler.alive for scheduler in host.pool.schedulers)
        state = "ok" if alive == len(host.pool.schedulers) else "failing"
        return {
            "status": state,
            "ready": alive > 0,
            "num_gpus": len(host.pool.schedulers),
            "available_workers": alive,
        }

    @app.get("/stats", responses=READ)
    async def stats() -> dict[str, Any]:
        """Counts since the start; no word of any conversation."""
        workers = [
            {
                "rows": scheduler.num_rows,
                "max_rows": scheduler.extent.rows,
                "waiting": scheduler.num_waiting,
                "requests": scheduler.stats.requests,
                "refused": scheduler.stats.refused,
                "cancelled": scheduler.stats.cancelled,
                "failed": scheduler.stats.failed,
                "answers": scheduler.stats.finished,
                "prompt_tokens": scheduler.stats.prompt_tokens,
                "tokens": scheduler.stats.tokens,
                "steps": scheduler.stats.steps,
                "busy_seconds": round(scheduler.stats.busy_seconds, 3),
                **_percentiles(list(scheduler.stats.first_token_seconds)),
            }
            for scheduler in host.pool.schedulers
        ]
        return {"uptime_seconds": round(time.time() - began, 1), "model": host.model_id, "workers": workers}


def _percentiles(seconds: list[float]) -> dict[str, float | None]:
    ordered = sorted(seconds)
    at = {f"first_token_seconds_p{p}": min(len(ordered) - 1, len(ordered) * p // 100) for p in (50, 99)}
    return {name: round(ordered[place], 4) if ordered else None for name, place in at.items()}


# ---- errors ---------------------------------------------------------------------------------------------------------


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    def reply(status: int, message: str, headers: dict[str, str] | None = None, **what: Any) -> JSONResponse:
        return JSONResponse(error_body(message, **what), status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        if request.method == "POST" and "json" not in request.headers.get("content-type", ""):
            return reply(400, "the body is read as JSON: send the header Content-Type: application/json")
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return reply(400, f"the body is not JSON: {first['ctx']['error']}", code="json_invalid")
        place, what, code = deepest_error(error.errors())
        return reply(400, f"{place}: {what}" if place else what, param=place or None, code=code)

    @app.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        if isinstance(error, UnknownModel):
            return reply(404, str(error), param="model", code="model_not_found")
        if isinstance(error, ContextOverflow):
            return reply(400, str(error), param=error.field, code="context_length_exceeded")
        return reply(400, str(error), code="invalid_value")

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> JSONResponse:
        headers = {"Retry-After": str(error.retry_seconds)}
        return reply(429, str(error), headers, kind="rate_limit_error", code="queue_full")

    @app.exception_handler(ModelFailed)
    async def failed(_: Request, error: ModelFailed) -> JSONResponse:
        return reply(500, str(error), kind="server_error", code="model_failed")

    @app.exception_handler(ClientLeft)
    async def left(_: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        return reply(error.status_code, str(error.detail), headers, code=f"http_{error.status_code}")


def _describe(app: FastAPI) -> None:
    """Take FastAPI's 422 out of the API's description: such requests get 400 here."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
