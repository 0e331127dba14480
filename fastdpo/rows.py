"""Files, folders and Hub names -> preference rows as a datasets.Dataset.

JSON and CSV files are read row by row (json_rows.py, csv_rows.py), before Arrow asks all rows to be
alike, so that an error names the file and the line (JSON, from 1) or the row (CSV, from 0).
`datasets` finds the files of a folder, and reads all else.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, ReadInstruction, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import generate_random_fingerprint
from transformers.utils import logging

from fastdpo.csv_rows import csv_rows
from fastdpo.json_rows import json_rows
from fastdpo.preferences import (
    MALFORMED,
    TEXT_FIELDS,
    are_more_than_texts,
    as_json_texts,
    checked_row,
    from_arrow,
    raise_or_mark,
    storable,
    warn_of_unread,
)
from fastdpo.row_errors import FieldError, RowError

logger = logging.get_logger(__name__)

READERS = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows}
SUFFIXES = (*READERS, ".parquet")
Rows = Dataset | IterableDataset
UNLIKE = (pa.ArrowException, OverflowError)  # what a column of unlike values raises


def load_rows(
    path_or_name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    data_files: Any = None,
    data_dir: str | None = None,
    columns: list[str] | None = None,
    on_bad_rows: str = "raise",
) -> Rows:
    """The rows of a file, of a folder of files, of one that Dataset.save_to_disk wrote, or of a
    Hub dataset.

    config_name, data_files, data_dir: as `datasets.load_dataset` takes them, for the Hub and for
    folders of files. split: its name, or without streaming also parts such as "train[:100]" (not
    of what save_to_disk wrote); a single file is all of "train". streaming=True gives an
    IterableDataset, which reads as it goes (an array in a .json file whole). columns: those to
    read, None for all.

    RowError at the first malformed row, with file, line and field. Malformed too: a conversation
    among texts or the other way round; in JSON a prompt in some rows alone; in CSV a row with other
    fields than the header, or a cell that should be JSON and is not. With on_bad_rows="skip" the
    row stays, with that message as `fastdpo_malformed`, for prepare_pairs to count and leave out.
    ValueError for a path or split that is not there, and for what `datasets` cannot read.
    """
    path, skip_bad = Path(path_or_name).expanduser(), on_bad_rows == "skip"
    is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    of_others = {"config_name": config_name, "data_files": data_files, "data_dir": data_dir}
    if (path.is_file() or is_saved) and any(of_others.values()):
        given = {name: value for name, value in of_others.items() if value}
        raise ValueError(f"{path}: want none of {[*of_others]} for rows that are here, got {given}")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: want a file of {SUFFIXES}, got {path.suffix or 'no suffix'}")
    if is_saved:
        rows = _selected(_from_disk(path, split), columns, path_or_name)
        return rows.to_iterable_dataset() if streaming else rows
    if not path.exists() and _looks_like_a_path(path_or_name):
        raise ValueError(f"want a file or folder of preference rows, {path_or_name} is not there")
    source = {
        "path": str(path.absolute()) if path.exists() else path_or_name,
        "name": config_name,
        "data_files": data_files,
        "data_dir": data_dir,
    }
    if path.is_file():
        source |= {"path": path.suffix[1:], "data_files": str(path)}
    if files := _files_to_read(path, source):
        read = partial(_read_files, columns=columns, streaming=streaming, skip_bad=skip_bad)
        rows = _read_split(files, split, read, str(path))
    else:
        rows = _load(str(path), datasets.load_dataset, split=split, streaming=streaming, **source)
        rows = _selected(rows, columns, path_or_name)
    return _with_a_row(rows, path) if path.exists() else rows


def _selected(rows: Rows, columns: list[str] | None, source: str) -> Rows:
    if columns is None:
        return rows
    missing = {*columns}.difference(rows.column_names or columns)
    if missing:
        raise ValueError(f"{source}: want the columns {columns}, got {rows.column_names}")
    return rows.select_columns(columns)


def _load(source: str, load: Callable, **settings: Any) -> Any:
    """What a function of `datasets` makes of `source`, which its own errors do not name."""
    try:
        return load(**settings)
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{source}: {error.__cause__ or error}") from error


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(SUFFIXES)


def _from_disk(path: Path, split: str) -> Dataset:
    try:
        rows = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:  # Arrow's own errors are ValueErrors
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(rows, DatasetDict):
        if split != "train":
            raise ValueError(f"{path}: want split 'train' of a single dataset, got {split!r}")
        return rows
    if split not in rows:
        raise ValueError(f"{path}: want one of the splits {sorted(rows)}, got {split!r}")
    return rows[split]


def as_dataset(rows: Iterable[dict[str, Any]], source: str = "rows") -> Dataset:
    """`rows` in memory, with the columns of all rows (Dataset.from_list has only the first row's).

    Messages that are more than a role and a text are kept as JSON text, each by itself: Arrow would
    give every tool call the arguments of all. RowError names the first row of `source` whose value
    Arrow cannot keep beside those before it.
    """
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    for name in set(TEXT_FIELDS) & set(columns):
        if any(map(are_more_than_texts, columns[name])):
            columns[name] = list(map(as_json_texts, columns[name]))
    try:
        return _in_memory(columns)
    except UNLIKE:
        for name, values in columns.items():
            _check_column(values, source, name)
        raise


def _in_memory(columns: dict[str, list]) -> Dataset:
    # without a fingerprint it would be one of the content, for which datasets copies all of it
    return Dataset(pa.table(columns), fingerprint=generate_random_fingerprint())


def _check_column(values: list[Any], source: str, name: str) -> None:
    def error_of(stop: int) -> Exception | None:
        try:
            _in_memory({name: values[:stop]})
        except UNLIKE as error:
            return error
        return None

    # the first row with which the rows up to it do not make a column
    row = bisect_left(range(len(values)), True, key=lambda i: error_of(i + 1) is not None)
    if row < len(values):
        error = error_of(row + 1)
        raise RowError(
            f"{source}, row {row}, field {name!r}: want values of the kind of the rows before in "
            f"all their parts, got others ({error})"
        ) from error


def _files_to_read(path: Path, source: dict[str, Any]) -> dict[str, list[str]]:
    """The files of each split of what is here, if READERS can read them all; else {}."""
    if path.is_file():
        files = {"train": [str(path)]}
    elif path.is_dir() or source["path"] in ("json", "csv"):
        builder = _load(str(path), datasets.load_dataset_builder, **source)
        files = {str(split): [*names] for split, names in builder.config.data_files.items()}
        if path.is_dir() and not (source["data_files"] or source["data_dir"]):
            _warn_of_others(path, chain(*files.values()))
    else:
        return {}
    are_ours = all(
        Path(name).suffix in READERS and Path(name).is_file() for name in chain(*files.values())
    )
    return files if are_ours else {}


def _warn_of_others(folder: Path, files: Iterable[str]) -> None:
    """Warn of files beside those that are read: `datasets` takes one format of a folder, and where
    some names have a split in them, no others."""
    read = {Path(name).resolve() for name in files}
    rows = [each for each in sorted(folder.iterdir()) if each.suffix in SUFFIXES]
    unread = [each.name for each in rows if each.resolve() not in read and each.name[0] not in "._"]
    if unread:
        logger.warning_once(
            f"{folder}: {len(read)} files are read, {len(unread)} are not, such as {unread[0]}: "
            "want one format, and a split in all of their names (train-2.jsonl) or in none"
        )


def _read_split(
    files: dict[str, list[str]], split: str, read: Callable[[list[str], str], Rows], source: str
) -> Rows:
    """What `read` makes of the files of `split`, or of the parts of splits that it names."""
    if split in files:
        return read(files[split], source)
    named = [name for name in files if name in re.findall(r"\w+", split)]
    rows = {name: read(files[name], source) for name in named}
    if not rows or isinstance(rows[named[0]], IterableDataset):
        hint = "train.jsonl and test.jsonl in a folder are two splits"
        hint = "a stream has no parts" if rows else hint
        raise ValueError(f"{source}: want one of the splits {[*files]}, got {split!r} ({hint})")
    try:
        counts = {name: len(rows[name]) for name in named}
        parts = ReadInstruction.from_spec(split).to_absolute(counts)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    parts = [part for part in parts if part.from_ < part.to]
    if not parts:
        raise ValueError(f"{source}: want at least one row, got none in {split!r} of {counts}")
    return concatenate_datasets(
        [rows[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def _read_files(
    files: list[str], source: str, *, columns: list[str] | None, streaming: bool, skip_bad: bool
) -> Rows:
    settings = {
        "files": files,
        "skip_bad": skip_bad,
        "columns": columns and tuple(columns),
        "kinds": {},  # of all files' texts: a stream calls _rows_of for each file by itself
    }
    if streaming:
        return IterableDataset.from_generator(_rows_of, gen_kwargs=settings)
    rows = list(_rows_of(**settings))
    if all(MALFORMED in row for row in rows):
        first = f", the first: {rows[0][MALFORMED]}" if rows else ""
        raise ValueError(
            f"{source}: want at least one row, got none ({len(rows)} malformed{first})"
        )
    return as_dataset(rows, source)


def _rows_of(
    files: list[str], skip_bad: bool, columns: tuple[str, ...] | None, kinds: dict[str, str]
) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from READERS[Path(file).suffix](file, skip_bad, columns, kinds)


def _with_a_row(rows: Rows, path: Path) -> Rows:
    try:
        first = next(iter(rows), None)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error  # Arrow does not name the file
    if first is None:
        raise ValueError(f"{path}: want at least one row, got none")
    return rows


def in_one_schema(rows: Rows, source: str, *, skip_bad: bool) -> Rows:
    """`rows` in one schema for all sources, so that several can be concatenated: known fields only,
    with an explicit prompt, and messages and options as JSON text.

    A malformed row is a RowError that names `source`, or with skip_bad what load_rows makes of it.
    """
    features = rows.features
    warn_of_unread(source, rows.column_names or ())

    def checked(row: dict[str, Any], index: int) -> dict[str, Any]:
        if row.get(MALFORMED) is not None:
            return raise_or_mark(row[MALFORMED], skip_bad)
        try:
            row = storable(checked_row(from_arrow(row, features)))
        except FieldError as error:
            return raise_or_mark(f"{source}, row {index}, {error}", skip_bad)
        return row | {field: as_json_texts(row[field]) for field in TEXT_FIELDS if field in row}

    if isinstance(rows, IterableDataset):
        return rows.map(checked, with_indices=True, remove_columns=rows.column_names)
    return as_dataset(map(checked, rows, count()), source)
