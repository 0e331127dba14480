from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.collate import Cut, PackedCollator, make_collator
from fastdpo.packs import PackCollator, split
from fastdpo.token_budget import UNBOUNDED, TokenBudget


def row(prompt, chosen, rejected):
    return {"prompt_ids": [1] * prompt, "chosen_ids": [2] * chosen, "rejected_ids": [3] * rejected}


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
)
def test_packs_hold_every_pair_once_and_keep_to_the_budget(rows, max_tokens, layout, cut):
    collator = make_collator(layout, cut, pad_token_id=0, pad_to_multiple_of=None)
    packs = split(rows, max_tokens, collator)
    assert sorted(map(str, rows)) == sorted(str(r) for pack in packs for r in pack)
    for pack in packs:
        assert collator(pack)["tokens"].run <= max_tokens or len(pack) == 1


def test_pairs_of_one_prompt_stay_together_while_they_fit():
    rows = [row(9, 2, 3), row(5, 2, 2), row(9, 4, 1), row(5, 1, 3)]
    packs = split(rows, 20, PackedCollator(share=True))
    assert [[len(r["prompt_ids"]) for r in pack] for pack in packs] == [[9, 9], [5, 5]]


def test_a_small_group_fills_the_first_pack_that_has_room_for_it():
    rows = [row(3, 1, 1), row(6, 5, 5), row(5, 5, 5), row(1, 1, 1)]
    packs = split(rows, 20, PackedCollator(share=True))
    assert [[len(r["prompt_ids"]) for r in pack] for pack in packs] == [[6, 1], [5, 3]]


def test_more_packs_are_made_where_another_rank_has_more():
    collate = PackCollator(PackedCollator(share=True), TokenBudget())
    rows = [row(n, 1, 1) for n in (2, 3, 4)]
    assert [len(collate(rows, at_least=n)["packs"]) for n in (1, 2, 3, 9)] == [1, 2, 3, 3]
