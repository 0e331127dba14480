"""Every kernel in plain PyTorch, by the same name: what each must equal.

Full logits, autograd, no tricks. Inputs are promoted to float32; float64 stays float64. Arguments
are the kernel's own, except those that control how it computes, or with skip_below how exactly.
linear_logps serves only as a specification. pair_loss is also what runs on a CPU, and on a GPU with
BATCH_LOSSES; completion_sums has no kernel and runs everywhere.
"""

import math

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
            "entropy": torch.special.entr(logps_NV.exp()).sum(-1),
            "mean_logit": logits_NV.mean(-1),
            "is_top1": token_logps_N >= logps_NV.amax(-1),
            "log_sum_p2": (2 * logps_NV).logsumexp(-1),
        }
    return token_logps_N, {name: every[name] for name in stats}


def completion_sums(values_C: Tensor, cu_seqlens: Tensor, ld_alpha: float | None = None) -> Tensor:
    """The sum of each completion's values, such as its token log-probabilities: (S,).

    Summed in float64, by one operator on any device, and rounded once to the dtype of values_C.

    With ld_alpha, tokens past the length of the pair's shorter completion weigh ld_alpha: LD-DPO,
    arXiv:2409.06411. The cu_seqlens are then of S = 2B completions, chosen 0..B-1, then rejected.
    """
    if ld_alpha is not None:
        lengths_S = cu_seqlens.diff()
        shared_ends_S = cu_seqlens[:-1] + torch.minimum(*lengths_S.chunk(2)).repeat(2)
        C = values_C.numel()
        shared_ends_C = shared_ends_S.repeat_interleave(lengths_S, output_size=C)
        is_shared_C = torch.arange(C, device=values_C.device) < shared_ends_C
        values_C = torch.where(is_shared_C, values_C, ld_alpha * values_C)
    offsets = cu_seqlens.long()
    # it adds one token after the other: in float32, the sum of 512 was off by 1e-3 nats
    sums_S = torch.segment_reduce(values_C.double(), "sum", offsets=offsets, unsafe=True)
    return sums_S.to(values_C.dtype)


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
    """loss_B and metrics_MB of S = 2B completions, chosen 0..B-1, then rejected.

    Beside what the kernel knows, loss_type may name BATCH_LOSSES.
    """
    logps_S = completion_sums(_wide(token_logps_C), cu_seqlens, ld_alpha)
    logratios_S = logps_S - reference_logps_S
    scores_S = SCORES[f_divergence_type](logratios_S, f_alpha_divergence_coef)
    scaled_scores = (beta * scores_S).chunk(2)
    settings = {
        "lengths": cu_seqlens.diff().clamp(min=1).chunk(2),
        "beta": beta,
        "label_smoothing": label_smoothing,
        "tau": discopop_tau,
    }
    tokens = {"token_logps_C": _wide(token_logps_C), "cu_seqlens": cu_seqlens}
    losses = [
        LOSSES[name](*scaled_scores, **settings)
        if name in LOSSES
        else BATCH_LOSSES[name](logps_S, reference_logps_S, **tokens, **settings)
        for name in loss_type
    ]
    weights = loss_weights or (1.0,) * len(losses)
    loss_B = sum(weight * each_B for weight, each_B in zip(weights, losses, strict=True))
    return loss_B, _metrics(logps_S.detach(), beta * logratios_S.detach())


def _metrics(logps_S: Tensor, rewards_S: Tensor) -> Tensor:
    chosen_B, rejected_B = rewards_S.chunk(2)
    accuracy_B = (chosen_B > rejected_B).to(rewards_S.dtype)
    return torch.stack([chosen_B, rejected_B, chosen_B - rejected_B, accuracy_B, *logps_S.chunk(2)])


# The losses: functions of beta times the chosen and the rejected score, which with reverse_kl are
# the rewards. Each takes all of `lengths` (tokens of the chosen and of the rejected completions),
# `beta`, `label_smoothing` and `tau`, and names those that it reads.


