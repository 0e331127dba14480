"""Who sees whom in a packed row: causal trunks, and branches that continue a trunk's beginning.

    tokens      trunk 0        | trunk 1        | ... | branch 0 | branch 1 | ...
    a trunk     is one causal sequence
    a branch    sees the first `shared` tokens of its trunk, and itself causally

packed_row.py lays pairs out so; attention.py runs attention along it.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastdpo.batch import cu_seqlens_of


class Trunk(NamedTuple):
    """Tokens start to stop are one causal sequence."""

    start: int
    stop: int


class Branch(NamedTuple):
    """Tokens start to stop continue the `shared` tokens from trunk_start on, and see no other."""

    start: int
    stop: int
    trunk_start: int
    shared: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """Who sees whom in a packed row of T tokens: trunks end to end, then branches end to end.

    The same for variable-length kernels, in FlashAttention's words: cu_seqlens_q (int32) of the
    trunks and branches, cu_seqlens_k of what each of them sees, and the longest of both. The keys
    are gathered from the tokens at key_indices (int64): of a branch its shared beginning, then
    itself. Moves like a tensor.
    """

    trunks: tuple[Trunk, ...]
    branches: tuple[Branch, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_indices: Tensor

    @classmethod
    def of(cls, trunks: list[Trunk], branches: list[Branch]) -> "Tree":
        """The tree of these trunks and branches, each in the order of its tokens."""
        lengths = [s.stop - s.start for s in (*trunks, *branches)]
        shared = [0] * len(trunks) + [branch.shared for branch in branches]
        seen = [a + b for a, b in zip(lengths, shared, strict=True)]
        # what a segment continues, and itself; of a trunk the first is empty
        starts = [[0, t.start] for t in trunks] + [[b.trunk_start, b.start] for b in branches]
        key_indices = ranges(np.ravel(starts), np.ravel(list(zip(shared, lengths, strict=True))))
        return cls(
            trunks=tuple(trunks),
            branches=tuple(branches),
            cu_seqlens_q=cu_seqlens_of(lengths),
            cu_seqlens_k=cu_seqlens_of(seen),
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(seen),
            key_indices=torch.from_numpy(key_indices),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Tree":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Tree":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> "Tree":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def ranges(starts: ArrayLike, lengths: ArrayLike) -> np.ndarray:
    """Consecutive int64 numbers from each of `starts` on, as many as `lengths` says, end to end."""
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    numbers = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    numbers += np.arange(len(numbers))
    return numbers
