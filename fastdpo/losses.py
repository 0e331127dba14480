"""Log-probabilities of policy and reference -> PairLoss; a function per paper."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo import ops


class PairLoss(NamedTuple):
    """Of each of B pairs, float32 (B,). Only loss_B carries a gradient."""

    loss_B: Tensor
    chosen_logps_B: Tensor
    rejected_logps_B: Tensor
    chosen_reward_B: Tensor
    rejected_reward_B: Tensor


def completion_logps(token_logps_C: Tensor, cu_seqlens: Tensor) -> Tensor:
    """logps_S: the sum of each completion's token log-probabilities, float32 (S,)."""
    return torch.segment_reduce(token_logps_C, "sum", offsets=cu_seqlens.long(), unsafe=True)


def sigmoid_loss(
    token_logps_C: Tensor,
    cu_seqlens: Tensor,
    reference_logps_S: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """DPO: -log sigmoid(chosen reward - rejected reward), arXiv:2305.18290, equation 7.

    token_logps_C: float32, C tokens of S = 2B completions end to end, chosen 0..B-1 then
    rejected; cu_seqlens: int32 (S + 1,). A reward is beta * (policy logps - reference logps).
    label_smoothing is the probability that a pair is the wrong way round (conservative DPO).
    """
    loss_B, logps_S, rewards_S = ops.pair_loss(
        token_logps_C, cu_seqlens, reference_logps_S, beta=beta, label_smoothing=label_smoothing
    )
    return PairLoss(loss_B, *logps_S.chunk(2), *rewards_S.chunk(2))


LOSSES = {"sigmoid": sigmoid_loss}
