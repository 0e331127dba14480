"""How a batch is parted into packs."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.collate import PackedCollator, make_collator
from fastdpo.columns import Cut
from fastdpo.packs import BudgetCollator, into_more, into_packs
from fastdpo.token_budget import UNBOUNDED, TokenBudget


def row(prompt, chosen, rejected):
    """A pair of these lengths; prompts of one length are one prompt, and no other has its ids."""
    return {
        "prompt_ids": [100 + prompt] * prompt,
        "chosen_ids": [2] * chosen,
        "rejected_ids": [3] * rejected,
    }


def packs_of(rows, max_tokens, layout, **cut):
    """How many pairs each pack has."""
    collator = make_collator(layout, Cut(**cut), pad_token_id=0, pad_to_multiple_of=None)
    packs = into_packs(rows, max_tokens, collator)
    assert all(collator(pack)["tokens"].run <= max_tokens for pack in packs)
    return [len(pack) for pack in packs]


lengths = st.integers(1, 12)


@settings(deadline=None, derandomize=True)
@given(
    rows=st.lists(st.builds(row, lengths, lengths, lengths), min_size=1, max_size=12),
    max_tokens=st.sampled_from([1, 10, 20, 40, 80, UNBOUNDED]),
    layout=st.sampled_from(["shared", "packed", "padded"]),
    cut=st.builds(
        lambda n, mode: Cut(max_length=n, truncation_mode=mode),
        st.sampled_from([None, 8]),
        st.sampled_from(["keep_start", "keep_end"]),
    ),
    multiple=st.sampled_from([None, 8]),
)
def test_packs_hold_every_pair_once_and_keep_to_the_budget(rows, max_tokens, layout, cut, multiple):
    collator = make_collator(layout, cut, pad_token_id=0, pad_to_multiple_of=multiple)
    packs = into_packs(rows, max_tokens, collator)
    assert sorted(map(str, rows)) == sorted(str(r) for pack in packs for r in pack)
    for pack in packs:
        assert collator(pack)["tokens"].run <= max_tokens or len(pack) == 1


def test_pairs_of_one_prompt_stay_together_while_they_fit():
    rows = [row(9, 2, 3), row(5, 2, 2), row(9, 4, 1), row(5, 1, 3)]
    packs = into_packs(rows, 20, PackedCollator(share=True))
    assert [[len(r["prompt_ids"]) for r in pack] for pack in packs] == [[9, 9], [5, 5]]
    just_fits = [row(9, 2, 3), row(9, 4, 1)]
    just_fits[1]["prompt_ids"] = np.array(just_fits[1]["prompt_ids"], np.int32)
    assert packs_of(just_fits, 9 + 2 + 3 + 4 + 1, "shared") == [2]


def test_a_small_group_fills_the_first_pack_that_has_room_for_it():
    rows = [row(3, 1, 1), row(6, 5, 5), row(5, 5, 5), row(1, 1, 1)]
    packs = into_packs(rows, 20, PackedCollator(share=True))
    assert [[len(r["prompt_ids"]) for r in pack] for pack in packs] == [[6, 1], [5, 3]]


def test_many_groups_fill_a_pack_to_its_last_token():
    rows = [row(n, 1, 1) for n in (5, 4, 3, 2)]
    for layout, tokens in (("shared", 7 + 6 + 5 + 4), ("packed", 2 * 18), ("padded", 8 * 6)):
        assert packs_of(rows, tokens, layout) == [4]
        assert packs_of(rows, tokens - 1, layout) == [3, 1]


def test_a_padded_pack_is_as_large_as_its_longest_sequence_times_all():
    assert packs_of([row(3, 2, 1), row(2, 3, 3)], 20, "padded") == [2]
    assert packs_of([row(3, 2, 1), row(2, 4, 3)], 20, "padded") == [1, 1]


def test_a_pack_is_measured_as_it_is_cut():
    long = [row(3, 50, 50), row(3, 50, 50)]
    assert packs_of(long, 32, "packed", max_length=8) == [2]
    # 3 of the prompt, and 5 of each of two completions that both rows have
    assert packs_of(long, 23, "shared", max_length=8) == [2]
    # other tokens of the prompt are left before each completion: nothing is shared
    other = [row(6, 4, 6), row(6, 5, 3)]
    assert packs_of(other, 31, "shared", max_length=8, truncation_mode="keep_end") == [1, 1]
    assert packs_of(other, 32, "shared", max_length=8, truncation_mode="keep_end") == [2]
    # of a prompt that is cut itself no more is shared than is left
    prompts = [row(12, 1, 1), row(11, 1, 1)]
    assert packs_of(prompts, 15, "shared", max_length=8) == [1, 1]


def test_keep_end_shares_the_prompts_of_sequences_that_it_does_not_cut():
    rows, cut = [row(9, 2, 3), row(9, 4, 1)], {"max_length": 64, "truncation_mode": "keep_end"}
    assert packs_of(rows, 9 + 2 + 3 + 4 + 1, "shared", **cut) == [2]


def test_more_packs_are_made_where_another_rank_has_more():
    collate = BudgetCollator(PackedCollator(share=True), TokenBudget())
    rows = [row(n, 1, 1) for n in (2, 3, 4)]
    assert [len(collate(rows, at_least=n)["packs"]) for n in (1, 2, 3, 9)] == [1, 2, 3, 3]


def test_the_fullest_pack_is_halved_and_the_packs_given_stay():
    packs = [["a"], ["b", "c", "d", "e"]]
    assert into_more(packs, at_least=3) == [["a"], ["b", "d"], ["c", "e"]]
    assert packs == [["a"], ["b", "c", "d", "e"]]
