"""What became of a dataset's rows: the status of each, their counts, and the warnings of both.

A row's status is bits that say why it is dropped, or what is odd about one that is kept; its note,
where it has one, says which row it is and what is wrong with it. Both are columns beside the pairs
until all is counted.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from transformers.utils import logging

from fastdpo.columns import ID_COLUMNS, Cut
from fastdpo.preferences import ORIGIN

logger = logging.get_logger(__name__)

TOO_LONG, BAD, EQUAL, END_LOST = 1, 2, 4, 8
DROPPED = TOO_LONG | BAD
STATUS, NOTE = "fastdpo_status", "fastdpo_note"
NOTES_SHOWN = 3
PROMPT_END_LOST = (
    "the prompt alone is tokenised otherwise than before a completion, so that its end is left "
    "out (its chat template renders it otherwise, or tokens merge across its end)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCounts:
    """What became of a dataset's rows; tokens are those of the pairs kept, before they are cut.

    too_long: dropped, as the prompt alone fills max_length. bad: dropped as malformed. equal:
    kept, though chosen and rejected have the same tokens, once both are cut to max_length.
    prompt_end_lost: kept without the last prompt tokens, which change once a completion follows.
    truncated: kept, though longer than max_length.
    """

    rows: int
    pairs: int
    too_long: int
    bad: int
    equal: int
    prompt_end_lost: int
    truncated: int
    prompt_tokens: int
    completion_tokens: int


def origins_of(batch: Mapping[str, Any], indices: list[int]) -> list[str]:
    """Which row each of a batch is."""
    return batch.get(ORIGIN) or [f"row {index}" for index in indices]


def cut_status(columns: Mapping[str, Sequence], cut: Cut) -> list[int]:
    """The status of each row once it is cut: TOO_LONG where that leaves nothing of a completion,
    with EQUAL where it leaves chosen and rejected alike, else as before."""
    status = []
    before_and_ids = zip(*(columns[name] for name in (STATUS, *ID_COLUMNS)), strict=True)
    for before, prompt, chosen, rejected in before_and_ids:
        (_, chosen), (_, rejected) = cut(prompt, chosen), cut(prompt, rejected)
        if before & BAD:
            status.append(before)
        elif not len(chosen):  # keep_end leaves something of it
            status.append(TOO_LONG)
        else:
            status.append(before | EQUAL if np.array_equal(chosen, rejected) else before)
    return status


def counted(
    status: np.ndarray,
    prompt_B: np.ndarray,
    chosen_B: np.ndarray,
    rejected_B: np.ndarray,
    max_length: int | None,
) -> PairCounts:
    """Counts from all rows' status, and from the numbers of tokens of those kept."""

    def count(bits: int) -> int:
        return int(np.count_nonzero(status & bits))

    longest_B = prompt_B + np.maximum(chosen_B, rejected_B)
    return PairCounts(
        rows=len(status),
        pairs=len(status) - count(DROPPED),
        too_long=count(TOO_LONG),
        bad=count(BAD),
        equal=count(EQUAL),
        prompt_end_lost=count(END_LOST),
        truncated=int(np.count_nonzero(longest_B > (max_length or sys.maxsize))),
        prompt_tokens=int(prompt_B.sum()),
        completion_tokens=int(chosen_B.sum() + rejected_B.sum()),
    )


def warn(name: str, counts: PairCounts, status: np.ndarray, notes: pa.ChunkedArray) -> None:
    """Log how many rows are malformed, too long, equal or lost the end of their prompt, and the
    first of each."""

    def first(bits: int, at_most: int) -> list[str]:
        return [notes[i].as_py() for i in np.flatnonzero(status & bits)[:at_most]]

    if counts.bad:
        shown = "; ".join(first(BAD, NOTES_SHOWN))
        logger.warning(f"{name} dataset: {counts.bad} malformed rows left out, such as: {shown}")
    if counts.too_long:
        logger.warning(
            f"{name} dataset: {counts.too_long} rows left out, whose prompt alone fills max_length"
        )
    if counts.equal:
        logger.warning(
            f"{name} dataset: in {counts.equal} rows chosen and rejected have the same tokens (cut "
            "to max_length); they teach nothing"
        )
    for note in first(END_LOST, 1):
        logger.warning(
            f"{name} dataset: in {counts.prompt_end_lost} rows {PROMPT_END_LOST}, first in {note}"
        )


class WarnOnce:
    """`tokenize` for a stream, whose rows are not counted: warns at the first row that is dropped
    and at the first whose prompt loses its end."""

    def __init__(self, tokenize: Callable[[dict, list[int]], dict[str, list]], name: str, cut: Cut):
        self._tokenize = tokenize
        self._name = name
        self._cut = cut
        self._told = 0  # bits of status

    def __call__(self, batch: dict[str, Sequence], indices: list[int]) -> dict[str, list]:
        columns = self._tokenize(batch, indices)
        columns[STATUS] = cut_status(columns, self._cut)
        origins = origins_of(batch, indices)
        for origin, status, note in zip(origins, columns[STATUS], columns[NOTE], strict=True):
            if status & TOO_LONG:
                note = f"{origin}: its prompt alone fills max_length"
            if status & DROPPED & ~self._told:
                self._tell(DROPPED, f"rows are left out, this one first: {note}")
            if status & END_LOST & ~self._told:
                self._tell(END_LOST, f"in rows from this one on {PROMPT_END_LOST}: {note}")
        return columns

    def _tell(self, bits: int, what: str) -> None:
        self._told |= bits
        logger.warning(f"{self._name} dataset: {what}")
