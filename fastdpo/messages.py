"""Is this a conversation that a chat template can render? Checks of message lists."""

import json
from typing import Any

SYSTEM_ROLES = ("system", "developer")
TOOL_ROLES = ("tool", "function", "ipython")
ROLES = (*SYSTEM_ROLES, "user", "assistant", *TOOL_ROLES)


class FieldError(ValueError):
    """What is wrong with one field of a row: `field`, what was wanted, what came."""

    def __init__(self, field: str, wanted: str, came: Any):
        self.field = field
        super().__init__(f"field {field!r}: want {wanted}, got {_brief(came)}")


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) and value.startswith("no ") else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_text(field: str, value: Any) -> None:
    """FieldError unless `value` is a text that can be written: half a surrogate pair cannot."""
    if not isinstance(value, str):
        raise FieldError(field, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FieldError(field, "text", f"no Unicode ({error})") from None


def is_conversation(value: Any) -> bool:
    return isinstance(value, list)


def check_conversation(prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> None:
    """FieldError unless prompt + completion is in order, for both completions."""
    for field, messages in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        _check_messages(field, messages)
    _check_order("prompt", prompt, may_be_system=True, previous=None)
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[0]["role"] != "assistant":
            wanted = "a first message of role 'assistant'"
            raise FieldError(field, wanted, f"role {messages[0]['role']!r}")
        _check_order(field, messages, may_be_system=False, previous=prompt[-1]["role"])


def _check_messages(field: str, messages: list[Any]) -> None:
    if not messages:
        raise FieldError(field, "at least one message", messages)
    for i, message in enumerate(messages):
        where = f"{field}[{i}]"
        if not isinstance(message, dict) or "role" not in message:
            raise FieldError(where, "a message with 'role' and 'content'", message)
        if message["role"] not in ROLES:
            raise FieldError(f"{where}.role", f"one of {ROLES}", message["role"])
        _check_content(f"{where}.content", message)
        for key, value in message.items():
            if isinstance(value, str):
                check_text(f"{where}.{key}", value)


def _check_content(where: str, message: dict[str, Any]) -> None:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise FieldError(where, "text (vision-language rows are not supported yet)", part)
            check_text(where, part.get("text"))
        return
    if content is None:
        raise FieldError(where, "text", "no content")
    check_text(where, content)


def _check_order(
    field: str, messages: list[dict], *, may_be_system: bool, previous: str | None
) -> None:
    for i, message in enumerate(messages):
        role = message["role"]
        if role in SYSTEM_ROLES and not (may_be_system and i == 0):
            raise FieldError(f"{field}[{i}].role", f"{role!r} only as the first message", role)
        if role in TOOL_ROLES and previous not in ("assistant", *TOOL_ROLES):
            raise FieldError(f"{field}[{i}].role", f"{role!r} only after 'assistant'", role)
        previous = role


def as_sent(messages: list[Any]) -> list[Any]:
    """The messages as they were before Arrow stored them: messages kept as JSON text (rows.py) are
    decoded, and the None values are dropped that Arrow adds to give all the same keys."""
    return [
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, dict)
        else message
        for message in map(_read, messages)
    ]


def _read(message: Any) -> Any:
    try:
        return json.loads(message) if isinstance(message, str) else message
    except (ValueError, RecursionError):
        return message


def parsed(field: str, value: Any, kind: type) -> Any:
    """`value`, or what it holds as JSON text; FieldError unless it is of `kind` (None stays)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FieldError(field, f"JSON ({error})", value) from None
    if value is not None and not isinstance(value, kind):
        raise FieldError(field, f"a {kind.__name__} or one as JSON text", value)
    return value
