"""Pairs that were tokenised once are read from a file at the next start.

`datasets` keeps such a file beside rows that lie on disk. Those of rows in memory (of JSON and CSV
files, and of lists) are kept in the folder fastdpo of `datasets`' own cache.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.fingerprint import update_fingerprint
from transformers.utils import logging

logger = logging.get_logger(__name__)

HASHED_AT_ONCE = 1000  # rows


def folder() -> Path:
    """The folder fastdpo of `datasets`' own cache, made where something is written to it."""
    return Path(datasets.config.HF_DATASETS_CACHE, "fastdpo")


def has_transform(dataset: Dataset | IterableDataset) -> bool:
    """Whether a function makes its rows at each read (Dataset.set_transform)."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def map_once(dataset: Dataset, tokenize: Callable, *, name: str, **settings: Any) -> Dataset:
    """`dataset.map` with these settings, from a file if there is one of an earlier start.

    With a warning and in memory where no file can be written.
    """
    cache_file = _cache_file(dataset, tokenize, settings["remove_columns"])
    try:
        return dataset.map(tokenize, cache_file_name=cache_file, **settings)
    except OSError as error:
        logger.warning(
            f"{name} dataset: tokenised in memory, and again at the next start, as the pairs "
            f"cannot be kept in a file: {error}"
        )
        return dataset.map(tokenize, keep_in_memory=True, **settings)


def _cache_file(dataset: Dataset, tokenize: Callable, remove_columns: list[str]) -> str | None:
    """The file for rows in memory; None for a transform, whose rows may change unseen, and where
    `datasets` keeps the file, or is to keep none."""
    if dataset.cache_files or has_transform(dataset) or not datasets.is_caching_enabled():
        return None
    # of what the rows are, where dataset._fingerprint is of how they were made
    key = update_fingerprint(_digest(dataset), tokenize, {"remove_columns": remove_columns})
    return str(folder() / f"cache-{key}.arrow")


def _digest(dataset: Dataset) -> str:
    """A digest of the rows, some at a time: generate_fingerprint would copy all of them."""
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(HASHED_AT_ONCE):
        written = pa.BufferOutputStream()
        with pa.ipc.new_stream(written, table.schema) as stream:
            stream.write_table(table.combine_chunks())
        digest.update(written.getvalue())
    return digest.hexdigest()
