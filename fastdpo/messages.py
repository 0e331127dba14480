"""Messages and options: read back from JSON text and Arrow, and checked for a chat template."""

import json
from typing import Any

import datasets

from fastdpo.row_errors import FieldError

JSON = getattr(datasets, "Json", ())  # not in datasets 4


def check_text(field: str, value: Any) -> None:
    """FieldError unless `value` is a text that can be written: half a surrogate pair cannot."""
    if not isinstance(value, str):
        raise FieldError(field, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FieldError(field, "text", said=f"no Unicode ({error})") from None


def is_conversation(value: Any) -> bool:
    return isinstance(value, list)


def check_conversation(prompt: list[dict], chosen: list[dict], rejected: list[dict]) -> None:
    """FieldError unless these are messages that a chat template can render, one after the other.

    Roles and their order are the template's to judge, but for a completion that goes on as the
    user, such as one with the prompt in it once more.
    """
    for field, messages in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        _check_messages(field, messages)
    for field, messages in (("chosen", chosen), ("rejected", rejected)):
        if prompt[-1]["role"] == messages[0]["role"] == "user":
            raise FieldError(field, "a first message of another role than 'user'", messages[0])


def _check_messages(field: str, messages: list[Any]) -> None:
    if not messages:
        raise FieldError(field, "at least one message", messages)
    for i, message in enumerate(messages):
        where = f"{field}[{i}]"
        if not isinstance(message, dict) or "role" not in message:
            raise FieldError(where, "a message with 'role' and 'content'", message)
        if not isinstance(message["role"], str) or not message["role"]:
            raise FieldError(f"{where}.role", "the name of a role", message["role"])
        _check_content(f"{where}.content", message)
        for key, value in message.items():
            if isinstance(value, str):
                check_text(f"{where}.{key}", value)


def _check_content(where: str, message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise FieldError(where, "text (vision-language rows are not supported yet)", part)
            check_text(where, part.get("text"))
    elif content is not None:
        check_text(where, content)
    elif not any(value for key, value in message.items() if key != "role"):
        raise FieldError(where, "text", said="no content")  # nor tool_calls, reasoning_content, ...


def decoded(messages: list[Any]) -> list[Any]:
    """The messages, those kept as JSON text (preferences.as_json_texts) parsed, without keys that
    are None; an item that is not a message stays."""
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


def without_nulls(value: Any, feature: Any = None) -> Any:
    """`value` without keys that are None: Arrow adds such to give all objects of a column the same.

    (One that was None before goes too: nothing tells them apart.) What `feature` says is Json stays
    as it is.
    """
    if isinstance(feature, JSON):
        return value
    if isinstance(value, dict):
        of_keys = feature if isinstance(feature, dict) else {}
        given = {key: each for key, each in value.items() if each is not None}
        return {key: without_nulls(each, of_keys.get(key)) for key, each in given.items()}
    if isinstance(value, list):
        return [without_nulls(each, getattr(feature, "feature", None)) for each in value]
    return value


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
