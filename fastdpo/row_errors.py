"""What is wrong with a row of preferences: which row, which field, what was wanted, what came."""

from typing import Any


class RowError(ValueError):
    """A malformed row: which source, which row, which field, what was wanted, what came."""


class FieldError(ValueError):
    """What is wrong with one field of a row whose source and number the caller knows.

    came: the value, shown in brief. said: words in its place, shown as they are.
    """

    def __init__(self, field: str, wanted: str, came: Any = None, *, said: str | None = None):
        got = _brief(came) if said is None else said
        super().__init__(f"field {field!r}: want {wanted}, got {got}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
