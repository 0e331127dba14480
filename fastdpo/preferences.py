"""One preference row: checked, with its prompt apart, and as Arrow can store it.

It is of texts, conversations or token ids.
"""

import json
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from transformers.utils import logging

from fastdpo.columns import ID_COLUMNS, REFERENCE_COLUMNS
from fastdpo.messages import (
    check_conversation,
    check_text,
    decoded,
    is_conversation,
    parsed,
    without_nulls,
)
from fastdpo.row_errors import FieldError, RowError

logger = logging.get_logger(__name__)

TEXT_FIELDS = ("prompt", "chosen", "rejected")
IMAGE_FIELDS = ("image", "images")
OPTION_FIELDS = ("tools", "chat_template_kwargs")
MALFORMED = "fastdpo_malformed"  # in place of all others: why a row could not be read
ORIGIN = "fastdpo_origin"  # which row of which source, where rows of several are mixed
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(['"])(role|content)\1\s*:""")
PROMPTS_ELSEWHERE = {"question", "instruction", "input", "query", "context", "system"}
FIELDS = (*TEXT_FIELDS, *ID_COLUMNS, *REFERENCE_COLUMNS, *IMAGE_FIELDS, *OPTION_FIELDS, MALFORMED)


def warn_of_unread(source: str, columns: Collection[str]) -> None:
    """Warn, once, of columns that other formats have the prompt in, where there is none here."""
    unread = [name for name in columns if name in PROMPTS_ELSEWHERE]
    if unread and "prompt" not in columns and {"chosen", "rejected"} <= {*columns}:
        logger.warning_once(
            f"{source}: no column prompt, so the prompt is what chosen and rejected begin with "
            f"alike; not read: {unread}"
        )


def from_arrow(row: dict[str, Any], features: Mapping[str, Any] | None) -> dict[str, Any]:
    """`row` with its messages and options as without_nulls leaves them.

    features: of a datasets.Dataset; None where a stream does not know them.
    """
    of_fields = features or {}
    fields = [field for field in (*TEXT_FIELDS, *OPTION_FIELDS) if field in row]
    return row | {field: without_nulls(row[field], of_fields.get(field)) for field in fields}


def checked_row(row: Any) -> dict[str, Any]:
    """The known fields of `row`, its implicit prompt made explicit; FieldError if malformed.

    Texts go before token ids, which may be another tokenizer's.
    """
    if not isinstance(row, Mapping):
        raise FieldError("row", "an object with prompt, chosen and rejected", row)
    given = {name: row[name] for name in FIELDS if row.get(name) is not None}
    for field in IMAGE_FIELDS:
        if given.get(field):
            wanted = "no image (vision-language rows are not supported yet)"
            raise FieldError(field, wanted, given[field])
    if ID_COLUMNS[0] in given and not {"chosen", "rejected"} & given.keys():
        return _checked_ids(given) | _checked_reference(given)
    if "prompt" in row and "prompt" not in given:  # not one to be found in chosen and rejected
        raise FieldError("prompt", "a text or messages", None)
    return _checked_texts(given) | _checked_reference(given)


def _checked_ids(row: dict[str, Any]) -> dict[str, Any]:
    for field in ID_COLUMNS:
        ids = row.get(field)
        if ids is None:
            raise FieldError(field, "token ids", said="none")
        if not isinstance(ids, list) or not ids:
            raise FieldError(field, "token ids", ids)
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < 2**63:
                raise FieldError(field, "token ids, whole numbers from 0", token)
    return {field: row[field] for field in ID_COLUMNS}


def _checked_texts(row: dict[str, Any]) -> dict[str, Any]:
    for field in ("chosen", "rejected"):
        if field not in row:
            raise FieldError(field, "a text or messages", said="none")
    kinds = {field: type(row[field]) for field in TEXT_FIELDS if field in row}
    for field, kind in kinds.items():
        if kind not in (str, list):
            raise FieldError(field, "a text or messages", row[field])
    for field, kind in kinds.items():
        if kind is not kinds["chosen"]:
            raise FieldError(field, f"a {kinds['chosen'].__name__}, as chosen is", row[field])
    texts = {field: row[field] for field in kinds}
    conversation = is_conversation(row["chosen"])
    if conversation:
        texts = {field: decoded(messages) for field, messages in texts.items()}
    else:
        for field, text in texts.items():
            check_text(field, text)
        if _are_written_out(texts):
            wanted = "messages as a list (in a CSV file as JSON), not as text"
            raise FieldError("chosen", wanted, row["chosen"])
    if "prompt" not in texts:
        texts = _with_prompt(texts["chosen"], texts["rejected"])
    if not conversation:
        return texts
    check_conversation(*(texts[field] for field in TEXT_FIELDS))
    options = {
        "tools": parsed("tools", row.get("tools"), list),
        "chat_template_kwargs": parsed(
            "chat_template_kwargs", row.get("chat_template_kwargs"), dict
        ),
    }
    return texts | {name: value for name, value in options.items() if value is not None}


def _are_written_out(texts: dict[str, str]) -> bool:
    """Whether these are messages that became text: Python's, or in all fields JSON's.

    (JSON in the completions alone may be what the prompt asks for.)
    """
    found = {field: MESSAGES_AS_TEXT.match(text) for field, text in texts.items()}
    if not (found["chosen"] and found["rejected"]):
        return False
    return found["chosen"][1] == "'" or all(found.values())


def _with_prompt(chosen: Any, rejected: Any) -> dict[str, Any]:
    """The longest common beginning as the prompt; a space before the split goes with the rest.

    If one conversation begins with all of the other, the shorter keeps its last message.
    """
    shared, shorter = 0, min(len(chosen), len(rejected))
    while shared < shorter and chosen[shared] == rejected[shared]:
        shared += 1
    if shared and (shared == shorter if is_conversation(chosen) else chosen[shared - 1] == " "):
        shared -= 1
    if not shared:
        wanted = "a prompt, or a beginning that chosen and rejected share"
        raise FieldError("prompt", wanted, said="none")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _checked_reference(row: dict[str, Any]) -> dict[str, float]:
    given = [field for field in REFERENCE_COLUMNS if field in row]
    for field in given:
        value = row[field]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max:  # an int may be beyond it
            raise FieldError(field, "a finite number", value)
    if len(given) == 1:
        missing = next(field for field in REFERENCE_COLUMNS if field not in row)
        raise FieldError(missing, f"a number, as {given[0]} has one", said="none")
    return {field: float(row[field]) for field in given}


def check_same_kind(row: Mapping[str, Any], kinds: dict[str, str]) -> None:
    """FieldError for a text among messages or the other way round.

    kinds: of the texts of the rows before; what is new in this one is added.
    """
    for field in TEXT_FIELDS:
        if (value := row.get(field)) is not None:
            kind = type(value).__name__
            wanted = kinds.setdefault(field, kind)
            if kind != wanted:
                raise FieldError(field, f"a {wanted}, as in the rows before", value)


def raise_or_mark(reason: str, skip_bad: bool) -> dict[str, str | None]:
    """RowError, or what stands for a row that could not be read, if it may be skipped."""
    if not skip_bad:
        raise RowError(reason)
    return dict.fromkeys(TEXT_FIELDS) | {MALFORMED: reason}


def storable(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with what Arrow would ask to be alike as JSON text: options, and messages that are more
    than a role and a text."""
    texts = {name: json.dumps(row[name]) for name in OPTION_FIELDS if name in row}
    many = [name for name in TEXT_FIELDS if are_more_than_texts(row.get(name))]
    return row | texts | {name: as_json_texts(row[name]) for name in many}


def are_more_than_texts(value: Any) -> bool:
    """Whether these are messages of which some have more than a role and a text."""
    return isinstance(value, list) and any(map(_is_more_than_a_text, value))


def _is_more_than_a_text(message: Any) -> bool:
    if not isinstance(message, dict):
        return isinstance(message, str)  # JSON text already
    is_plain = message.keys() == {"role", "content"}
    return not (is_plain and all(isinstance(x, str) for x in message.values()))


def as_json_texts(value: Any) -> Any:
    """Each of these messages as JSON text; a text stays as it is."""
    if not isinstance(value, list):
        return value
    return [each if isinstance(each, str) else json.dumps(each) for each in value]
