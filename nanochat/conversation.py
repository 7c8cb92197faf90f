"""
What a conversation is, and a clear word to whoever hands over something else.

`{"messages": [{"role": "user" | "assistant" | "system", "content": ...}, ...]}`, where content is a string or a list of parts
`{"type": "text" | "python" | "python_output", "text": ...}`, with `"trained": false` where it is not to be learnt.
The rules are nanochat's: an optional system message first, which becomes the opening of the user's first message, then user and
assistant in turn.

One rule is ours. Neighbouring text parts are joined by a line break: without it "50 km" and "Answer: E" read "50 kmAnswer: E",
and the model is trained on a word that nobody writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nanochat.common import UserError

Conversation = Mapping[str, Any]
Part = tuple[str, str, bool]  # text, python or output; what it says; whether the assistant learns to say it
KINDS = {"text": "text", "python": "python", "python_output": "output"}


def messages_of(conversation: Conversation) -> list[Mapping[str, Any]]:
    """The messages, each with a role that we know. Raises UserError with the message that is not one."""
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError('a conversation is {"messages": [...]} with at least one message')
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ("system", "user", "assistant"):
            raise UserError(
                f"a message has a role, system, user or assistant, and content; not {message!r:.80}"
            )
    return list(messages)


def turns(conversation: Conversation) -> Iterator[tuple[str, list[Part]]]:
    """(role, parts) of each turn: user and assistant alternate, a system message opens the first user's."""
    preface, expected = "", "user"
    for index, message in enumerate(messages_of(conversation)):
        role, parts = message["role"], _parts(message.get("content"), message["role"])
        if role == "system" and index == 0:
            preface = "".join(text for _, text, _ in parts) + "\n\n"
            continue
        if role != expected:
            raise UserError(f"message {index + 1} is the {role}'s but it is the {expected}'s turn")
        if preface:
            parts, preface = [("text", preface + "".join(text for _, text, _ in parts), True)], ""
        yield role, parts
        expected = "assistant" if role == "user" else "user"
    if preface:
        raise UserError("a system message alone is no conversation; a user's message must follow")


def _parts(content: Any, role: str) -> list[Part]:
    """The content as parts; neighbouring texts are joined by a line break."""
    if isinstance(content, str):
        return [("text", content, True)]
    if not isinstance(content, (list, tuple)):
        raise UserError(f"the {role}'s content is text or a list of parts, not {type(content).__name__}")
    parts: list[Part] = []
    for part in content:
        kind = KINDS.get(str(part.get("type"))) if isinstance(part, Mapping) else None
        if kind is None or not isinstance(part.get("text"), str) or (kind != "text" and role != "assistant"):
            allowed = "text, python or python_output" if role == "assistant" else "text"
            raise UserError(f'a part of the {role} is {{"type": {allowed}, "text": ...}}; not {part!r:.80}')
        text, trained = part["text"], part.get("trained", True)
        if not isinstance(trained, bool):
            raise UserError(f'"trained" of a part of the {role} is true or false, not {trained!r:.40}')
        if parts and kind == parts[-1][0] == "text":
            _, before, as_before = parts[-1]
            apart = not before or not text or before.endswith("\n") or text.startswith("\n")
            text = ("" if apart else "\n") + text
            if trained == as_before:
                text = parts.pop()[1] + text
        parts.append((kind, text, trained))
    return parts
