"""What a run logs: TRL's metric names, sums kept on the device, one read per logging interval."""

import torch
from accelerate import Accelerator
from torch import Tensor

from fastdpo.batch import PairBatch
from fastdpo.losses import PairLoss, completion_logps
from fastdpo.model import ScoredOutput


class MetricSums:
    """Running sums of metrics, and of the weights to divide each by."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: dict[str, tuple[Tensor, Tensor | int]]) -> None:
        """Add `name: (sum, weight)`; nothing here makes the CPU wait for the device."""
        for name, (value, weight) in sums.items():
            pair = torch.stack([value.double(), torch.as_tensor(weight, device=value.device)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Each sum over its weight, over all ranks; starts again. The wait for the device"""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
        self._sums = {}
        return {
            name: value / weight if weight else 0.0
            for name, (value, weight) in zip(names, totals.tolist(), strict=True)
        }


@torch.no_grad()
def pair_metrics(
    batch: PairBatch, scored: ScoredOutput, losses: PairLoss
) -> dict[str, tuple[Tensor, Tensor | int]]:
    """TRL's metrics of one batch as `name: (sum, weight)`.

    Rewards and logps weigh pairs alike; entropy, logits and mean_token_accuracy weigh tokens
    alike. A tie counts as wrong in rewards/accuracies, as in TRL.
    """
    B = batch.num_pairs
    margin_B = losses.chosen_reward_B - losses.rejected_reward_B
    per_pair = {
        "rewards/chosen": losses.chosen_reward_B,
        "rewards/rejected": losses.rejected_reward_B,
        "rewards/margins": margin_B,
        "rewards/accuracies": (margin_B > 0).float(),
        "logps/chosen": losses.chosen_logps_B,
        "logps/rejected": losses.rejected_logps_B,
    }
    chosen_tokens, all_tokens = batch.cu_seqlens[B], batch.cu_seqlens[-1]
    is_chosen_C = torch.arange(len(batch.labels_C), device=chosen_tokens.device) < chosen_tokens
    mean_logit_S = completion_logps(scored.mean_logit_C, batch.cu_seqlens)
    per_token = {
        "entropy": (scored.entropy_C.sum(), all_tokens),
        "mean_token_accuracy": ((scored.is_top1_C & is_chosen_C).sum(), chosen_tokens),
        "logits/chosen": (mean_logit_S[:B].sum(), chosen_tokens),
        "logits/rejected": (mean_logit_S[B:].sum(), all_tokens - chosen_tokens),
    }
    return {name: (value.sum(), B) for name, value in per_pair.items()} | per_token
