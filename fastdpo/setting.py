"""One setting of a dataclass: how its field is declared, refused, and given as a count."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any


def setting(default: Any, text: str, choices: Sequence[Any] | None = None) -> Any:
    """A dataclass's field with its help text."""
    metadata = {"help": text} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def want(condition: bool, wanted: str, came: Any) -> None:
    """ValueError for a setting of DPOConfig, unless `condition`; `wanted` names it."""
    if not condition:
        raise ValueError(f"DPOConfig: want {wanted}, got {came!r}")


def count_or_auto(name: str, value: int | str | None) -> int | str | None:
    """The number in `value`, which the command line hands over as text; "auto"; or None."""
    text = str(value).lower()
    if text in ("none", "null", "auto"):
        return "auto" if text == "auto" else None
    want(text.isdecimal() and int(text) > 0, f"{name} auto or a count", value)
    return int(text)
