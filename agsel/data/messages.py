"""Conversations: messages of several dialects made into one, every one of them checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from agsel.data.values import is_text, kind_name, plain

Complain = Callable[[str], Exception]
"""Makes the error that names row and column of what is wrong."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""Of a message, beside role, content and tool calls; chat templates read these."""


def is_sharegpt(value: Any) -> bool:
    """Whether a list of messages has from and value, in place of role and content."""
    if is_text(value) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and first.get("from") is not None and first.get("role") is None


def read_messages(value: Any, complain: Complain, *, sharegpt: bool = False) -> list[dict[str, Any]]:
    """A list of messages.

    Args:
        value: as it stands in the row.
        complain: makes the error.
        sharegpt: they have from and value, in place of role and content.
    """
    if value is None:
        raise complain("is null: give it a list of messages")
    if is_text(value) and value.lstrip().startswith("["):
        value = _parsed(value, complain)
    if not isinstance(value, list):
        raise complain(f"holds {kind_name(value)}, not a list of messages with role and content")
    if not value:
        raise complain("holds no messages")
    return [_read_message(message, number, complain, sharegpt) for number, message in enumerate(value)]


def require_answer(messages: list[dict[str, Any]], complain: Complain) -> None:
    """Somebody must have said something that can be learnt."""
    if not any(message["role"] == "assistant" and _says_something(message) for message in messages):
        raise complain("has nothing to learn: no message of the assistant has text or tool calls")


def read_tools(value: Any, complain: Complain) -> list[Any] | None:
    """A list of tools, or JSON of one; None for none."""
    tools = _parsed(value, complain) if isinstance(value, str) and value else value or None
    if tools is not None and not isinstance(tools, list):
        raise complain(f"holds {kind_name(tools)}, not a list of tools")
    return plain(tools) or None


def _parsed(text: str, complain: Complain) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise complain(f"holds text that is no JSON ({error})") from error


def _read_message(message: Any, number: int, complain: Complain, sharegpt: bool) -> dict[str, Any]:
    who, what = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(message, Mapping):
        raise complain(f"message {number} is {kind_name(message)}, not one with {who} and {what}")
    found = {name: value for name, value in message.items() if value is not None}
    if who not in found:
        listed = ", ".join(found) or "nothing"
        raise complain(f"message {number} has no {who}, it has {listed}: {who} and {what} are needed in every row")
    found = _of_sharegpt(found, number, complain) if sharegpt else found
    if found["role"] not in ROLES:
        raise complain(f"message {number} has the unknown role {found['role']!r}: known are {', '.join(ROLES)}")
    calls = _read_calls(found.get("tool_calls"), number, complain)
    content = _read_content(found.get("content"), bool(calls), number, complain)
    texts = {name: found[name] for name in TEXTS if name in found}
    for name, text in texts.items():
        if not is_text(text):
            raise complain(f"the {name} of message {number} is {kind_name(text)}, not text")
    return {"role": found["role"], "content": content} | texts | ({"tool_calls": calls} if calls else {})


def _of_sharegpt(message: Mapping[str, Any], number: int, complain: Complain) -> dict[str, Any]:
    if not is_text(message["from"]) or message["from"] not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        raise complain(f"message {number} is from the unknown role {message['from']!r}: known are {known}")
    others = {name: value for name, value in message.items() if name not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[message["from"]], "content": message.get("value"), **others}


def _read_content(content: Any, has_calls: bool, number: int, complain: Complain) -> str:
    """Text, or parts of text; nothing only beside tool calls."""
    if isinstance(content, list):
        return "".join(_text_of_part(part, number, complain) for part in content)
    if content is None and has_calls:
        return ""
    if is_text(content):
        return content
    raise complain(f"the content of message {number} is {kind_name(content)}, not text")


def _text_of_part(part: Any, number: int, complain: Complain) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and is_text(part.get("text")):
        return part["text"]
    raise complain(f"the content of message {number} has a part that is no text: agsel trains on text only")


def _read_calls(calls: Any, number: int, complain: Complain) -> list[Any]:
    """Tool calls, their arguments as objects: OpenAI writes them as JSON, and templates would quote that once more."""
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise complain(f"the tool_calls of message {number} are {kind_name(calls)}, not a list of calls")
    return [_with_parsed_arguments(plain(dict(call))) for call in calls]


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, Mapping):
        return call | {"function": _with_parsed_arguments(dict(function))}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        return call | {"arguments": parsed} if isinstance(parsed, dict) else call
    return call


def _says_something(message: Mapping[str, Any]) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))
