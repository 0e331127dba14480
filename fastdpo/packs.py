"""A training batch in packs of at most max_tokens tokens, run one after the other.

    pairs --into_packs--> packs --collator--> {"packs": [inputs of a forward, ...], "pairs": ...}

Pairs with one prompt stay in one pack while they fit. pack_trainer.py runs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdpo.collate import PackedCollator, PaddedCollator, Size
from fastdpo.columns import Pair
from fastdpo.token_budget import TokenBudget

Collator = PaddedCollator | PackedCollator


class KeptPairs:
    """A batch's pairs, kept to lay them out again; opaque, so that nothing walks through them."""

    def __init__(self, pairs: Sequence[Pair]):
        self.pairs = pairs


@dataclass(frozen=True, slots=True)
class BudgetCollator:
    """Pairs -> the inputs of each pack of a batch. Only a single pair may exceed the budget."""

    collator: Collator
    budget: TokenBudget

    def __call__(self, pairs: Sequence[Pair], at_least: int = 1) -> dict[str, Any]:
        packs = into_more(into_packs(pairs, self.budget.max_tokens, self.collator), at_least)
        return {"packs": [self.collator(pack) for pack in packs], "pairs": KeptPairs(pairs)}


def into_packs(pairs: Sequence[Pair], max_tokens: int, collator: Collator) -> list[list[Pair]]:
    """`pairs` in packs of at most max_tokens tokens as `collator` lays them out.

    Groups of one prompt, the largest first, each into the first pack that has room for it. A group
    that no pack has room for goes by its pairs, and a pair that none has room for is a pack. 512
    long pairs take 6 to 8 ms of CPU time, whatever the budget (bench/bench_packs.py).
    """
    groups = []
    for group in _by_prompt(pairs):
        fits = collator.tokens(collator.size(group)) <= max_tokens
        groups += [group] if fits else [[pair] for pair in group]
    sized = [(group, collator.size(group)) for group in groups]
    sized.sort(key=lambda each: collator.tokens(each[1]), reverse=True)

    # P packs, a group each at the most; those not begun come last, empty
    packs: list[list[Pair]] = [[] for _ in sized]
    used_P = Size(*np.zeros((3, len(packs)), np.int64))
    for group, size in sized:
        with_group_P = used_P.beside(size)
        has_room_P = collator.tokens(with_group_P) <= max_tokens
        p = int((has_room_P | (used_P.sequences == 0)).argmax())
        packs[p] += group
        for used, with_group in zip(used_P, with_group_P, strict=True):
            used[p] = with_group[p]
    return [pack for pack in packs if pack]


def _by_prompt(pairs: Sequence[Pair]) -> list[list[Pair]]:
    groups: dict[bytes, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(np.asarray(pair["prompt_ids"], np.int64).tobytes(), []).append(pair)
    return list(groups.values())


def into_more(packs: list[list[Pair]], at_least: int) -> list[list[Pair]]:
    """Split the fullest packs in halves until there are `at_least`, or each is a single pair."""
    packs = list(packs)
    while len(packs) < at_least:
        fullest = max(packs, key=len)
        if len(fullest) == 1:
            break
        packs.remove(fullest)
        packs += [fullest[::2], fullest[1::2]]
    return packs
