"""How what is wrong with a field is told."""

import pytest

from fastdpo.row_errors import FieldError


@pytest.mark.parametrize(
    ("came", "got"),
    [("no text", "'no text'"), (None, "None"), ("x" * 90, f"'{'x' * 76}...")],
    ids=["as a check would say it", "none", "long"],
)
def test_a_value_is_quoted_in_brief(came, got):
    assert (
        str(FieldError("chosen", "a number", came)) == f"field 'chosen': want a number, got {got}"
    )


def test_what_a_check_says_is_not_quoted():
    error = FieldError("prompt", "text", said="no such field")
    assert str(error) == "field 'prompt': want text, got no such field"
