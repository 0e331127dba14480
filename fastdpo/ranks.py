"""Collectives between forwards, and what one rank does before others; no-ops with one process."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import TrainingArguments

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20  # of gradients that are reduced in one go


def one_rank_first(args: TrainingArguments) -> AbstractContextManager:
    """A context in which each node's first rank tokenises before the others, which find its pairs
    (pairs_cache.py) and wait for args.ddp_timeout at most. All ranks have to enter it; where
    nothing is kept they are in it at once. An error on one rank holds up no other.
    """
    if not datasets.is_caching_enabled():
        return nullcontext()
    return args.main_process_first(desc="tokenizing")


def from_main_process(make: Callable[[], T], args: TrainingArguments) -> T:
    """On every process what `make` gives on the main one, or the error that it raises there; both
    have to pickle."""
    made = None
    if args.process_index == 0:
        try:
            made = make()
        except Exception as error:
            made = error
    [made] = broadcast_object_list([made])
    if isinstance(made, Exception):
        raise made
    return made


def least_of_ranks(count: int, accelerator: Accelerator) -> int:
    """The least `count` of any rank. The CPU waits for the device, and for the slowest rank."""
    if accelerator.num_processes == 1:
        return count
    return accelerator.gather(torch.tensor([count], device=accelerator.device)).min().item()


def pairs_not_repeated(num_pairs: int, accelerator: Accelerator) -> int:
    """How many pairs of this rank's batch, the first ones, are not repeats.

    At the end of a dataset accelerate repeats its first rows to fill every rank's last batch. They
    are counted as gather_for_metrics does, but for a single rank, which repeats none: a stream that
    workers read seems to have none.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return num_pairs
    return min(max(state.remainder - accelerator.process_index * num_pairs, 0), num_pairs)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Make each gradient its mean over the ranks, as DDP does in a backward that it reduces.

    A parameter without a gradient counts as 0 where another rank has one, and is left without
    where none has. Takes BUCKET_BYTES of memory at most; hooks for DDP's communication do not run.
    """
    if accelerator.num_processes == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    have_one = torch.tensor([p.grad is not None for p in trained], device=accelerator.device).int()
    ranks_with_one = accelerator.reduce(have_one, "sum").tolist()  # a wait
    used = [p for p, ranks in zip(trained, ranks_with_one, strict=True) if ranks]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in used]):
        parts = [gradient.flatten() for gradient in bucket]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        flat /= accelerator.num_processes  # before the sum, which may leave a dtype's range
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(bucket, flat.split([len(p) for p in parts]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """`gradients` in lots of one dtype and at most BUCKET_BYTES; a larger one goes alone."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        size = sum(each.nbytes for each in bucket) + gradient.nbytes
        if bucket and (size > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
