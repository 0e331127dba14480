"""Every kernel in plain PyTorch, by the same name and signature: what each must equal.

Full logits, autograd, no tricks. Inputs are promoted to float32, or stay float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_logps(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """log softmax(z)[label] of each row, z = cap(scale * (hidden headᵀ + down upᵀ + bias))."""
    logits_NV = _wide(hidden_ND) @ _wide(head_VD).T
    if low_rank is not None:
        down_NR, up_VR = low_rank
        logits_NV = logits_NV + _wide(down_NR) @ _wide(up_VR).T
    if bias_V is not None:
        logits_NV = logits_NV + _wide(bias_V)
    logits_NV = scale * logits_NV
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logps_NV = logits_NV.log_softmax(-1)
    token_logps_N = logps_NV.gather(1, labels_N[:, None]).squeeze(1)
    if not stats:
        return token_logps_N
    with torch.no_grad():
        every = {
            "lse": logits_NV.logsumexp(-1),
            "entropy": -(logps_NV.exp() * logps_NV).sum(-1),
            "mean_logit": logits_NV.mean(-1),
            "is_top1": token_logps_N >= logps_NV.amax(-1),
            "log_sum_p2": (2 * logps_NV).logsumexp(-1),
        }
    return token_logps_N, {name: every[name] for name in stats}


def pair_loss(
    token_logps_C: Tensor,
    cu_seqlens: Tensor,
    reference_logps_S: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_B, logps_S and rewards_S of S = 2B completions, chosen 0..B-1, then rejected.

    DPO, arXiv:2305.18290, equation 7, with the labels smoothed as conservative DPO has it.
    """
    token_logps_C = _wide(token_logps_C)
    logps_S = torch.segment_reduce(token_logps_C, "sum", offsets=cu_seqlens.long(), unsafe=True)
    rewards_S = beta * (logps_S - reference_logps_S)
    chosen_reward_B, rejected_reward_B = rewards_S.chunk(2)
    margin_B = chosen_reward_B - rejected_reward_B
    loss_B = -(1 - label_smoothing) * F.logsigmoid(margin_B)
    if label_smoothing:
        loss_B = loss_B - label_smoothing * F.logsigmoid(-margin_B)
    return loss_B, logps_S.detach(), rewards_S.detach()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
