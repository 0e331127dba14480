"""Log-probabilities of policy and reference -> PairLoss, by the names of the losses."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo import ops
from fastdpo.kernels import reference
from fastdpo.kernels.reference import completion_sums

BATCH_LOSSES = tuple(reference.BATCH_LOSSES)  # a pair's depends on the other pairs of its batch
LOSS_TYPES = (*reference.LOSSES, *BATCH_LOSSES)
F_DIVERGENCES = tuple(reference.SCORES)
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")  # read label_smoothing
# The losses that TRL allows with an f-divergence. Its reward has an unknown constant, which cancels
# in chosen minus rejected; in sigmoid_norm and ipo, whose rewards are per token, only where the
# lengths are equal. sft has no reward and ignores the divergence.
WITH_F_DIVERGENCE = tuple("sigmoid sigmoid_norm robust hinge ipo exo_pair discopop sft".split())
PAIR_METRICS = (  # the rows of metrics_MB
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


class PairLoss(NamedTuple):
    """The losses and metrics of B pairs, float32. Only loss_B carries a gradient.

    loss_B: (B,). metrics_MB: a row for each of PAIR_METRICS. A reward is beta times the
    log-ratio, policy logps minus reference logps, whatever the loss makes of it.
    """

    loss_B: Tensor
    metrics_MB: Tensor

    @property
    def logps_S(self) -> Tensor:
        """The policy's log-probabilities of 2B completions, chosen 0..B-1, then rejected."""
        return self.metrics_MB[PAIR_METRICS.index("logps/chosen") :].flatten()


def pair_loss(
    token_logps_C: Tensor,
    cu_seqlens: Tensor,
    reference_logps_S: Tensor,
    *,
    log_sum_p2_C: Tensor | None = None,
    **settings: Any,
) -> PairLoss:
    """The weighted sum of one or more losses for each pair: kernels/reference.py has the formulas.

    With one of BATCH_LOSSES, the pairs given here are the batch. With log_sum_p2_C, each pair's
    loss is multiplied by its weight: pair_weights.

    token_logps_C: float32, C tokens of S = 2B completions end to end, chosen 0..B-1 then
    rejected; cu_seqlens: int32 (S + 1,). settings: those of kernels.pair_loss.pair_loss.
    """
    losses = PairLoss(*ops.pair_loss(token_logps_C, cu_seqlens, reference_logps_S, **settings))
    if log_sum_p2_C is None:
        return losses
    weight_B = pair_weights(token_logps_C, log_sum_p2_C, cu_seqlens)
    return losses._replace(loss_B=losses.loss_B * weight_B)


@torch.no_grad()
def pair_weights(token_logps_C: Tensor, log_sum_p2_C: Tensor, cu_seqlens: Tensor) -> Tensor:
    """weight_B, float32: how likely the policy is to write both of a pair's completions itself.

    WPO, arXiv:2406.11827, equation 2: of each completion the geometric mean of p / sum p'^2 over
    its tokens, p' the probabilities of the whole vocabulary. log_sum_p2_C: the logarithm of that
    sum. Tokens and cu_seqlens as pair_loss has them; an empty completion weighs 1.
    """
    logs_S = completion_sums(token_logps_C - log_sum_p2_C, cu_seqlens)
    chosen_B, rejected_B = (logs_S / cu_seqlens.diff().clamp(min=1)).exp().chunk(2)
    return chosen_B * rejected_B
