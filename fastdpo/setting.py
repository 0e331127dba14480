"""How a setting of a dataclass is declared."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any


def setting(default: Any, text: str, choices: Sequence[Any] | None = None) -> Any:
    """A dataclass's field with its help text."""
    metadata = {"help": text} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
