"""A JSON file, line by line or as one array, read so that an error names its line."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdpo.preferences import (
    OPTION_FIELDS,
    TEXT_FIELDS,
    check_same_kind,
    checked_row,
    raise_or_mark,
    storable,
    warn_of_unread,
)
from fastdpo.row_errors import FieldError, RowError

BETWEEN_ROWS = re.compile(r"[ \t\r\n,]*")


def json_rows(
    path: str, skip_bad: bool, columns: tuple[str, ...] | None, kinds: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The rows of a JSON file, checked, as preferences.storable makes them.

    columns: those to read, None for all. A malformed row, one of another kind than those before it,
    also those of the files that `kinds` comes from (preferences.check_same_kind), or one with a
    prompt where the file's first has none or without, is RowError, or with skip_bad what
    preferences.raise_or_mark makes of it. ValueError where the first good row lacks some of
    `columns`.
    """
    first: set[str] = set()  # the texts that the first row has
    unseen = set(columns or ()).difference(OPTION_FIELDS)  # of the columns, until a row is good
    for line, row in _values(Path(path)):
        try:
            if isinstance(row, Exception):
                raise FieldError("row", "an object in JSON on one line, in UTF-8", str(row))
            if columns is not None and isinstance(row, dict):
                row = {name: row[name] for name in columns if name in row}
            if not first and isinstance(row, dict):
                warn_of_unread(path, row)
            checked = checked_row(row)
            unseen = unseen.difference(row)
            if unseen:
                raise ValueError(
                    f"{path}: want the columns {list(columns)}, line {line} has no {sorted(unseen)}"
                )
            check_same_kind(row, kinds)
            first = first or _texts(row)
            _check_texts(row, first)
            yield storable(checked)
        except FieldError as error:
            yield raise_or_mark(f"{path}, line {line}, {error}", skip_bad)


def _texts(row: dict[str, Any]) -> set[str]:
    """Which of the three texts a row has; none for token ids."""
    return {field for field in TEXT_FIELDS if row.get(field) is not None}


def _check_texts(row: dict[str, Any], first: set[str]) -> None:
    """FieldError if a text is missing or new, beside the first row's."""
    texts = _texts(row)
    for field in TEXT_FIELDS if texts else ():
        if (field in texts) != (field in first):
            wanted = "a value" if field in first else "none"
            said = None if field in row else "no such field"
            raise FieldError(field, f"{wanted}, as in the first row", row.get(field), said=said)


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and row: a parsed value, or the exception that it could not be parsed with."""
    with open(path, "rb") as file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        first = next(filter(bytes.strip, file), b"")
        file.seek(start)
        if first.lstrip().startswith(b"["):
            yield from _array_rows(path, file.read())
            return
        for line, text in enumerate(file, start=1):
            if text.strip():
                yield line, _parse(text)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        return error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; ValueError where json would keep the last of several alike."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} twice")
    return dict(pairs)


def _array_rows(path: Path, whole: bytes) -> Iterator[tuple[int, Any]]:
    """The objects of one JSON array, each with the line it begins in.

    What is wrong with the array itself is RowError even where bad rows are skipped: there is no
    telling where the next row begins.
    """
    try:
        text = whole.decode("utf-8")
    except UnicodeDecodeError as error:
        line = whole[: error.start].count(b"\n") + 1
        raise RowError(f"{path}, line {line}: want UTF-8, got {error}") from None
    try:
        # with one comma between two rows, and nothing behind the array
        json.loads(text, parse_int=str)  # a number that is too long is reported with its row, below
    except json.JSONDecodeError as error:
        raise RowError(f"{path}, line {error.lineno}: want one array of JSON: {error}") from None
    except RecursionError:
        pass  # reported with its row, too
    decode = json.JSONDecoder(object_pairs_hook=_each_once).raw_decode
    line, counted = 1, 0
    at = BETWEEN_ROWS.match(text, text.index("[") + 1).end()
    while text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decode(text, at)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{path}, line {line}: want an object in JSON, got {error}") from None
        yield line, row
        at = BETWEEN_ROWS.match(text, at).end()
