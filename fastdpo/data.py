"""Preference rows -> tokenised pairs: prompt_ids, chosen_ids and rejected_ids of each row.

A row's three texts (prompt, prompt + chosen, prompt + rejected) are tokenised once each, all of
a batch of rows in one call. Tokens may merge across the end of a prompt, so the prompt's ids are
those that the three begin with alike; what follows is the completion. Row numbers count from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Sequence as ListOf
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from fastdpo.messages import FieldError, is_conversation
from fastdpo.preferences import FIELDS, ID_FIELDS, REFERENCE_FIELDS, checked_row

logger = logging.get_logger(__name__)

KEPT, TOO_LONG, BAD = 0, 1, 2
REASONS_SHOWN = 3


class RowError(ValueError):
    """A malformed row: which source, which row, which field, what was wanted, what came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairCounts:
    """What became of a dataset's rows; tokens are those of the pairs kept, before truncation.

    too_long: dropped, as the prompt alone fills max_length. bad: dropped as malformed. equal:
    kept, though chosen equals rejected.
    """

    rows: int
    pairs: int
    too_long: int
    bad: int
    equal: int
    prompt_tokens: int
    completion_tokens: int


def prepare_pairs(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "train",
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    on_bad_rows: str = "raise",
    num_proc: int | None = None,
    length_column: str | None = None,
) -> tuple[Dataset | IterableDataset, PairCounts | None]:
    """`dataset` with the columns prompt_ids, chosen_ids, rejected_ids, and what was counted.

    ref_chosen_logps and ref_rejected_logps stay, where the rows have them. A row whose prompt
    alone fills max_length is dropped (keep_start would cut all of its completion); cutting is
    the collator's. length_column: one more column, the tokens of prompt, chosen and rejected, for
    samplers by length. A streamed dataset is read as it trains, and not counted: None.

    RowError at the first malformed row, or with on_bad_rows="skip" a warning that counts them;
    ValueError where no row is left.
    """
    columns = _columns(dataset)
    tokenize = _Tokenize(
        tokenizer=tokenizer,
        name=name,
        limit=max_length if truncation_mode == "keep_start" else None,
        skip_bad=on_bad_rows == "skip",
        with_reference=bool(set(REFERENCE_FIELDS) & set(columns)),
    )
    if isinstance(dataset, IterableDataset):
        pairs = dataset.map(
            _DropAsItComes(tokenize), batched=True, with_indices=True, remove_columns=columns
        )
        return pairs, None
    if len(dataset) == 0:
        raise ValueError(f"{name} dataset: want at least one row, got none")
    pairs = dataset.with_format(None).map(
        tokenize,
        batched=True,
        with_indices=True,
        remove_columns=columns,
        features=_features(tokenize.with_reference),
        num_proc=num_proc and min(num_proc, len(dataset)),
        desc=f"Tokenizing the {name} dataset",
    )
    counts = _counted(pairs)
    _warn(name, counts, [reason for reason in pairs["reason"] if reason])
    if counts.pairs == 0:
        raise ValueError(
            f"{name} dataset: no row is left of {counts.rows}: in {counts.too_long} the prompt "
            f"alone fills max_length={max_length}, {counts.bad} are malformed"
        )
    kept = np.flatnonzero(np.array(pairs["status"]) == KEPT)
    pairs = pairs.select(kept).remove_columns(["status", "reason"])
    if length_column is not None:
        lengths = [sum(len(row[field]) for field in ID_FIELDS) for row in pairs]
        pairs = pairs.add_column(length_column, lengths)
    return pairs, counts


def _columns(dataset: Dataset | IterableDataset) -> list[str]:
    if dataset.column_names is not None:
        return dataset.column_names
    return list(next(iter(dataset), {}))