def _sigmoid(chosen_B, rejected_B, *, label_smoothing=0.0, **_):
    """DPO, arXiv:2305.18290, equation 7; with label_smoothing, conservative DPO.

    That is Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023:
    label_smoothing is the probability that a pair is the wrong way round. TRL ignores it here.
    """
    margin_B = chosen_B - rejected_B
    loss_B = -(1 - label_smoothing) * F.logsigmoid(margin_B)
    return loss_B - label_smoothing * F.logsigmoid(-margin_B) if label_smoothing else loss_B


def _sigmoid_norm(chosen_B, rejected_B, *, lengths, **_):
    """Length-normalised DPO, as in Tülu 3, arXiv:2411.15124: of rewards per token.

    As in TRL, label_smoothing is no part of it.
    """
    return _sigmoid(chosen_B / lengths[0], rejected_B / lengths[1])


def _robust(chosen_B, rejected_B, *, label_smoothing, **_):
    """Robust DPO, arXiv:2403.00409: unbiased where labels are flipped at that rate."""
    margin_B = chosen_B - rejected_B
    kept_B, flipped_B = F.logsigmoid(margin_B), F.logsigmoid(-margin_B)
    return (label_smoothing * flipped_B - (1 - label_smoothing) * kept_B) / (
        1 - 2 * label_smoothing
    )


def _hinge(chosen_B, rejected_B, **_):
    """SLiC-HF's loss, arXiv:2305.10425, on rewards, as RSO has it, arXiv:2309.06657."""
    return F.relu(1 - (chosen_B - rejected_B))


def _ipo(chosen_B, rejected_B, *, lengths, beta, **_):
    """IPO, arXiv:2310.12036, equation 17, beta its tau: of log-ratios per token, as in TRL.

    The paper's are summed over a completion.
    """
    margin_B = chosen_B / lengths[0] - rejected_B / lengths[1]
    return ((margin_B - 0.5) / beta).square()


def _exo_pair(chosen_B, rejected_B, *, label_smoothing, **_):
    """EXO of two completions, arXiv:2402.00856, equation 16; label_smoothing above 0."""
    margin_B = chosen_B - rejected_B
    log_kept, log_flipped = math.log1p(-label_smoothing), math.log(label_smoothing)
    kept_B = margin_B.sigmoid() * (F.logsigmoid(margin_B) - log_kept)
    return kept_B + (-margin_B).sigmoid() * (F.logsigmoid(-margin_B) - log_flipped)


def _nca_pair(chosen_B, rejected_B, **_):
    """NCA of a pair, arXiv:2402.05369: an absolute reward, so the chosen's need not fall."""
    pushed_B = F.logsigmoid(-chosen_B) + F.logsigmoid(-rejected_B)
    return -F.logsigmoid(chosen_B) - 0.5 * pushed_B


def _bco_pair(chosen_B, rejected_B, **_):
    """BCO of a pair, arXiv:2404.04656: a classifier of desirable completions, by their reward.

    As in TRL, without the paper's reward shift delta, a moving average of both sides' rewards.
    """
    return -F.logsigmoid(chosen_B) - F.logsigmoid(-rejected_B)


def _sppo_hard(chosen_B, rejected_B, *, beta, **_):
    """SPPO, arXiv:2405.00675, equation 4.7, with win probabilities 1 and 0."""
    return ((chosen_B - 0.5) / beta).square() + ((rejected_B + 0.5) / beta).square()


def _apo_zero(chosen_B, rejected_B, **_):
    """APO-zero, arXiv:2408.06266, equation 7: chosen up, rejected down."""
    return (-chosen_B).sigmoid() + rejected_B.sigmoid()


def _apo_down(chosen_B, rejected_B, **_):
    """APO-down, arXiv:2408.06266, equation 8: both down, rejected more."""
    return chosen_B.sigmoid() + (rejected_B - chosen_B).sigmoid()


