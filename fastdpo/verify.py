"""The engine against kernels/reference.py, on the user's own model and rows.

    plain       a sequence a forward, the model's own logits in float32, log_softmax,
                reference.pair_loss, autograd: nothing that fastdpo does to be fast
    engine      what a training step runs: collator, score, pair_loss, in each layout

Compared are the log-probability of every completion token, the loss of every pair and the gradient
of every trained parameter. Both ways run in the precision of the run. On a CPU pair_loss is the
same function both ways: a mistake of its own shows on a GPU alone.

The reference's log-probabilities are the policy's own, plainly, minus log-ratios that are made up:
equal ones would give every pair the same loss. They are at most 1 / beta, and at most 5 nats where
the f-divergence is exponential in them. The engine's losses are those at this reference. Its
gradients are those at these log-ratios: with its own, which rounding moves by nats in 16 bits, they
would be off by the loss's curvature, though neither way is wrong.

The reference model, dropout, gradient checkpointing, packs (max_tokens_per_forward) and the
experts' load-balancing loss are left out.

A loss of a whole batch (aot, aot_unpaired, sft) mixes per_device_train_batch_size pairs both ways.
AOT sorts them: two log-ratios that differ by less than rounding may swap places, which is reported
as a difference of losses, though neither way is wrong.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from fastdpo.attention import attend_along_trees, attend_as_before
from fastdpo.batch import PairBatch, cu_seqlens_of
from fastdpo.collate import LAYOUTS, make_collator
from fastdpo.columns import ID_COLUMNS
from fastdpo.kernels import reference
from fastdpo.layout import why_padded
from fastdpo.losses import pair_loss
from fastdpo.model import attach_scorer, causal_lm_of, score
from fastdpo.subject import Subject

SIDES = ("chosen", "rejected")
# Tolerances, in roundings of the dtype that the layers compute in. In a Llama of 16 random layers
# on a CPU, the padded layout differed by 2.2 roundings of the logits' spread and 10 of a gradient
# in bfloat16; by 7 and 35 in float32, whose sums round too.
LOGP_ROUNDINGS, LEAST_LOGP = 8, 3e-5  # times the logits' spread: nats, rms over tokens
LARGEST = 8  # a single token may be this many times as far off
GRADIENT_ROUNDINGS, LEAST_GRADIENT = 24, 2e-4  # share of a parameter's gradient
POWERS, LARGEST_POWER = ("forward_kl", "alpha_divergence"), 5.0  # nats: e**5 is 148
SMALL_GRADIENT = 0.01  # of all parameters' gradient: a parameter's own counts as that much larger


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


class Tolerance(NamedTuple):
    """What the two ways may differ by: a token's log-probability, in nats, rms over all tokens;
    a parameter's gradient, as a share of it."""

    logp: float
    gradient: float

    @classmethod
    def of(cls, dtype: torch.dtype, spread: float) -> "Tolerance":
        """For layers that compute in `dtype`, and logits whose standard deviation is `spread`."""
        eps = torch.finfo(dtype).eps
        logp = max(LEAST_LOGP, LOGP_ROUNDINGS * eps) * max(1.0, spread)
        return cls(logp, max(LEAST_GRADIENT, GRADIENT_ROUNDINGS * eps))


class CannotRun(Exception):
    """A forward failed, as one may in a layout that does not fit the model."""


class Finding(NamedTuple):
    """One comparison in one layout, and whether the ways agree in it.

    worst: of all differences the one that is the largest share of what it may be. allowed: what it
    may be. place: where it is. rms: of all differences. The numbers are NaN where nothing could be
    compared: `agrees` then says whether that is as it should be, in a layout that the model cannot
    run, and `place` why.
    """

    layout: str
    what: str
    agrees: bool
    place: str
    worst: float = math.nan
    rms: float = math.nan
    allowed: float = math.nan

    def __str__(self) -> str:
        numbers = "".join(f"{x:>10.1e}" for x in (self.worst, self.rms, self.allowed))
        verdict = "DIFFERS" if not self.agrees else "skipped" if math.isnan(self.worst) else "ok"
        return f"{self.layout:<8}{self.what:<24}{numbers}  {verdict:<8} {self.place}"