def _features(with_reference: bool) -> Features:
    ids = {field: ListOf(Value("int64")) for field in ID_FIELDS}
    logps = {field: Value("float64") for field in REFERENCE_FIELDS} if with_reference else {}
    return Features(ids | logps | {"status": Value("int8"), "reason": Value("string")})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokenize:
    """A batch of rows as columns, and their row numbers -> the columns of _features."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    limit: int | None
    skip_bad: bool
    with_reference: bool

    def __call__(self, batch: dict[str, Sequence], indices: list[int]) -> dict[str, list]:
        names = [name for name in FIELDS if name in batch]
        columns = [batch[name] for name in names]
        rows: list[dict | None] = []
        reasons: list[str | None] = []
        for index, values in zip(indices, zip(*columns, strict=True), strict=True):
            row, reason = self._attempt(
                index, self._rendered, dict(zip(names, values, strict=True))
            )
            rows.append(row)
            reasons.append(reason)
        if not columns:
            self._attempt(indices[0], checked_row, {})
        self._add_ids(rows)
        for i, row in enumerate(rows):
            if row is not None:
                rows[i], reasons[i] = self._attempt(indices[i], self._split, row)
        return self._as_columns(rows, reasons)

    def _attempt(self, index: int, step, row) -> tuple[Any, str | None]:
        """What `step` makes of the row, or why it is malformed."""
        try:
            return step(row), None
        except FieldError as error:
            message = f"{self.name} dataset, row {index}, {error}"
            if not self.skip_bad:
                raise RowError(message) from None
            return None, message

    def _rendered(self, row: dict[str, Any]) -> dict[str, Any]:
        """The checked row, with the three texts of it that are to be tokenised."""
        row = checked_row(row)
        if self.with_reference and REFERENCE_FIELDS[0] not in row:
            raise FieldError(REFERENCE_FIELDS[0], "a number, as other rows have one", "no value")
        if "prompt_ids" in row:
            return row
        sides = (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"])
        if not is_conversation(row["prompt"]):
            end = self.tokenizer.eos_token or ""
            texts = [row["prompt"], *(t if t.endswith(end) else t + end for t in sides)]
            return row | {"texts": texts, "is_chat": False}
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{self.name} dataset: want a tokenizer with a chat template for conversations, "
                "got one without"
            )
        options = row.get("chat_template_kwargs", {}) | {"tools": row.get("tools")}
        render = self.tokenizer.apply_chat_template
        try:
            texts = [render(row["prompt"], tokenize=False, add_generation_prompt=True, **options)]
            texts += [render(side, tokenize=False, **options) for side in sides]
        except TemplateError as error:
            raise FieldError("prompt", "what the chat template takes", str(error)) from None
        return row | {"texts": texts, "is_chat": True}

    def _add_ids(self, rows: list[dict | None]) -> None:
        """Tokenise the texts of all rows: one call for plain text, one for conversations."""
        for is_chat in (False, True):
            group = [row for row in rows if row is not None and row.get("is_chat") is is_chat]
            texts = [text for row in group for text in row["texts"]]
            if not texts:
                continue
            # a chat template writes the special tokens itself
            all_ids = self.tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
            for i, row in enumerate(group):
                ids = all_ids[3 * i : 3 * i + 3]
                row["ids"] = ids if is_chat else [self._one_of_each_end(each) for each in ids]

    def _one_of_each_end(self, ids: list[int]) -> list[int]:
        """`ids` without a second BOS or EOS, where both the text and the tokenizer have one."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if eos is not None and ids[-2:] == [eos, eos]:
            ids = ids[:-1]
        return ids

    def _split(self, row: dict[str, Any]) -> dict[str, Any]:
        """prompt_ids, chosen_ids and rejected_ids of a row that has its ids, and its status."""
        pair = {field: row[field] for field in (*ID_FIELDS, *REFERENCE_FIELDS) if field in row}
        if "ids" in row:
            shared = _common_length(*row["ids"])
            prompt_ids, chosen_ids, rejected_ids = row["ids"]
            ids = (prompt_ids[:shared], chosen_ids[shared:], rejected_ids[shared:])
            pair |= dict(zip(ID_FIELDS, ids, strict=True))
        for field in ID_FIELDS:
            if not pair[field]:
                text = row[field.removesuffix("_ids")]
                raise FieldError(field.removesuffix("_ids"), "at least one token of its own", text)
            if max(pair[field]) >= len(self.tokenizer):
                wanted = f"token ids below {len(self.tokenizer)}"
                raise FieldError(field, wanted, max(pair[field]))
        is_long = self.limit is not None and len(pair["prompt_ids"]) >= self.limit
        return pair | {"status": TOO_LONG if is_long else KEPT}

    def _as_columns(self, rows: list[dict | None], reasons: list[str | None]) -> dict[str, list]:
        empty = {field: [] for field in ID_FIELDS} | {"status": BAD}
        rows = [row or empty for row in rows]
        fields = (*ID_FIELDS, *(REFERENCE_FIELDS if self.with_reference else ()), "status")
        return {f: [row.get(f) for row in rows] for f in fields} | {"reason": reasons}


def _common_length(prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int]) -> int:
    length = 0
    for three in zip(prompt_ids, chosen_ids, rejected_ids, strict=False):
        if not three[0] == three[1] == three[2]:
            break
        length += 1
    return length


class _DropAsItComes:
    """_Tokenize for a stream: rows that do not train are left out at once, the first one told."""

    def __init__(self, tokenize: _Tokenize):
        self._tokenize = tokenize
        self._told = False

    def __call__(self, batch: dict[str, Sequence], indices: list[int]) -> dict[str, list]:
        columns = self._tokenize(batch, indices)
        status, reasons = columns.pop("status"), columns.pop("reason")
        for index, code, reason in zip(indices, status, reasons, strict=True):
            if code != KEPT and not self._told:
                self._told = True
                reason = reason or f"row {index}: its prompt alone fills max_length"
                logger.warning(
                    f"{self._tokenize.name} dataset: rows are left out, this one first: {reason}"
                )
        kept = [i for i, code in enumerate(status) if code == KEPT]
        return {name: [values[i] for i in kept] for name, values in columns.items()}


def _counted(pairs: Dataset) -> PairCounts:
    status = np.array(pairs["status"])
    kept = list(pairs.select_columns(list(ID_FIELDS)).select(np.flatnonzero(status == KEPT)))
    return PairCounts(
        rows=len(status),
        pairs=len(kept),
        too_long=int((status == TOO_LONG).sum()),
        bad=int((status == BAD).sum()),
        equal=sum(row["chosen_ids"] == row["rejected_ids"] for row in kept),
        prompt_tokens=sum(len(row["prompt_ids"]) for row in kept),
        completion_tokens=sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in kept),
    )


def _warn(name: str, counts: PairCounts, reasons: list[str]) -> None:
    if counts.bad:
        shown = "; ".join(reasons[:REASONS_SHOWN])
        logger.warning(f"{name} dataset: {counts.bad} malformed rows left out, such as: {shown}")
    if counts.too_long:
        logger.warning(
            f"{name} dataset: {counts.too_long} rows left out, whose prompt alone fills max_length"
        )
    if counts.equal:
        logger.warning(
            f"{name} dataset: in {counts.equal} rows chosen equals rejected; they teach nothing"
        )
