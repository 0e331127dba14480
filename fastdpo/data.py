"""Preference rows -> tokenised pairs: prompt_ids, chosen_ids and rejected_ids of each row.

A row's three texts (prompt, prompt + chosen, prompt + rejected) are tokenised, all of a batch of
rows in one call. Tokens may merge across the end of a prompt, so the prompt's ids are those that
the three begin with alike; what follows is the completion. Row numbers count from 0.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import transformers
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from fastdpo.columns import ID_COLUMNS, REFERENCE_COLUMNS, Cut
from fastdpo.messages import check_text, is_conversation
from fastdpo.pairs_cache import has_transform, map_once
from fastdpo.preferences import (
    FIELDS,
    MALFORMED,
    ORIGIN,
    checked_row,
    from_arrow,
    warn_of_unread,
)
from fastdpo.row_errors import FieldError, RowError
from fastdpo.row_report import (
    BAD,
    DROPPED,
    END_LOST,
    NOTE,
    STATUS,
    PairCounts,
    WarnOnce,
    counted,
    cut_status,
    origins_of,
    warn,
)

AT_ONCE = 64  # rows that are in memory as lists while they are tokenised


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
    keep_columns: bool = False,
) -> tuple[Dataset | IterableDataset, PairCounts | None]:
    """`dataset` with the columns prompt_ids, chosen_ids, rejected_ids, and what was counted.

    ref_chosen_logps and ref_rejected_logps stay, where the rows have them. A row whose prompt
    alone fills max_length is dropped (keep_start would cut all of its completion); cutting is
    the collator's. length_column: one more column, the tokens of prompt, chosen and rejected, for
    samplers by length. keep_columns: the rows' other columns stay too, but for a stream's. A
    streamed dataset is read up to its first pair, the rest as it trains, and not counted: None.

    RowError at the first malformed row, or with on_bad_rows="skip" a warning that counts them;
    ValueError where columns are missing or no row is left, TypeError for anything but a dataset.
    """
    check_dataset(dataset, name)
    if not has_transform(dataset):
        dataset = dataset.with_format(None)  # lists and texts; a transform of the rows' own stays
    columns = _columns(dataset, name)
    warn_of_unread(f"{name} dataset", columns)
    tokenize = _Tokenize(
        tokenizer=tokenizer,
        # not all ids below the largest need have a token
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        name=name,
        row_features=dataset.features,
        skip_bad=on_bad_rows == "skip",
        with_reference=_has_reference(dataset, columns),
        source_digest=_source_digest(),
    )
    cut = Cut(max_length=max_length, truncation_mode=truncation_mode)
    if isinstance(dataset, IterableDataset):
        return _as_it_comes(dataset, tokenize, cut, columns), None
    made = {*tokenize.features, MALFORMED, ORIGIN, length_column}
    may_stay = keep_columns and not has_transform(dataset)  # a transform makes its own
    others = [column for column in dataset.column_names if may_stay and column not in made]
    pairs = map_once(
        dataset,
        tokenize,
        name=name,
        batched=True,
        batch_size=AT_ONCE,
        with_indices=True,
        remove_columns=[column for column in dataset.column_names if column not in others],
        features=Features({key: dataset.features[key] for key in others} | tokenize.features),
        num_proc=num_proc and min(num_proc, len(dataset)),
        desc=f"Tokenizing the {name} dataset",
    ).with_format(None)
    status = _status(pairs, cut)
    kept = status & DROPPED == 0
    tokens = {column: pc.list_value_length(pairs.data[column]).to_numpy() for column in ID_COLUMNS}
    counts = counted(status, *(tokens[column][kept] for column in ID_COLUMNS), max_length)
    warn(name, counts, status, pairs.data[NOTE])
    if counts.pairs == 0:
        raise ValueError(
            f"{name} dataset: no row is left of {counts.rows}: in {counts.too_long} the prompt "
            f"alone fills max_length={max_length}, {counts.bad} are malformed"
        )
    if length_column is not None:
        pairs = pairs.add_column(length_column, sum(tokens.values()))
    return pairs.remove_columns([STATUS, NOTE]).select(np.flatnonzero(kept)), counts


def check_dataset(dataset: Any, name: str) -> None:
    """TypeError for anything but a dataset."""
    if not isinstance(dataset, Dataset | IterableDataset):
        got = type(dataset).__name__
        raise TypeError(f"{name} dataset: want a datasets.Dataset or IterableDataset, got {got}")


def _status(pairs: Dataset, cut: Cut) -> np.ndarray:
    """The status of each row once it is cut."""
    batches = pairs.with_format("numpy", columns=[*ID_COLUMNS, STATUS]).iter(1000)
    return np.concatenate([cut_status(batch, cut) for batch in batches])


def _columns(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    """The columns of `dataset`; ValueError where a pair's are not among them."""
    columns, why = dataset.column_names, ""
    if columns is None or has_transform(dataset):
        # the rows say; one that could not be read does not
        columns = list(next((row for row in dataset if MALFORMED not in row), {}))
        if not columns and (first := next(iter(dataset), None)):
            why = f", the first: {first[MALFORMED]}"
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"{name} dataset: want at least one row that can be read, got none{why}")
    if not ({"chosen", "rejected"} <= set(columns) or set(ID_COLUMNS) <= set(columns)):
        raise ValueError(
            f"{name} dataset: want the columns chosen and rejected, with prompt or without, or "
            f"{', '.join(ID_COLUMNS)}, got {columns}"
        )
    return columns


