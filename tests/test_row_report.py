"""Rows that are dropped, without the end of their prompt, or odd: counted, and told once."""

import pytest
import tiny
from datasets import Dataset
from pairs import decoded, merging_tokenizer, pairs_of, with_ends

from fastdpo.data import prepare_pairs
from fastdpo.preferences import MALFORMED


@pytest.fixture(scope="module")
def tokenizer():
    return merging_tokenizer()


def test_a_prompt_whose_end_is_lost_is_counted_and_reported_once(caplog):
    tokenizer = tiny.tokenizer(["hello world"] * 9)
    rows = [
        {"prompt": "say", "chosen": " a", "rejected": " b"},
        *[{"prompt": "say hel", "chosen": "lo world", "rejected": "lo"}] * 2,
    ]
    (_, pair, _), counts = pairs_of(rows, tokenizer)
    assert decoded(tokenizer, pair) == ["say ", "hello world</s>", "hello</s>"]
    assert (counts.pairs, counts.prompt_end_lost) == (3, 2)
    (record,) = caplog.records
    assert "in 2 rows" in record.getMessage() and "first in row 1: 'hel'" in record.getMessage()

    _, counts = pairs_of(rows, tokenizer, max_length=4)
    assert (counts.too_long, counts.prompt_end_lost) == (2, 0)  # a row is told of once

    caplog.clear()
    stream, _ = prepare_pairs(Dataset.from_list(rows).to_iterable_dataset(), tokenizer)
    assert len(list(stream)) == 3
    (record,) = caplog.records
    assert "row 1: 'hel'" in record.getMessage()


def test_the_end_that_a_tokenizer_adds_to_a_prompt_is_no_loss(tokenizer):
    assert pairs_of(tiny.rows(3), with_ends(tokenizer))[1].prompt_end_lost == 0


@pytest.mark.parametrize("num_proc", [None, 2])
def test_what_is_dropped_and_what_is_odd_is_counted_and_reported_once(tokenizer, num_proc, caplog):
    rows = [
        *tiny.rows(3),
        {"prompt": "a b " * 50, "chosen": " c", "rejected": " d"},
        {"prompt": "a", "chosen": None, "rejected": " d"},
        {"prompt": "a", "chosen": " same", "rejected": " same"},
    ]
    kept, counts = pairs_of(rows, tokenizer, max_length=40, on_bad_rows="skip", num_proc=num_proc)
    assert (counts.rows, counts.pairs) == (6, 4) and len(kept) == 4
    assert (counts.too_long, counts.bad, counts.equal) == (1, 1, 1)
    assert counts.prompt_tokens == sum(len(pair["prompt_ids"]) for pair in kept)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "1 malformed rows" in messages[0] and "row 4, field 'chosen'" in messages[0]


def test_a_row_that_could_not_be_read_is_told_of_by_where_it_was(tokenizer, caplog):
    unread = dict.fromkeys(("prompt", "chosen", "rejected")) | {MALFORMED: "a.jsonl, line 9: torn"}
    _, counts = pairs_of(
        [row | {MALFORMED: None} for row in tiny.rows(2)] + [unread], tokenizer, on_bad_rows="skip"
    )
    assert counts.bad == 1
    assert caplog.records[0].getMessage().endswith("such as: train dataset, a.jsonl, line 9: torn")


def test_a_stream_tells_of_the_first_row_that_it_drops(tokenizer, caplog):
    rows = [*tiny.rows(2), *[{"prompt": "a b " * 50, "chosen": " c", "rejected": " d"}] * 2]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    pairs, _ = prepare_pairs(stream, tokenizer, max_length=40)
    assert len(list(pairs)) == 2
    (record,) = caplog.records
    assert "this one first: row 2: its prompt alone fills max_length" in record.getMessage()


def test_keep_end_drops_no_long_prompt(tokenizer):
    rows = [{"prompt": "a b " * 50, "chosen": " c", "rejected": " d"}]
    _, counts = pairs_of(rows, tokenizer, max_length=40, truncation_mode="keep_end")
    assert (counts.pairs, counts.truncated) == (1, 1)


def test_pairs_that_are_cut_to_max_length_are_counted(tokenizer):
    rows = [{"prompt": "ab", "chosen": " " + "c" * n, "rejected": " d"} for n in (1, 20)]
    rows.append({"prompt": "ab", "chosen": " d", "rejected": " " + "c" * 30})
    truncated = []
    for limit in (None, 34, 33, 23, 4):  # the longest has 34 tokens, the next 24
        _, counts = pairs_of(rows, tokenizer, max_length=limit)
        truncated.append(counts.truncated)
    assert truncated == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_pairs_that_are_equal_once_they_are_cut_are_counted_as_equal(mode, tokenizer):
    ids = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, 8, 7], "rejected_ids": [7, 8, 5, 8, 7]}
    rows = [ids, ids | {"rejected_ids": [9, 8, 7, 8, 9]}]
    for limit, equal in ((None, 0), (5, 0), (4, 1)):
        _, counts = pairs_of(
            rows,
            tokenizer,
            max_length=limit and limit - 2 * (mode == "keep_end"),
            truncation_mode=mode,
        )
        assert counts.equal == equal


def test_where_no_row_is_left_it_is_explained(tokenizer):
    rows = [{"prompt": "a b " * 50, "chosen": " c", "rejected": " d"}]
    with pytest.raises(ValueError, match="no row is left of 1: in 1 the prompt alone"):
        pairs_of(rows, tokenizer, max_length=40)
    with pytest.raises(ValueError, match="at least one row"):
        prepare_pairs(Dataset.from_dict({"prompt": []}), tokenizer)


def test_a_stream_tells_of_lost_ends_and_of_dropped_rows_once_each(caplog):
    tokenizer = tiny.tokenizer(["hello world"] * 9)
    lost = {"prompt": "say hel", "chosen": "lo world", "rejected": "lo"}
    long = {"prompt": "a b " * 50, "chosen": " c", "rejected": " d"}
    rows = Dataset.from_list([lost, long, lost, long]).to_iterable_dataset()
    stream, _ = prepare_pairs(rows, tokenizer, max_length=40)
    assert len(list(stream)) == 2
    first, second = [record.getMessage() for record in caplog.records]
    assert "row 0: 'hel'" in first and "row 1: its prompt alone fills max_length" in second