def _discopop(chosen_B, rejected_B, *, tau, **_):
    """DiscoPOP, the log-ratio modulated loss of arXiv:2406.08414, equation 5.

    exp(-margin) and its gate stay in one exponent: TRL's inf * 0 is NaN at margins below -88.
    """
    margin_B = chosen_B - rejected_B
    exponential_B = (F.logsigmoid(margin_B / tau) - margin_B).exp()
    return exponential_B - (-margin_B / tau).sigmoid() * F.logsigmoid(margin_B)


LOSSES = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid_norm,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
}

# Losses in which a pair's depends on the other pairs of its batch, so they have no kernel.
# Functions of the policy's and the reference's logps, which also take `token_logps_C`,
# `cu_seqlens` and what the losses above take, and name those that they read. They return a loss
# for each pair.


def _aot(logps_S, reference_logps_S, *, beta, label_smoothing, **_):
    """AOT of pairs, arXiv:2406.05882, with hard sorting and the logistic loss, as in TRL.

    The policy's distribution of chosen minus rejected should lie above the reference's: with both
    sorted, each value is compared with the reference's of the same rank. label_smoothing as in
    conservative DPO.
    """
    chosen_B, rejected_B = logps_S.chunk(2)
    reference_chosen_B, reference_rejected_B = reference_logps_S.chunk(2)
    ours_B, theirs_B = chosen_B - rejected_B, reference_chosen_B - reference_rejected_B
    matched_B = _of_same_rank(theirs_B, ours_B)
    return _sigmoid(beta * ours_B, beta * matched_B, label_smoothing=label_smoothing)


def _aot_unpaired(logps_S, reference_logps_S, *, beta, label_smoothing, **_):
    """AOT without pairs, arXiv:2406.05882: a chosen reward against the rejected of its rank."""
    chosen_B, rejected_B = (logps_S - reference_logps_S).chunk(2)
    matched_B = _of_same_rank(rejected_B, chosen_B)
    return _sigmoid(beta * chosen_B, beta * matched_B, label_smoothing=label_smoothing)


def _of_same_rank(values_B, like_B):
    """The element of values_B that has the rank of like_B[b] in its own, for each b; equal ones
    rank in the batch's order."""
    ranks_B = like_B.detach().argsort(stable=True).argsort()
    return values_B.sort().values.gather(0, ranks_B)


def _sft(logps_S, reference_logps_S, *, token_logps_C, cu_seqlens, **_):
    """Cross-entropy of the chosen completions, a mean over all their tokens in the batch.

    A pair's loss is B times its tokens' share of that mean, so the mean over pairs is the mean over
    tokens. ld_alpha does not apply.
    """
    B = len(logps_S) // 2
    chosen_logps_B = completion_sums(token_logps_C, cu_seqlens)[:B]
    return -B * chosen_logps_B / cu_seqlens[B].clamp(min=1)


BATCH_LOSSES = {"aot": _aot, "aot_unpaired": _aot_unpaired, "sft": _sft}

# The scores of log-ratios log t: f'(t) of an f-divergence f (f-DPO, arXiv:2309.16240, theorem 1),
# up to an additive constant, TRL's, which cancels except in losses of rewards per token.


def _reverse_kl(logratios_S, alpha):
    """f(t) = t log t: DPO's own."""
    return logratios_S


def _forward_kl(logratios_S, alpha):
    """f(t) = -log t: 1 - 1/t. Its exponent stops at 80; TRL's does not and ends as inf or NaN."""
    return _power_score(logratios_S, -1.0)


def _js_divergence(logratios_S, alpha):
    """f(t) = t log t - (t + 1) log((t + 1) / 2): log(2 t / (t + 1))."""
    return math.log(2) + F.logsigmoid(logratios_S)


def _alpha_divergence(logratios_S, alpha):
    """(t^(alpha - 1) - 1) / (alpha - 1), TRL's alpha: 1 minus the paper's. At 1, its limit."""
    if abs(alpha - 1) < 1e-6:
        return logratios_S
    return _power_score(logratios_S, alpha - 1)


def _power_score(logratios_S, exponent):
    """(t^exponent - 1) / exponent, its growth stopped at e^80 as in TRL, where float32 ends."""
    return torch.expm1((exponent * logratios_S).clamp(max=80)) / exponent


SCORES = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
