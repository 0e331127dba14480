"""pair_loss: token log-probabilities of chosen and rejected completions -> loss and metrics.

    logps_S[s]    = sum of token_logps_C[cu_seqlens[s] : cu_seqlens[s + 1]]
    logratio_S[s] = logps_S[s] - reference_logps_S[s]           reward = beta * logratio
    scaled_S[s]   = beta * score(logratio_S[s])                 the reward, without an f-divergence
    loss_B[b]     = sum over losses of weight * loss(scaled_S[b], scaled_S[B + b])

Sequence b is chosen against sequence B + b. A loss depends on the tokens through two numbers, so
the forward keeps its slope in each, and the backward writes that slope to a completion's tokens.
One launch forward, a program a pair; one launch backward, a program a completion.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.closed_forms import pair_term, score

BLOCK_C = 1024  # tokens read at a time: most completions in one
LOSSES = (
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@triton.jit
def _segment_sum(token_logps_ptr, start, end, shared, ld_alpha, BLOCK_C: tl.constexpr):
    """The tokens from start to end, those after the first `shared` weighted by ld_alpha.

    In float64, rounded once, as the reference's are: log-ratios then start at 0, not near it.
    """
    total_C = tl.zeros((BLOCK_C,), tl.float64)
    for first in range(start, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        weight_C = tl.where(c < start + shared, 1.0, ld_alpha)
        logp_C = weight_C * tl.load(token_logps_ptr + c, mask=c < end, other=0.0)
        total_C += logp_C.to(tl.float64)
    return tl.sum(total_C).to(tl.float32)


@triton.jit
def _forward_kernel(
    token_logps_ptr,
    cu_seqlens_ptr,
    reference_logps_ptr,
    loss_ptr,
    metrics_ptr,
    slope_ptr,
    B,
    beta,
    label_smoothing,
    f_alpha_divergence_coef,
    discopop_tau,
    ld_alpha,
    NAMES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    F_DIVERGENCE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0)
    chosen_start, chosen_end = tl.load(cu_seqlens_ptr + b), tl.load(cu_seqlens_ptr + b + 1)
    rejected_start = tl.load(cu_seqlens_ptr + B + b)
    rejected_end = tl.load(cu_seqlens_ptr + B + b + 1)
    shared = tl.minimum(chosen_end - chosen_start, rejected_end - rejected_start)
    chosen_logp = _segment_sum(token_logps_ptr, chosen_start, chosen_end, shared, ld_alpha, BLOCK_C)
    rejected_logp = _segment_sum(
        token_logps_ptr, rejected_start, rejected_end, shared, ld_alpha, BLOCK_C
    )
    chosen_logratio = chosen_logp - tl.load(reference_logps_ptr + b)
    rejected_logratio = rejected_logp - tl.load(reference_logps_ptr + B + b)

    chosen_score, chosen_dscore = score(F_DIVERGENCE, chosen_logratio, f_alpha_divergence_coef)
    rejected_score, rejected_dscore = score(
        F_DIVERGENCE, rejected_logratio, f_alpha_divergence_coef
    )
    loss, dchosen, drejected = 0.0, 0.0, 0.0
    for i in tl.static_range(len(NAMES)):
        term, dterm_chosen, dterm_rejected = pair_term(
            tl.constexpr(NAMES[i]),  # Triton 3.6 hands over the bare str
            beta * chosen_score,
            beta * rejected_score,
            tl.maximum(chosen_end - chosen_start, 1).to(tl.float32),
            tl.maximum(rejected_end - rejected_start, 1).to(tl.float32),
            beta,
            label_smoothing,
            discopop_tau,
        )
        loss += WEIGHTS[i] * term
        dchosen += WEIGHTS[i] * dterm_chosen
        drejected += WEIGHTS[i] * dterm_rejected
    tl.store(loss_ptr + b, loss)
    tl.store(slope_ptr + b, beta * dchosen * chosen_dscore)
    tl.store(slope_ptr + B + b, beta * drejected * rejected_dscore)

    chosen_reward, rejected_reward = beta * chosen_logratio, beta * rejected_logratio
    tl.store(metrics_ptr + b, chosen_reward)
    tl.store(metrics_ptr + B + b, rejected_reward)
    tl.store(metrics_ptr + 2 * B + b, chosen_reward - rejected_reward)
    tl.store(metrics_ptr + 3 * B + b, (chosen_reward > rejected_reward).to(tl.float32))
    tl.store(metrics_ptr + 4 * B + b, chosen_logp)
    tl.store(metrics_ptr + 5 * B + b, rejected_logp)


@triton.jit
def _backward_kernel(
    dloss_ptr, slope_ptr, cu_seqlens_ptr, dtoken_logps_ptr, B, ld_alpha, BLOCK_C: tl.constexpr
):
    s = tl.program_id(0)
    other = (s + B) % (2 * B)  # the other completion of the pair
    start, end = tl.load(cu_seqlens_ptr + s), tl.load(cu_seqlens_ptr + s + 1)
    shared = tl.load(cu_seqlens_ptr + other + 1) - tl.load(cu_seqlens_ptr + other)
    dlogp = tl.load(dloss_ptr + s % B) * tl.load(slope_ptr + s)
    for first in range(start, end, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        weight_C = tl.where(c < start + shared, 1.0, ld_alpha)
        tl.store(dtoken_logps_ptr + c, weight_C * dlogp, mask=c < end)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_logps_C, cu_seqlens, reference_logps_S, settings):
        """settings: the scalars and constants of _forward_kernel, by name."""
        S, device = reference_logps_S.numel(), token_logps_C.device
        loss_B = torch.empty(S // 2, dtype=torch.float32, device=device)
        metrics_MB = torch.empty(6, S // 2, dtype=torch.float32, device=device)
        slope_S = torch.empty_like(reference_logps_S)
        if S:
            with torch.cuda.device_of(loss_B):  # Triton launches on the current GPU otherwise
                _forward_kernel[(S // 2,)](
                    token_logps_C,
                    cu_seqlens,
                    reference_logps_S,
                    loss_B,
                    metrics_MB,
                    slope_S,
                    S // 2,
                    **settings,
                    BLOCK_C=BLOCK_C,
                )
        ctx.save_for_backward(slope_S, cu_seqlens)
        ctx.num_tokens, ctx.ld_alpha = token_logps_C.numel(), settings["ld_alpha"]
        ctx.mark_non_differentiable(metrics_MB)
        return loss_B, metrics_MB

    @staticmethod
    def backward(ctx, dloss_B, _dmetrics_MB):
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError("pair_loss has no second derivative: want create_graph=False")
        slope_S, cu_seqlens = ctx.saved_tensors
        S = slope_S.numel()
        dloss_B = dloss_B.contiguous()  # .sum() hands back an expanded gradient, of stride 0
        dtoken_logps_C = torch.empty(ctx.num_tokens, dtype=torch.float32, device=slope_S.device)
        if S:
            with torch.cuda.device_of(slope_S):
                _backward_kernel[(S,)](
                    dloss_B, slope_S, cu_seqlens, dtoken_logps_C, S // 2, ctx.ld_alpha, BLOCK_C
                )
        return dtoken_logps_C, None, None, None


def pair_loss(
    token_logps_C: Tensor,
    cu_seqlens: Tensor,
    reference_logps_S: Tensor,
    *,
    beta: float,
    loss_type: tuple[str, ...] = ("sigmoid",),
    loss_weights: tuple[float, ...] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    ld_alpha: float | None = None,
) -> tuple[Tensor, Tensor]:
    """loss_B and metrics_MB, float32, of S = 2B completions, chosen 0..B-1, then rejected.

    The rows of metrics_MB are chosen reward, rejected reward, margin, accuracy (1 where the
    margin is above 0, else 0), chosen logps, rejected logps. Gradient flows from loss_B alone to
    token_logps_C; backward keeps 4 bytes a completion. The same in plain PyTorch, with each
    loss's paper: reference.pair_loss. ValueError as check_pair_loss has it, RuntimeError for
    create_graph=True: there is no second derivative.

    token_logps_C: float32; completion s is cu_seqlens[s] to cu_seqlens[s + 1] of it.
    cu_seqlens: int32 (S + 1,), from 0 to C, unchecked.
    reference_logps_S: float32, summed over a completion as its token_logps are.
    beta, label_smoothing, discopop_tau: as in the losses' formulas.
    loss_type, loss_weights: the loss is their weighted sum; no weights: each 1.
    f_divergence_type: what makes the score of a log-ratio (f-DPO); alpha_divergence reads
        f_alpha_divergence_coef.
    ld_alpha: weight of tokens past the length of the pair's shorter completion (LD-DPO); None: 1.
    """
    check_pair_loss(
        token_logps_C,
        cu_seqlens,
        reference_logps_S,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        f_divergence_type=f_divergence_type,
    )
    loss_weights = loss_weights or (1.0,) * len(loss_type)
    if f_divergence_type == "alpha_divergence" and abs(f_alpha_divergence_coef - 1) < 1e-6:
        f_divergence_type = "reverse_kl"  # its limit
    settings = {
        "beta": float(beta),  # Triton would compile an int 1 into the kernel
        "label_smoothing": float(label_smoothing),
        "f_alpha_divergence_coef": float(f_alpha_divergence_coef),
        "discopop_tau": float(discopop_tau),
        "ld_alpha": 1.0 if ld_alpha is None else float(ld_alpha),
        "NAMES": tuple(loss_type),
        "WEIGHTS": tuple(map(float, loss_weights)),
        "F_DIVERGENCE": f_divergence_type,
    }
    return _PairLoss.apply(
        token_logps_C.contiguous(),
        cu_seqlens.contiguous(),
        reference_logps_S.contiguous(),
        settings,
    )


def check_pair_loss(
    token_logps_C: Tensor,
    cu_seqlens: Tensor,
    reference_logps_S: Tensor,
    *,
    loss_type: tuple[str, ...] = ("sigmoid",),
    loss_weights: tuple[float, ...] | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    batch_losses: tuple[str, ...] = (),
    float_dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    **_others: float | None,  # beta and others that need no check; pair_loss refuses unknown names
) -> None:
    """ValueError for shapes, dtypes or settings that pair_loss and its twin do not take.

    batch_losses, float_dtypes: what the twin in torch takes beyond the kernel.
    No value of a tensor is looked at: that would make the CPU wait for the GPU.
    """
    shapes = (token_logps_C.ndim, cu_seqlens.ndim, reference_logps_S.ndim)
    S = reference_logps_S.numel()
    if shapes != (1, 1, 1) or S % 2 or cu_seqlens.numel() != S + 1:
        came = f"{(*token_logps_C.shape,)}, {(*cu_seqlens.shape,)}, {(*reference_logps_S.shape,)}"
        raise ValueError(f"want token_logps (C,), cu_seqlens (2B + 1,), logps (2B,), got {came}")
    dtypes = (token_logps_C.dtype, cu_seqlens.dtype, reference_logps_S.dtype)
    if not {dtypes[0], dtypes[2]} <= set(float_dtypes) or dtypes[1] != torch.int32:
        raise ValueError(
            f"want token_logps and reference_logps in {float_dtypes}, cu_seqlens in torch.int32, "
            f"got {dtypes[0]}, {dtypes[2]}, {dtypes[1]}"
        )
    if not loss_type or not set(loss_type) <= {*LOSSES, *batch_losses}:
        raise ValueError(f"want loss_type of {(*LOSSES, *batch_losses)}, got {loss_type}")
    if loss_weights is not None and len(loss_weights) != len(loss_type):
        raise ValueError(f"want a weight for each of {loss_type}, got {loss_weights}")
    if f_divergence_type not in F_DIVERGENCES:
        raise ValueError(f"want f_divergence_type in {F_DIVERGENCES}, got {f_divergence_type!r}")
    takes_log = "exo_pair" in loss_type  # and robust divides by 1 - 2 label_smoothing
    if not 0 <= label_smoothing < 0.5 or (takes_log and label_smoothing == 0):
        least = "above 0" if takes_log else "from 0"
        raise ValueError(
            f"want label_smoothing {least} and below 0.5 for {loss_type}, got {label_smoothing}"
        )