def _has_reference(dataset: Dataset | IterableDataset, columns: list[str]) -> bool:
    """Whether one of the columns is there, in a dataset at hand with a number in most rows."""
    names = set(REFERENCE_COLUMNS) & set(columns)
    if isinstance(dataset, Dataset):
        at_hand = sorted(names & set(dataset.data.column_names))
        table = dataset.select_columns(at_hand).with_format("arrow")[:] if at_hand else None
        names -= {name for name in at_hand if 2 * table[name].null_count > len(table)}
    return bool(names)


def _as_it_comes(
    dataset: IterableDataset, tokenize: "_Tokenize", cut: Cut, columns: list[str]
) -> IterableDataset:
    pairs = dataset.map(
        WarnOnce(tokenize, tokenize.name, cut),
        batched=True,
        batch_size=AT_ONCE,
        with_indices=True,
        remove_columns=columns,
    ).filter(_is_kept, input_columns=STATUS)
    # a later row may have columns that the first lacked
    features = Features({k: v for k, v in tokenize.features.items() if k not in (STATUS, NOTE)})
    pairs = pairs.select_columns([*features]).cast(features)
    if next(iter(pairs), None) is None:
        raise ValueError(
            f"{tokenize.name} dataset: no row is left of the stream: all are malformed, or their "
            "prompt alone fills max_length"
        )
    return pairs


def _source_digest() -> str:
    """A digest of what makes pairs of rows: these sources, and the version of transformers."""
    names = ("data", "preferences", "messages", "row_errors", "row_report", "columns")
    parts = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in names]
    return hashlib.sha256(b"".join([*parts, transformers.__version__.encode()])).hexdigest()


