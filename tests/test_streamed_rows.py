"""Rows of a stream as tokenised pairs: checked as they come."""

import pytest
import tiny
from datasets import IterableDataset
from pairs import merging_tokenizer, pairs_of

from fastdpo.data import prepare_pairs
from fastdpo.row_errors import RowError


@pytest.fixture(scope="module")
def tokenizer():
    return merging_tokenizer()


def test_a_stream_is_checked_as_it_is_read(tokenizer, caplog):
    bad = {"prompt": "a", "chosen": None, "rejected": " d"}
    rows = [*tiny.rows(3), bad, *tiny.rows(2)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    kept, counts = prepare_pairs(stream, tokenizer, on_bad_rows="skip")
    assert counts is None
    expected, _ = pairs_of([*tiny.rows(3), *tiny.rows(2)], tokenizer)
    assert list(kept) == expected
    assert sum("row 3, field 'chosen'" in r.getMessage() for r in caplog.records) == 1
    with pytest.raises(RowError, match="row 3, field 'chosen'"):
        prepare_pairs(stream, tokenizer)
    far = IterableDataset.from_generator(lambda: iter([*tiny.rows(1000), bad]))
    strict, _ = prepare_pairs(far, tokenizer)  # reads no further than it must
    with pytest.raises(RowError, match="row 1000, field 'chosen'"):
        list(strict)


def test_a_stream_without_a_row_that_trains_is_reported_at_once(tokenizer):
    rows = [{"prompt": "a", "chosen": None, "rejected": "c"}] * 3
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="eval dataset: no row is left"):
        prepare_pairs(stream, tokenizer, name="eval", on_bad_rows="skip")


def test_a_stream_says_its_columns_and_has_no_others(tokenizer):
    logps = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    rows = [tiny.rows(1)[0] | logps, tiny.rows(1)[0] | logps | {"note": "odd"}]
    stream, _ = prepare_pairs(IterableDataset.from_generator(lambda: iter(rows)), tokenizer)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids", *logps]
    assert stream.column_names == columns
    assert [list(pair) for pair in stream] == [columns] * 2


def test_reference_logps_that_a_streams_first_row_has_not_are_reported(tokenizer):
    rows = [*tiny.rows(2), tiny.rows(1)[0] | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(RowError, match="row 2, field 'ref_chosen_logps': want none, as other rows"):
        list(prepare_pairs(stream, tokenizer)[0])
