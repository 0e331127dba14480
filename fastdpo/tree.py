"""Who sees whom in a packed row: causal trunks, and branches that continue a trunk's beginning.

    rows        trunk 0        | trunk 1        | ... | branch 0 | branch 1 | ...
    a trunk     is one causal sequence
    a branch    sees the first `shared` rows of its trunk, and itself causally

collate.py lays pairs out so; attention.py runs attention along it.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Trunk(NamedTuple):
    """Rows start to stop are one causal sequence."""

    start: int
    stop: int


class Branch(NamedTuple):
    """Rows start to stop continue the `shared` rows from trunk_start on, and see no other row."""

    start: int
    stop: int
    trunk_start: int
    shared: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """Who sees whom in a packed row of T tokens: trunks end to end, then branches end to end.

    The same for variable-length kernels, which take int32 running lengths: cu_trunks of the
    trunks; cu_branches of the branches, and cu_keys of what each of them sees, gathered from the
    rows key_rows (int64): a branch's shared beginning, then itself. Moves like a tensor.
    """

    trunks: tuple[Trunk, ...]
    branches: tuple[Branch, ...]
    cu_trunks: Tensor
    cu_branches: Tensor
    cu_keys: Tensor
    key_rows: Tensor

    @classmethod
    def of(cls, trunks: list[Trunk], branches: list[Branch]) -> "Tree":
        keys = [np.r_[b.trunk_start : b.trunk_start + b.shared, b.start : b.stop] for b in branches]
        return cls(
            trunks=tuple(trunks),
            branches=tuple(branches),
            cu_trunks=_running([t.stop - t.start for t in trunks]),
            cu_branches=_running([b.stop - b.start for b in branches]),
            cu_keys=_running([len(rows) for rows in keys]),
            key_rows=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *keys])),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Tree":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Tree":
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> "Tree":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def _running(lengths: list[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
