"""Samplers whose order survives a resume, and streams that several ranks share."""

from collections.abc import Iterator

import datasets
import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.state import GradientState
from torch.utils.data import IterableDataset, Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededByEpoch(Sampler[int]):
    """`sampler`, in an order that follows from seed and epoch alone, on every rank.

    transformers lets it draw from torch's global random state, which is another one by the time
    that a run resumes within an epoch.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        # a dataset's column reads a row at each look
        sampler.lengths = np.asarray(sampler.lengths[:]).tolist()
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The data loader's call, before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(self._sampler)


class WholeStream(IterableDataset):
    """Hides from accelerate that `pairs` is a datasets.IterableDataset.

    It would share that out by files, and a rank with more rows than another would wait forever. So
    each rank takes its part of every batch, and reads all rows. Of the last batch accelerate is
    told how many rows do not repeat those before, which it knows by itself only of a dataset with
    a length; but nothing where a loader's workers read them.
    """

    def __init__(self, pairs: datasets.IterableDataset):
        self._pairs = pairs

    def set_epoch(self, epoch: int) -> None:
        """The data loader's call, before each pass: of a shuffled stream."""
        self._pairs.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        num_read = 0
        for pair in self._pairs:
            num_read += 1
            yield pair
        loader = GradientState().active_dataloader
        shard = getattr(loader, "dataset", None)
        if isinstance(shard, IterableDatasetShard) and shard.dataset is self:
            ranks = 1 if shard.split_batches else shard.num_processes
            loader.remainder = num_read % (shard.batch_size * ranks)
