"""The plain way: a sequence a forward, the model's own logits in float32, log_softmax,
kernels/reference.py and autograd. Nothing that fastdpo does to be fast.

The reference's log-probabilities are the policy's own, plainly, minus log-ratios that are made up:
equal ones would give every pair the same loss. They are at most 1 / beta, and at most 5 nats where
the f-divergence is exponential in them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.batch import cu_seqlens_of
from fastdpo.kernels import reference
from fastdpo.subject import Subject

SIDES = ("chosen", "rejected")
POWERS, LARGEST_POWER = ("forward_kl", "alpha_divergence"), 5.0  # nats: e**5 is 148


class Answer(NamedTuple):
    """What one way computes.

    token_logps: (C,) for each completion, in the order pair 0's chosen, pair 0's rejected, pair 1's
    chosen and so on. gradients: of each trained parameter by name, None where it has none.
    """

    token_logps: list[Tensor]
    loss_B: Tensor
    gradients: dict[str, Tensor | None]


class OwnTokens(NamedTuple):
    """A completion's tokens by the model's own forward: log-probabilities, the variance of their
    logits, and WPO's log sum of p². (C,) each, float32."""

    logps_C: Tensor
    variance_C: Tensor
    log_sum_p2_C: Tensor


class PlainPairs(NamedTuple):
    """The plain way's values for a few pairs, of which Plain is made.

    completions: in the order of Answer's. loss_B carries its gradient. reference_logps_B2 and
    slope_B: as in Plain.
    """

    completions: list[OwnTokens]
    reference_logps_B2: Tensor
    loss_B: Tensor
    slope_B: Tensor


class Plain(NamedTuple):
    """The plain way's answer for all pairs, and what the tolerances are made of.

    reference_logps_B2, logratios_B2: the reference's log-probability of chosen and rejected, and
    the policy's minus that. slope_B: how long the gradient of a pair's loss in its token
    log-probabilities is. spread: the standard deviation of a token's logits over the vocabulary,
    rms over tokens.
    """

    answer: Answer
    reference_logps_B2: Tensor
    logratios_B2: Tensor
    slope_B: Tensor
    spread: float


def plain_way(subject: Subject) -> Plain:
    """The plain way's values for all pairs.

    ValueError, with pair, token and layer, where a log-probability comes out NaN or Inf.
    """
    args, num_pairs = subject.args, len(subject.pairs)
    # pairs that meet in a loss are kept together, with all their logits
    together = args.per_device_train_batch_size if args.mixes_pairs else 1
    # no two pairs' alike; without an f-divergence the rewards are in [-1, 1]
    largest = 1 / args.beta
    if args.f_divergence_type in POWERS:
        largest = min(largest, LARGEST_POWER)
    logratios_B2 = largest * torch.arange(2.0 * num_pairs, device=args.device).sin().view(-1, 2)
    batches = []
    subject.policy.zero_grad()
    for few in torch.arange(num_pairs).split(together):
        batches.append(pairs := _plain_pairs(subject, few.tolist(), logratios_B2[few]))
        (pairs.loss_B.sum() / num_pairs).backward()
    completions = [each for pairs in batches for each in pairs.completions]
    answer = Answer(
        token_logps=[each.logps_C.detach() for each in completions],
        loss_B=torch.cat([pairs.loss_B.detach() for pairs in batches]),
        gradients=subject.take_gradients(),
    )
    return Plain(
        answer,
        reference_logps_B2=torch.cat([pairs.reference_logps_B2 for pairs in batches]),
        logratios_B2=logratios_B2,
        slope_B=torch.cat([pairs.slope_B for pairs in batches]),
        spread=torch.cat([each.variance_C for each in completions]).mean().sqrt().item(),
    )


def _plain_pairs(subject: Subject, few: list[int], logratios_B2: Tensor) -> PlainPairs:
    args = subject.args
    chosen, rejected = ([_own_tokens(subject, b, side) for b in few] for side in SIDES)
    completions = chosen + rejected
    token_logps_C = torch.cat([each.logps_C for each in completions])
    lengths = [len(each.logps_C) for each in completions]
    cu_seqlens = cu_seqlens_of(lengths).to(token_logps_C.device)
    # as the loss sums them, or the reference is as far off as what ld_alpha leaves out
    logps_S = reference.completion_sums(token_logps_C.detach(), cu_seqlens, args.ld_alpha)
    reference_logps_S = logps_S - logratios_B2.T.flatten().to(logps_S)
    loss_B, _ = reference.pair_loss(
        token_logps_C, cu_seqlens, reference_logps_S, **args.loss_settings
    )
    weight_B = torch.ones_like(loss_B)
    if args.use_weighting:
        alignments_C = token_logps_C - torch.cat([each.log_sum_p2_C for each in completions])
        means_S = torch.stack([each_C.mean() for each_C in alignments_C.split(lengths)])
        weight_B = means_S.view(2, -1).sum(0).exp()
    # a weight is no part of the gradient, but as far off as the tokens that it is made of
    slopes = [
        torch.autograd.grad(weighted, token_logps_C, retain_graph=True)[0].double().norm()
        for weighted in loss_B * weight_B
    ]
    return PlainPairs(
        completions=[each for pair in zip(chosen, rejected, strict=True) for each in pair],
        reference_logps_B2=reference_logps_S.view(2, -1).T,
        loss_B=loss_B * weight_B.detach(),
        slope_B=torch.stack(slopes),
    )


def _own_tokens(subject: Subject, b: int, side: str) -> OwnTokens:
    pair, args = subject.pairs[b], subject.args
    ids = pair["prompt_ids"] + pair[f"{side}_ids"]
    length = min(len(ids), args.max_length or len(ids))
    lost = len(ids) - length if args.truncation_mode == "keep_end" else 0
    ids_L = torch.tensor(ids[lost : lost + length], device=args.device)
    # a first token has nothing that predicts it
    start = max(1, len(pair["prompt_ids"]) - lost)
    with subject.autocast():
        logits_LV = subject.policy(input_ids=ids_L[None], use_cache=False).logits[0]
    logits_CV = logits_LV[start - 1 : -1].float()
    labels_C = ids_L[start:].to(logits_CV.device)
    logps_CV = logits_CV.log_softmax(-1)
    logps_C = logps_CV.gather(1, labels_C[:, None]).squeeze(1)
    if not (finite_C := logps_C.isfinite()).all():
        t = int(finite_C.int().argmin())
        raise ValueError(
            f"{subject.place(b, side, t)}: want finite numbers from the model's own forward, got "
            f"NaN or Inf, first in {_first_not_finite(subject, ids_L)}"
        )
    with torch.no_grad():
        return OwnTokens(logps_C, logits_CV.var(-1), (2 * logps_CV).logsumexp(-1))


@torch.no_grad()
def _first_not_finite(subject: Subject, ids_L: Tensor) -> str:
    with subject.autocast():
        found = subject.policy(input_ids=ids_L[None], use_cache=False, output_hidden_states=True)
    for layer, hidden in enumerate(found.hidden_states):
        if not hidden.isfinite().all():
            return f"the hidden states of layer {layer - 1}" if layer else "the embeddings"
    return "the logits"
