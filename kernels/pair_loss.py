"""pair_loss: token log-probabilities of chosen and rejected completions -> DPO's loss and rewards.

    logps_S[s]   = sum of token_logps_C[cu_seqlens[s] : cu_seqlens[s + 1]]
    rewards_S[s] = beta * (logps_S[s] - reference_logps_S[s])
    margin_B[b]  = rewards_S[b] - rewards_S[B + b]                chosen b against rejected b
    loss_B[b]    = -(1 - eps) log sigmoid(margin) - eps log sigmoid(-margin)

One launch forward, a program a pair; one launch backward, a program a completion.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_C = 1024  # tokens read at a time: most completions in one


@triton.jit
def _segment_sum(token_logps_ptr, start, end, BLOCK_C: tl.constexpr):
    total_C = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(start, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        total_C += tl.load(token_logps_ptr + c, mask=c < end, other=0.0)
    return tl.sum(total_C)


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _forward_kernel(
    token_logps_ptr,
    cu_seqlens_ptr,
    reference_logps_ptr,
    loss_ptr,
    logps_ptr,
    rewards_ptr,
    slope_ptr,
    B,
    beta,
    label_smoothing,
    BLOCK_C: tl.constexpr,
):
    chosen = tl.program_id(0)
    rejected = B + chosen
    chosen_logp = _segment_sum(
        token_logps_ptr,
        tl.load(cu_seqlens_ptr + chosen),
        tl.load(cu_seqlens_ptr + chosen + 1),
        BLOCK_C,
    )
    rejected_logp = _segment_sum(
        token_logps_ptr,
        tl.load(cu_seqlens_ptr + rejected),
        tl.load(cu_seqlens_ptr + rejected + 1),
        BLOCK_C,
    )
    chosen_reward = beta * (chosen_logp - tl.load(reference_logps_ptr + chosen))
    rejected_reward = beta * (rejected_logp - tl.load(reference_logps_ptr + rejected))
    margin = chosen_reward - rejected_reward
    right_way = (1.0 - label_smoothing) * _log_sigmoid(margin)
    tl.store(loss_ptr + chosen, -right_way - label_smoothing * _log_sigmoid(-margin))
    tl.store(logps_ptr + chosen, chosen_logp)
    tl.store(logps_ptr + rejected, rejected_logp)
    tl.store(rewards_ptr + chosen, chosen_reward)
    tl.store(rewards_ptr + rejected, rejected_reward)
    # d loss / d margin = eps - sigmoid(-margin), which is exact where sigmoid(margin) rounds to 1
    slope = beta * (label_smoothing - tl.exp(_log_sigmoid(-margin)))
    tl.store(slope_ptr + chosen, slope)
    tl.store(slope_ptr + rejected, -slope)


@triton.jit
def _backward_kernel(
    dloss_ptr, slope_ptr, cu_seqlens_ptr, dtoken_logps_ptr, B, BLOCK_C: tl.constexpr
):
    s = tl.program_id(0)
    dlogp = tl.load(dloss_ptr + s % B) * tl.load(slope_ptr + s)
    end = tl.load(cu_seqlens_ptr + s + 1)
    for first in range(tl.load(cu_seqlens_ptr + s), end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        tl.store(dtoken_logps_ptr + c, tl.zeros((BLOCK_C,), tl.float32) + dlogp, mask=c < end)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_logps_C, cu_seqlens, reference_logps_S, beta, label_smoothing):
        S = reference_logps_S.numel()
        loss_B = torch.empty(S // 2, dtype=torch.float32, device=token_logps_C.device)
        logps_S, rewards_S, slope_S = (torch.empty_like(reference_logps_S) for _ in range(3))
        if S:
            _forward_kernel[(S // 2,)](
                token_logps_C,
                cu_seqlens,
                reference_logps_S,
                loss_B,
                logps_S,
                rewards_S,
                slope_S,
                S // 2,
                beta,
                label_smoothing,
                BLOCK_C,
            )
        ctx.save_for_backward(slope_S, cu_seqlens)
        ctx.num_tokens = token_logps_C.numel()
        ctx.mark_non_differentiable(logps_S, rewards_S)
        return loss_B, logps_S, rewards_S

    @staticmethod
    def backward(ctx, dloss_B, _dlogps_S, _drewards_S):
        slope_S, cu_seqlens = ctx.saved_tensors
        S = slope_S.numel()
        dloss_B = dloss_B.contiguous()  # .sum() hands back an expanded gradient, of stride 0
        dtoken_logps_C = torch.empty(ctx.num_tokens, dtype=torch.float32, device=slope_S.device)
        if S:
            _backward_kernel[(S,)](dloss_B, slope_S, cu_seqlens, dtoken_logps_C, S // 2, BLOCK_C)
        return dtoken_logps_C, None, None, None, None


def pair_loss(
    token_logps_C: Tensor,
    cu_seqlens: Tensor,
    reference_logps_S: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_B, logps_S and rewards_S, float32, of S = 2B completions, chosen 0..B-1, then rejected.

    token_logps_C: float32, contiguous; completion s is cu_seqlens[s] to cu_seqlens[s + 1] of it.
    cu_seqlens: int32 (S + 1,), from 0 to C, unchecked. reference_logps_S: float32. Gradient flows
    from loss_B alone to token_logps_C; backward keeps 4 bytes a completion. ValueError for other
    shapes or dtypes. DPO: arXiv:2305.18290, equation 7; label_smoothing is eps of conservative
    DPO. The same in plain PyTorch: reference.pair_loss.
    """
    shapes = (token_logps_C.ndim, cu_seqlens.ndim, reference_logps_S.ndim)
    S = reference_logps_S.numel()
    if shapes != (1, 1, 1) or S % 2 or cu_seqlens.numel() != S + 1:
        came = f"{(*token_logps_C.shape,)}, {(*cu_seqlens.shape,)}, {(*reference_logps_S.shape,)}"
        raise ValueError(f"want token_logps (C,), cu_seqlens (2B + 1,), logps (2B,), got {came}")
    dtypes = (token_logps_C.dtype, cu_seqlens.dtype, reference_logps_S.dtype)
    if dtypes != (torch.float32, torch.int32, torch.float32):
        raise ValueError(f"want float32, int32 and float32, got {dtypes}")
    return _PairLoss.apply(
        token_logps_C.contiguous(),
        cu_seqlens.contiguous(),
        reference_logps_S.contiguous(),
        beta,
        label_smoothing,
    )
