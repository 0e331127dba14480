"""A CSV file, row by row, its cells as texts.

pandas would guess their kinds, and take the first of too many fields for an index.
"""

import csv
import re
from collections.abc import Iterator
from typing import Any

from fastdpo.columns import REFERENCE_COLUMNS
from fastdpo.messages import parsed
from fastdpo.preferences import TEXT_FIELDS, check_same_kind, raise_or_mark
from fastdpo.row_errors import FieldError, RowError

OBJECTS = re.compile(r"\s*\[\s*\{")
MESSAGES = re.compile(r'\s*\[\s*\{\s*"role"\s*:')


def csv_rows(
    path: str, skip_bad: bool, columns: tuple[str, ...] | None, kinds: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file: its cells as texts, but None for an empty one, a number in the
    reference columns, and messages where a conversation is written as JSON.

    A malformed row, or one of another kind than those before it, also those of the files that
    `kinds` comes from (preferences.check_same_kind), is RowError, or with skip_bad what
    preferences.raise_or_mark makes of it.
    """
    lines = _csv_lines(path)
    header = next(lines, [])
    twice = [name for name in header if header.count(name) > 1]
    missing = {*(columns or ())}.difference(header)
    if twice or missing:
        wanted = f"the columns {list(columns)}" if missing else "each name once in the header"
        raise ValueError(f"{path}: want {wanted}, got {header}")
    for index, cells in enumerate(lines):
        if len(cells) != len(header):
            wanted = f"want {len(header)} fields, as in the header, got {len(cells)}"
            yield raise_or_mark(f"{path}, row {index}: {wanted}", skip_bad)
            continue
        row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
        row = {name: row[name] for name in columns or header}
        try:
            row |= _numbers(row) | _messages(row)
            check_same_kind(row, kinds)
            yield row
        except FieldError as error:
            yield raise_or_mark(f"{path}, row {index}, {error}", skip_bad)


def _csv_lines(path: str) -> Iterator[list[str]]:
    """The cells of each line that is not blank; RowError for malformed CSV, even where bad rows
    are skipped: there is no telling where the next row begins."""
    csv.field_size_limit(2**31 - 1)  # its own limit is 131,072 characters
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for cells in reader:
                if len(cells) > 1 or "".join(cells).strip():
                    yield cells
        except (csv.Error, UnicodeDecodeError) as error:
            detail = f"{path}, after line {reader.line_num}: want CSV in UTF-8, got {error}"
            raise RowError(detail) from None


def _numbers(row: dict[str, str | None]) -> dict[str, float]:
    """The numbers in a CSV row's reference columns."""
    numbers = {}
    for field in REFERENCE_COLUMNS:
        if (cell := row.get(field)) is not None:
            try:
                numbers[field] = float(cell)
            except ValueError:
                raise FieldError(field, "a finite number", cell) from None
    return numbers


def _messages(row: dict[str, str | None]) -> dict[str, list]:
    """What a CSV row's cells hold as messages in JSON, if it is a conversation."""
    messages, errors = {}, []
    for field in TEXT_FIELDS:
        cell = row.get(field)
        if cell is not None and OBJECTS.match(cell):  # as a text may begin too
            try:
                value = parsed(field, cell, list)
            except FieldError as error:
                errors.append(error)
            else:
                if all(isinstance(each, dict) and "role" in each for each in value):
                    messages[field] = value
    if errors and (messages or any(MESSAGES.match(str(row.get(f))) for f in TEXT_FIELDS)):
        raise errors[0]
    return messages
