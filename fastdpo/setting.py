"""One setting of a dataclass: how its field is declared, and what a count may be given as."""

from dataclasses import field
from typing import Any


def setting(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass's field with its help text; metadata may have `choices`."""
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def count_or_auto(name: str, value: int | str | None) -> int | str | None:
    """The number in `value`, which the command line hands over as text; "auto"; or None.

    ValueError for anything else; name: DPOConfig's, for the error.
    """
    text = str(value).lower()
    if text in ("none", "null", "auto"):
        return "auto" if text == "auto" else None
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"DPOConfig: want {name} auto or a count, got {value!r}")
    return int(text)
