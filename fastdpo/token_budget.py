"""How many tokens a forward may have, and how many the memory at hand has room for."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastdpo.batch import count_pairs

UNBOUNDED = sys.maxsize  # tokens
SAFE_SHARE = 0.8  # of free memory that a budget may use; the rest is left for fragmentation


class TokenBudget:
    """At most max_tokens in a forward; fewer when memory runs out, if it may shrink.

    The number is kept in shared memory, so that a data loader's workers see it shrink.
    """

    def __init__(self, max_tokens: int = UNBOUNDED, *, may_shrink: bool = False):
        self._shared = torch.tensor(max_tokens, device="cpu").share_memory_()
        self.may_shrink = may_shrink

    @property
    def max_tokens(self) -> int:
        return self._shared.item()

    @max_tokens.setter
    def max_tokens(self, count: int) -> None:
        self._shared.fill_(count)

    def fits(self, pack: Mapping[str, Any]) -> bool:
        """Whether `pack` keeps to the budget, or is a single pair, which nothing can split."""
        return pack["tokens"].run <= self.max_tokens or not _can_split(pack)


def half_of_largest(packs: Sequence[Mapping[str, Any]]) -> int:
    """A budget that the largest of `packs` exceeds; 0 where each is a single pair."""
    return max((pack["tokens"].run for pack in packs if _can_split(pack)), default=0) // 2


def _can_split(pack: Mapping[str, Any]) -> bool:
    return count_pairs(pack) > 1


def tokens_that_fit(
    run: Callable[[dict], None], probes: Sequence[dict], device: torch.device, *, kept_bytes: int
) -> int:
    """How many tokens of a forward and backward fit into `device`'s free memory, less kept_bytes.

    probes: inputs of more and more tokens. run(inputs) leaves the gradients where they are: made
    again they would be the peak of a small forward, whatever its tokens cost. The last two probes
    that memory has room for tell what a token costs, and what comes on top. UNBOUNDED, until memory
    runs out, where the device is not a GPU or no probe has more tokens than another.
    torch.OutOfMemoryError where there is no room for the first.
    """
    growing = {inputs["tokens"].run: inputs for inputs in probes}
    if device.type != "cuda" or len(growing) == 1:
        return UNBOUNDED
    run(probes[0])  # warms up, and makes the gradients
    tokens, peaks = [], []
    for inputs in growing.values():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            run(inputs)
        except torch.OutOfMemoryError:
            if not tokens:
                raise
            return tokens[-1]
        tokens.append(inputs["tokens"].run)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    per_token = max(1.0, (peaks[-1] - peaks[-2]) / (tokens[-1] - tokens[-2]))
    on_top = max(0.0, peaks[-1] - per_token * tokens[-1])
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int((SAFE_SHARE * (free - kept_bytes) - on_top) / per_token))
