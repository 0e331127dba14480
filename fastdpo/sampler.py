"""The order of a sampler that transformers lets draw from torch's global random state."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededByEpoch(Sampler[int]):
    """`sampler`, in an order that follows from seed and epoch alone, on every rank.

    A run that resumes within an epoch finds its order again: by then the global random state is
    another one.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The data loader's call, before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(self._sampler)
