"""Files, folders and Hub names -> preference rows as a datasets.Dataset.

JSON is read here, line by line, so that a bad row is told by file and line (counted from 1) and
before Arrow asks all rows to be alike. All else is read by `datasets`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset
from transformers.utils import logging

from fastdpo.data import REASONS_SHOWN, RowError
from fastdpo.messages import FieldError, parsed
from fastdpo.preferences import OPTION_FIELDS, TEXT_FIELDS, checked_row

logger = logging.get_logger(__name__)

JSON_SUFFIXES = (".jsonl", ".json")
SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".csv")
BETWEEN_ROWS = re.compile(r"[ \t\r\n,]*")


def load_rows(
    path_or_name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    data_files: Any = None,
    data_dir: str | None = None,
    on_bad_rows: str = "raise",
) -> Dataset | IterableDataset:
    """The rows of a file, of a folder that Dataset.save_to_disk wrote, or of a Hub dataset.

    config_name, data_files, data_dir: as `datasets.load_dataset` takes them, for the Hub and for
    folders of files. A single file is all of the split "train". streaming=True gives an
    IterableDataset. RowError names file, line and field of a malformed JSON row, or a warning
    counts them with on_bad_rows="skip"; ValueError for a path or a split that is not there.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        if split != "train":
            raise ValueError(f"{path}: want split 'train' of a single file, got {split!r}")
        rows = _read_file(path, skip_bad=on_bad_rows == "skip")
        return rows.to_iterable_dataset() if streaming else rows
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        rows = _from_disk(path, split)
        return rows.to_iterable_dataset() if streaming else rows
    if not path.exists() and _looks_like_a_path(path_or_name):
        raise ValueError(f"want a file or folder of preference rows, {path_or_name} is not there")
    return datasets.load_dataset(
        path_or_name,
        name=config_name,
        split=split,
        streaming=streaming,
        data_files=data_files,
        data_dir=data_dir,
    )


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(SUFFIXES)


def _from_disk(path: Path, split: str) -> Dataset:
    rows = datasets.load_from_disk(str(path))
    if not isinstance(rows, DatasetDict):
        if split != "train":
            raise ValueError(f"{path}: want split 'train' of a single dataset, got {split!r}")
        return rows
    if split not in rows:
        raise ValueError(f"{path}: want one of the splits {sorted(rows)}, got {split!r}")
    return rows[split]


def _read_file(path: Path, skip_bad: bool) -> Dataset:
    if path.suffix in JSON_SUFFIXES:
        return _read_json(path, skip_bad)
    if path.suffix == ".parquet":
        return Dataset.from_parquet(str(path))
    if path.suffix == ".csv":
        cells = Dataset.from_csv(str(path), keep_default_na=False)
        return Dataset.from_list([_parse_cells(path, i, row) for i, row in enumerate(cells)])
    raise ValueError(f"{path}: want a file of {SUFFIXES}, got {path.suffix or 'no suffix'}")


def _parse_cells(path: Path, index: int, row: dict[str, Any]) -> dict[str, Any]:
    """A CSV row, its cells that hold a list of messages as JSON parsed."""
    for field in TEXT_FIELDS:
        cell = row.get(field)
        if isinstance(cell, str) and cell.lstrip().startswith("[{"):
            try:
                row[field] = parsed(field, cell, list)
            except FieldError as error:
                raise RowError(f"{path}, row {index}, {error}") from None
    return row


def _read_json(path: Path, skip_bad: bool) -> Dataset:
    rows, reasons = [], []
    for line, row in _json_rows(path):
        try:
            if isinstance(row, Exception):
                raise FieldError("row", "an object in JSON, in UTF-8", str(row))
            rows.append(_storable(checked_row(row)))
        except FieldError as error:
            reason = f"{path}, line {line}, {error}"
            if not skip_bad:
                raise RowError(reason) from None
            reasons.append(reason)
    if reasons:
        shown = "; ".join(reasons[:REASONS_SHOWN])
        logger.warning(f"{path}: {len(reasons)} malformed rows left out, such as: {shown}")
    if not rows:
        raise ValueError(f"{path}: want at least one row, got none ({len(reasons)} malformed)")
    return Dataset.from_list(rows)


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and row: a parsed value, or the exception that it could not be parsed with."""
    whole = path.read_bytes()
    if whole.lstrip()[:1] == b"[":
        yield from _array_rows(path, whole)
        return
    for line, text in enumerate(whole.split(b"\n"), start=1):
        if text.strip():
            yield line, _parse(text)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        return error


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
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = BETWEEN_ROWS.match(text, text.index("[") + 1).end()
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise RowError(f"{path}, line {error.lineno}: want JSON, got {error}") from None
        yield line, row
        at = BETWEEN_ROWS.match(text, at).end()


def _storable(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with its free-form options as JSON text: Arrow would ask them to be alike."""
    return row | {name: json.dumps(row[name]) for name in OPTION_FIELDS if name in row}