@dataclasses.dataclass(slots=True)
class _Row:
    """A row on its way to a pair. `origin` says which it is, `status` and `note` are its report.

    given: its fields as they came; checked: the same once checked. texts: prompt, prompt + chosen
    and prompt + rejected, where the row has texts and no token ids; ids: theirs. pair: the columns
    of the pair, empty ones of a malformed row.
    """

    origin: str
    given: dict[str, Any]
    checked: dict[str, Any] = dataclasses.field(default_factory=dict)
    texts: list[str] | None = None
    is_chat: bool = False
    ids: list[list[int]] | None = None
    pair: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {column: [] for column in ID_COLUMNS}
    )
    status: int = 0
    note: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Tokenize:
    """A batch of rows as columns, and their row numbers -> the columns of `features`."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int  # bounds ids that came with a row
    name: str
    row_features: Features | None
    skip_bad: bool
    with_reference: bool
    # enters datasets' cache key, which sees a class's name and fields, not its code
    source_digest: str

    @property
    def features(self) -> Features:
        ids = {column: List(Value("int64")) for column in ID_COLUMNS}
        columns = REFERENCE_COLUMNS if self.with_reference else ()
        logps = {column: Value("float64") for column in columns}
        return Features(ids | logps | {STATUS: Value("int8"), NOTE: Value("string")})

    def __call__(self, batch: dict[str, Sequence], indices: list[int]) -> dict[str, list]:
        names = [name for name in FIELDS if name in batch]
        rows = [
            _Row(origin, {name: batch[name][i] for name in names})
            for i, origin in enumerate(origins_of(batch, indices))
        ]
        self._attempt(self._render, rows)
        self._add_ids([row for row in rows if row.texts is not None])
        self._attempt(self._split, rows)
        columns = {name: [row.pair.get(name) for row in rows] for name in self.features}
        return columns | {STATUS: [row.status for row in rows], NOTE: [row.note for row in rows]}

    def _attempt(self, step: Callable[[_Row], None], rows: list[_Row]) -> None:
        """Take `step` with each row that is not dropped yet; a malformed one is dropped.

        RowError at the first of those, unless they may be skipped.
        """
        for row in rows:
            if row.status & DROPPED:
                continue
            try:
                step(row)
            except (FieldError, RowError) as error:
                where = "" if isinstance(error, RowError) else f"{row.origin}, "
                row.status, row.note = BAD, f"{self.name} dataset, {where}{error}"
                if not self.skip_bad:
                    raise RowError(row.note) from None

    def _render(self, row: _Row) -> None:
        """Check the row's fields, and render the texts that are to be tokenised."""
        if row.given.get(MALFORMED) is not None:
            raise RowError(row.given[MALFORMED])  # which says where the row is from
        row.checked = fields = checked_row(from_arrow(row.given, self.row_features))
        if self.with_reference and REFERENCE_COLUMNS[0] not in fields:
            wanted = "a number, as other rows have one"
            raise FieldError(REFERENCE_COLUMNS[0], wanted, said="no value")
        if not self.with_reference and REFERENCE_COLUMNS[0] in fields:
            came = fields[REFERENCE_COLUMNS[0]]
            raise FieldError(REFERENCE_COLUMNS[0], "none, as other rows have none", came)
        if "prompt_ids" not in fields:
            row.is_chat = is_conversation(fields["prompt"])
            row.texts = self._chat_texts(fields) if row.is_chat else self._plain_texts(fields)

    def _plain_texts(self, row: dict[str, Any]) -> list[str]:
        end = self.tokenizer.eos_token
        if end is None:
            raise ValueError(
                f"{self.name} dataset: want a tokenizer with an eos_token for rows of text, which "
                "end with it, got one without"
            )
        sides = (
            side if side.endswith(end) else side + end for side in (row["chosen"], row["rejected"])
        )
        return [row["prompt"], *(row["prompt"] + side for side in sides)]

    def _chat_texts(self, row: dict[str, Any]) -> list[str]:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{self.name} dataset: want a tokenizer with a chat template for conversations, "
                "got one without"
            )
        options = {"tools": row.get("tools")} | row.get("chat_template_kwargs", {})
        texts = [self._written("prompt", row["prompt"], options, add_generation_prompt=True)]
        for field in ("chosen", "rejected"):
            texts.append(self._written(field, row["prompt"] + row[field], options))
        return texts

    def _written(self, field: str, messages: list[dict], options: dict, **more: bool) -> str:
        """The text that the chat template makes of `messages`.

        FieldError where it fails, or expects text where a message has a list of parts.
        """
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **more, **options)
        except Exception as error:  # a template is code, and may stumble over what it is given
            what = f"{type(error).__name__}: {error}"
            raise FieldError(field, "what the chat template takes", said=what) from None
        for message in messages:
            parts = message.get("content")
            if isinstance(parts, list) and parts and _wants_text(parts, message["role"], text):
                raise FieldError(field, "content as text, for this chat template", parts)
        check_text(field, text)
        return text

    def _add_ids(self, rows: list[_Row]) -> None:
        """Tokenise the texts of all rows: one call for plain text, one for conversations."""
        for is_chat in (False, True):
            group = [row for row in rows if row.is_chat is is_chat]
            texts = [text for row in group for text in row.texts]
            if not texts:
                continue
            # a chat template writes the special tokens itself
            all_ids = self.tokenizer(texts, add_special_tokens=not is_chat)["input_ids"]
            if not is_chat:
                all_ids = self._with_one_of_each_end(all_ids, texts[1])
            for i, row in enumerate(group):
                row.ids = all_ids[3 * i : 3 * i + 3]

    def _with_one_of_each_end(self, all_ids: list[list[int]], a_text: str) -> list[list[int]]:
        """Without the BOS or EOS that the tokenizer adds to a text that has its own."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        own, whole = (self.tokenizer(a_text, add_special_tokens=x).input_ids for x in (False, True))
        begin = [bos, bos] if whole[: len(own) + 1] == [bos, *own] else None
        end = [eos, eos] if whole[-len(own) - 1 :] == [*own, eos] else None
        all_ids = [ids[1:] if ids[:2] == begin else ids for ids in all_ids]
        return [ids[:-1] if ids[-2:] == end else ids for ids in all_ids]

    def _split(self, row: _Row) -> None:
        """Make the fields the pair's columns."""
        given = row.checked
        pair = {name: given[name] for name in (*ID_COLUMNS, *REFERENCE_COLUMNS) if name in given}
        lost: list[int] = []
        if row.ids is not None:
            shared = _common_length(*row.ids)
            prompt_ids, chosen_ids, rejected_ids = row.ids
            ids = (prompt_ids[:shared], chosen_ids[shared:], rejected_ids[shared:])
            pair |= dict(zip(ID_COLUMNS, ids, strict=True))
            lost = prompt_ids[shared:]
        for field in ID_COLUMNS:
            if not pair[field]:
                text = given[field.removesuffix("_ids")]
                raise FieldError(field.removesuffix("_ids"), "at least one token of its own", text)
            if field in given and max(pair[field]) >= self.vocab_size:
                raise FieldError(field, f"token ids below {self.vocab_size}", max(pair[field]))
        row.pair = pair
        if lost and lost != [self.tokenizer.eos_token_id]:  # the tokenizer's own end of any text
            row.status = END_LOST
            row.note = f"{row.origin}: {self.tokenizer.decode(lost)!r}"


def _wants_text(parts: list[dict], role: str, text: str) -> bool:
    """Whether the chat template that wrote `text` wants content as text: it wrote these parts of a
    message as a Python list, or a user's as JSON or not at all.

    (By intent it may leave out an assistant's reasoning, and write what a tool says as JSON.)
    """
    if str(parts) in text:
        return True
    is_written = any(part["text"].strip() in text for part in parts)
    is_json = json.dumps(parts, ensure_ascii=False) in text
    return role == "user" and (is_json or not is_written)


def _common_length(prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int]) -> int:
    length = 0
    for three in zip(prompt_ids, chosen_ids, rejected_ids, strict=False):
        if not three[0] == three[1] == three[2]:
            break
        length += 1
    return length


def _is_kept(status: int) -> bool:
    return not status & DROPPED
