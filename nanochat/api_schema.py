"""
What the HTTP interface takes, field by field, with its limits: OpenAI's names, and nanochat's own routes.

A field that would change the answer and that we do not have (tools, penalties, images) is refused, never ignored: who
asked for JSON and gets prose should hear of it. Fields that change nothing (user, metadata) are taken. `top_k` is ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_MESSAGES, MAX_MESSAGE_CHARACTERS, MAX_CHARACTERS = 500, 8_000, 32_000
MAX_CHOICES, MAX_PROMPTS, MAX_STOPS = 32, 16, 4

Text = Annotated[str, StringConstraints(max_length=MAX_MESSAGE_CHARACTERS)]
Temperature = Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False, description="0 is greedy")]
TopP = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, le=1_000_000, description="sample among the k likeliest tokens; 0: all")]
MaxTokens = Annotated[int, Field(ge=1, le=1_000_000, description="cut where the model's context ends")]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


def _not_there(value: bool) -> bool:
    if value:
        raise ValueError("not available here: leave it out, or false")
    return value


# Literal[False] would take 0 as well.
Never = Annotated[bool, AfterValidator(_not_there), Field(json_schema_extra={"const": False})]
Nothing = Annotated[float, Field(ge=0.0, le=0.0)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)]


class Strict(BaseModel):
    """A request: unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=64)]
    name: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="taken, and not shown to the model"
    )

    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="taken; nothing is obfuscated")


class ResponseFormat(Strict):
    type: Literal["text"]


class Common(Strict):
    """What chat and plain completions share."""

    model: str | None = Field(None, max_length=200, description="as /v1/models names it; may be left out")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    stop: Stops | None = None
    seed: Seed | None = None
    temperature: Temperature | None = Field(None, description="by default the server's")
    top_p: TopP | None = None
    top_k: TopK | None = Field(None, description="ours: by default the server's")
    max_tokens: MaxTokens | None = None
    frequency_penalty: Nothing | None = Field(None, description="not available: 0")
    presence_penalty: Nothing | None = Field(None, description="not available: 0")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(
        None, description="not available: empty"
    )
    user: str | None = Field(None, max_length=200, description="whose turn it is when many wait")

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: MaxTokens | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = Field(None, description="only text")
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="not available: empty")
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(None, description="taken")
    store: Never | None = Field(None, description="nothing is stored")

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self


Ids = Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, max_length=MAX_CHARACTERS)]
Prompt = Annotated[str, StringConstraints(max_length=MAX_CHARACTERS)]


class CompletionRequest(Common):
    """POST /v1/completions: text that goes on, as a base model has learned it."""

    prompt: (
        Prompt
        | Ids
        | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Never | None = Field(None, description="not available: false")
    suffix: Annotated[str, StringConstraints(max_length=0)] | None = Field(None, description="not available")
    best_of: int | None = Field(None, ge=1, le=1, description="not available: 1")


class OwnChatRequest(Strict):
    """POST /chat/completions, nanochat's own: token events, always streamed."""

    messages: Messages
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    max_tokens: MaxTokens | None = None
    seed: Seed | None = None
    top: int | None = Field(None, ge=0, le=10, description="likeliest tokens reported beside each token")
    letters: bool = Field(
        False,
        description="read the last message as a multiple-choice question, if it is one, and watch its letters",
    )


class VoteRequest(Strict):
    """POST /chat/vote: k answers to one multiple-choice question, and what most of them say."""

    messages: Messages
    k: int = Field(8, ge=1, le=MAX_CHOICES)
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    max_tokens: MaxTokens | None = None
    seed: Seed | None = None


# ---- what comes back ------------------------------------------------------------------------------------------------


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error of every route, in OpenAI's shape."""

    error: ErrorBody


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class Reply(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: Reply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "failing"]
    ready: bool
    num_gpus: int
    available_workers: int
