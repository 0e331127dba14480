"""What a forward is given of a batch, in each layout: tokens, positions, labels, what is shared."""

import itertools

import numpy as np
import pytest
import torch

from fastdpo.batch import PairBatch, TokensRun, count_pairs
from fastdpo.collate import LAYOUTS, SAMPLED_PAIRS, first_pairs_longest_first, make_collator
from fastdpo.columns import Cut

PAD = 99
ROWS = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11, 12]},
]


def collate(rows=ROWS, layout="padded", pad_to_multiple_of=None, **cut):
    return make_collator(layout, Cut(**cut), PAD, pad_to_multiple_of)(rows)


def scored_pairs(inputs):
    """(predicting token, predicted token) of every scored row, per completion."""
    batch = PairBatch.from_inputs(inputs)
    before = inputs["input_ids"].flatten()[batch.scored_rows_N]
    pairs = list(zip(before.tolist(), batch.labels_N.tolist(), strict=True))
    ends = batch.cu_seqlens.tolist()
    return [pairs[a:b] for a, b in itertools.pairwise(ends)]


def test_chosen_stand_before_rejected_padded_to_the_longest():
    inputs = collate()
    assert inputs["input_ids"].tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 9, PAD, PAD],
        [1, 2, 3, 6, PAD],
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_is_made_on_the_cpu_whatever_torchs_default(layout):
    rows = [row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in ROWS]
    with torch.device("meta"):
        inputs = collate(rows, layout)
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_moves_value_by_value(layout):
    inputs = collate(layout=layout)
    moved = {name: value.to("meta") for name, value in inputs.items()}
    assert moved["tokens"] == inputs["tokens"]
    batch = PairBatch.from_inputs(moved)
    assert batch.model_inputs["input_ids"].is_meta and batch.scored_rows_N.is_meta


def test_a_batch_of_trls_collator_is_scored_alike():
    inputs = collate()
    trl = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    trl["completion_mask"] = trl["completion_mask"].bool()
    ours, theirs = PairBatch.from_inputs(inputs), PairBatch.from_inputs(trl)
    for name in ("scored_rows_N", "labels_N", "cu_seqlens"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert count_pairs(inputs) == count_pairs(trl) == ours.num_pairs == 2


def test_a_collators_mask_stays_as_it_was():
    inputs = collate()
    trl = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)  # no prompt at all
    batch = PairBatch.from_inputs({**trl, "completion_mask": mask})
    assert mask.all() and batch.cu_seqlens.tolist() == [0, 4, 8, 12, 16]


def test_a_model_is_given_what_it_takes_of_a_batch():
    inputs = collate([row | {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} for row in ROWS])
    assert set(PairBatch.from_inputs(inputs).model_inputs) == {"input_ids"}
    of_ours_alone = ("scored_rows", "completion_labels", "cu_seqlens")
    trl = {name: x for name, x in inputs.items() if name not in of_ours_alone}
    assert set(PairBatch.from_inputs(trl).model_inputs) == {"input_ids", "attention_mask"}


def test_keep_start_cuts_the_end_of_each_sequence():
    inputs = collate(max_length=4)
    assert inputs["input_ids"].tolist() == [
        [1, 2, 3, 4],
        [7, 8, 9, PAD],
        [1, 2, 3, 6],
        [7, 8, 10, 11],
    ]
    assert scored_pairs(inputs)[0] == [(3, 4)]
    assert Cut(max_length=2)([1, 2, 3], [4, 5, 6]) == ([1, 2], [])


def test_keep_end_cuts_the_beginning_of_each_sequence():
    inputs = collate(max_length=3, truncation_mode="keep_end")
    assert inputs["input_ids"].tolist() == [[3, 4, 5], [7, 8, 9], [2, 3, 6], [10, 11, 12]]
    # nothing is left that could predict token 10
    assert scored_pairs(inputs)[3] == [(10, 11), (11, 12)]
    shorter = collate(max_length=2, truncation_mode="keep_end")
    assert shorter["input_ids"].tolist() == [[4, 5], [8, 9], [3, 6], [11, 12]]
    longer = collate(max_length=4, truncation_mode="keep_end")  # two are shorter, and stay whole
    assert longer["input_ids"].tolist() == [
        [2, 3, 4, 5],
        [7, 8, 9, PAD],
        [1, 2, 3, 6],
        [8, 10, 11, 12],
    ]


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
    wide = {n: x.double() if "ref" in n else x for n, x in collate(rows).items()}
    assert PairBatch.from_inputs(wide).reference_logps_S.dtype == torch.float32
    assert PairBatch.from_inputs(collate()).reference_logps_S is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_ids_may_be_lists_or_arrays_of_any_integers(layout):
    arrays = [{name: np.array(ids, np.int32) for name, ids in row.items()} for row in ROWS]
    mixed = [arrays[0], {**ROWS[1], "prompt_ids": ROWS[0]["prompt_ids"]}]
    lists = [ROWS[0], mixed[1]]
    for rows, same in ((arrays, ROWS), (mixed, lists)):
        ours, theirs = collate(rows, layout), collate(same, layout)
        for name in ("input_ids", "completion_labels", "scored_rows"):
            assert torch.equal(ours[name], theirs[name]), name


