from itertools import pairwise

import pytest
import torch

from fastdpo.batch import PairBatch, count_pairs
from fastdpo.collate import Cut, PaddedCollator

ROWS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12]},
]


def collate(rows=ROWS, **settings):
    pad_to = settings.pop("pad_to_multiple_of", None)
    return PaddedCollator(pad_token_id=0, pad_to_multiple_of=pad_to, cut=Cut(**settings))(rows)


def scored_pairs(inputs):
    """(predicting token, predicted token) of every scored row, per completion."""
    batch = PairBatch.from_inputs(inputs)
    before = inputs["input_ids"].flatten()[batch.scored_rows_R]
    pairs = list(zip(before.tolist(), batch.labels_R.tolist(), strict=True))
    ends = batch.cu_seqlens.tolist()
    return [pairs[a:b] for a, b in pairwise(ends)]


def test_chosen_stand_before_rejected_padded_to_the_longest():
    inputs = collate()
    assert inputs["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 9, 0, 0],
        [1, 2, 3, 6, 0],
        [7, 8, 10, 11, 12],
    ]
    assert inputs["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_each_completion_token_is_scored_by_the_token_before_it():
    assert scored_pairs(collate()) == [
        [(3, 4), (4, 5)],
        [(8, 9)],
        [(3, 6)],
        [(8, 10), (10, 11), (11, 12)],
    ]


def test_a_batch_of_trls_collator_is_scored_alike():
    inputs = collate()
    trl = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    ours, theirs = PairBatch.from_inputs(inputs), PairBatch.from_inputs(trl)
    for name in ("scored_rows_R", "labels_R", "cu_seqlens"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert count_pairs(inputs) == count_pairs(trl) == ours.num_pairs == 2


def test_keep_start_cuts_the_end_of_each_sequence():
    inputs = collate(max_length=4)
    assert inputs["input_ids"].tolist() == [
        [1, 2, 3, 4],
        [7, 8, 9, 0],
        [1, 2, 3, 6],
        [7, 8, 10, 11],
    ]
    assert scored_pairs(inputs)[0] == [(3, 4)]


def test_keep_end_cuts_the_beginning_of_each_sequence():
    inputs = collate(max_length=3, truncation_mode="keep_end")
    assert inputs["input_ids"].tolist() == [[3, 4, 5], [7, 8, 9], [2, 3, 6], [10, 11, 12]]
    # nothing is left that could predict token 10
    assert scored_pairs(inputs)[3] == [(10, 11), (11, 12)]


def test_padding_reaches_the_multiple_asked_for():
    assert collate(pad_to_multiple_of=8)["input_ids"].shape == (4, 8)


def test_reference_logps_of_the_rows_reach_the_batch_chosen_first():
    logps = [(-1.0, -2.0), (-3.0, -4.0)]
    rows = [
        row | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        for row, (chosen, rejected) in zip(ROWS, logps, strict=True)
    ]
    batch = PairBatch.from_inputs(collate(rows))
    assert batch.reference_logps_S.tolist() == [-1.0, -3.0, -2.0, -4.0]
    assert PairBatch.from_inputs(collate()).reference_logps_S is None


@pytest.mark.parametrize("max_length", [None, 4])
def test_tokens_counted_are_those_that_run(max_length):
    inputs = collate(max_length=max_length)
    assert PairBatch.from_inputs(inputs).num_tokens == inputs["attention_mask"].sum()
