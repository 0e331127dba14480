"""Datasets -> the same with their reference's log-probabilities, scored before training."""

import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastdpo.batch import PairBatch
from fastdpo.columns import REFERENCE_COLUMNS
from fastdpo.reference_cache import ReferenceCache
from fastdpo.reference_logps import Reference, RowLogps, once_training

BATCHES_AT_ONCE = 16  # scored before the CPU waits for them and keeps them


def have_reference_logps(
    datasets: Mapping[str, Dataset | IterableDataset], *, precompute: bool
) -> bool:
    """Whether the rows of all datasets have reference log-probabilities.

    ValueError if only some do, or if all are to get them, with `precompute`, and one is streamed,
    which has no place to keep them.
    """
    required = set(REFERENCE_COLUMNS)
    scored = [name for name, rows in datasets.items() if required <= set(rows.column_names)]
    others = [name for name in datasets if name not in scored]
    if scored and others:
        raise ValueError(
            f"want {' and '.join(REFERENCE_COLUMNS)} in all datasets or in none, got them in "
            f"{', '.join(scored)} and not in {', '.join(others)}"
        )
    streams = [name for name in others if isinstance(datasets[name], IterableDataset)]
    if precompute and streams:
        raise ValueError(
            "want map-style datasets with precompute_ref_log_probs=True, got streamed ones: "
            f"{', '.join(streams)}"
        )
    return bool(scored)


def after_precompute(
    reference: Reference, policy: nn.Module, cache: ReferenceCache | None, *, is_sharded: bool
) -> Reference:
    """`reference`, now that all rows have its log-probabilities, those of `cache` among them.

    It still scores new rows; the policy itself, where that is the reference, until it trains, or,
    with is_sharded, until it is sharded.
    """
    source = f"{reference.source}, all rows scored before training"
    if cache and cache.found:
        source += f" ({cache.found:,} found in the cache)"
    in_rows = RowLogps(source, reference)
    return once_training(policy, in_rows) if is_sharded else in_rows


def with_reference_logps(
    dataset: Dataset,
    *,
    reference_logps: Callable[[PairBatch], Tensor],
    collator: Callable,
    batch_size: int,
    accelerator: Accelerator,
    cache: ReferenceCache | None,
) -> Dataset:
    """`dataset` with ref_chosen_logps and ref_rejected_logps of every pair, scored over all ranks.

    cache: of the main process, None on the others; pairs that are there are not scored again.
    """
    keys = cache.keys(dataset) if cache else []
    known_N2 = cache.find(keys) if cache else np.full((len(dataset), 2), np.nan)
    logps_N2 = broadcast(torch.from_numpy(known_N2).to(accelerator.device)).cpu()
    missing = logps_N2.isnan().any(1).nonzero().flatten().tolist()
    # torch's own generator would give training other noise than where all rows are in the cache
    loader = DataLoader(
        dataset.select(missing),
        batch_size=batch_size,
        collate_fn=collator,
        generator=torch.Generator(),
    )
    scored = _scored(loader, reference_logps, accelerator) if missing else iter(())
    rows = iter(missing)
    while lot := [*itertools.islice(scored, BATCHES_AT_ONCE)]:
        lot_N2 = torch.cat(lot).double().cpu()
        its_rows = [*itertools.islice(rows, len(lot_N2))]
        logps_N2[its_rows] = lot_N2
        if cache:
            cache.add([keys[row] for row in its_rows], lot_N2.numpy())
    for name, logps_N in zip(REFERENCE_COLUMNS, logps_N2.T, strict=True):
        dataset = dataset.add_column(name, logps_N.tolist())
    return dataset


def _scored(
    loader: DataLoader, reference_logps: Callable[[PairBatch], Tensor], accelerator: Accelerator
) -> Iterator[Tensor]:
    """(B, 2) of each batch of all ranks, chosen and rejected, in the loader's order."""
    for inputs in accelerator.prepare(loader):
        logps_S = reference_logps(PairBatch.from_inputs(inputs))
        # without the rows that accelerate repeats to fill the last batch
        yield accelerator.gather_for_metrics(torch.stack(logps_S.chunk(2), 1))