def test_a_group_is_laid_out_as_the_docstring_of_packed_row_draws_it():
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 2], "rejected_ids": [7, 9, 2]}
    inputs = collate([row], "shared")
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 2, 9, 2]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4]]
    assert inputs["attention_mask"].tolist() == [[2, 2, 2, 1, 1, 1, 1]]
    assert inputs["scored_rows"].tolist() == [1, 2, 3, 2, 5]
    assert inputs["completion_labels"].tolist() == [7, 8, 2, 9, 2]
    assert inputs["completion_rows"].tolist() == [0, 1, 2, 0, 3, 4]
    assert inputs["tree"].trunks == ((0, 5),) and inputs["tree"].branches == ((5, 7, 0, 3),)


def test_equal_completions_of_a_prompt_are_there_once():
    other_way_round = ROWS[0] | {"chosen_ids": [6], "rejected_ids": [4, 5]}
    inputs = collate([ROWS[0], other_way_round], "shared")
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert inputs["attention_mask"].tolist() == [[4, 4, 4, 2, 2, 2]]


@pytest.mark.parametrize("chosen, rejected", [([4, 5], [4, 5, 9]), ([4, 5, 9], [4, 5])])
def test_a_completion_that_another_continues_is_no_branch_of_its_own(chosen, rejected):
    row = {"prompt_ids": [1, 2], "chosen_ids": chosen, "rejected_ids": rejected}
    inputs = collate([row], "shared")
    assert inputs["input_ids"].tolist() == [[1, 2, 4, 5, 9]]
    assert inputs["tree"].branches == ()


def test_completions_that_share_no_row_need_no_map_of_rows():
    alone = {"prompt_ids": [1], "chosen_ids": [4, 5], "rejected_ids": [6]}
    alike = alone | {"rejected_ids": [4, 6]}
    assert PairBatch.from_inputs(collate([alone], "shared")).completion_rows_C is None
    batch = PairBatch.from_inputs(collate([alike], "shared"))
    assert batch.labels_N[batch.completion_rows_C].tolist() == [4, 5, 4, 6]


@pytest.mark.parametrize(
    "layout, tokens",
    [
        ("padded", TokensRun(run=4 * 5)),
        ("packed", TokensRun(run=5 + 3 + 4 + 5, padding_avoided=3)),
        ("shared", TokensRun(run=3 + 3 + 2 + 4, shared=3 + 2, padding_avoided=3)),
    ],
)
def test_what_ran_and_what_did_not_have_to_is_counted(layout, tokens):
    assert collate(layout=layout)["tokens"] == tokens


def test_tokens_add_up_over_batches():
    assert TokensRun(10, 2, 3) + TokensRun(20, 0, 5) == TokensRun(30, 2, 8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_length, wanted", [(None, 5 + 3 + 4 + 5), (4, 4 + 3 + 4 + 4)])
def test_num_tokens_is_the_sum_of_all_sequences_lengths(layout, max_length, wanted):
    inputs = collate(layout=layout, max_length=max_length)
    assert PairBatch.from_inputs(inputs).num_tokens == wanted


def test_the_longest_of_the_first_rows_is_looked_at_and_a_stream_not_read_on():
    def stream():
        for i in itertools.count():
            assert i < SAMPLED_PAIRS, "read too far"
            is_long = i == 7  # as a whole: others have longer prompts
            yield {
                "prompt_ids": [i] * (2 if is_long else 9),
                "chosen_ids": [i] * (30 if is_long else 4),
                "rejected_ids": [i],
            }

    pairs = first_pairs_longest_first(stream())
    assert len(pairs) == SAMPLED_PAIRS and pairs[0]["prompt_ids"] == [7, 7]