HEADER = f"{'layout':<8}{'compared':<24}{'worst':>10}{'rms':>10}{'allowed':>10}  {'':<8} worst at"


def plain_way(subject: Subject) -> Plain:
    """A sequence at a time, by the model's own forward and kernels/reference.py.

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
        gradients=_take_gradients(subject),
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


def _take_gradients(subject: Subject) -> dict[str, Tensor | None]:
    gradients = {name: parameter.grad for name, parameter in subject.trained.items()}
    subject.policy.zero_grad()  # sets to None, so that these stay as they are
    return gradients


def engine_way(subject: Subject, layout: str, plain: Plain) -> Answer:
    """As a training step has it, batches of per_device_train_batch_size pairs in `layout`.

    CannotRun where a forward fails.
    """
    args, B = subject.args, len(subject.pairs)
    pad_token_id = subject.tokenizer.pad_token_id
    collate = make_collator(layout, pad_token_id=pad_token_id, **args.collator_settings)
    token_logps, losses = [], []
    subject.policy.zero_grad()
    for chunk in torch.arange(B).split(args.per_device_train_batch_size):
        inputs = collate([{name: subject.pairs[b][name] for name in ID_COLUMNS} for b in chunk])
        batch = PairBatch.from_inputs(send_to_device(inputs, args.device))
        with subject.autocast():
            try:
                scored = score(subject.policy, batch, stats=args.token_stats)
            except torch.OutOfMemoryError:
                raise
            except (TypeError, ValueError, RuntimeError) as error:
                raise CannotRun(str(error)) from error
        token_logps_C = scored.token_logps_C.detach()
        # first: unlike a GPU's pair_loss it refuses lengths that do not fit the tokens
        completions = token_logps_C.split(batch.cu_seqlens.diff().tolist())
        loss_of = functools.partial(
            pair_loss,
            scored.token_logps_C,
            batch.cu_seqlens,
            log_sum_p2_C=scored.log_sum_p2_C,
            **args.loss_settings,
        )
        loss_B = loss_of(plain.reference_logps_B2[chunk].T.flatten()).loss_B  # chosen, rejected
        logps_S = reference.completion_sums(token_logps_C, batch.cu_seqlens, args.ld_alpha)
        at_logratios = loss_of(logps_S - plain.logratios_B2[chunk].T.flatten().to(logps_S))
        (at_logratios.loss_B.sum() / B).backward()
        chosen, rejected = completions[: len(chunk)], completions[len(chunk) :]
        token_logps += [side for both in zip(chosen, rejected, strict=True) for side in both]
        losses.append(loss_B.detach())
    return Answer(token_logps, torch.cat(losses), _take_gradients(subject))


def describe(subject: Subject, plain: Plain) -> str:
    """What is compared, and how the tolerances come about, a line each."""
    dtype, policy = subject.compute_dtype, subject.policy
    logp, gradient = Tolerance.of(dtype, plain.spread)
    eps = torch.finfo(dtype).eps
    trained = sum(parameter.numel() for parameter in subject.trained.values())
    tokens = sum(map(len, plain.answer.token_logps))
    lines = (
        f"model      {type(causal_lm_of(policy)).__name__} in {policy.dtype}, {trained:,} trained",
        f"pairs      {len(subject.pairs)} of the first {subject.num_rows} rows, counted from 0, "
        f"with {tokens:,} completion tokens",
        f"tolerance  layers compute in {dtype}: a rounding is {eps:.1e}",
        f"  token      {logp:.1e} nats rms, {LARGEST} times that for one: {LOGP_ROUNDINGS} "
        f"roundings, at least {LEAST_LOGP:g}, times the logits' standard deviation "
        f"({plain.spread:.2g}, at least 1)",
        "  loss       what independent errors of that size in its tokens add up to",
        f"  gradient   {gradient:.1e} of a parameter's own: {GRADIENT_ROUNDINGS} roundings, "
        f"at least {LEAST_GRADIENT:g}",
    )
    if eps > torch.finfo(torch.float32).eps:
        lines += ("  a mistake below these roundings shows in float32 alone: verify there too",)
    return "\n".join(lines)


def compare(subject: Subject, plain: Plain) -> Iterator[Finding]:
    """A Finding for each layout and thing compared, as they come.

    Layouts are all that the model can run, or the one that args.layout names.
    """
    attach_scorer(subject.policy, **subject.args.head_settings)
    tolerance = Tolerance.of(subject.compute_dtype, plain.spread)
    wanted, reason = subject.args.layout, why_padded(subject.policy)
    for layout in LAYOUTS if wanted == "auto" else (wanted,):
        if layout != "padded" and reason is not None:
            yield Finding(layout, "not for this model", True, reason)
            continue
        switch = attend_as_before if layout == "padded" else attend_along_trees
        switch(causal_lm_of(subject.policy))
        try:
            answer = engine_way(subject, layout, plain)
        except torch.OutOfMemoryError:
            raise
        except (CannotRun, TypeError, ValueError, RuntimeError) as error:
            # one that fails at the start makes `auto` pad; in the backward it would end the run
            pads = isinstance(error, CannotRun) and wanted == "auto" and layout != "padded"
            what = "not for this model" if pads else "forward and backward"
            yield Finding(layout, what, pads, " ".join(str(error).split()))
            continue
        for compare_one in (_compare_tokens, _compare_losses, _compare_gradients):
            yield compare_one(subject, layout, plain, answer, tolerance)


def _compare_tokens(subject, layout, plain: Plain, answer: Answer, tolerance: Tolerance) -> Finding:
    ours, theirs = answer.token_logps, plain.answer.token_logps
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if len(a) != len(b):
            place = f"pair {i // 2}, {SIDES[i % 2]}: {len(a)} tokens scored, plainly {len(b)}"
            return Finding(layout, "token log-probabilities", False, place)
    places = [(i // 2, SIDES[i % 2], t) for i, each in enumerate(ours) for t in range(len(each))]
    return _finding(
        layout,
        "token log-probabilities",
        (torch.cat(ours) - torch.cat(theirs)).abs(),
        LARGEST * tolerance.logp,
        lambda c: subject.place(*places[c]),
        rms_allowed=tolerance.logp,
    )


def _compare_losses(subject, layout, plain: Plain, answer: Answer, tolerance: Tolerance) -> Finding:
    """A loss may be off by what independent errors of its tokens, each as allowed, add up to."""
    loss_B = plain.answer.loss_B
    rounding_B = 16 * torch.finfo(loss_B.dtype).eps * (1 + loss_B.abs())
    return _finding(
        layout,
        "pair losses",
        (answer.loss_B - loss_B).abs(),
        LARGEST * tolerance.logp * plain.slope_B + rounding_B,
        lambda b: f"pair {b}",
    )


def _compare_gradients(
    subject, layout, plain: Plain, answer: Answer, tolerance: Tolerance
) -> Finding:
    """Each parameter's difference, as a share of its gradient's length; as it is, where no
    parameter has a gradient."""
    names = list(subject.trained)
    theirs = [_or_zero(plain.answer.gradients[name]) for name in names]
    ours = [_or_zero(answer.gradients[name]) for name in names]
    norm_P = torch.stack([x.norm().cpu() for x in theirs])
    difference_P = torch.stack([(a - b).norm().cpu() for a, b in zip(ours, theirs, strict=True)])
    length_P = norm_P + SMALL_GRADIENT * norm_P.norm()
    share_P = difference_P / (length_P if norm_P.any() else 1)
    return _finding(layout, "gradients (share)", share_P, tolerance.gradient, names.__getitem__)


def _or_zero(gradient: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if gradient is None else gradient.double()


def _finding(
    layout: str,
    what: str,
    difference_N: Tensor,
    allowed: Tensor | float,
    place: Callable[[int], str],
    rms_allowed: float = math.inf,
) -> Finding:
    """The worst of N differences, and what all of them say."""
    difference_N = difference_N.double()  # whose squares are finite
    allowed_N = torch.as_tensor(allowed, device=difference_N.device).expand_as(difference_N)
    rms = difference_N.square().mean().sqrt().item()
    share_N = torch.where(allowed_N.isfinite(), difference_N / allowed_N, math.inf)
    n = int(share_N.argmax())  # a NaN, where there is one; else what has no bound
    worst, most = difference_N[n].item(), allowed_N[n].item()
    agrees = worst <= most < math.inf and rms <= rms_allowed
    return Finding(layout, what, agrees, place(n), worst, rms, most)
