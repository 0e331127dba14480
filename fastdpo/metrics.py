"""What a run logs: TRL's metric names, sums kept on the device, one read per logging interval."""

import itertools

import torch
from accelerate import Accelerator
from torch import Tensor

from fastdpo.batch import PairBatch
from fastdpo.losses import PAIR_METRICS, PairLoss, completion_logps
from fastdpo.model import ScoredOutput

TOKEN_METRICS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")


class MetricSums:
    """Running sums of metrics, and of the weights to divide each by."""

    def __init__(self):
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, sums: dict[tuple[str, ...], tuple[Tensor, Tensor | int]]) -> None:
        """Add `names: (sums_M, weights_M or one weight for all)`, a group of M metrics at a time.

        Nothing here makes the CPU wait for the device.
        """
        for names, (sums_M, weights) in sums.items():
            sums_2M = sums_M.new_empty((2, len(names)), dtype=torch.float64)
            sums_2M[0], sums_2M[1] = sums_M, weights
            self._sums[names] = self._sums[names].add_(sums_2M) if names in self._sums else sums_2M

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Each sum over its weight, over all ranks; starts again. The wait for the device"""
        if not self._sums:
            return {}
        groups = sorted(self._sums)
        sums_2M = accelerator.reduce(torch.cat([self._sums[names] for names in groups], 1), "sum")
        self._sums = {}
        return {
            name: value / weight if weight else 0.0
            for name, value, weight in zip(itertools.chain(*groups), *sums_2M.tolist(), strict=True)
        }


@torch.no_grad()
def pair_metrics(
    batch: PairBatch, scored: ScoredOutput, losses: PairLoss
) -> dict[tuple[str, ...], tuple[Tensor, Tensor | int]]:
    """TRL's metrics of one batch as `names: (sums, weights)`.

    Rewards and logps weigh pairs alike; entropy, logits and mean_token_accuracy weigh tokens
    alike. A tie counts as wrong in rewards/accuracies, as in TRL.
    """
    B = batch.num_pairs
    chosen_tokens, all_tokens = batch.cu_seqlens[B], batch.cu_seqlens[-1]
    is_chosen_C = torch.arange(len(scored.is_top1_C), device=chosen_tokens.device) < chosen_tokens
    mean_logit_S = completion_logps(scored.mean_logit_C, batch.cu_seqlens)
    token_sums = [
        scored.entropy_C.sum(),
        (scored.is_top1_C & is_chosen_C).sum(),
        mean_logit_S[:B].sum(),
        mean_logit_S[B:].sum(),
    ]
    tokens = [all_tokens, chosen_tokens, chosen_tokens, all_tokens - chosen_tokens]
    return {
        PAIR_METRICS: (losses.metrics_MB.sum(1, dtype=torch.float64), B),
        TOKEN_METRICS: (torch.stack(token_sums), torch.stack(tokens)),
    }
