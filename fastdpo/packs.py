"""A training batch in packs of at most so many tokens, run one after the other.

    rows --split--> packs --collator--> {"packs": [inputs of one forward, ...], "rows": Rows}

Pairs with one prompt stay in one pack while they fit. pack_trainer.py runs them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdpo.collate import PackedCollator, PaddedCollator, Row

SAFE_SHARE = 0.8  # of the free memory that a budget may count on: fragments take the rest


@dataclass(slots=True)
class TokenBudget:
    """How many tokens a forward may have; None for no bound. Grows smaller when memory runs out."""

    max_tokens: int | None
    may_shrink: bool = False

    def shrink(self, packs: Sequence[Mapping[str, Any]]) -> bool:
        """Halve what the largest of `packs` was; False where no smaller pack could be made."""
        tokens = [pack["tokens"].run for pack in packs if len(pack["cu_seqlens"]) > 3]
        if not (self.may_shrink and tokens):
            return False
        self.max_tokens = max(tokens) // 2
        return True

    def fits(self, pack: Mapping[str, Any]) -> bool:
        """Whether `pack` keeps to the budget, or is a single pair, which nothing can split."""
        is_one_pair = len(pack["cu_seqlens"]) == 3
        return self.max_tokens is None or pack["tokens"].run <= self.max_tokens or is_one_pair


class Rows:
    """A batch's rows, kept to lay them out anew; opaque, so that nothing walks through them."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows


@dataclass(frozen=True, slots=True)
class PackCollator:
    """Rows -> the inputs of each pack of a batch. A pack larger than the budget is a single pair"""

    collator: PaddedCollator | PackedCollator
    budget: TokenBudget

    def __call__(self, rows: Sequence[Row], at_least: int = 1) -> dict[str, Any]:
        packs = split(rows, self.budget.max_tokens, self.collator.tokens)
        packs = [self.collator(pack) for pack in into_more(packs, at_least)]
        return {"packs": packs, "rows": Rows(rows)}


def split(
    rows: Sequence[Row], max_tokens: int | None, count: Callable[[list[list[Row]]], int]
) -> list[list[Row]]:
    """`rows` in packs; count(groups) says how many tokens a forward of these groups has.

    The largest group first, each into the first pack that has room for it.
    """
    if max_tokens is None:
        return [list(rows)]
    by_prompt: dict[bytes, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(np.asarray(row["prompt_ids"], np.int64).tobytes(), []).append(row)
    groups = []
    for group in by_prompt.values():
        groups += [group] if count([group]) <= max_tokens else [[row] for row in group]
    packs: list[list[list[Row]]] = []
    for group in sorted(groups, key=lambda group: count([group]), reverse=True):
        for pack in packs:
            if count([*pack, group]) <= max_tokens:
                pack.append(group)
                break
        else:
            packs.append([group])
    return [[row for group in pack for row in group] for pack in packs]


def into_more(packs: list[list[Row]], at_least: int) -> list[list[Row]]:
    """As many packs as other ranks have, as far as there are pairs: the fullest in halves."""
    packs = list(packs)
    while len(packs) < at_least:
        fullest = max(packs, key=len)
        if len(fullest) == 1:
            break
        packs.remove(fullest)
        packs += [fullest[::2], fullest[1::2]]
    return packs


def tokens_that_fit(
    run: Callable[[dict], None],
    smaller: dict,
    larger: dict,
    device: torch.device,
    *,
    kept_bytes: int,
) -> int | None:
    """Tokens of a forward and backward in what is free of `device` but for kept_bytes.

    Read off what run(smaller) and run(larger) take at their peak: the difference is what tokens
    cost, gradients and all else that does not grow with them aside. None, for no bound until
    memory runs out, where the device is no GPU or the two have as many tokens.
    """
    tokens = larger["tokens"].run - smaller["tokens"].run
    if device.type != "cuda" or tokens <= 0:
        return None
    peaks = []
    for inputs in (smaller, smaller, larger):  # the first one warms up
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            run(inputs)
        except torch.OutOfMemoryError:
            if inputs is smaller:
                raise
            return smaller["tokens"].run
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    per_token = max(1.0, (peaks[2] - peaks[1]) / tokens)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(SAFE_SHARE * (free - kept_bytes) / per_token))
