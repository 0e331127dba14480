"""What a run logs: TRL's metric names, sums kept on the device, read when they are logged."""

import itertools
from dataclasses import astuple, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from fastdpo.batch import PairBatch, TokensRun, cu_seqlens_of
from fastdpo.kernels.reference import completion_sums
from fastdpo.losses import PAIR_METRICS, PairLoss
from fastdpo.model import ScoredOutput

TOKEN_METRICS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
# names of M metrics -> their sums (M,), and their weights (M,), or one weight for all
Sums = dict[tuple[str, ...], tuple[Tensor, Tensor | int]]


class MetricSums:
    """Running sums of metrics, and of the weights to divide each by."""

    def __init__(self):
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, sums: Sums) -> None:
        """Add each group of metrics. Nothing here makes the CPU wait for the device."""
        for names, (sums_M, weights) in sums.items():
            sums_2M = sums_M.new_empty((2, len(names)), dtype=torch.float64)
            sums_2M[0], sums_2M[1] = sums_M, weights
            self._sums[names] = self._sums[names].add_(sums_2M) if names in self._sums else sums_2M

    def take_means(self, accelerator: Accelerator) -> dict[str, float]:
        """Weighted means over all ranks; the sums start again at 0. Waits for the device."""
        if not self._sums:
            return {}
        groups = sorted(self._sums)
        sums_2M = accelerator.reduce(torch.cat([self._sums[names] for names in groups], 1), "sum")
        self._sums = {}
        return {
            name: value / weight if weight else 0.0
            for name, value, weight in zip(itertools.chain(*groups), *sums_2M.tolist(), strict=True)
        }


class RunCounts:
    """What one training counts: metrics since the last log, and tokens since its start.

    num_train_tokens: of this rank, on the device. tokens: of this rank. num_evaluated: pairs of
    the evaluation that runs, on this rank.
    """

    def __init__(self, device: torch.device):
        self.train = MetricSums()
        self.num_train_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.tokens = TokensRun()
        self.start_evaluation()

    def start_evaluation(self) -> None:
        self.eval, self.num_evaluated = MetricSums(), 0


def tokens_over_ranks(tokens: TokensRun, accelerator: Accelerator) -> dict[str, int]:
    """The sums over all ranks, named for the log."""
    counts = torch.tensor(astuple(tokens), device=accelerator.device)
    names = ("tokens/run", "tokens/shared", "tokens/padding_avoided")
    return dict(zip(names, accelerator.reduce(counts, "sum").tolist(), strict=True))


@torch.no_grad()
def evaluation_metrics(
    batch: PairBatch, scored: ScoredOutput, losses: PairLoss, num_new: int
) -> Sums:
    """pair_metrics of the batch, and its loss; 0, of weight 0, where none of its pairs is new."""
    metrics = pair_metrics(batch, scored, losses)
    metrics[("loss",)] = (losses.loss_B.sum(dtype=torch.float64)[None], batch.num_pairs)
    if num_new == 0:
        return {names: (0 * sums, 0 * weights) for names, (sums, weights) in metrics.items()}
    return metrics


def first_pairs(
    batch: PairBatch, scored: ScoredOutput, reference_logps_S: Tensor, count: int
) -> tuple[PairBatch, ScoredOutput, Tensor]:
    """What losses and metrics need of the first `count` pairs alone. Waits for the device, unless
    those are all."""
    if count == batch.num_pairs:
        return batch, scored, reference_logps_S
    lengths_2B = batch.cu_seqlens.diff().view(2, -1)
    is_first_2B = torch.arange(batch.num_pairs, device=lengths_2B.device).expand(2, -1) < count
    tokens_C = is_first_2B.flatten().repeat_interleave(lengths_2B.flatten()).nonzero().squeeze(1)
    lengths_S = lengths_2B[:, :count].flatten()
    return (
        replace(batch, cu_seqlens=cu_seqlens_of(lengths_S)),
        scored.of_rows(tokens_C),
        reference_logps_S.view(2, -1)[:, :count].flatten(),
    )


@torch.no_grad()
def pair_metrics(batch: PairBatch, scored: ScoredOutput, losses: PairLoss) -> Sums:
    """TRL's metrics of one batch as `names: (sums, weights)`.

    Rewards and logps weigh pairs alike; entropy, logits and mean_token_accuracy weigh tokens
    alike. A tie counts as wrong in rewards/accuracies, as in TRL.
    """
    B = batch.num_pairs
    chosen_tokens, all_tokens = batch.cu_seqlens[B], batch.cu_seqlens[-1]
    is_chosen_C = torch.arange(len(scored.is_top1_C), device=chosen_tokens.device) < chosen_tokens
    mean_logit_S = completion_sums(scored.mean_logit_C, batch.cu_seqlens)
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
