"""A JSON file, line by line or as one array, read so that what is wrong is told by its line."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdpo.row_errors import RowError

BETWEEN_ROWS = re.compile(r"[ \t\r\n,]*")


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
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
        json.loads(text, parse_int=str)  # a number that is too long is told with its row, below
    except json.JSONDecodeError as error:
        raise RowError(f"{path}, line {error.lineno}: want one array of JSON: {error}") from None
    except RecursionError:
        pass  # told with its row, too
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
